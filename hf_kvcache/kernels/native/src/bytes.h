// Products with rows of bytes (levels or codes of 8 bits), whose values are `byte - kBias`: centred, because what is left of
// rounding is proportional to them, and a mean that all channels share would gather in one when it is rotated back.
//
// With AVX512-VNNI the float side is split in two signed bytes, 16 bits in all: x = unit * (256 * high + low). The sums are
// exact in int32, so the error is that of the split: at most 2^-16 of the largest |x|.
#pragma once

#include "elements.h"

namespace {

constexpr int kBias = 128;

struct Byte {
    static constexpr int kBytes = 1;
    static Vec load_vec(const uint8_t* p) {
// GCC widens a vector byte by byte.
#if defined(__AVX512F__)
        const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
        return (Vec)_mm512_cvtepi32_ps(_mm512_sub_epi32(x, _mm512_set1_epi32(kBias)));
#elif defined(__AVX2__)
        const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
        return (Vec)_mm256_cvtepi32_ps(_mm256_sub_epi32(x, _mm256_set1_epi32(kBias)));
#else
        typedef uint8_t Narrow __attribute__((vector_size(HFKV_LANES)));
        Narrow x;
        std::memcpy(&x, p, sizeof x);
        return __builtin_convertvector(__builtin_convertvector(x, VecInt) - kBias, Vec);
#endif
    }
    static float load_one(const uint8_t* p) { return (float)((int)*p - kBias); }
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

// Transposes 16 rows of 16 groups of four bytes: afterwards lane i of v[g] is group g of row i.
inline void transpose(__m512i v[16]) {
    __m512i w[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        w[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        w[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        v[4 * i] = _mm512_unpacklo_epi64(w[4 * i], w[4 * i + 2]);
        v[4 * i + 1] = _mm512_unpackhi_epi64(w[4 * i], w[4 * i + 2]);
        v[4 * i + 2] = _mm512_unpacklo_epi64(w[4 * i + 1], w[4 * i + 3]);
        v[4 * i + 3] = _mm512_unpackhi_epi64(w[4 * i + 1], w[4 * i + 3]);
    }
    // Quarter q of v[4 r + c] is group 4 q + c of rows 4 r to 4 r + 3; what is left is to transpose the quarters.
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        const __m512i even_low = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88), odd_low = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xdd);
        const __m512i even_high = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88);
        const __m512i odd_high = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xdd);
        w[c] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        w[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        w[8 + c] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        w[12 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) v[i] = w[i];
}

inline __m512i four_bytes(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}

inline int32_t byte_sum(const int8_t* x, int n) {
    int32_t total = 0;
    for (int i = 0; i < n; i++) total += x[i];
    return total;
}

// Sixteen tokens at a time, a token to a lane, so that no sum runs across lanes.
template <int M>
void dot_bytes_vnni(const uint8_t* rows, int n, int dim, const float* query, int query_pitch, float* scores,
                    int pitch, int8_t* scratch, Stream& next) {
    const int width = padded(dim);
    int32_t start[M];  // takes the bias out again
    float units[M];
    for (int m = 0; m < M; m++) {
        int8_t* high = scratch + (2 * m) * width;
        units[m] = split(query + m * query_pitch, dim, high, high + width);
        start[m] = -kBias * (256 * byte_sum(high, dim) + byte_sum(high + width, dim));
    }
    for (int t = 0; t < n; t += 16) {
        next.work(6);
        __m512i upper[M], lower[M];
        for (int m = 0; m < M; m++) upper[m] = _mm512_setzero_si512(), lower[m] = _mm512_set1_epi32(start[m]);
        for (int c = 0; c < dim; c += 64) {
            const __mmask64 in = dim - c < 64 ? (1ull << (dim - c)) - 1 : ~0ull;
            __m512i v[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                // Rows behind the last one are not read: its own stands in for them.
                const uint8_t* row = rows + (int64_t)(t + i < n ? t + i : n - 1) * dim + c;
                v[i] = _mm512_maskz_loadu_epi8(in, row);
            }
            transpose(v);
            const int8_t* q = scratch + c;
#pragma GCC unroll 16
            for (int g = 0; g < 16; g++)
#pragma GCC unroll 4
                for (int m = 0; m < M; m++) {
                    upper[m] = _mm512_dpbusd_epi32(upper[m], v[g], four_bytes(q + 2 * m * width + 4 * g));
                    lower[m] = _mm512_dpbusd_epi32(lower[m], v[g], four_bytes(q + (2 * m + 1) * width + 4 * g));
                }
        }
        const int left = n - t;
        const __mmask16 out = left >= 16 ? 0xffff : (__mmask16)((1 << left) - 1);
        for (int m = 0; m < M; m++) {
            const __m512i total = _mm512_add_epi32(_mm512_slli_epi32(upper[m], 8), lower[m]);
            _mm512_mask_storeu_ps(scores + m * pitch + t, out, _mm512_mul_ps(_mm512_cvtepi32_ps(total), _mm512_set1_ps(units[m])));
        }
    }
}

// Four rows of 64 bytes, transposed in groups of four bytes: lane i of part p holds channel 16 (i / 4) + 4 p + i % 4.
template <int M, int kHalf>
void weigh_block(const uint8_t* rows, int n, int dim, __mmask64 in, const int8_t* weights, int weight_pitch,
                 const int32_t* high_start, const int32_t* low_start, const float* units, float* output, int output_pitch,
                 int channels, Stream& next) {
    __m512i upper[M][2], lower[M][2];
    for (int m = 0; m < M; m++)
        for (int p = 0; p < 2; p++) {
            upper[m][p] = _mm512_set1_epi32(high_start[m]);
            lower[m][p] = _mm512_set1_epi32(low_start[m]);
        }
    for (int t = 0; t < n; t += 4) {
        __m512i row[4];
        if (t % 8 == 0) next.work(2);
        for (int i = 0; i < 4; i++) {
            const uint8_t* from = rows + (int64_t)(t + i < n ? t + i : n - 1) * dim;
            row[i] = _mm512_maskz_loadu_epi8(in, from);
        }
        const __m512i ab = kHalf ? _mm512_unpackhi_epi8(row[0], row[1]) : _mm512_unpacklo_epi8(row[0], row[1]);
        const __m512i cd = kHalf ? _mm512_unpackhi_epi8(row[2], row[3]) : _mm512_unpacklo_epi8(row[2], row[3]);
        const __m512i parts[2] = {_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd)};
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            const __m512i high = four_bytes(weights + (2 * m) * weight_pitch + t);
            const __m512i low = four_bytes(weights + (2 * m + 1) * weight_pitch + t);
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
void weigh_bytes_vnni(const uint8_t* rows, int n, int dim, const float* weights, int pitch, float* output,
                      int output_pitch, int8_t* scratch, Stream& next) {
    const int width = padded(n);
    int32_t high_start[M], low_start[M];
    float units[M];
    for (int m = 0; m < M; m++) {
        int8_t* high = scratch + (2 * m) * width;
        units[m] = split(weights + m * pitch, n, high, high + width);
        high_start[m] = -kBias * byte_sum(high, n);
        low_start[m] = -kBias * byte_sum(high + width, n);
    }
    for (int c = 0; c < dim; c += 64) {
        const int channels = dim - c < 64 ? dim - c : 64;
        const __mmask64 in = channels < 64 ? (1ull << channels) - 1 : ~0ull;
        weigh_block<M, 0>(rows + c, n, dim, in, scratch, width, high_start, low_start, units, output + c, output_pitch, channels, next);
        weigh_block<M, 1>(rows + c, n, dim, in, scratch, width, high_start, low_start, units, output + c, output_pitch, channels, next);
    }
}

#endif  // __AVX512VNNI__

// Wider rows or longer pages could overflow int32.
constexpr int kLargestExactDim = 256, kLargestExactTokens = 256;

template <int M>
void dot_bytes(const uint8_t* rows, int n, int dim, const float* query, int query_pitch, float* scores, int pitch,
               int8_t* scratch, Stream& next) {
#if defined(__AVX512VNNI__)
    if (dim <= kLargestExactDim) {
        dot_bytes_vnni<M>(rows, n, dim, query, query_pitch, scores, pitch, scratch, next);
        return;
    }
#endif
    (void)scratch;
    dot_elements<Byte, M>(rows, dim, n, dim, query, query_pitch, scores, pitch, next);
}

template <int M>
void weigh_bytes(const uint8_t* rows, int n, int dim, const float* weights, int pitch, float* output,
                 int output_pitch, int8_t* scratch, Stream& next) {
#if defined(__AVX512VNNI__)
    if (n <= kLargestExactTokens) {
        weigh_bytes_vnni<M>(rows, n, dim, weights, pitch, output, output_pitch, scratch, next);
        return;
    }
#endif
    (void)scratch;
    weigh_elements<Byte, M>(rows, dim, n, dim, weights, pitch, output, output_pitch, next);
}

}  // namespace
