// Dot products and weighted sums of up to four queries with rows of levels, in integers, by AVX2 without VNNI. page_side.h calls
// `dot_levels` and `weigh_levels`.
//
// The float side is in 16 bits, x = unit * multiple, and bytes are widened to 16 bits. One instruction (pmaddwd) multiplies 16
// pairs and adds every two products; float32 takes two for as many, and twice the work to widen the bytes. Sums are exact in
// int32. Products of bytes (pmaddubsw) would take no less: the float side would be two bytes, and 16-bit sums have no room for
// levels of eight bits.
#pragma once

#include "byte_rows.h"

#if defined(__AVX2__) && !defined(__AVX512VNNI__)

#define HFKV_MULTIPLES  // page_side.h computes with multiples

namespace {

constexpr int kWideQueries = 4;
constexpr int kWideColumns = 32;  // rows of multiples are filled up with zeros to a multiple of so many

inline __m256i first_lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// Up to four rows of floats, each as multiples of a unit.
struct Multiples {
    const int8_t* rows;  // two bytes a number, at any address
    int pitch;           // numbers of a row
    float units[kWideQueries];
    int32_t start[kWideQueries];  // takes the bias of the bytes out of a sum
    float lifts[kWideQueries];    // what to add to a sum because of the row's rounding

    const int8_t* at(int m, int column) const { return rows + 2 * ((int64_t)m * pitch + column); }
    __m256i sixteen(int m, int column) const { return _mm256_loadu_si256((const __m256i*)at(m, column)); }
    // Two numbers, in every lane.
    __m256i pair(int m, int column) const {
        int32_t two;
        std::memcpy(&two, at(m, column), sizeof two);
        return _mm256_set1_epi32(two);
    }
};

// The first n numbers of M rows, and zeros behind them. offset: as in HfkvSide; room: for M rows of n + kWideColumns numbers.
template <int M>
inline Multiples multiples_of(const float* x, int x_pitch, int n, int offset, int8_t* room) {
    Multiples out{room, (n + kWideColumns - 1) / kWideColumns * kWideColumns, {}, {}, {}};
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    for (int m = 0; m < M; m++) {
        const float* from = x + (int64_t)m * x_pitch;
        const auto eight = [&](int c) { return _mm256_maskload_ps(from + c, first_lanes(n - c)); };
        __m256 top = _mm256_setzero_ps(), total = _mm256_setzero_ps();
        for (int c = 0; c < n; c += 8) {
            top = _mm256_max_ps(top, _mm256_and_ps(eight(c), magnitude));
            total = _mm256_add_ps(total, eight(c));
        }
        const float peak = largest_of_eight(top);
        // A subnormal peak would have an infinite inverse.
        const float unit = peak > 1e-30f ? peak / kLargestUnits : 1.0f;
        const __m256 inverse = _mm256_set1_ps(1.0f / unit);
        __m256i sums = _mm256_setzero_si256();
        for (int c = 0; c < out.pitch; c += 16) {
            const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(eight(c), inverse));
            const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(eight(c + 8), inverse));
            sums = _mm256_add_epi32(sums, _mm256_add_epi32(low, high));
            const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
            _mm256_storeu_si256((__m256i*)(room + 2 * ((int64_t)m * out.pitch + c)), both);
        }
        const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        const __m128i quarter = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
        out.units[m] = unit;
        out.start[m] = -kBias * (_mm_cvtsi128_si32(quarter) + _mm_extract_epi32(quarter, 1));
        out.lifts[m] = rest_of_mean(offset, sum_of_eight(total), unit, out.start[m]);
    }
    return out;
}

// The first `count` bytes at p, up to 16, and zeros behind them.
inline __m128i some_bytes(const uint8_t* p, int count) {
    if (count >= 16) return _mm_loadu_si128((const __m128i*)p);
    if (count == 8) return _mm_loadl_epi64((const __m128i*)p);
    uint8_t room[16] = {};
    std::memcpy(room, p, count > 0 ? count : 0);
    return _mm_loadu_si128((const __m128i*)room);
}

// The sums and, in each lane, the products of its two numbers of x with those of y.
inline __m256i add_pairs(__m256i sums, __m256i x, __m256i y) {
    // From the intrinsic, GCC 12 puts a sum in another register each time, and so keeps one of eight in memory.
    asm("vpaddd %1, %0, %0" : "+x"(sums) : "x"(_mm256_madd_epi16(x, y)));
    return sums;
}

