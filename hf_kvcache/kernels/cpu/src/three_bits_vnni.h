// Codes of three bits looked up in registers, for AVX512-VNNI. A row is a plane of two bits, whose byte j holds channel j of each
// quarter of the row, and a plane of third bits, whose byte j holds channel j of each eighth; unpack.h does the same by way of
// memory. page_side.h calls `dot_three_bits` and `weigh_three_bits` for rows of 64 and of 128 channels.
#pragma once

#include "dot_vnni.h"

#if defined(__AVX512VNNI__)

namespace {

inline bool three_bits_fit(const HfkvSide& side) { return side.bits == 3 && (side.dim == 64 || side.dim == 128); }

// In every nibble: the low two bits of `low`, and above them a bit of `high`. Bit 3 is 0, so a nibble is an index for a look-up as it
// is, even if the upper one is shifted down together with the next byte's lower one.
HFKV_INLINE __m512i nibbles(__m512i low, __m512i high) {
    const __m512i both = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x33), low, high, 0xca);  // where the mask is 1: low; else: high
    return _mm512_and_si512(both, _mm512_set1_epi8(0x77));
}

// The levels of the lower nibbles and those of the upper ones.
HFKV_INLINE __m512i lower_levels(__m512i table, __m512i codes) { return _mm512_shuffle_epi8(table, codes); }
HFKV_INLINE __m512i upper_levels(__m512i table, __m512i codes) { return _mm512_shuffle_epi8(table, _mm512_srli_epi16(codes, 4)); }

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
        out[0] = lower_levels(table, even), out[2] = upper_levels(table, even);
        out[1] = lower_levels(table, odd), out[3] = upper_levels(table, odd);
    }
};

// As dot_codes. Neither this nor weigh_three_bits is inlined: what calls them would become so long that GCC inlines less of the other
// widths, and 2 bits at 64 channels would take a third longer.
template <int M, int kDim, class Put>
__attribute__((noinline)) void dot_three_bits(const HfkvSide& side, const uint8_t* codes, int n, const Split& queries, Stream& next,
                                              const Put& put) {
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

// The packed bytes of four rows, with those of the four tokens side by side.
template <int kDim>
struct FourRows {
    static constexpr int kRow = kDim * 3 / 8, kLow = kDim / 64;
    __m512i low[kLow];  // 16 bytes of the first plane each
    __m512i high;       // of 16 channels; for rows of 64 in two lanes, and in the other two again, shifted by a bit

    HFKV_INLINE void save(uint8_t* to) const {
        for (int i = 0; i < kLow; i++) _mm512_storeu_si512(to + 64 * i, low[i]);
        _mm512_storeu_si512(to + 64 * kLow, high);
    }
    // The nibbles of output 2 h + odd: the lower ones are 16 channels from `channel` on, the upper ones those kDim / 2 further on.
    template <int kOutput>
    static HFKV_INLINE __m512i output(const uint8_t* saved) {
        constexpr int h = kOutput / 2;
        const __m512i two = _mm512_loadu_si512(saved + 64 * h), third = _mm512_loadu_si512(saved + 64 * kLow);
        if (kOutput % 2 == 0) return nibbles(two, _mm512_slli_epi16(third, 2 - h));
        return nibbles(_mm512_srli_epi16(two, 2), h ? _mm512_srli_epi16(third, h) : third);
    }
    static constexpr int channel(int output) { return kDim / 4 * (output % 2) + 16 * (output / 2); }
};

// Puts four rows side by side. A vector is put in order by groups of four bytes and then by bytes within 16.
template <int kDim>
struct ThreeBitWeave {
    __m512i order[kDim == 64 ? 2 : 3], transposed, shifts;

    ThreeBitWeave() {
        // Of the vectors of a page of 128 channels: in which lane of 16 bytes row r lies.
        constexpr int8_t kLanesOfRows[3][4] = {{0, 3, 2, 1}, {1, 0, 3, 2}, {2, 1, 0, 3}};
        for (int i = 0; i < (kDim == 64 ? 2 : 3); i++) {
            alignas(64) int32_t from[16];
            for (int k = 0; k < 4; k++)
                for (int r = 0; r < 4; r++)
                    from[4 * k + r] = kDim == 64 ? 6 * r + (i ? 4 + k % 2 : k) : 4 * kLanesOfRows[i][r] + k;
            order[i] = _mm512_load_si512(from);
        }
        transposed = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        shifts = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    }
    HFKV_INLINE __m512i bytes(__m512i v) const { return _mm512_shuffle_epi8(v, transposed); }
    // Four rows fill 96 or 192 bytes.
    HFKV_INLINE FourRows<kDim> four_rows(const uint8_t* from) const {
        FourRows<kDim> out;
        const __m512i a = _mm512_loadu_si512(from);
        if constexpr (kDim == 64) {
            const __m512i b = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(from + 64)));
            out.low[0] = bytes(_mm512_permutex2var_epi32(a, order[0], b));
            out.high = _mm512_srlv_epi32(bytes(_mm512_permutex2var_epi32(a, order[1], b)), shifts);
        } else {
            const __m512i b = _mm512_loadu_si512(from + 64), c = _mm512_loadu_si512(from + 128);
            // Of each 16 bytes of a row, the four rows lie in four different lanes.
            const auto lanes = [](__m512i outer, __m512i second, __m512i first) __attribute__((always_inline)) {
                return _mm512_mask_blend_epi64(0x0c, _mm512_mask_blend_epi64(0x30, outer, second), first);
            };
            out.low[0] = bytes(_mm512_permutexvar_epi32(order[0], lanes(a, b, c)));
            out.low[1] = bytes(_mm512_permutexvar_epi32(order[1], lanes(b, c, a)));
            out.high = bytes(_mm512_permutexvar_epi32(order[2], lanes(c, a, b)));
        }
        return out;
    }
};

