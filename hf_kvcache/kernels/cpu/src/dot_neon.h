// Dot products and weighted sums of up to four queries with rows of levels, in integers, by NEON: with the dot products of bytes
// of Armv8.2 (sdot), or with the products of 2 by 8 bytes of I8MM (smmla), which do twice as much at a time. page_side.h calls
// `dot_levels` and `weigh_levels`.
//
// The float side is in 16 bits, x = unit * multiple, as two signed bytes: multiple = 256 * high + low. Eight high bytes and their
// eight low bytes lie side by side in a vector. Levels less their bias are signed bytes too, so nothing is left to be subtracted.
// Sums are exact in int32.
#pragma once

#include "byte_rows.h"

#if defined(__ARM_FEATURE_DOTPROD)

#define HFKV_MULTIPLES  // page_side.h computes with multiples

#include <arm_neon.h>

namespace {

constexpr int kWideColumns = 16;  // rows of multiples are filled up with zeros to a multiple of so many

// Up to four rows of floats, each as multiples of a unit.
struct Multiples {
    const int8_t* rows;  // two bytes a number
    int pitch;           // numbers of a row
    float units[4];
    float lifts[4];  // what to add to a sum because of the row's rounding

    // The high bytes of eight numbers from `column` on, a multiple of eight, then their low bytes.
    int8x16_t eight(int m, int column) const { return vld1q_s8(rows + 2 * ((int64_t)m * pitch + column)); }
};

// The first `count` of four numbers at p, and zeros behind them.
inline float32x4_t some_floats(const float* p, int count) {
    if (count >= 4) return vld1q_f32(p);
    float room[4] = {};
    for (int i = 0; i < count; i++) room[i] = p[i];
    return vld1q_f32(room);
}

// The first n numbers of M rows, and zeros behind them. offset: as in HfkvSide; room: for M rows of n + kWideColumns numbers.
template <int M>
inline Multiples multiples_of(const float* x, int x_pitch, int n, int offset, int8_t* room) {
    Multiples out{room, (n + kWideColumns - 1) / kWideColumns * kWideColumns, {}, {}};
    for (int m = 0; m < M; m++) {
        const float* from = x + (int64_t)m * x_pitch;
        float32x4_t top = vdupq_n_f32(0), total = vdupq_n_f32(0);
        for (int c = 0; c < n; c += 4) {
            const float32x4_t v = some_floats(from + c, n - c);
            top = vmaxq_f32(top, vabsq_f32(v));
            total = vaddq_f32(total, v);
        }
        const float peak = vmaxvq_f32(top);
        // A subnormal peak would have an infinite inverse.
        const float unit = peak > 1e-30f ? peak / kLargestUnits : 1.0f, inverse = 1.0f / unit;
        int32x4_t sums = vdupq_n_s32(0);
        for (int c = 0; c < out.pitch; c += 8) {
            const int32x4_t first = vcvtnq_s32_f32(vmulq_n_f32(some_floats(from + c, n - c), inverse));
            const int32x4_t second = vcvtnq_s32_f32(vmulq_n_f32(some_floats(from + c + 4, n - c - 4), inverse));
            sums = vaddq_s32(sums, vaddq_s32(first, second));
            const int16x8_t both = vcombine_s16(vqmovn_s32(first), vqmovn_s32(second));
            int8_t* to = room + 2 * ((int64_t)m * out.pitch + c);
            vst1_s8(to, vshrn_n_s16(vaddq_s16(both, vdupq_n_s16(128)), 8));
            vst1_s8(to + 8, vmovn_s16(both));
        }
        out.units[m] = unit;
        out.lifts[m] = rest_of_mean(offset, vaddvq_f32(total), unit, -kBias * vaddvq_s32(sums));
    }
    return out;
}

inline int8x16_t less_bias(uint8x16_t levels) { return vreinterpretq_s8_u8(veorq_u8(levels, vdupq_n_u8(kBias))); }

// The first `count` bytes at p, up to 16, and zeros behind them.
inline uint8x16_t some_bytes(const uint8_t* p, int count) {
    if (count >= 16) return vld1q_u8(p);
    uint8_t room[16] = {};
    std::memcpy(room, p, count);
    return vld1q_u8(room);
}

// Four sums of their high and low parts: a and b hold high, low, high, low.
inline float32x4_t whole_sums(int32x4_t a, int32x4_t b) {
    return vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(vuzp1q_s32(a, b), 8), vuzp2q_s32(a, b)));
}

