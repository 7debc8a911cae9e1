// Products with rows of bytes (levels or codes of 8 bits), whose values are `byte - bias`.
//
// With AVX512-VNNI the float side is split in two signed bytes, 16 bits in all: x = unit * (256 * high + low). The sums are
// exact in int32, so the error is that of the split: at most 2^-16 of the largest |x|.
#pragma once

#include "elements.h"

namespace {

template <bool kSigned>
struct Byte {
    static constexpr int kBytes = 1;
    static Vec load_vec(const uint8_t* p) {
        typedef uint8_t Narrow __attribute__((vector_size(HFKV_LANES)));
        Narrow x;
        std::memcpy(&x, p, sizeof x);
        return __builtin_convertvector(__builtin_convertvector(x, VecInt) - (kSigned ? 128 : 0), Vec);
    }
    static float load_one(const uint8_t* p) { return (float)((int)*p - (kSigned ? 128 : 0)); }
};

#if defined(__AVX512VNNI__)

constexpr int kLargestUnits = 32512;  // 127 * 256: the high byte stays within 127

inline int padded(int n) { return (n + 63) & ~63; }

// Splits x [n] in high and low bytes, zeros up to a multiple of 64; returns the unit.
inline float split(const float* x, int n, int8_t* high, int8_t* low) {
    __m512 top = _mm512_setzero_ps();
    for (int c = 0; c < n; c += 16) {
        const __mmask16 in = n - c >= 16 ? 0xffff : (__mmask16)((1 << (n - c)) - 1);
        top = _mm512_max_ps(top, _mm512_abs_ps(_mm512_maskz_loadu_ps(in, x + c)));
    }
    const float peak = _mm512_reduce_max_ps(top);
    // A subnormal peak would have an infinite inverse.
    const float unit = peak > 1e-30f ? peak / kLargestUnits : 1.0f;
    const __m512 inverse = _mm512_set1_ps(1.0f / unit);
    const int stop = padded(n);
    for (int c = 0; c < stop; c += 16) {
        const int left = n - c;
        const __mmask16 in = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1 << left) - 1);
        const __m512i units = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(in, x + c), inverse));
        const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(units, _mm512_set1_epi32(128)), 8);
        const __m512i lower = _mm512_sub_epi32(units, _mm512_slli_epi32(upper, 8));
        _mm_storeu_si128((__m128i*)(high + c), _mm512_cvtepi32_epi8(upper));
        _mm_storeu_si128((__m128i*)(low + c), _mm512_cvtepi32_epi8(lower));
    }
    return unit;
}

// Lane i of the result is the sum over the lanes of v[i].
inline __m512i lane_sums(const __m512i v[16]) {
    __m512i w[4];
    for (int i = 0; i < 4; i++) {
        const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(v[4 * i], v[4 * i + 1]),
                                            _mm512_unpackhi_epi32(v[4 * i], v[4 * i + 1]));
        const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(v[4 * i + 2], v[4 * i + 3]),
                                            _mm512_unpackhi_epi32(v[4 * i + 2], v[4 * i + 3]));
        w[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    }
    const __m512i x = _mm512_add_epi32(_mm512_shuffle_i32x4(w[0], w[1], 0x44), _mm512_shuffle_i32x4(w[0], w[1], 0xee));
    const __m512i y = _mm512_add_epi32(_mm512_shuffle_i32x4(w[2], w[3], 0x44), _mm512_shuffle_i32x4(w[2], w[3], 0xee));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
}