// The sums of all rows for the channels of output kOutput. saved: n / 4 times what FourRows saves.
template <int M, int kDim, int kOutput, class Put>
HFKV_INLINE void weigh_output(const uint8_t* saved, int n, __m512i table, const Split& weights, Stream& next, const Put& put) {
    // Each of these loops is unrolled: by a variable index, the compiler would keep the sums in memory.
    __m512i high[2][M], low[2][M];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
        high[0][m] = high[1][m] = _mm512_setzero_si512();
        low[0][m] = low[1][m] = _mm512_set1_epi32(weights.start[m]);
    }
    for (int t = 0; t < n; t += 4, saved += sizeof(FourRows<kDim>)) {
        if (t % 32 == 0) next.work(12 * 32 / kDim);
        const __m512i codes = FourRows<kDim>::template output<kOutput>(saved);
        const __m512i x[2] = {lower_levels(table, codes), upper_levels(table, codes)};
        const int8_t* by = weights.group(t);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++)
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                multiply(high[i][m], x[i], by + 8 * m);
                multiply(low[i][m], x[i], by + 8 * m + 4);
            }
    }
    __m512 totals[2][M];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
#pragma GCC unroll 4
        for (int m = 0; m < M; m++)
            totals[i][m] = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[i][m], 8), low[i][m]));
    constexpr int c = FourRows<kDim>::channel(kOutput);
    put(c, totals[0]);
    put(c + kDim / 2, totals[1]);
}

// As weigh_codes, but put(c, totals) receives the sums of 16 channels from c on. bytes: room for the bytes of n rows, rounded up to
// a multiple of four. A row of 64 channels takes 32 there.
template <int M, int kDim, class Put>
__attribute__((noinline)) void weigh_three_bits(const HfkvSide& side, const uint8_t* codes, int n, const Split& weights, uint8_t* bytes,
                                                Stream& next, const Put& put) {
    {
        const ThreeBitWeave<kDim> weave;
        const CodeRows<8> rows(side, codes, FourRows<kDim>::kRow, n);
        uint8_t room[4 * FourRows<kDim>::kRow];
        uint8_t* to = bytes;
        for (int t = 0; t < n; t += 4, to += sizeof(FourRows<kDim>)) weave.four_rows(rows.from(t, 4, room)).save(to);
    }
    const __m512i table = _mm512_loadu_si512(side.levels);
    weigh_output<M, kDim, 0>(bytes, n, table, weights, next, put);
    weigh_output<M, kDim, 1>(bytes, n, table, weights, next, put);
    if constexpr (kDim == 128) {
        weigh_output<M, kDim, 2>(bytes, n, table, weights, next, put);
        weigh_output<M, kDim, 3>(bytes, n, table, weights, next, put);
    }
}

}  // namespace

#endif  // __AVX512VNNI__
