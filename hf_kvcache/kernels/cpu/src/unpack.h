// Unpacks codes of 1 to 4 bits to one byte each, by a table of 16 bytes. page_side.h and latent_dot_float.h call `unpack` where
// codes are not looked up in registers; hf_kvcache/kernels/reference/pack.py defines the layout of the codes.
#pragma once

#include "vectors.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

// A vector of bytes whose lanes of 16 look up the same table. x86 shifts no bytes, so `shifted` (to the right) may leave bits of
// the neighboring byte in the upper bits, and `raised` (to the left) in the lower ones; the caller masks them out.
struct Bytes16 {
    static constexpr int kBytes = 16;
    typedef uint8_t Type __attribute__((vector_size(16)));
    static Type shifted(Type x, int n) {
#if defined(__SSE2__)
        return (Type)_mm_srli_epi16((__m128i)x, n);
#else
        return x >> n;
#endif
    }
    static Type raised(Type x, int n) {
#if defined(__SSE2__)
        return (Type)_mm_slli_epi16((__m128i)x, n);
#else
        return x << n;
#endif
    }
    // What a look-up takes for the lower nibbles of x, whose bits 3 and 7 are 0: the instruction of x86 heeds no other upper bits.
    static Type nibbles(Type x) {
#if defined(__SSSE3__)
        return x;
#else
        return x & 15;
#endif
    }
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

// Wider vectors exist only where an instruction looks their bytes up: a compiler would do without by one byte at a time.
#if defined(__AVX2__)
struct Bytes32 {
    static constexpr int kBytes = 32;
    typedef uint8_t Type __attribute__((vector_size(32)));
    static Type shifted(Type x, int n) { return (Type)_mm256_srli_epi16((__m256i)x, n); }
    static Type raised(Type x, int n) { return (Type)_mm256_slli_epi16((__m256i)x, n); }
    static Type nibbles(Type x) { return x; }
    static Type lookup(Type table, Type index) { return (Type)_mm256_shuffle_epi8((__m256i)table, (__m256i)index); }
};
#endif

#if defined(__AVX512BW__)
struct Bytes64 {
    static constexpr int kBytes = 64;
    typedef uint8_t Type __attribute__((vector_size(64)));
    static Type shifted(Type x, int n) { return (Type)_mm512_srli_epi16((__m512i)x, n); }
    static Type raised(Type x, int n) { return (Type)_mm512_slli_epi16((__m512i)x, n); }
    static Type nibbles(Type x) { return x; }
    static Type lookup(Type table, Type index) { return (Type)_mm512_shuffle_epi8((__m512i)table, (__m512i)index); }
};
#endif

template <class Bytes>
inline typename Bytes::Type load_bytes(const uint8_t* p) {
    typename Bytes::Type out;
    std::memcpy(&out, p, sizeof out);
    return out;
}

// Unpacks n rows of `length` bytes. Byte j of a row holds element j of each of the 8 / kWidth segments of the row.
// levels: the bytes of the codes, repeated to 64.
template <int kWidth, class Bytes>
inline void unpack_plane(const uint8_t* codes, int n, int length, const uint8_t* levels, uint8_t* out, Stream& next) {
    typedef typename Bytes::Type Type;
    const Type table = load_bytes<Bytes>(levels);
    for (int t = 0; t < n; t++) {
        if (t % 16 == 0) next.work(2);
        const uint8_t* row = codes + (int64_t)t * length;
        uint8_t* to = out + (int64_t)t * length * (8 / kWidth);
        for (int j = 0; j < length; j += Bytes::kBytes) {
            const Type packed = load_bytes<Bytes>(row + j);
#pragma GCC unroll 8
            for (int s = 0; s < 8 / kWidth; s++) {
                const Type level = Bytes::lookup(table, Bytes::shifted(packed, s * kWidth) & (uint8_t)((1 << kWidth) - 1));
                std::memcpy(to + s * length + j, &level, sizeof level);
            }
        }
    }
}

// The same for rows of half a vector, two at a time; n is even.
template <int kWidth, class Bytes>
inline void unpack_pairs_of_rows(const uint8_t* codes, int n, const uint8_t* levels, uint8_t* out, Stream& next) {
    typedef typename Bytes::Type Type;
    constexpr int kLength = Bytes::kBytes / 2, kDim = kLength * (8 / kWidth);
    const Type table = load_bytes<Bytes>(levels);
    for (int t = 0; t < n; t += 2) {
        if (t % 16 == 0) next.work(2);
        const Type packed = load_bytes<Bytes>(codes + t * kLength);
#pragma GCC unroll 8
        for (int s = 0; s < 8 / kWidth; s++) {
            const Type level = Bytes::lookup(table, Bytes::shifted(packed, s * kWidth) & (uint8_t)((1 << kWidth) - 1));
            std::memcpy(out + t * kDim + s * kLength, &level, kLength);
            std::memcpy(out + (t + 1) * kDim + s * kLength, (const uint8_t*)&level + kLength, kLength);
        }
    }
}

typedef uint64_t Words __attribute__((vector_size(16)));

// The same for rows whose length is no multiple of a vector: eight bytes at a time, then one.
template <int kWidth>
inline void unpack_uneven_plane(const uint8_t* codes, int n, int length, const uint8_t* levels, uint8_t* out,
                                Stream& next) {
    const Bytes16::Type table = load_bytes<Bytes16>(levels);
    for (int t = 0; t < n; t++) {
        if (t % 16 == 0) next.work(2);
        const uint8_t* row = codes + (int64_t)t * length;
        uint8_t* to = out + (int64_t)t * length * (8 / kWidth);
        int j = 0;
        for (; j + 8 <= length; j += 8) {
            uint64_t word;
            std::memcpy(&word, row + j, 8);
            const Bytes16::Type packed = (Bytes16::Type)(Words){word, 0};
#pragma GCC unroll 8
            for (int s = 0; s < 8 / kWidth; s++) {
                const Words level =
                    (Words)Bytes16::lookup(table, Bytes16::shifted(packed, s * kWidth) & (uint8_t)((1 << kWidth) - 1));
                word = level[0];
                std::memcpy(to + s * length + j, &word, 8);
            }
        }
        for (; j < length; j++)
            for (int s = 0; s < 8 / kWidth; s++)
                to[s * length + j] = levels[(row[j] >> (s * kWidth)) & ((1 << kWidth) - 1)];
    }
}

// Calls op with the widest vector of bytes that divides `length`, and returns whether there is one.
template <class Op>
inline bool with_vectors(int length, const Op& op) {
#if defined(__AVX512BW__)
    if (length % 64 == 0) return op(Bytes64()), true;
#endif
#if defined(__AVX2__)
    if (length % 32 == 0) return op(Bytes32()), true;
#endif
    if (length % 16 == 0) return op(Bytes16()), true;
    return false;
}

// Calls op with the widest vector of bytes that is no longer than `length`, and returns whether there is one.
template <class Op>
inline bool with_vectors_within(int length, const Op& op) {
    return with_vectors(length >= 64 ? 64 : length >= 32 ? 32 : length >= 16 ? 16 : 1, op);
}

// Rows whose length is no multiple of a vector, as whole vectors all the same, except the last row. The last vector of a row
// reaches into the next one; what it writes behind a segment is written again by a vector that comes later.
template <int kWidth, class Bytes>
inline void unpack_overlapping_plane(const uint8_t* codes, int n, int length, const uint8_t* levels, uint8_t* out,
                                     Stream& next) {
    typedef typename Bytes::Type Type;
    const Type table = load_bytes<Bytes>(levels);
    for (int t = 0; t < n; t++) {
        if (t % 16 == 0) next.work(2);
        const uint8_t* row = codes + (int64_t)t * length;
        uint8_t* to = out + (int64_t)t * length * (8 / kWidth);
        for (int j = (length - 1) / Bytes::kBytes * Bytes::kBytes; j >= 0; j -= Bytes::kBytes) {
            const Type packed = load_bytes<Bytes>(row + j);
#pragma GCC unroll 8
            for (int s = 0; s < 8 / kWidth; s++) {
                const Type level = Bytes::lookup(table, Bytes::shifted(packed, s * kWidth) & (uint8_t)((1 << kWidth) - 1));
                std::memcpy(to + s * length + j, &level, sizeof level);
            }
        }
    }
}

template <int kWidth>
inline void unpack_one_plane(const uint8_t* codes, int n, int dim, const uint8_t* levels, uint8_t* out, Stream& next) {
    const int length = dim * kWidth / 8;
#if defined(__AVX2__)
    if (length == 16) {
        unpack_pairs_of_rows<kWidth, Bytes32>(codes, n & ~1, levels, out, next);
        codes += (n & ~1) * length, out += (n & ~1) * dim, n &= 1;
    }
#endif
    const auto whole = [&](auto bytes) { unpack_plane<kWidth, decltype(bytes)>(codes, n, length, levels, out, next); };
    if (n == 0 || with_vectors(length, whole)) return;
    const auto overlapping = [&](auto bytes) {
        unpack_overlapping_plane<kWidth, decltype(bytes)>(codes, n - 1, length, levels, out, next);
    };
    const int last = with_vectors_within(length, overlapping) ? n - 1 : 0;
    unpack_uneven_plane<kWidth>(codes + (int64_t)last * length, n - last, length, levels, out + (int64_t)last * dim, next);
}

// Codes of three bits are a plane of two bits and a plane of one bit. The third bits of half h of segment s of the first plane
// are segment 2 s + h of the second. Where a segment of the first plane fills one vector, the second plane is loaded twice, side
// by side in one vector; where it fills more, a vector lies in one half.
template <class Bytes>
inline typename Bytes::Type twice(const uint8_t* half) {
    typename Bytes::Type out;
    std::memcpy((uint8_t*)&out, half, Bytes::kBytes / 2);
    std::memcpy((uint8_t*)&out + Bytes::kBytes / 2, half, Bytes::kBytes / 2);
    return out;
}
#if defined(__AVX512BW__)
template <>
inline Bytes64::Type twice<Bytes64>(const uint8_t* half) {
    return (Bytes64::Type)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)half));
}
#endif
#if defined(__AVX2__)
template <>
inline Bytes32::Type twice<Bytes32>(const uint8_t* half) {
    return (Bytes32::Type)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)half));
}
#endif
#if defined(__SSE2__)
template <>
inline Bytes16::Type twice<Bytes16>(const uint8_t* half) {
    uint64_t word;
    std::memcpy(&word, half, 8);
    return (Bytes16::Type)(Words){word, word};
}
#endif

