// Rotation of vectors into the basis of a side of a page, and back. attention.h and latent_attention.h rotate queries and
// outputs, encode.h rotates the vectors that it packs.
#pragma once

#include "api.h"
#include "vectors.h"

namespace {

// The lanes in another order: lane i becomes lane i ^ kDistance.
template <int kDistance>
inline Vec mirrored(Vec v) {
#if defined(__AVX512F__)
    const __m512 x = (__m512)v;
    if (kDistance == 1) return (Vec)_mm512_permute_ps(x, 0xb1);
    if (kDistance == 2) return (Vec)_mm512_permute_ps(x, 0x4e);
    return (Vec)(kDistance == 4 ? _mm512_shuffle_f32x4(x, x, 0xb1) : _mm512_shuffle_f32x4(x, x, 0x4e));
#elif defined(__AVX__)
    const __m256 x = (__m256)v;
    if (kDistance == 4) return (Vec)_mm256_permute2f128_ps(x, x, 1);
    return (Vec)(kDistance == 1 ? _mm256_permute_ps(x, 0xb1) : _mm256_permute_ps(x, 0x4e));
#else
    Vec out;
    for (int i = 0; i < kLanes; i++) out[i] = v[i ^ kDistance];
    return out;
#endif
}

// The stages of the transform that stay within a vector, from distance kDistance on.
template <int kDistance>
inline Vec within_vector(Vec v) {
    if constexpr (kDistance >= kLanes) {
        return v;
    } else {
        Vec sign;
        for (int i = 0; i < kLanes; i++) sign[i] = i & kDistance ? -1.0f : 1.0f;
        return within_vector<2 * kDistance>(mirrored<kDistance>(v) + v * sign);
    }
}

// The Walsh-Hadamard transform in place, not normalized, in the order of Sylvester's construction; dim is a power of two.
inline void walsh_hadamard(float* x, int dim) {
    int h = 1;
    if (dim % kLanes == 0) {
        for (int c = 0; c < dim; c += kLanes) store(x + c, within_vector<1>(load(x + c)));
        h = kLanes;
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
