// Codes of three bits looked up in registers, for AVX512-VNNI. A row is a plane of two bits, whose byte j holds channel j of each
// quarter of the row, and a plane of third bits, whose byte j holds channel j of each eighth; unpack.h does the same by way of
// memory. page_side.h calls `dot_three_bits` and `weigh_three_bits` for rows of 64 and of 128 channels.
#pragma once

#include "dot_vnni.h"

#if defined(__AVX512VNNI__)

namespace {

inline bool three_bits_fit(const HfkvSide& side) { return side.bits == 3 && (side.dim == 64 || side.dim == 128); }

// In every nibble: the low two bits of `low`, and above them a bit of `high`; bit 3 says nothing.
HFKV_INLINE __m512i nibbles(__m512i low, __m512i high) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x33), low, high, 0xca);  // where the mask is 1: low; else: high
}

// The levels of the lower nibbles.
HFKV_INLINE __m512i three_bit_levels(__m512i table, __m512i codes) {
    return _mm512_shuffle_epi8(table, _mm512_and_si512(codes, _mm512_set1_epi8(7)));
}

// The first 16 bytes of 16 rows, which are kStride bytes apart, transposed: lane i of group g holds bytes 4 g to 4 g + 3 of row i.
template <int kStride>
HFKV_INLINE void transpose_16(const uint8_t* from, __m512i v[4]) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const auto part = [&](int i) { return _mm_loadu_si128((const __m128i*)(from + i * kStride)); };
        const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(part(j)), part(4 + j), 1);
        const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(part(8 + j)), part(12 + j), 1);
        v[j] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    transpose_quarters(v);
}

// The same for 32 bytes.
template <int kStride>
HFKV_INLINE void transpose_32(const uint8_t* from, __m512i v[8]) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        const uint8_t* row = from + (j % 4 + 8 * (j / 4)) * kStride;
        v[j] = two_halves(row, row + 4 * kStride);
    }
    transpose_halves(v);
}

// Groups of four bytes of 16 rows. Eight bytes of memory behind the last row may be read.
template <int kDim>
struct ThreeBitGroups {
    static constexpr int kLow = kDim / 16, kHigh = kDim / 32, kStride = kDim * 3 / 8;
    __m512i low[kDim == 64 ? 8 : kLow], high[4];

    explicit ThreeBitGroups(const uint8_t* from) {
        transpose_32<kStride>(from, low);
        if (kDim == 64) high[0] = low[4], high[1] = low[5];
        else transpose_16<kStride>(from + 32, high);
    }
    // The levels of channels 4 g to 4 g + 3 of the quarters. Quarters 0 and 2 have their third bits in bits h and 4 + h, the
    // others in bits 2 + h and 6 + h.
    HFKV_INLINE void levels(__m512i table, int g, __m512i out[4]) const {
        const int h = g / kHigh;
        const __m512i third = high[g % kHigh];
        const __m512i even = nibbles(low[g], _mm512_slli_epi16(third, 2 - h));
        const __m512i odd = nibbles(_mm512_srli_epi16(low[g], 2), h ? _mm512_srli_epi16(third, h) : third);
        out[0] = three_bit_levels(table, even), out[2] = three_bit_levels(table, _mm512_srli_epi16(even, 4));
        out[1] = three_bit_levels(table, odd), out[3] = three_bit_levels(table, _mm512_srli_epi16(odd, 4));
    }
};