// Calls put(s, levels) with the levels of a vector of each segment s of four. low: the codes of two bits; third: their third bits,
// bits 2 s of segment s.
template <class Bytes, class Put>
HFKV_INLINE void look_up_three_bits(typename Bytes::Type table, typename Bytes::Type low, typename Bytes::Type third, const Put& put) {
    typedef typename Bytes::Type Type;
    const Type even = (low & 0x33) | (Bytes::raised(third, 2) & 0x44), odd = (Bytes::shifted(low, 2) & 0x33) | (third & 0x44);
    put(0, Bytes::lookup(table, Bytes::nibbles(even)));
    put(1, Bytes::lookup(table, Bytes::nibbles(odd)));
    put(2, Bytes::lookup(table, Bytes::nibbles(Bytes::shifted(even, 4))));
    put(3, Bytes::lookup(table, Bytes::nibbles(Bytes::shifted(odd, 4))));
}

template <class Bytes>
HFKV_INLINE void store_three_bits(typename Bytes::Type table, typename Bytes::Type low, typename Bytes::Type third, int segment,
                                  uint8_t* to) {
    typedef typename Bytes::Type Type;
    look_up_three_bits<Bytes>(table, low, third, [&](int s, Type level) __attribute__((always_inline)) {
        std::memcpy(to + s * segment, &level, sizeof level);
    });
}