// kVectors: vectors of 64 bytes in a row, 0 for any number.
template <int M, int kVectors>
void dot_bytes_vnni(const uint8_t* rows, int n, int dim, int bias, const float* query, int query_pitch, float* scores,
                    int pitch, int8_t* scratch) {
    constexpr int kTokens = M == 1 ? 16 : M == 2 ? 8 : 4;
    const int width = padded(dim), vectors = kVectors ? kVectors : width / 64;
    const __mmask64 last = dim % 64 ? (1ull << (dim % 64)) - 1 : ~0ull;
    __m512i start[M];  // takes the bias out again
    float units[16] = {};
    for (int m = 0; m < M; m++) {
        int8_t* high = scratch + (2 * m) * width;
        int8_t* low = high + width;
        const float unit = split(query + m * query_pitch, dim, high, low);
        for (int t = 0; t < kTokens; t++) units[m * kTokens + t] = unit;
        const __m512i ones = _mm512_set1_epi8((char)bias);
        __m512i upper = _mm512_setzero_si512(), lower = upper;
        for (int v = 0; v < vectors; v++) {
            upper = _mm512_dpbusd_epi32(upper, ones, _mm512_loadu_si512(high + 64 * v));
            lower = _mm512_dpbusd_epi32(lower, ones, _mm512_loadu_si512(low + 64 * v));
        }
        start[m] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_add_epi32(_mm512_slli_epi32(upper, 8), lower));
    }
    const __m512 unit_of = _mm512_loadu_ps(units);
    for (int t = 0; t < n; t += kTokens) {
        __m512i sums[16];
        for (int i = M * kTokens; i < 16; i++) sums[i] = _mm512_setzero_si512();
#pragma GCC unroll 16
        for (int i = 0; i < kTokens; i++) {
            // Rows behind the last one are not read: its own stands in for them.
            const uint8_t* row = rows + (int64_t)(t + i < n ? t + i : n - 1) * dim;
            __m512i upper[M], lower[M];
            for (int m = 0; m < M; m++) upper[m] = _mm512_setzero_si512(), lower[m] = start[m];
            for (int v = 0; v < vectors; v++) {
                const __m512i x = v + 1 < vectors ? _mm512_loadu_si512(row + 64 * v) : _mm512_maskz_loadu_epi8(last, row + 64 * v);
#pragma GCC unroll 4
                for (int m = 0; m < M; m++) {
                    const int8_t* high = scratch + (2 * m) * width + 64 * v;
                    upper[m] = _mm512_dpbusd_epi32(upper[m], x, _mm512_loadu_si512(high));
                    lower[m] = _mm512_dpbusd_epi32(lower[m], x, _mm512_loadu_si512(high + width));
                }
            }
            for (int m = 0; m < M; m++) sums[m * kTokens + i] = _mm512_add_epi32(_mm512_slli_epi32(upper[m], 8), lower[m]);
        }
        float out[16];
        _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_cvtepi32_ps(lane_sums(sums)), unit_of));
        const int count = n - t < kTokens ? n - t : kTokens;
        for (int m = 0; m < M; m++)
            for (int i = 0; i < count; i++) scores[m * pitch + t + i] = out[m * kTokens + i];
    }
}

// Four rows of 64 bytes, transposed in groups of four bytes: lane i of part p holds channel 16 (i / 4) + 4 p + i % 4.
template <int M, int kHalf>
void weigh_block(const uint8_t* rows, int n, int dim, __mmask64 in, const int8_t* weights, int weight_pitch,
                 const int32_t* high_start, const int32_t* low_start, const float* units, float* output, int output_pitch,
                 int channels) {
    __m512i upper[M][2], lower[M][2];
    for (int m = 0; m < M; m++)
        for (int p = 0; p < 2; p++) {
            upper[m][p] = _mm512_set1_epi32(high_start[m]);
            lower[m][p] = _mm512_set1_epi32(low_start[m]);
        }
    for (int t = 0; t < n; t += 4) {
        __m512i row[4];
        for (int i = 0; i < 4; i++) {
            const uint8_t* from = rows + (int64_t)(t + i < n ? t + i : n - 1) * dim;
            row[i] = _mm512_maskz_loadu_epi8(in, from);
        }
        const __m512i ab = kHalf ? _mm512_unpackhi_epi8(row[0], row[1]) : _mm512_unpacklo_epi8(row[0], row[1]);
        const __m512i cd = kHalf ? _mm512_unpackhi_epi8(row[2], row[3]) : _mm512_unpacklo_epi8(row[2], row[3]);
        const __m512i parts[2] = {_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd)};
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            int32_t four;
            std::memcpy(&four, weights + (2 * m) * weight_pitch + t, 4);
            const __m512i high = _mm512_set1_epi32(four);
            std::memcpy(&four, weights + (2 * m + 1) * weight_pitch + t, 4);
            const __m512i low = _mm512_set1_epi32(four);
            for (int p = 0; p < 2; p++) {
                upper[m][p] = _mm512_dpbusd_epi32(upper[m][p], parts[p], high);
                lower[m][p] = _mm512_dpbusd_epi32(lower[m][p], parts[p], low);
            }
        }
    }
    for (int m = 0; m < M; m++)
        for (int p = 0; p < 2; p++) {
            const __m512 total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(upper[m][p]), _mm512_set1_ps(256.0f),
                                                 _mm512_cvtepi32_ps(lower[m][p]));
            float lanes[16];
            _mm512_storeu_ps(lanes, _mm512_mul_ps(total, _mm512_set1_ps(units[m])));
            for (int quad = 0; quad < 4; quad++) {
                const int c = 16 * quad + 8 * kHalf + 4 * p;
                float* to = output + m * output_pitch + c;
                if (c + 4 <= channels)
                    _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), _mm_loadu_ps(lanes + 4 * quad)));
                else
                    for (int i = 0; c + i < channels; i++) to[i] += lanes[4 * quad + i];
            }
        }
}

