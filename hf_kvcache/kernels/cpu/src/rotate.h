// Rotation of vectors into the basis of a side of a page, and back. attention.h and latent_attention.h rotate queries and
// outputs, encode.h rotates the vectors that it packs.
#pragma once

#include "api.h"
#include "vectors.h"

namespace {

inline Vec mirrored(Vec v, int distance) {
#if defined(__AVX512F__)
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (Vec)_mm512_permutexvar_ps(_mm512_xor_si512(lanes, _mm512_set1_epi32(distance)), (__m512)v);
#endif
    Vec out;
    for (int i = 0; i < kLanes; i++) out[i] = v[i ^ distance];
    return out;
}

// The Walsh-Hadamard transform in place, not normalized, in the order of Sylvester's construction; dim is a power of two.
inline void walsh_hadamard(float* x, int dim) {
    int h = 1;
    if (dim % kLanes == 0) {
        for (; h < kLanes; h *= 2) {
            Vec sign;
            for (int i = 0; i < kLanes; i++) sign[i] = i & h ? -1.0f : 1.0f;
            for (int c = 0; c < dim; c += kLanes) {
                const Vec v = load(x + c);
                store(x + c, mirrored(v, h) + v * sign);
            }
        }
    }
    for (; h < dim; h *= 2)
        for (int c = 0; c < dim; c += 2 * h) {
            int i = c;
            for (; i + kLanes <= c + h; i += kLanes) {
                const Vec a = load(x + i), b = load(x + i + h);
                store(x + i, a + b);
                store(x + i + h, a - b);
            }
            for (; i < c + h; i++) {
                const float a = x[i], b = x[i + h];
                x[i] = a + b;
                x[i + h] = a - b;
            }
        }
}

inline void rotate_by_matrix(const float* x, const float* matrix, int dim, bool inverse, float* out) {
    for (int c = 0; c < dim; c++) out[c] = 0;
    for (int i = 0; i < dim; i++) {
        if (inverse) {
            float total = 0;
            for (int c = 0; c < dim; c++) total += x[c] * matrix[i * dim + c];
            out[i] = total;
        } else {
            for (int c = 0; c < dim; c++) out[c] += x[i] * matrix[i * dim + c];
        }
    }
}

// out = x in the rotated basis, or, if inverse, x back from it; x and out do not overlap.
inline void rotate(const HfkvSide& side, const float* x, bool inverse, float* out) {
    const int dim = side.dim;
    if (side.rotation == 1) {
        rotate_by_matrix(x, side.matrix, dim, inverse, out);
        return;
    }
    if (side.rotation == 0) {
        std::memcpy(out, x, sizeof(float) * dim);
        return;
    }
    const float norm = 1.0f / __builtin_sqrtf((float)dim);
    for (int c = 0; c < dim; c++) out[c] = inverse ? x[c] : x[c] * side.signs[c];
    walsh_hadamard(out, dim);
    for (int c = 0; c < dim; c++) out[c] *= inverse ? norm * side.signs[c] : norm;
}

}  // namespace
