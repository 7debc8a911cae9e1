// Dot products and weighted sums of up to four queries with the codes of a page, by AVX512-VNNI. Codes become levels in registers,
// between memory and the products. page_side.h calls `dot_codes` and `weigh_codes`; more queries are for AMX (dot_amx.h), which
// multiplies eight in the time of one.
#pragma once

#include "byte_rows.h"
#include "unpack_vnni.h"

#if defined(__AVX512VNNI__)

namespace {

constexpr int kVnniQueries = 4;

typedef int32_t __attribute__((may_alias)) FourBytes;

// Adds to each lane of sums four products: of its bytes of x with the four signed bytes at `four`.
HFKV_INLINE void multiply(__m512i& sums, __m512i x, const int8_t* four) {
    // From the intrinsic, GCC 12 makes an instruction of its own that loads the four bytes.
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(x), "m"(*(const FourBytes*)four));
}

// Reduces the lanes of each of four vectors by op.
template <class Op>
HFKV_INLINE __m128 fold_four(const __m512 v[4], const Op& op) {
    const __m512 a = op(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 b = op(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512 c = op(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    const __m512 d = op(c, _mm512_shuffle_f32x4(c, c, 0x4e));  // the other half
    return _mm512_castps512_ps128(op(d, _mm512_shuffle_f32x4(d, d, 0xb1)));
}

inline __m512 larger_lanes(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
inline __m512 sum_of_lanes(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }

inline __mmask16 first_lanes(int n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1 << n) - 1); }
inline __mmask64 first_bytes(int n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }

// 16 numbers of half precision at p as floats, 0 in lanes that are not `in`; 1 everywhere if p is null.
HFKV_INLINE __m512 factors(const uint8_t* p, __mmask16 in) {
    return p ? _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(in, p)) : _mm512_set1_ps(1.0f);
}

// Rows of floats, each as multiples of a unit, in two signed bytes: unit * (256 * high + low). Sums of a row with levels begin
// with `start`, which takes the bias of the bytes out of them.
struct Split {
    // Groups of four columns. A group holds, row by row, the high bytes and the low bytes of its columns: all the factors of a
    // vector of levels lie side by side.
    const int8_t* bytes;
    float units[kVnniQueries];
    int32_t start[kVnniQueries];

    // What to add to the products of row m with levels; `total` is the sum of the row, and offset is as in HfkvSide.
    float lift(int m, int offset, float total) const {
        return (float)offset * total + rest_of_mean(offset, total, units[m], start[m]);
    }

    static constexpr int kGroupBytes = 4 * 2 * kVnniQueries;
    const int8_t* group(int column) const { return bytes + kGroupBytes / 4 * column; }
};

// Results of scale_rows, for each row.
struct Scaled {
    float tops[kVnniQueries];    // largest magnitude of the products
    float totals[kVnniQueries];  // sum of the products
    float zeros[kVnniQueries];   // sum of the row times `zero`
};

// out[m, c] = x[m, c] * factor[c] * step for c < n. factor and zero are in half precision; null stands for 1 and for 0.
template <int M>
inline Scaled scale_rows(const float* x, int pitch, int n, const uint8_t* factor, const uint8_t* zero, float step, float* out,
                         int out_pitch) {
    __m512 tops[kVnniQueries], totals[kVnniQueries], zeros[kVnniQueries];
    for (int m = 0; m < kVnniQueries; m++) tops[m] = totals[m] = zeros[m] = _mm512_setzero_ps();
    for (int c = 0; c < n; c += 16) {
        const __mmask16 in = first_lanes(n - c);
        const __m512 scale = _mm512_mul_ps(factors(factor ? factor + 2 * c : nullptr, in), _mm512_set1_ps(step));
        const __m512 offset = zero ? factors(zero + 2 * c, in) : _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            const __m512 v = _mm512_maskz_loadu_ps(in, x + (int64_t)m * pitch + c), scaled = _mm512_mul_ps(v, scale);
            _mm512_mask_storeu_ps(out + (int64_t)m * out_pitch + c, in, scaled);
            tops[m] = _mm512_max_ps(tops[m], _mm512_abs_ps(scaled));
            totals[m] = _mm512_add_ps(totals[m], scaled);
            zeros[m] = _mm512_fmadd_ps(v, offset, zeros[m]);
        }
    }
    Scaled s;
    _mm_storeu_ps(s.tops, fold_four(tops, larger_lanes));
    _mm_storeu_ps(s.totals, fold_four(totals, sum_of_lanes));
    _mm_storeu_ps(s.zeros, fold_four(zeros, sum_of_lanes));
    return s;
}