// A mask of the bytes of a vector from j on that belong to the first half of a segment.
template <class Bytes>
inline typename Bytes::Type in_first_half(int j, int half) {
    typename Bytes::Type mask;
    for (int i = 0; i < Bytes::kBytes; i++) mask[i] = j + i < half ? 0xff : 0;
    return mask;
}

// x with its second half shifted by a bit; every second bit counts. mask: the first half.
template <class Bytes>
inline typename Bytes::Type second_half_shifted(typename Bytes::Type x, typename Bytes::Type mask) {
    return (x & mask) | (Bytes::shifted(x, 1) & ~mask);
}
#if defined(__AVX2__)
template <>
inline Bytes32::Type second_half_shifted<Bytes32>(Bytes32::Type x, Bytes32::Type) {
    return (Bytes32::Type)_mm256_srlv_epi64((__m256i)x, _mm256_setr_epi64x(0, 0, 1, 1));
}
#endif

// kOne: whether a segment fills one vector.
template <class Bytes, bool kOne>
inline void unpack_three_bits(const uint8_t* codes, int n, int segment, const uint8_t* levels, uint8_t* out, Stream& next) {
    typedef typename Bytes::Type Type;
    constexpr int kBytes = Bytes::kBytes;
    const int half = segment / 2;
    const Type table = load_bytes<Bytes>(levels), mask = in_first_half<Bytes>(0, kBytes / 2);
    for (int t = 0; t < n; t++) {
        if (t % 16 == 0) next.work(2);
        const uint8_t* row = codes + (int64_t)t * (segment + half);
        for (int j = 0; j < (kOne ? kBytes : segment); j += kBytes) {
            Type third = kOne ? twice<Bytes>(row + segment) : load_bytes<Bytes>(row + segment + j % half);
            if (kOne) third = second_half_shifted<Bytes>(third, mask);
            else if (j >= half) third = Bytes::shifted(third, 1);
            store_three_bits<Bytes>(table, load_bytes<Bytes>(row + j), third, segment, out + (int64_t)t * 4 * segment + j);
        }
    }
}

