// Products of a few vectors with a matrix of each head, hfkv_project, and the whole decode step of latent attention,
// hfkv_latent_step. The time is that of reading the weights, so each of their rows is read once for all vectors. kernels.inc
// exports both.
#pragma once

#include "latent_attention.h"

namespace {

constexpr int kRowsAtOnce = 8;  // rows of a weight
constexpr int kLineBytes = 64;

// out [n] += sum of R rows of weights, `stride` bytes apart, by x [R]; prefetches the next rows.
template <class Element, int R>
inline void add_rows(const uint8_t* weight, int64_t stride, const float* x, int n, float* out) {
    Vec by[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) by[i] = splat(x[i]);
    for (int c = 0; c < n; c += kLanes) {
        Vec total = load(out + c);
        const uint8_t* at = weight + c * Element::kBytes;
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
            if (c * Element::kBytes % kLineBytes == 0) __builtin_prefetch(at + (i + kRowsAtOnce) * stride, 0, 2);
            total += by[i] * Element::load_vec(at + i * stride);
        }
        store(out + c, total);
    }
}

// out [R] = products of R rows of weights with x [n].
template <class Element, int R>
inline void multiply_rows(const uint8_t* weight, int64_t stride, const float* x, int n, float* out) {
    Vec total[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) total[i] = splat(0.0f);
    for (int c = 0; c < n; c += kLanes) {
        const uint8_t* at = weight + c * Element::kBytes;
        const Vec v = load(x + c);
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
            if (c * Element::kBytes % kLineBytes == 0) __builtin_prefetch(at + (i + kRowsAtOnce) * stride, 0, 2);
            total[i] += v * Element::load_vec(at + i * stride);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) out[i] = sum(total[i]);
}

// One head. x and out: float32 [vectors, n or width]; first, last: the part of the width, or of n if transposed, to compute.
template <class Element>
void project_head(const HfkvProject& c, const uint8_t* weight, const float* x, int first, int last, float* out) {
    const int64_t stride = Element::kBytes * c.weight_row;
    const int vectors = c.batch * c.length, from = c.transposed ? first : 0, to = c.transposed ? last : c.n;
    const int shift = c.transposed ? 0 : first, width = c.transposed ? c.width : last - first;
    int row = from;
    for (; row + kRowsAtOnce <= to; row += kRowsAtOnce) {
        const uint8_t* at = weight + row * stride + shift * Element::kBytes;
        for (int v = 0; v < vectors; v++) {
            if (c.transposed) multiply_rows<Element, kRowsAtOnce>(at, stride, x + (int64_t)v * c.width, width, out + (int64_t)v * c.n + row);
            else add_rows<Element, kRowsAtOnce>(at, stride, x + (int64_t)v * c.n + row, width, out + (int64_t)v * c.width + shift);
        }
    }
    for (; row < to; row++) {
        const uint8_t* at = weight + row * stride + shift * Element::kBytes;
        for (int v = 0; v < vectors; v++) {
            if (c.transposed) multiply_rows<Element, 1>(at, stride, x + (int64_t)v * c.width, width, out + (int64_t)v * c.n + row);
            else add_rows<Element, 1>(at, stride, x + (int64_t)v * c.n + row, width, out + (int64_t)v * c.width + shift);
        }
    }
}

// Loads x, projects one part of a head, and stores it. buffer: [vectors, n + width].
inline void project_part(const HfkvProject& c, int head, int first, int last, float* buffer) {
    const int bytes = width_of(c.level), vectors = c.batch * c.length;
    const int inner = c.transposed ? c.width : c.n, outer = c.transposed ? c.n : c.width;
    float *x = buffer, *out = buffer + (int64_t)vectors * inner;
    for (int v = 0; v < vectors; v++) {
        const int64_t at = v / c.length * c.x_batch + head * c.x_head + v % c.length * c.x_token;
        load_elements(c.level, (const uint8_t*)c.x + bytes * at, inner, x + (int64_t)v * inner);
    }
    std::memset(out, 0, sizeof(float) * vectors * outer);
    const uint8_t* weight = (const uint8_t*)c.weight + bytes * (head * c.weight_head);
    if (c.level == HFKV_FLOAT32) project_head<Float32>(c, weight, x, first, last, out);
    else if (c.level == HFKV_BFLOAT16) project_head<BFloat16>(c, weight, x, first, last, out);
    else project_head<Float16>(c, weight, x, first, last, out);
    for (int v = 0; v < vectors; v++) {
        const int64_t at = v / c.length * c.out_batch + head * c.out_head + v % c.length * c.out_token + first;
        store_elements(c.level, out + (int64_t)v * outer + first, last - first, (uint8_t*)c.out + bytes * at);
    }
}

inline int project(const HfkvProject& call) {
    const int64_t floats = (int64_t)call.batch * call.length * (call.n + call.width) + 16;
    const int64_t bytes = (int64_t)call.heads * call.n * call.width * width_of(call.level);
    const int threads = bytes < kOneThreadBytes ? 1 : call.threads;
    const Workspace workspace(sizeof(float) * floats * threads);
    float* buffers = (float*)workspace.at();
    if (!buffers) return 1;
    // If there are few heads, each is split into parts, which are multiples of 16 outputs.
    const int outer = call.transposed ? call.n : call.width, sixteens = (outer + 15) / 16;
    const int wanted = threads == 1 ? 1 : (2 * threads + call.heads - 1) / call.heads, parts = wanted < sixteens ? wanted : sixteens;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int task = 0; task < call.heads * parts; task++) {
        const int head = task / parts, part = task % parts;
        const int first = sixteens * part / parts * 16, last = sixteens * (part + 1) / parts * 16;
#if defined(_OPENMP)
        float* buffer = buffers + floats * omp_get_thread_num();
#else
        float* buffer = buffers;
#endif
        project_part(call, head, first, last < outer ? last : outer, buffer);
    }
    return 0;
}

inline int latent_step(const HfkvLatentStep& call) {
    const HfkvProject &absorb = call.absorb, &expand = call.expand;
    const HfkvLatent& attend = call.attend;
    if (project(absorb)) return 1;
    const int64_t width = width_of(absorb.level), rank = attend.layout->keys.dim, rotary = attend.layout->values.dim;
    for (int b = 0; b < attend.batch; b++)
        for (int h = 0; h < attend.heads; h++)
            std::memcpy((uint8_t*)attend.query + width * (b * attend.query_batch + h * attend.query_head + rank),
                        (const uint8_t*)absorb.x + width * (b * absorb.x_batch + h * absorb.x_head + absorb.n), width * rotary);
    if (attend_latents(attend) || project(expand)) return 1;
    count_tokens(attend.token, attend.batch, attend.slots);
    return 0;
}

}  // namespace
