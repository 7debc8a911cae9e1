// Codes of 1 to 4 bits to one byte each, by a table of 16 bytes; hf_kvcache/kernels/pack/reference.py defines the layout.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSSE3__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

// A vector of bytes whose lanes of 16 look up the same table.
struct Bytes16 {
    static constexpr int kBytes = 16;
    typedef uint8_t Type __attribute__((vector_size(16)));
    static Type lookup(Type table, Type index) {
#if defined(__SSSE3__)
        return (Type)_mm_shuffle_epi8((__m128i)table, (__m128i)index);
#elif defined(__ARM_NEON) && defined(__aarch64__)
        return (Type)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)index);
#else
        Type out;
        for (int i = 0; i < 16; i++) out[i] = table[index[i]];
        return out;
#endif
    }
};

struct Bytes32 {
    static constexpr int kBytes = 32;
    typedef uint8_t Type __attribute__((vector_size(32)));
    static Type lookup(Type table, Type index) {
#if defined(__AVX2__)
        return (Type)_mm256_shuffle_epi8((__m256i)table, (__m256i)index);
#else
        Type out;
        for (int i = 0; i < 32; i++) out[i] = table[index[i]];
        return out;
#endif
    }
};

struct Bytes64 {
    static constexpr int kBytes = 64;
    typedef uint8_t Type __attribute__((vector_size(64)));
    static Type lookup(Type table, Type index) {
#if defined(__AVX512BW__)
        return (Type)_mm512_shuffle_epi8((__m512i)table, (__m512i)index);
#else
        Type out;
        for (int i = 0; i < 64; i++) out[i] = table[index[i]];
        return out;
#endif
    }
};

template <class Bytes>
typename Bytes::Type tiled(const uint8_t table[16]) {
    typename Bytes::Type out;
    for (int i = 0; i < Bytes::kBytes; i += 16) std::memcpy((uint8_t*)&out + i, table, 16);
    return out;
}

// One plane of `kWidth` bits: byte j of a row holds element j of each of its 8 / kWidth segments.
template <int kWidth, class Bytes>
int expand_plane(const uint8_t* row, int from, int length, const uint8_t table[16], uint8_t* out) {
    typedef typename Bytes::Type Type;
    const Type levels = tiled<Bytes>(table);
    int j = from;
    for (; j + Bytes::kBytes <= length; j += Bytes::kBytes) {
        Type packed;
        std::memcpy(&packed, row + j, sizeof packed);
#pragma GCC unroll 8
        for (int s = 0; s < 8 / kWidth; s++) {
            const Type level = Bytes::lookup(levels, (packed >> (s * kWidth)) & ((1 << kWidth) - 1));
            std::memcpy(out + s * length + j, &level, sizeof level);
        }
    }
    return j;
}

template <int kWidth>
void expand_plane_row(const uint8_t* row, int dim, const uint8_t table[16], uint8_t* out) {
    const int length = dim * kWidth / 8;
    int j = 0;
#if defined(__AVX512BW__)
    j = expand_plane<kWidth, Bytes64>(row, j, length, table, out);
#endif
#if defined(__AVX2__)
    j = expand_plane<kWidth, Bytes32>(row, j, length, table, out);
#endif
    j = expand_plane<kWidth, Bytes16>(row, j, length, table, out);
    for (; j < length; j++)
        for (int s = 0; s < 8 / kWidth; s++) out[s * length + j] = table[(row[j] >> (s * kWidth)) & ((1 << kWidth) - 1)];
}

// Three bits: a plane of two and a plane of one. Half h of segment s of the first has its third bits in segment 2s + h
// of the second.
inline void expand_three_bits(const uint8_t* row, int dim, const uint8_t table[16], uint8_t* out) {
    typedef Bytes16::Type Type;
    const int eighth = dim / 8;
    const uint8_t* third = row + 2 * eighth;
    const Type levels = tiled<Bytes16>(table);
    for (int s = 0; s < 4; s++) {
        for (int h = 0; h < 2; h++) {
            const uint8_t* low = row + h * eighth;
            uint8_t* to = out + (2 * s + h) * eighth;
            int j = 0;
            for (; j + 16 <= eighth; j += 16) {
                Type a, b;
                std::memcpy(&a, low + j, 16);
                std::memcpy(&b, third + j, 16);
                const Type code = ((a >> (2 * s)) & 3) | (((b >> (2 * s + h)) & 1) << 2);
                const Type level = Bytes16::lookup(levels, code);
                std::memcpy(to + j, &level, 16);
            }
            for (; j + 8 <= eighth; j += 8) {
                Type a{}, b{};
                std::memcpy(&a, low + j, 8);
                std::memcpy(&b, third + j, 8);
                const Type code = ((a >> (2 * s)) & 3) | (((b >> (2 * s + h)) & 1) << 2);
                const Type level = Bytes16::lookup(levels, code);
                std::memcpy(to + j, &level, 8);
            }
            for (; j < eighth; j++) to[j] = table[((low[j] >> (2 * s)) & 3) | (((third[j] >> (2 * s + h)) & 1) << 2)];
        }
    }
}

// n rows of packed codes to n rows of `dim` bytes each.
inline void expand(const uint8_t* codes, int bits, int n, int dim, const uint8_t table[16], uint8_t* out) {
    const int row_bytes = dim * bits / 8;
    for (int t = 0; t < n; t++) {
        const uint8_t* row = codes + (int64_t)t * row_bytes;
        uint8_t* to = out + (int64_t)t * dim;
        if (bits == 4)
            expand_plane_row<4>(row, dim, table, to);
        else if (bits == 3)
            expand_three_bits(row, dim, table, to);
        else if (bits == 2)
            expand_plane_row<2>(row, dim, table, to);
        else
            expand_plane_row<1>(row, dim, table, to);
    }
}

}  // namespace
