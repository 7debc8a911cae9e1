// Dot products and weighted sums of latents with 16 queries at a time in float32, on every instruction set; and the decoding of
// latents. latent_attention.h calls it where AMX does not apply.
//
// Scores are stored token by token, with the 16 queries of a token side by side. So no sum and no maximum runs across lanes, and
// whatever depends on the token alone (a scale, whether it is seen) applies to a whole vector.
#pragma once

#include "attention.h"

namespace {

constexpr int kQueries = 16;     // heads times query tokens that are computed together, padded
constexpr int kQueryVectors = kQueries / kLanes;
constexpr int kLatentChunk = 64; // tokens that are computed at a time

// The float32 rows of some tokens, `stride` bytes apart.
struct FloatRows {
    const uint8_t* data;
    int64_t stride;
    const float* row(int t) const { return (const float*)(data + t * stride); }
};

// scores[t][16] += rows[t] . query[., 16] of T tokens.
template <int T>
inline void dot_tokens(const FloatRows& rows, int start, int dim, const float* query, float* scores) {
    Vec total[T][kQueryVectors];
#pragma GCC unroll 16
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int p = 0; p < kQueryVectors; p++) total[t][p] = load(scores + (start + t) * kQueries + p * kLanes);
    for (int c = 0; c < dim; c++) {
        Vec q[kQueryVectors];
#pragma GCC unroll 4
        for (int p = 0; p < kQueryVectors; p++) q[p] = load(query + c * kQueries + p * kLanes);
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) {
            const Vec x = splat(Float32::load_one(rows.data + (start + t) * rows.stride + 4 * c));
#pragma GCC unroll 4
            for (int p = 0; p < kQueryVectors; p++) total[t][p] += x * q[p];
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int p = 0; p < kQueryVectors; p++) store(scores + (start + t) * kQueries + p * kLanes, total[t][p]);
}

// scores [n, 16] += products of n rows with 16 queries. query: [dim, 16].
inline void dot_rows(const FloatRows& rows, int n, int dim, const float* query, float* scores, Stream& next) {
    constexpr int kMany = 12 / kQueryVectors, kSome = 4 / kQueryVectors;
    int t = 0;
    for (; t + kMany <= n; t += kMany) {
        next.work(kMany);
        dot_tokens<kMany>(rows, t, dim, query, scores);
    }
    for (; t + kSome <= n; t += kSome) dot_tokens<kSome>(rows, t, dim, query, scores);
    for (; t < n; t++) dot_tokens<1>(rows, t, dim, query, scores);
}