#if defined(__AVX2__)
// The same for rows of 64. The halves of a vector are segments 0 and 1, and then 2 and 3; its quarters are eighths of a row. The third
// bit of a code goes below the other two here, since bits can be shifted by another count in each quarter to the right only.
inline void unpack_three_bit_rows_of_64(const uint8_t* codes, int n, const uint8_t* levels, uint8_t* out, Stream& next) {
    constexpr int kRow = 24, kDim = 64;
    typedef Bytes32::Type Type;
    const __m128i by_code = _mm_loadu_si128((const __m128i*)levels);
    const Type table = (Type)_mm256_broadcastsi128_si256(_mm_unpacklo_epi8(by_code, _mm_srli_si128(by_code, 4)));
    const __m256i segments = _mm256_setr_epi64x(0, 0, 2, 2), eighths = _mm256_setr_epi64x(0, 1, 2, 3);
    for (int t = 0; t < n; t++) {
        if (t % 16 == 0) next.work(2);
        const uint8_t* row = codes + (int64_t)t * kRow;
        int64_t word;
        std::memcpy(&word, row + 16, sizeof word);
        const __m256i low = _mm256_srlv_epi64(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)row)), segments);
        const __m256i third = _mm256_srlv_epi64(_mm256_set1_epi64x(word), eighths);
        const Type index = (Bytes32::raised((Type)low, 1) & 0x66) | ((Type)third & 0x11);
        const Type lower = Bytes32::lookup(table, index), upper = Bytes32::lookup(table, Bytes32::shifted(index, 4));
        std::memcpy(out + (int64_t)t * kDim, &lower, sizeof lower);
        std::memcpy(out + (int64_t)t * kDim + 32, &upper, sizeof upper);
    }
}
#endif