// Stores the bytes of 64 columns, given as a vector for each of eight rows, group by group of four columns. Group g is element
// g / 4 of lane g % 4, which is the order of split_bytes.
HFKV_INLINE void store_groups(const __m512i rows[8], int8_t* to) {
    __m512i pairs[8], quads[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        quads[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]), quads[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        quads[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        quads[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        _mm512_storeu_si512(to + 128 * k, _mm512_permutex2var_epi64(quads[k], first, quads[4 + k]));
        _mm512_storeu_si512(to + 128 * k + 64, _mm512_permutex2var_epi64(quads[k], second, quads[4 + k]));
    }
}

// Splits n columns of M rows; up to the next multiple of 64, zeros are written. tops: the largest magnitude of each row.
template <int M>
inline Split split_rows(const float* x, int pitch, int n, const float* tops, int8_t* bytes) {
    Split s{bytes, {}, {}};
    __m512i sums[kVnniQueries];
    float inverses[M];
    for (int m = 0; m < kVnniQueries; m++) sums[m] = _mm512_setzero_si512();
    for (int m = 0; m < M; m++) {
        // A subnormal peak would have an infinite inverse.
        s.units[m] = tops[m] > 1e-30f ? tops[m] / kLargestUnits : 1.0f;
        inverses[m] = 1.0f / s.units[m];
    }
    for (int c = 0; c < n; c += 64) {
        __m512i rows[8];
        for (int m = M; m < kVnniQueries; m++) rows[2 * m] = rows[2 * m + 1] = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            __m512i v[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const int at = c + 16 * j;
                const __m512 row = _mm512_maskz_loadu_ps(first_lanes(n - at), x + (int64_t)m * pitch + at);
                v[j] = _mm512_cvtps_epi32(_mm512_mul_ps(row, _mm512_set1_ps(inverses[m])));
                sums[m] = _mm512_add_epi32(sums[m], v[j]);
            }
            split_bytes(v, rows[2 * m], rows[2 * m + 1]);
        }
        store_groups(rows, bytes + Split::kGroupBytes / 4 * c);
    }
    _mm_storeu_si128((__m128i*)s.start, _mm_mullo_epi32(four_sums(sums), _mm_set1_epi32(-kBias)));
    return s;
}

// Transposes 16 rows of 32 bytes: lane i of v[g] becomes group g of row i, four bytes. Before, v[j] holds rows j and 4 + j, and
// v[4 + j] holds rows 8 + j and 12 + j.
HFKV_INLINE void transpose_halves(__m512i v[8]) {
    __m512i w[8];
#pragma GCC unroll 2
    for (int r = 0; r < 8; r += 4) {
        const __m512i a = _mm512_unpacklo_epi32(v[r], v[r + 1]), b = _mm512_unpackhi_epi32(v[r], v[r + 1]);
        const __m512i c = _mm512_unpacklo_epi32(v[r + 2], v[r + 3]), d = _mm512_unpackhi_epi32(v[r + 2], v[r + 3]);
        w[r] = _mm512_unpacklo_epi64(a, c), w[r + 1] = _mm512_unpackhi_epi64(a, c);
        w[r + 2] = _mm512_unpacklo_epi64(b, d), w[r + 3] = _mm512_unpackhi_epi64(b, d);
    }
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) {
        v[g] = _mm512_shuffle_i32x4(w[g], w[4 + g], 0x88);
        v[4 + g] = _mm512_shuffle_i32x4(w[g], w[4 + g], 0xdd);
    }
}

// The same for 16 rows of 16 bytes: before, v[j] holds rows j, 4 + j, 8 + j and 12 + j.
HFKV_INLINE void transpose_quarters(__m512i v[4]) {
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm512_unpacklo_epi64(a, c), v[1] = _mm512_unpackhi_epi64(a, c);
    v[2] = _mm512_unpacklo_epi64(b, d), v[3] = _mm512_unpackhi_epi64(b, d);
}