// The sums of the lanes of each of eight vectors.
inline __m256i eight_sums(const __m256i v[8]) {
    __m256i pairs[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        pairs[i] = _mm256_add_epi32(_mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]), _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
    const __m256i a = _mm256_add_epi32(_mm256_unpacklo_epi64(pairs[0], pairs[1]), _mm256_unpackhi_epi64(pairs[0], pairs[1]));
    const __m256i b = _mm256_add_epi32(_mm256_unpacklo_epi64(pairs[2], pairs[3]), _mm256_unpackhi_epi64(pairs[2], pairs[3]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

// scores[m * pitch + t]: the products of M queries with n rows of levels, [n, dim]. Up to seven scores behind the n-th are written.
template <int M>
inline void dot_levels(const uint8_t* levels, int n, int dim, const Multiples& queries, float* scores, int pitch, Stream& next) {
    constexpr int kTokens = M == 1 ? 8 : M == 2 ? 4 : 2;  // tokens of eight sums, as many as a vector holds
    alignas(32) int32_t starts[8] = {};
    alignas(32) float units[8] = {}, lifts[8] = {};
    for (int i = 0; i < M * kTokens; i++) {
        const int m = i / kTokens;
        starts[i] = queries.start[m], units[i] = queries.units[m], lifts[i] = queries.lifts[m];
    }
    const __m256i start = _mm256_load_si256((const __m256i*)starts);
    const __m256 unit = _mm256_load_ps(units), lift = _mm256_load_ps(lifts);
    for (int t = 0; t < n; t += kTokens) {
        if (t % 16 == 0) next.work(6);
        const uint8_t* rows[kTokens];  // the last row again in place of those behind it
        for (int i = 0; i < kTokens; i++) rows[i] = levels + (int64_t)(t + i < n ? t + i : n - 1) * dim;
        __m256i sums[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) sums[i] = _mm256_setzero_si256();
        const auto add = [&](int c, const auto& load) {
            __m256i x[kTokens];
#pragma GCC unroll 8
            for (int i = 0; i < kTokens; i++) x[i] = _mm256_cvtepu8_epi16(load(rows[i] + c));
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                const __m256i query = queries.sixteen(m, c);
#pragma GCC unroll 8
                for (int i = 0; i < kTokens; i++) sums[m * kTokens + i] = add_pairs(sums[m * kTokens + i], x[i], query);
            }
        };
        int c = 0;
        for (; c + 16 <= dim; c += 16) add(c, [](const uint8_t* p) { return _mm_loadu_si128((const __m128i*)p); });
        if (c < dim) add(c, [&](const uint8_t* p) { return some_bytes(p, dim - c); });
        const __m256 total = _mm256_cvtepi32_ps(_mm256_add_epi32(eight_sums(sums), start));
        alignas(32) float out[8];
        _mm256_store_ps(out, _mm256_add_ps(_mm256_mul_ps(total, unit), lift));
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) std::memcpy(scores + (int64_t)m * pitch + t, out + m * kTokens, kTokens * sizeof(float));
    }
}

// The channels of quarter q of 32 are 4 q to 4 q + 3 and 16 more, in the two halves of a vector.
template <int M>
inline void add_quarter(const Multiples& weights, int c, int q, const __m256i* sums, int dim, float* output, int pitch) {
    const int first = c + 4 * q, second = first + 16;
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
        const __m256 total = _mm256_cvtepi32_ps(_mm256_add_epi32(sums[m], _mm256_set1_epi32(weights.start[m])));
        const __m256 x = _mm256_add_ps(_mm256_mul_ps(total, _mm256_set1_ps(weights.units[m])), _mm256_set1_ps(weights.lifts[m]));
        float* to = output + (int64_t)m * pitch;  // behind the width, a row has room up to a multiple of 16
        if (first < dim) _mm_storeu_ps(to + first, _mm_add_ps(_mm_loadu_ps(to + first), _mm256_castps256_ps128(x)));
        if (second < dim) _mm_storeu_ps(to + second, _mm_add_ps(_mm_loadu_ps(to + second), _mm256_extractf128_ps(x, 1)));
    }
}

// output[m * output_pitch + c] += the sums of n rows of levels by M rows of weights, for kQuarters quarters, from kFirst on, of the
// 32 channels from c on.
template <int M, int kFirst, int kQuarters, class Load>
inline void weigh_quarters(const uint8_t* levels, int n, int dim, int c, const Multiples& weights, float* output, int output_pitch,
                           Stream& next, const Load& load) {
    __m256i sums[kQuarters][M];
    for (int q = 0; q < kQuarters; q++)
        for (int m = 0; m < M; m++) sums[q][m] = _mm256_setzero_si256();
    const __m256i zero = _mm256_setzero_si256();
    for (int t = 0; t < n; t += 2) {
        if (kFirst == 0 && c == 0 && t % 16 == 0) next.work(6);
        const uint8_t* row = levels + (int64_t)t * dim + c;
        // Behind the last row, the weight is 0.
        const __m256i a = load(row), b = load(t + 1 < n ? row + dim : row);
        __m256i x[kQuarters];
#pragma GCC unroll 2
        for (int half = 0; half < kQuarters / 2; half++) {
            const __m256i two = kFirst / 2 + half ? _mm256_unpackhi_epi8(a, b) : _mm256_unpacklo_epi8(a, b);
            x[2 * half] = _mm256_unpacklo_epi8(two, zero), x[2 * half + 1] = _mm256_unpackhi_epi8(two, zero);
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            const __m256i weight = weights.pair(m, t);
#pragma GCC unroll 4
            for (int q = 0; q < kQuarters; q++) sums[q][m] = add_pairs(sums[q][m], x[q], weight);
        }
    }
#pragma GCC unroll 4
    for (int q = 0; q < kQuarters; q++) add_quarter<M>(weights, c, kFirst + q, sums[q], dim, output, output_pitch);
}

// output[m * output_pitch + c] += the sums of n rows of levels, [n, dim], by M rows of weights.
template <int M>
inline void weigh_levels(const uint8_t* levels, int n, int dim, const Multiples& weights, float* output, int output_pitch,
                         Stream& next) {
    const auto columns = [&](int c, const auto& load) {
        if constexpr (M <= 2) {
            weigh_quarters<M, 0, 4>(levels, n, dim, c, weights, output, output_pitch, next, load);
        } else {  // the sums of all would take all registers
            weigh_quarters<M, 0, 2>(levels, n, dim, c, weights, output, output_pitch, next, load);
            weigh_quarters<M, 2, 2>(levels, n, dim, c, weights, output, output_pitch, next, load);
        }
    };
    int c = 0;
    for (; c + 32 <= dim; c += 32) columns(c, [](const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); });
    const int left = dim - c;
    if (left > 0)
        columns(c, [&](const uint8_t* p) { return _mm256_set_m128i(some_bytes(p + 16, left - 16), some_bytes(p, left)); });
}

}  // namespace

#endif  // __AVX2__ && !__AVX512VNNI__