// As dot_codes. Neither this nor weigh_three_bits is inlined: what calls them would become so long that GCC inlines less of the other
// widths, and 2 bits at 64 channels would take a third longer.
template <int M, int kDim, class Put>
__attribute__((noinline)) void dot_three_bits(const HfkvSide& side, const uint8_t* codes, int n, const Split& queries, Stream& next, const Put& put) {
    constexpr int kStride = kDim * 3 / 8, kGroups = kDim / 16;
    const __m512i table = _mm512_loadu_si512(side.levels);
    uint8_t room[16 * kStride + 8];
    for (int t = 0; t < n; t += 16) {
        const uint8_t* from = codes + (int64_t)t * kStride;
        if (t + 16 > n) {
            std::memset(room, 0, sizeof room);
            std::memcpy(room, from, (size_t)(n - t) * kStride);
            from = room;
        }
        next.work(6);
        const ThreeBitGroups<kDim> groups(from);
        __m512i high[2][M], low[2][M];
        for (int m = 0; m < M; m++) {
            high[0][m] = high[1][m] = low[1][m] = _mm512_setzero_si512();
            low[0][m] = _mm512_set1_epi32(queries.start[m]);
        }
#pragma GCC unroll 8
        for (int g = 0; g < kGroups; g++) {
            __m512i x[4];
            groups.levels(table, g, x);
#pragma GCC unroll 4
            for (int s = 0; s < 4; s++) {
                const int8_t* by = queries.group(s * (kDim / 4) + 4 * g);
#pragma GCC unroll 4
                for (int m = 0; m < M; m++) {
                    multiply(high[s % 2][m], x[s], by + 8 * m);
                    multiply(low[s % 2][m], x[s], by + 8 * m + 4);
                }
            }
        }
        __m512 totals[M];
        for (int m = 0; m < M; m++) {
            const __m512i high_bytes = _mm512_slli_epi32(_mm512_add_epi32(high[0][m], high[1][m]), 8);
            totals[m] = _mm512_cvtepi32_ps(_mm512_add_epi32(high_bytes, _mm512_add_epi32(low[0][m], low[1][m])));
        }
        put(t, totals);
    }
}

// 64 channels of each row, from channel 64 * which on, as vectors of levels; see LevelVectors. The levels of each row that is asked
// for are stored too, row by row.
template <int kDim>
struct ThreeBitVectors {
    static constexpr int kBits = 8, kOutputs = 1;
    CodeRows<8> rows;
    __m512i table, shifts, turns;
    int which;
    mutable uint8_t* levels;

    ThreeBitVectors(const HfkvSide& side, const uint8_t* codes, int n, int part, uint8_t* bytes)
        : rows(side, codes, kDim * 3 / 8, n), table(_mm512_loadu_si512(side.levels)), which(part), levels(bytes) {
        alignas(64) int16_t shift[32];
        alignas(64) int64_t turn[8];
        for (int i = 0; i < 32; i++) shift[i] = (int16_t)(2 * ((64 * part + 2 * i) / (kDim / 4)));
        // To the right, by the number of the bit less 2: what is shifted out comes in on the other side, and does not count.
        for (int i = 0; i < 8; i++) turn[i] = ((64 * part + 8 * i) / (kDim / 8) + 62) % 64;
        shifts = _mm512_load_si512(shift), turns = _mm512_load_si512(turn);
    }
    HFKV_INLINE __m512i row(const uint8_t* from, __mmask64) const {
        __m512i low, high;
        if (kDim == 64) {
            int64_t eight;
            std::memcpy(&eight, from + 16, sizeof eight);
            low = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)from)), high = _mm512_set1_epi64(eight);
        } else {
            low = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)from));
            high = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(from + 32)));
        }
        const __m512i found = three_bit_levels(table, nibbles(_mm512_srlv_epi16(low, shifts), _mm512_rorv_epi64(high, turns)));
        _mm512_storeu_si512(levels, found);
        levels += 64;
        return found;
    }
    __m512i level(__m512i bytes, int) const { return bytes; }
    int block(int, int) const { return which; }
    int units() const { return 6 * 64 / kDim; }
};

// Levels as LevelVectors has them, as 64 channels of a wider row.
struct PartOfLevels : LevelVectors<8, 64> {
    int which, worth;

    PartOfLevels(const HfkvSide& side, const uint8_t* bytes, int n, int part, int units)
        : LevelVectors<8, 64>(CodeRows<8>(side, bytes, 64, n)), which(part), worth(units) {}
    int block(int, int) const { return which; }
    int units() const { return worth; }
};

// As weigh_codes. bytes: room for the levels of 64 channels of n rows, rounded up to a multiple of four.
template <int M, int kDim, class Put>
__attribute__((noinline)) void weigh_three_bits(const HfkvSide& side, const uint8_t* codes, int n, const Split& weights, uint8_t* bytes, Stream& next,
                             const Put& put) {
    for (int part = 0; part < kDim / 64; part++) {
        // Looking up takes longer than reading what was looked up for the other half of the sums.
        const ThreeBitVectors<kDim> vectors(side, codes, n, part, bytes);
        weigh_part<M, 0>(vectors, 0, 0, weights, next, put);
        weigh_part<M, 2>(PartOfLevels(side, bytes, n, part, vectors.units()), 0, 0, weights, next, put);
    }
}

}  // namespace

#endif  // __AVX512VNNI__