HFKV_INLINE __m512i two_halves(const uint8_t* a, const uint8_t* b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)a)), _mm256_loadu_si256((const __m256i*)b), 1);
}

// Sums of 16 tokens with M queries. There are two of each, since an addition waits for the one before and the core has two units.
template <int M>
struct TokenSums {
    __m512i high[2][M], low[2][M];

    explicit TokenSums(const int32_t* start) {
        for (int m = 0; m < M; m++) {
            high[0][m] = high[1][m] = low[1][m] = _mm512_setzero_si512();
            low[0][m] = _mm512_set1_epi32(start[m]);
        }
    }
    // Adds the products of kGroups groups of four channels, from channel c of every segment on.
    template <int kGroups, int kBits>
    HFKV_INLINE void add(const __m512i* groups, const CodeRows<kBits>& rows, const Split& queries, int c) {
        constexpr int kSegments = Lookup<kBits>::kSegments;
#pragma GCC unroll 8
        for (int g = 0; g < kGroups; g++)
#pragma GCC unroll 8
            for (int s = 0; s < kSegments; s++) {
                const __m512i x = rows.levels.segment(groups[g], s);
                const int set = (g * kSegments + s) % 2;
                const int8_t* by = queries.group(s * rows.length + c) + Split::kGroupBytes * g;
#pragma GCC unroll 4
                for (int m = 0; m < M; m++) {
                    multiply(high[set][m], x, by + 8 * m);
                    multiply(low[set][m], x, by + 8 * m + 4);
                }
            }
    }
    HFKV_INLINE __m512 total(int m) const {
        const __m512i high_bytes = _mm512_slli_epi32(_mm512_add_epi32(high[0][m], high[1][m]), 8);
        return _mm512_cvtepi32_ps(_mm512_add_epi32(high_bytes, _mm512_add_epi32(low[0][m], low[1][m])));
    }
};

// Computes the sums of rows with queries, and calls put(t, totals) for every 16 tokens from t on.
template <int M, int kBits, class Put>
inline void dot_codes(const CodeRows<kBits>& rows, const Split& queries, Stream& next, const Put& put) {
    uint8_t room[16 * kLargestExactDim];
    for (int t = 0; t < rows.n; t += 16) {
        TokenSums<M> sums(queries.start);
        const uint8_t* from = rows.from(t, 16, room);
        next.work(6);
        int c = 0;
        for (; c + 32 <= rows.length; c += 32) {
            __m512i v[8];
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                const uint8_t* row = from + (int64_t)(j % 4 + 8 * (j / 4)) * rows.length + c;
                v[j] = two_halves(row, row + 4 * (int64_t)rows.length);
            }
            transpose_halves(v);
            sums.template add<8>(v, rows, queries, c);
        }
        for (; c < rows.length; c += 16) {
            const __mmask16 in = first_lanes(rows.length - c);
            __m512i v[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const auto part = [&](int i) { return _mm_maskz_loadu_epi8(in, from + (int64_t)i * rows.length + c); };
                const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(part(j)), part(4 + j), 1);
                const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(part(8 + j)), part(12 + j), 1);
                v[j] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
            }
            transpose_quarters(v);
            sums.template add<4>(v, rows, queries, c);
        }
        // A copy: the compiler leaves in memory what `put` gets the address of.
        __m512 totals[M];
        for (int m = 0; m < M; m++) totals[m] = sums.total(m);
        put(t, totals);
    }
}

// Part p of four rows, with the bytes of the four tokens side by side: lane i holds channel 16 (i / 4) + 4 p + i % 4.
HFKV_INLINE __m512i weave_part(const __m512i row[4], int p) {
    const __m512i ab = p / 2 ? _mm512_unpackhi_epi8(row[0], row[1]) : _mm512_unpacklo_epi8(row[0], row[1]);
    const __m512i cd = p / 2 ? _mm512_unpackhi_epi8(row[2], row[3]) : _mm512_unpacklo_epi8(row[2], row[3]);
    return p % 2 ? _mm512_unpackhi_epi16(ab, cd) : _mm512_unpacklo_epi16(ab, cd);
}