constexpr int kLargestSegment = 256;  // of vectors that overlap

// The same for segments that are no power of two, with vectors that reach into the next row, as above; all rows but the last one.
template <class Bytes>
inline void unpack_overlapping_three_bits(const uint8_t* codes, int n, int segment, const uint8_t* levels, uint8_t* out,
                                          Stream& next) {
    typedef typename Bytes::Type Type;
    constexpr int kBytes = Bytes::kBytes;
    const Type table = load_bytes<Bytes>(levels);
    const int half = segment / 2, last = (segment - 1) / kBytes * kBytes;
    Type masks[kLargestSegment / kBytes];
    for (int j = 0; j <= last; j += kBytes) masks[j / kBytes] = in_first_half<Bytes>(j, half);
    for (int t = 0; t < n; t++) {
        if (t % 16 == 0) next.work(2);
        const uint8_t* row = codes + (int64_t)t * (segment + half);
        for (int j = last; j >= 0; j -= kBytes) {
            const Type mask = masks[j / kBytes];
            const Type first = load_bytes<Bytes>(row + segment + j), second = load_bytes<Bytes>(row + segment + j - half);
            const Type third = (first & mask) | (Bytes::shifted(second, 1) & ~mask);
            store_three_bits<Bytes>(table, load_bytes<Bytes>(row + j), third, segment, out + (int64_t)t * 4 * segment + j);
        }
    }
}

inline void unpack_three_bits_row(const uint8_t* row, int dim, const uint8_t* levels, uint8_t* out) {
    const int quarter = dim / 4, eighth = dim / 8;
    for (int c = 0; c < dim; c++) {
        const int low = (row[c % quarter] >> (2 * (c / quarter))) & 3;
        const int high = (row[quarter + c % eighth] >> (c / eighth)) & 1;
        out[c] = levels[low | (high << 2)];
    }
}

inline void unpack_three_bits_planes(const uint8_t* codes, int n, int dim, const uint8_t* levels, uint8_t* out, Stream& next) {
    const int segment = dim / 4;
#if defined(__AVX2__)
    if (dim == 64) return unpack_three_bit_rows_of_64(codes, n, levels, out, next);
#endif
    const auto whole = [&](auto bytes) {
        typedef decltype(bytes) Bytes;
        if (segment == Bytes::kBytes) return unpack_three_bits<Bytes, true>(codes, n, segment, levels, out, next);
        unpack_three_bits<Bytes, false>(codes, n, segment, levels, out, next);
    };
    // A power of two is one vector, or its halves are whole vectors.
    if (n == 0 || ((segment & (segment - 1)) == 0 && with_vectors(segment, whole))) return;
    const auto overlapping = [&](auto bytes) {
        unpack_overlapping_three_bits<decltype(bytes)>(codes, n - 1, segment, levels, out, next);
    };
    // A vector of 16 bytes may be longer than a segment: it stays within the next row if that has 8.
    const bool fits = segment >= 8 && segment <= kLargestSegment;
    const int last = fits && with_vectors_within(segment < 16 ? 16 : segment, overlapping) ? n - 1 : 0;
    for (int t = last; t < n; t++) unpack_three_bits_row(codes + (int64_t)t * (dim * 3 / 8), dim, levels, out + (int64_t)t * dim);
}

// Unpacks n rows of codes to n rows of `dim` bytes. levels: the byte of each code, repeated to 64.
inline void unpack(const uint8_t* codes, int bits, int n, int dim, const uint8_t* levels, uint8_t* out,
                   Stream& next) {
    if (bits == 4) return unpack_one_plane<4>(codes, n, dim, levels, out, next);
    if (bits == 2) return unpack_one_plane<2>(codes, n, dim, levels, out, next);
    if (bits == 1) return unpack_one_plane<1>(codes, n, dim, levels, out, next);
    unpack_three_bits_planes(codes, n, dim, levels, out, next);
}

}  // namespace
