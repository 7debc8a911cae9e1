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

// Four rows at a time, with the bytes of the four tokens of a channel side by side. Output v = 2 h + odd of kDim / 32 holds
// nibbles: the lower ones are 16 channels from kDim / 4 * odd + 16 * h on, the upper ones those kDim / 2 further on.
template <int kDim>
struct ThreeBitWeave {
    static constexpr int kRow = kDim * 3 / 8, kOutputs = kDim / 32;
    __m512i order[kDim == 64 ? 2 : 3], transposed, shifts;

    ThreeBitWeave() {
        // In which lane of 16 bytes `load` finds row r.
        constexpr int8_t kLanes[3][4] = {{0, 3, 2, 1}, {1, 0, 3, 2}, {2, 1, 0, 3}};
        for (int i = 0; i < (kDim == 64 ? 2 : 3); i++) {
            alignas(64) int32_t from[16];
            for (int k = 0; k < 4; k++)
                for (int r = 0; r < 4; r++)
                    from[4 * k + r] = kDim == 64 ? 6 * r + (i ? 4 + k % 2 : k) : 4 * kLanes[i][r] + k;
            order[i] = _mm512_load_si512(from);
        }
        transposed = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        shifts = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    }
    HFKV_INLINE void operator()(const uint8_t* from, __m512i out[kOutputs]) const {
        const auto bytes = [&](__m512i v) __attribute__((always_inline)) { return _mm512_shuffle_epi8(v, transposed); };
        const __m512i a = _mm512_loadu_si512(from);
        if constexpr (kDim == 64) {
            const __m512i b = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(from + 64)));
            const __m512i low = bytes(_mm512_permutex2var_epi32(a, order[0], b));
            const __m512i high = _mm512_srlv_epi32(bytes(_mm512_permutex2var_epi32(a, order[1], b)), shifts);
            out[0] = nibbles(low, _mm512_slli_epi16(high, 2));
            out[1] = nibbles(_mm512_srli_epi16(low, 2), high);
        } else {
            const __m512i b = _mm512_loadu_si512(from + 64), c = _mm512_loadu_si512(from + 128);
            const auto lanes = [](__m512i x, __m512i second, __m512i first) __attribute__((always_inline)) {
                return _mm512_mask_blend_epi64(0x0c, _mm512_mask_blend_epi64(0x30, x, second), first);
            };
            const __m512i low[2] = {bytes(_mm512_permutexvar_epi32(order[0], lanes(a, b, c))),
                                    bytes(_mm512_permutexvar_epi32(order[1], lanes(b, c, a)))};
            const __m512i high = bytes(_mm512_permutexvar_epi32(order[2], lanes(c, a, b)));
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                out[2 * h] = nibbles(low[h], _mm512_slli_epi16(high, 2 - h));
                out[2 * h + 1] = nibbles(_mm512_srli_epi16(low[h], 2), h ? _mm512_srli_epi16(high, h) : high);
            }
        }
    }
};

// As weigh_codes, but put(c, totals) receives the sums of 16 channels from c on. bytes: room for the nibbles of n rows, rounded up
// to a multiple of four.
template <int M, int kDim, class Put>
__attribute__((noinline)) void weigh_three_bits(const HfkvSide& side, const uint8_t* codes, int n, const Split& weights, uint8_t* bytes, Stream& next,
                             const Put& put) {
    constexpr int kOutputs = kDim / 32;
    const ThreeBitWeave<kDim> weave;
    const CodeRows<8> rows(side, codes, kDim * 3 / 8, n);
    const __m512i table = _mm512_loadu_si512(side.levels);
    uint8_t room[4 * kDim * 3 / 8];
    for (int t = 0; t < n; t += 4) {
        __m512i v[kOutputs];
        weave(rows.from(t, 4, room), v);
#pragma GCC unroll 4
        for (int i = 0; i < kOutputs; i++) _mm512_storeu_si512(bytes + 64 * (kOutputs * (t / 4) + i), v[i]);
    }
    for (int v = 0; v < kOutputs; v++) {
        __m512i high[2][M], low[2][M];
        for (int i = 0; i < 2; i++)
            for (int m = 0; m < M; m++) high[i][m] = _mm512_setzero_si512(), low[i][m] = _mm512_set1_epi32(weights.start[m]);
        for (int t = 0; t < n; t += 4) {
            if (t % 32 == 0) next.work(12 / kOutputs);
            const __m512i codes_of_four = _mm512_loadu_si512(bytes + 64 * (kOutputs * (t / 4) + v));
            const __m512i x[2] = {lower_levels(table, codes_of_four), upper_levels(table, codes_of_four)};
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
        for (int i = 0; i < 2; i++)
            for (int m = 0; m < M; m++)
                totals[i][m] = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[i][m], 8), low[i][m]));
        const int c = kDim / 4 * (v % 2) + 16 * (v / 2);
        put(c, totals[0]);
        put(c + kDim / 2, totals[1]);
    }
}

}  // namespace

#endif  // __AVX512VNNI__