// Sums of all rows by each of M rows of weights, for two vectors of 16 channels, which put(block, part, totals) receives. They are
// parts kPart and kPart + 1 of output k, or part kPart of outputs k and k + 1 where a vector of bytes has several outputs.
template <int M, int kPart, class Rows, class Put>
HFKV_INLINE void weigh_part(const Rows& vectors, int c, int k, const Split& weights, Stream& next, const Put& put) {
    constexpr bool kParts = Rows::kOutputs == 1;
    const __mmask64 in = first_bytes(vectors.rows.length - c);
    __m512i high[2][M], low[2][M];
    for (int i = 0; i < 2; i++)
        for (int m = 0; m < M; m++) high[i][m] = _mm512_setzero_si512(), low[i][m] = _mm512_set1_epi32(weights.start[m]);
    const int units = vectors.units();
    uint8_t room[4 * kLargestExactDim];
    for (int t = 0; t < vectors.rows.n; t += 4) {
        if (t % 32 == 0) next.work(units);
        const uint8_t* from = vectors.rows.from(t, 4, room) + c;
        const int8_t* by = weights.group(t);
        __m512i row[4], x[2];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) row[i] = vectors.row(from + (int64_t)i * vectors.rows.length, in);
        const __m512i part = weave_part(row, kPart);
        x[0] = vectors.level(part, k);
        x[1] = kParts ? vectors.level(weave_part(row, kPart + 1), k) : vectors.level(part, k + 1);
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
    put(vectors.block(k, c), kPart, totals[0]);
    put(vectors.block(kParts ? k : k + 1, c), kParts ? kPart + 1 : kPart, totals[1]);
}

template <int M, class Rows, class Put>
inline void weigh_codes(const Rows& given, const Split& weights, Stream& next, const Put& put) {
    const Rows vectors = given;  // a local copy: the bytes written below could, to the compiler, belong to any other object
    for (int c = 0; c < vectors.rows.length; c += 64)
        for (int k = 0; k < Rows::kOutputs; k += 2) {
            weigh_part<M, 0>(vectors, c, k, weights, next, put);
            weigh_part<M, 2>(vectors, c, k, weights, next, put);
            if constexpr (Rows::kOutputs > 1) {
                weigh_part<M, 1>(vectors, c, k, weights, next, put);
                weigh_part<M, 3>(vectors, c, k, weights, next, put);
            }
        }
}

// output[m, c] += (unit * total + shift) * other for the 16 channels of a part of a block. other: null stands for 1; dim: the
// number of all channels.
template <int M>
HFKV_INLINE void add_part(const Split& weights, const float* shifts, const float* other, int block, int part, const __m512* totals,
                     int dim, float* output, int pitch) {
    const int c = 64 * block + 4 * part;
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
        const __m512 x = _mm512_fmadd_ps(totals[m], _mm512_set1_ps(weights.units[m]), _mm512_set1_ps(shifts[m]));
        const __m128 quarters[4] = {_mm512_castps512_ps128(x), _mm512_extractf32x4_ps(x, 1), _mm512_extractf32x4_ps(x, 2),
                                    _mm512_extractf32x4_ps(x, 3)};
        float* to = output + (int64_t)m * pitch;
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const int at = c + 16 * i;
            if (at >= dim) break;  // widths are multiples of 4
            const __m128 y = other ? _mm_mul_ps(quarters[i], _mm_loadu_ps(other + at)) : quarters[i];
            _mm_storeu_ps(to + at, _mm_add_ps(_mm_loadu_ps(to + at), y));
        }
    }
}

// The same for 16 channels from c on that lie side by side.
template <int M>
HFKV_INLINE void add_sixteen(const Split& weights, const float* shifts, const float* other, int c, const __m512* totals, float* output,
                             int pitch) {
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
        const __m512 x = _mm512_fmadd_ps(totals[m], _mm512_set1_ps(weights.units[m]), _mm512_set1_ps(shifts[m]));
        const __m512 y = other ? _mm512_mul_ps(x, _mm512_loadu_ps(other + c)) : x;
        float* to = output + (int64_t)m * pitch + c;
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), y));
    }
}

}  // namespace

#endif  // __AVX512VNNI__
