// What the first tokens of a sequence fix of the basis in which its keys are packed: a scale of each channel, hfkv_key_scale, and a
// mean, hfkv_key_mean. kernels.inc exports both; hf_kvcache/storage/key_basis.py defines and explains them.
#pragma once

#include <cmath>

#include "dot_float.h"
#include "rotate.h"
#include "workspace.h"

namespace {

constexpr int kSumBlock = 128;     // tokens that are added in float32, before their sum is added in float64
constexpr int kSumVectors = 4;     // vectors of channels that are read together
constexpr double kLeastPower = 1e-6, kLeastRatio = 1e-30;
constexpr double kLargestExponent = 4, kHalfExponent = 12;

// Adds to sums[c] the elements of channel c of n tokens, `token` bytes apart, and to squares[c] their squares. Null: not wanted.
template <class Element>
inline void add_columns(const uint8_t* x, int64_t token, int64_t n, int dim, double* sums, double* squares) {
    constexpr int kChannels = kSumVectors * kLanes;
    for (int64_t first = 0; first < n; first += kSumBlock) {
        const int64_t stop = first + kSumBlock < n ? first + kSumBlock : n;
        int c = 0;
        for (; c + kLanes <= dim; c += kChannels) {
            const int count = dim - c >= kChannels ? kSumVectors : (dim - c) / kLanes;
            Vec sum[kSumVectors], square[kSumVectors];
            for (int i = 0; i < kSumVectors; i++) sum[i] = square[i] = splat(0.0f);
            const auto add = [&](int64_t t, int i) {
                const Vec v = Element::load_vec(x + t * token + (c + i * kLanes) * Element::kBytes);
                sum[i] += v, square[i] += v * v;
            };
            if (count == kSumVectors) {
                for (int64_t t = first; t < stop; t++)
#pragma GCC unroll 4
                    for (int i = 0; i < kSumVectors; i++) add(t, i);
            } else {
                for (int i = 0; i < count; i++)
                    for (int64_t t = first; t < stop; t++) add(t, i);
            }
            for (int i = 0; i < count * kLanes; i++) {
                if (sums) sums[c + i] += sum[i / kLanes][i % kLanes];
                if (squares) squares[c + i] += square[i / kLanes][i % kLanes];
            }
        }
        for (c = dim / kLanes * kLanes; c < dim; c++) {
            float sum = 0, square = 0;
            for (int64_t t = first; t < stop; t++) {
                const float v = Element::load_one(x + t * token + c * Element::kBytes);
                sum += v, square += v * v;
            }
            if (sums) sums[c] += sum;
            if (squares) squares[c] += square;
        }
    }
}

inline void add_columns(const HfkvVectors& from, int level, int64_t batch, int64_t head, int64_t n, int dim, double* sums,
                        double* squares) {
    const int64_t width = level == HFKV_FLOAT32 ? 4 : 2;
    const uint8_t* x = (const uint8_t*)from.at + width * (batch * from.batch + head * from.head);
    for (int c = 0; c < dim; c++) {
        if (sums) sums[c] = 0;
        if (squares) squares[c] = 0;
    }
    if (level == HFKV_FLOAT32) return add_columns<Float32>(x, width * from.token, n, dim, sums, squares);
    if (level == HFKV_BFLOAT16) return add_columns<BFloat16>(x, width * from.token, n, dim, sums, squares);
    add_columns<Float16>(x, width * from.token, n, dim, sums, squares);
}

inline int key_mean(const HfkvKeyMean& call) {
    const HfkvSide& side = call.layout->keys;
    const int dim = side.dim;
    const size_t bytes = (sizeof(double) + sizeof(float)) * (size_t)(dim + 16);
    const Workspace workspace(bytes * call.threads);
    char* memory = workspace.at();
    if (!memory) return 1;
#pragma omp parallel for num_threads(call.threads) schedule(static)
    for (int row = 0; row < call.batch * call.heads; row++) {
#if defined(_OPENMP)
        double* sums = (double*)(memory + bytes * omp_get_thread_num());
#else
        double* sums = (double*)memory;
#endif
        float* mean = (float*)(sums + dim);
        add_columns(call.keys, call.level, row / call.heads, row % call.heads, call.tokens, dim, sums, nullptr);
        for (int c = 0; c < dim; c++) {
            mean[c] = (float)(sums[c] / (double)call.tokens);
            if (call.key_scale) mean[c] /= call.key_scale[(size_t)row * dim + c];
        }
        rotate(side, mean, false, call.mean + (size_t)row * dim);
    }
    return 0;
}

// x[c] = log2(x[c] + a small share of the mean over the channels).
inline void log_of_powers(double* x, int dim) {
    double mean = 0;
    for (int c = 0; c < dim; c++) mean += x[c];
    const double least = kLeastPower * mean / dim + kLeastRatio;
    for (int c = 0; c < dim; c++) x[c] = std::log2(x[c] + least);
}

// The scale of a KV head, from the mean squares of its queries, `power`, and of its keys, and the variance of these. The first two
// are overwritten.
inline void scale_of_head(double* power, double* variance, const double* squares, int level, int dim, float* scale) {
    log_of_powers(power, dim);
    log_of_powers(variance, dim);
    double mean = 0;
    for (int c = 0; c < dim; c++) variance[c] = (variance[c] - power[c]) / 4, mean += variance[c];
    mean /= dim;
    for (int c = 0; c < dim; c++) {
        double exponent = std::nearbyint(variance[c] - mean);
        if (!(exponent == exponent)) exponent = 0;
        if (level == HFKV_FLOAT16) {  // kernels may divide in half precision, which has to hold the quotient
            const double lowest = std::ceil(std::log2(squares[c]) / 2 - kHalfExponent);
            const double bound = lowest == lowest ? lowest : 0;
            exponent = exponent < bound ? bound : exponent;
        }
        exponent = exponent < -kLargestExponent ? -kLargestExponent : exponent > kLargestExponent ? kLargestExponent : exponent;
        scale[c] = (float)std::ldexp(1.0, (int)exponent);
    }
}

inline int key_scale(const HfkvKeyScale& call) {
    const int dim = call.dim, group = call.query_heads / call.heads, rows = call.batch * call.heads;
    const int heads = group + 1;  // of a row: those of its queries, and its own
    const Workspace workspace(sizeof(double) * 2 * dim * (size_t)rows * heads);
    double* memory = (double*)workspace.at();
    if (!memory) return 1;
#pragma omp parallel for num_threads(call.threads) schedule(dynamic, 1)
    for (int task = 0; task < rows * heads; task++) {
        const int row = task / heads, head = task % heads, batch = row / call.heads, own = row % call.heads;
        double *sums = memory + 2 * (size_t)dim * task, *squares = sums + dim;
        if (head == group) add_columns(call.keys, call.level, batch, own, call.tokens, dim, sums, squares);
        else add_columns(call.query, call.level, batch, own * group + head, call.tokens, dim, nullptr, squares);
    }
    for (int row = 0; row < rows; row++) {
        double* of_keys = memory + 2 * (size_t)dim * (row * heads + group);
        double* power = memory + 2 * (size_t)dim * row * heads;  // there the first query head has no sums
        double *variance = of_keys, *squares = of_keys + dim;
        for (int c = 0; c < dim; c++) {
            double total = 0;
            for (int g = 0; g < group; g++) total += power[(2 * (size_t)g + 1) * dim + c];
            power[c] = total / ((double)group * (double)call.tokens);
            const double mean = of_keys[c] / (double)call.tokens;
            squares[c] /= (double)call.tokens;
            variance[c] = squares[c] - mean * mean;
            if (variance[c] < 0) variance[c] = 0;
        }
        scale_of_head(power, variance, squares, call.level, dim, call.scale + (size_t)row * dim);
    }
    return 0;
}

}  // namespace