// Sums of K tokens with M queries. K is even.
template <int M, int K>
struct TokenSums {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    int32x4_t sums[M * K / 2];  // of two tokens each: high and low of the first, then of the second
#else
    int32x4_t sums[M * K];  // of a token each: two parts of high, two of low
#endif
    TokenSums() {
#pragma GCC unroll 8
        for (int32x4_t& sum : sums) sum = vdupq_n_s32(0);
    }
    // Adds the products of 16 channels from c on. x: these channels of each token.
    void add(const int8x16_t* x, const Multiples& queries, int c) {
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            const int8x16_t first = queries.eight(m, c), second = queries.eight(m, c + 8);
#if defined(__ARM_FEATURE_MATMUL_INT8)
#pragma GCC unroll 4
            for (int p = 0; p < K / 2; p++) {
                const int64x2_t a = vreinterpretq_s64_s8(x[2 * p]), b = vreinterpretq_s64_s8(x[2 * p + 1]);
                int32x4_t& sum = sums[m * K / 2 + p];
                sum = vmmlaq_s32(sum, vreinterpretq_s8_s64(vzip1q_s64(a, b)), first);
                sum = vmmlaq_s32(sum, vreinterpretq_s8_s64(vzip2q_s64(a, b)), second);
            }
#else
#pragma GCC unroll 8
            for (int i = 0; i < K; i++) {
                const int64x2_t both = vreinterpretq_s64_s8(x[i]);
                int32x4_t& sum = sums[m * K + i];
                sum = vdotq_s32(sum, vreinterpretq_s8_s64(vdupq_laneq_s64(both, 0)), first);
                sum = vdotq_s32(sum, vreinterpretq_s8_s64(vdupq_laneq_s64(both, 1)), second);
            }
#endif
        }
    }
    // High and low of two tokens, i and i + 1, counted over all queries.
    int32x4_t two(int i) const {
        if (i >= M * K) return vdupq_n_s32(0);
#if defined(__ARM_FEATURE_MATMUL_INT8)
        return sums[i / 2];
#else
        return vpaddq_s32(sums[i], sums[i + 1]);
#endif
    }
};

// scores[m * pitch + t]: the products of M queries with n rows of levels, [n, dim]. Up to seven scores behind the n-th are written.
template <int M>
inline void dot_levels(const uint8_t* levels, int n, int dim, const Multiples& queries, float* scores, int pitch, Stream& next) {
    constexpr int kTokens = M == 1 ? 8 : M == 2 ? 4 : 2;
    for (int t = 0; t < n; t += kTokens) {
        if (t % 16 == 0) next.work(6);
        const uint8_t* rows[kTokens];  // the last row again in place of those behind it
#pragma GCC unroll 8
        for (int i = 0; i < kTokens; i++) rows[i] = levels + (int64_t)(t + i < n ? t + i : n - 1) * dim;
        TokenSums<M, kTokens> sums;
        int8x16_t x[kTokens];
        int c = 0;
        for (; c + 16 <= dim; c += 16) {
#pragma GCC unroll 8
            for (int i = 0; i < kTokens; i++) x[i] = less_bias(vld1q_u8(rows[i] + c));
            sums.add(x, queries, c);
        }
        if (c < dim) {
#pragma GCC unroll 8
            for (int i = 0; i < kTokens; i++) x[i] = less_bias(some_bytes(rows[i] + c, dim - c));
            sums.add(x, queries, c);
        }
        float totals[8];
        vst1q_f32(totals, whole_sums(sums.two(0), sums.two(2)));
        vst1q_f32(totals + 4, whole_sums(sums.two(4), sums.two(6)));
#pragma GCC unroll 4
        for (int m = 0; m < M; m++)
#pragma GCC unroll 8
            for (int i = 0; i < kTokens; i++)
                scores[(int64_t)m * pitch + t + i] = totals[m * kTokens + i] * queries.units[m] + queries.lifts[m];
    }
}

// The bytes of a and b in turns.
inline uint8x16_t in_turns(uint8x8_t a, uint8x8_t b) { return vzip1q_u8(vcombine_u8(a, a), vcombine_u8(b, b)); }