template <int M>
void weigh_bytes_vnni(const uint8_t* rows, int n, int dim, int bias, const float* weights, int pitch, float* output,
                      int output_pitch, int8_t* scratch) {
    const int width = padded(n);
    int32_t high_start[M], low_start[M];
    float units[M];
    for (int m = 0; m < M; m++) {
        int8_t* high = scratch + (2 * m) * width;
        units[m] = split(weights + m * pitch, n, high, high + width);
        int32_t upper = 0, lower = 0;
        for (int t = 0; t < n; t++) upper += high[t], lower += high[width + t];
        high_start[m] = -bias * upper;
        low_start[m] = -bias * lower;
    }
    for (int c = 0; c < dim; c += 64) {
        const int channels = dim - c < 64 ? dim - c : 64;
        const __mmask64 in = channels < 64 ? (1ull << channels) - 1 : ~0ull;
        weigh_block<M, 0>(rows + c, n, dim, in, scratch, width, high_start, low_start, units, output + c, output_pitch, channels);
        weigh_block<M, 1>(rows + c, n, dim, in, scratch, width, high_start, low_start, units, output + c, output_pitch, channels);
    }
}

#endif  // __AVX512VNNI__

// Wider rows or longer pages could overflow int32.
constexpr int kLargestExactDim = 256, kLargestExactTokens = 256;

template <int M>
void dot_bytes(const uint8_t* rows, int n, int dim, int bias, const float* query, int query_pitch, float* scores, int pitch,
               int8_t* scratch) {
#if defined(__AVX512VNNI__)
    if (dim <= kLargestExactDim) {
        if (dim == 64)
            dot_bytes_vnni<M, 1>(rows, n, dim, bias, query, query_pitch, scores, pitch, scratch);
        else if (dim == 128)
            dot_bytes_vnni<M, 2>(rows, n, dim, bias, query, query_pitch, scores, pitch, scratch);
        else
            dot_bytes_vnni<M, 0>(rows, n, dim, bias, query, query_pitch, scores, pitch, scratch);
        return;
    }
#endif
    (void)scratch;
    if (bias)
        dot_elements<Byte<true>, M>(rows, dim, n, dim, query, query_pitch, scores, pitch);
    else
        dot_elements<Byte<false>, M>(rows, dim, n, dim, query, query_pitch, scores, pitch);
}

template <int M>
void weigh_bytes(const uint8_t* rows, int n, int dim, int bias, const float* weights, int pitch, float* output,
                 int output_pitch, int8_t* scratch) {
#if defined(__AVX512VNNI__)
    if (n <= kLargestExactTokens) {
        weigh_bytes_vnni<M>(rows, n, dim, bias, weights, pitch, output, output_pitch, scratch);
        return;
    }
#endif
    (void)scratch;
    if (bias)
        weigh_elements<Byte<true>, M>(rows, dim, n, dim, weights, pitch, output, output_pitch);
    else
        weigh_elements<Byte<false>, M>(rows, dim, n, dim, weights, pitch, output, output_pitch);
}

}  // namespace