// output[m][c] += sum of weights[t][m] * rows[t][c] of four queries m and V vectors of channels.
template <int V>
inline void weigh_channels(const FloatRows& rows, int n, int c, const float* weights, float* output, int pitch) {
    Vec total[4][V];
#pragma GCC unroll 4
    for (int m = 0; m < 4; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) total[m][v] = load(output + m * pitch + c + v * kLanes);
    for (int t = 0; t < n; t++) {
        Vec x[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) x[v] = load(rows.row(t) + c + v * kLanes);
#pragma GCC unroll 4
        for (int m = 0; m < 4; m++) {
            const Vec w = splat(weights[t * kQueries + m]);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) total[m][v] += w * x[v];
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < 4; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store(output + m * pitch + c + v * kLanes, total[m][v]);
}

// output [16, dim] += weights [n, 16], transposed, times n rows, for the first `count` queries. dim: a multiple of 16.
inline void weigh_rows(const FloatRows& rows, int n, int dim, const float* weights, int count, float* output, Stream& next) {
    constexpr int kVectors = kLanes == 16 ? 4 : 2;
    int c = 0;
    for (; c + kVectors * kLanes <= dim; c += kVectors * kLanes) {
        next.work(kVectors);
        for (int m = 0; m < count; m += 4) weigh_channels<kVectors>(rows, n, c, weights + m, output + m * dim, dim);
    }
    for (; c < dim; c += kLanes)
        for (int m = 0; m < count; m += 4) weigh_channels<1>(rows, n, c, weights + m, output + m * dim, dim);
}

// Converts n rows of elements to float32 rows of `dim`, side by side.
template <class Element>
inline void widen(const uint8_t* data, int64_t stride, int n, int dim, float* out) {
    for (int t = 0; t < n; t++) {
        const uint8_t* from = data + t * stride;
        float* to = out + (int64_t)t * dim;
        int c = 0;
        for (; c + kLanes <= dim; c += kLanes) store(to + c, Element::load_vec(from + c * Element::kBytes));
        for (; c < dim; c++) to[c] = Element::load_one(from + c * Element::kBytes);
    }
}

// Full-precision rows in float32: where they lie, or converted in `out` [n, dim].
inline FloatRows dense_floats(int level, const uint8_t* data, int64_t stride, int n, int dim, float* out) {
    if (level == HFKV_FLOAT32) return {data, stride};
    if (level == HFKV_BFLOAT16) widen<BFloat16>(data, stride, n, dim, out);
    else widen<Float16>(data, stride, n, dim, out);
    return {(const uint8_t*)out, 4 * (int64_t)dim};
}

// Scales and zero points, level * scale + zero: of each token and group of channels, [n, groups], or of each group of tokens and
// channel, [groups, dim].
struct Factors {
    float* scale;
    float* zero;
};

// The number of scales of a chunk, at most.
inline int factor_count(const HfkvSide& side) {
    if (side.level >= HFKV_FLOAT32) return 0;
    return side.axis == HFKV_CHANNEL ? (kLatentChunk / side.group + 2) * side.dim : kLatentChunk * (side.dim / side.group);
}

// The factors of n tokens from `start` on. They include the step of the levels and their offset from the center of the bytes.
inline Factors read_factors(const HfkvSide& side, const uint8_t* record, int start, int n, float* room) {
    const bool by_channel = side.axis == HFKV_CHANNEL;
    const int groups = by_channel ? side.dim : side.dim / side.group;
    const int first = by_channel ? start / side.group : start, last = by_channel ? (start + n - 1) / side.group : start + n - 1;
    const int count = (last - first + 1) * groups;
    const int64_t skipped = 2 * (int64_t)first * groups;
    const Factors f{room, room + rounded(factor_count(side))};
    halves(record + side.scale + skipped, count, f.scale);
    if (side.has_zero) halves(record + side.zero + skipped, count, f.zero);
    const float step = side.level == HFKV_CODES ? side.step : 1.0f, offset = side.level == HFKV_CODES ? side.offset : 0;
    for (int i = 0; i < count; i++) {
        f.scale[i] *= step;
        f.zero[i] = (side.has_zero ? f.zero[i] : 0.0f) + offset * f.scale[i];
    }
    return f;
}

// x [n, dim] = levels * scale + zero, with factors of each token and group of channels.
inline void scale_tokens(float* x, int n, int dim, int group, const Factors& f) {
    const int groups = dim / group;
    for (int t = 0; t < n; t++)
        for (int g = 0; g < groups; g++) {
            float* at = x + (int64_t)t * dim + g * group;
            const float a = f.scale[t * groups + g], b = f.zero[t * groups + g];
            for (int c = 0; c < group; c++) at[c] = at[c] * a + b;
        }
}

// The same with factors of each group of tokens and channel; f begins at the group of token `start`.
inline void scale_channels(float* x, int start, int n, int dim, int group, const Factors& f) {
    for (int t = 0; t < n; t++) {
        const int64_t at = (int64_t)((start + t) / group - start / group) * dim;
        for (int c = 0; c < dim; c++) x[(int64_t)t * dim + c] = x[(int64_t)t * dim + c] * f.scale[at + c] + f.zero[at + c];
    }
}

// Multiplies by the second scale, along the other axis.
inline void scale_again(const HfkvSide& side, const uint8_t* record, int start, int n, float* room, float* x) {
    const bool by_channel = side.axis == HFKV_CHANNEL;
    halves(record + side.other + (by_channel ? 2 * start : 0), by_channel ? n : side.dim, room);
    for (int t = 0; t < n; t++)
        for (int c = 0; c < side.dim; c++) x[(int64_t)t * side.dim + c] *= room[by_channel ? t : c];
}

// The codes of n tokens from `start` on as bytes: where they lie, or unpacked in `bytes` [n, dim].
inline const uint8_t* code_bytes(const HfkvSide& side, const uint8_t* record, int start, int n, uint8_t* bytes, Stream& next) {
    const uint8_t* codes = record + side.codes + (int64_t)start * (side.dim * side.bits / 8);
    if (side.bits == 8) return codes;
    unpack(codes, side.bits, n, side.dim, side.levels, bytes, next);
    return bytes;
}

// The buffers of one thread for one side of a chunk.
struct LatentRoom {
    float* floats;   // [kLatentChunk, dim]
    float* factors;  // twice factor_count, or a second scale
    uint8_t* bytes;  // [kLatentChunk, dim], and one more vector
};

// One side of n tokens of a page from `start` on, in float32 and in the rotated basis.
inline FloatRows page_floats(const HfkvSide& side, const uint8_t* record, int start, int n, const LatentRoom& room, Stream& next) {
    const int64_t row = (int64_t)side.dim * width_of(side.level);
    if (side.level >= HFKV_FLOAT32) return dense_floats(side.level, record + side.codes + start * row, row, n, side.dim, room.floats);
    const uint8_t* bytes = code_bytes(side, record, start, n, room.bytes, next);
    if (side.level == HFKV_FLOAT8) widen<Float8>(bytes, side.dim, n, side.dim, room.floats);
    else widen<Byte>(bytes, side.dim, n, side.dim, room.floats);
    const Factors f = read_factors(side, record, start, n, room.factors);
    if (side.axis == HFKV_CHANNEL) scale_channels(room.floats, start, n, side.dim, side.group, f);
    else scale_tokens(room.floats, n, side.dim, side.group, f);
    if (side.has_other) scale_again(side, record, start, n, room.factors, room.floats);
    return {(const uint8_t*)room.floats, 4 * (int64_t)side.dim};
}

}  // namespace