// Sums of eight channels over tokens, by M rows of weights.
template <int M>
struct ChannelSums {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    int32x4_t sums[4][M];  // of two channels each: high and low of the first, then of the second
#else
    int32x4_t high[2][M], low[2][M];  // of four channels each
#endif
    ChannelSums() {
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
            sums[0][m] = sums[1][m] = sums[2][m] = sums[3][m] = vdupq_n_s32(0);
#else
            high[0][m] = high[1][m] = low[0][m] = low[1][m] = vdupq_n_s32(0);
#endif
        }
    }

    // Adds eight tokens from t on. rows: eight channels of each of them.
    void add(const uint8x8_t rows[8], const Multiples& weights, int t) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
        const uint8x16_t a = in_turns(rows[0], rows[4]), b = in_turns(rows[1], rows[5]);
        const uint8x16_t c = in_turns(rows[2], rows[6]), d = in_turns(rows[3], rows[7]);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const uint8x16_t even = half ? vzip2q_u8(a, c) : vzip1q_u8(a, c), odd = half ? vzip2q_u8(b, d) : vzip1q_u8(b, d);
            const int8x16_t first = less_bias(vzip1q_u8(even, odd)), second = less_bias(vzip2q_u8(even, odd));
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                sums[2 * half][m] = vmmlaq_s32(sums[2 * half][m], first, weights.eight(m, t));
                sums[2 * half + 1][m] = vmmlaq_s32(sums[2 * half + 1][m], second, weights.eight(m, t));
            }
        }
#else
        add_four<0>(rows, weights, t);
        add_four<1>(rows + 4, weights, t);
#endif
    }
#if !defined(__ARM_FEATURE_MATMUL_INT8)
    // kPart: which half of eight tokens.
    template <int kPart>
    void add_four(const uint8x8_t* rows, const Multiples& weights, int t) {
        const uint16x8_t a = vreinterpretq_u16_u8(in_turns(rows[0], rows[1])), b = vreinterpretq_u16_u8(in_turns(rows[2], rows[3]));
        const int8x16_t x[2] = {less_bias(vreinterpretq_u8_u16(vzip1q_u16(a, b))), less_bias(vreinterpretq_u8_u16(vzip2q_u16(a, b)))};
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            const int8x16_t weight = weights.eight(m, t);
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                high[i][m] = vdotq_laneq_s32(high[i][m], x[i], weight, kPart);
                low[i][m] = vdotq_laneq_s32(low[i][m], x[i], weight, 2 + kPart);
            }
        }
    }
#endif
    // Four channels: the first or the second.
    float32x4_t total(int m, int i) const {
#if defined(__ARM_FEATURE_MATMUL_INT8)
        return whole_sums(sums[2 * i][m], sums[2 * i + 1][m]);
#else
        return vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(high[i][m], 8), low[i][m]));
#endif
    }
};

// output[m * output_pitch + c] += the sums of n rows of levels, [n, dim], by M rows of weights.
template <int M>
inline void weigh_levels(const uint8_t* levels, int n, int dim, const Multiples& weights, float* output, int output_pitch, Stream& next) {
    for (int c = 0; c < dim; c += 8) {
        ChannelSums<M> sums;
        const int left = dim - c;
        const auto add = [&](int t, const auto& row) {
            uint8x8_t rows[8];
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) rows[i] = left >= 8 ? vld1_u8(row(i)) : vget_low_u8(some_bytes(row(i), left));
            sums.add(rows, weights, t);
        };
        const uint8_t* at = levels + c;
        int t = 0;
        for (; t + 8 <= n; t += 8, at += 8 * (int64_t)dim) {
            if (c == 0 && t % 16 == 0) next.work(6);
            add(t, [&](int i) { return at + i * (int64_t)dim; });
        }
        // Behind the last row, weights are 0.
        if (t < n) add(t, [&](int i) { return at + (t + i < n ? i : n - 1 - t) * (int64_t)dim; });
#pragma GCC unroll 4
        for (int m = 0; m < M; m++)
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {  // behind the width, a row has room up to a multiple of 16
                float* to = output + (int64_t)m * output_pitch + c + 4 * i;
                const float32x4_t lifted = vfmaq_n_f32(vdupq_n_f32(weights.lifts[m]), sums.total(m, i), weights.units[m]);
                vst1q_f32(to, vaddq_f32(vld1q_f32(to), lifted));
            }
    }
}

}  // namespace

#endif  // __ARM_FEATURE_DOTPROD
