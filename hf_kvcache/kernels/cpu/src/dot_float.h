// Dot products and weighted sums of rows of elements in float32, on every instruction set, and the types of elements: float32,
// bfloat16, float16 and e4m3. page_side.h and attention.h use it wherever integer products do not apply.
#pragma once

#include "vectors.h"

namespace {

struct Float32 {
    static constexpr int kBytes = 4;
    static Vec load_vec(const uint8_t* p) { return load((const float*)p); }
    static float load_one(const uint8_t* p) {
        float x;
        std::memcpy(&x, p, 4);
        return x;
    }
};

struct BFloat16 {
    static constexpr int kBytes = 2;
    static Vec load_vec(const uint8_t* p) {
// GCC would convert the vector in two halves and join them again.
#if defined(__AVX512F__)
        return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
        return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
        typedef uint16_t Half __attribute__((vector_size(2 * HFKV_LANES)));
        typedef uint32_t Word __attribute__((vector_size(4 * HFKV_LANES)));
        Half h;
        std::memcpy(&h, p, sizeof h);
        return (Vec)(__builtin_convertvector(h, Word) << 16);
#endif
    }
    static float load_one(const uint8_t* p) {
        uint16_t h;
        std::memcpy(&h, p, 2);
        uint32_t bits = (uint32_t)h << 16;
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
};

struct Float16 {
    static constexpr int kBytes = 2;
    static Vec load_vec(const uint8_t* p) {
        float x[kLanes];
        halves(p, kLanes, x);
        return load(x);
    }
    static float load_one(const uint8_t* p) {
        uint16_t h;
        std::memcpy(&h, p, 2);
        return from_half(h);
    }
};

struct Float8 {
    static constexpr int kBytes = 1;
    static Vec load_vec(const uint8_t* p) {
#if defined(__AVX512F__)
        const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
        const __m512i magnitude = _mm512_slli_epi32(_mm512_and_si512(x, _mm512_set1_epi32(0x7f)), 7);
        const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(x, _mm512_set1_epi32(0x80)), 8);
        const __m256i half = _mm512_cvtepi32_epi16(_mm512_or_si512(magnitude, sign));
        return (Vec)_mm512_cvtph_ps(half) * splat(256.0f);
#else
        uint8_t as_half[2 * kLanes];
        for (int i = 0; i < kLanes; i++) {
            const uint16_t h = (uint16_t)(((p[i] & 0x80) << 8) | ((p[i] & 0x7f) << 7));
            std::memcpy(as_half + 2 * i, &h, 2);
        }
        float x[kLanes];
        halves(as_half, kLanes, x);
        return load(x) * splat(256.0f);
#endif
    }
    static float load_one(const uint8_t* p) { return from_float8(*p); }
};

// The sums of the lanes of N vectors, each to out[i * pitch].
template <int N>
HFKV_INLINE void store_sums(const Vec* v, float* out, int64_t pitch) {
    int i = 0;
#if defined(__AVX__)
#pragma GCC unroll 4
    for (; i + 4 <= N; i += 4) {
        alignas(16) float four[4];
        _mm_store_ps(four, sums_of_four(v + i));
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) out[(i + j) * pitch] = four[j];
    }
#endif
#pragma GCC unroll 4
    for (; i < N; i++) out[i * pitch] = sum(v[i]);
}

// Dot products of M queries with T rows: scores[m * pitch + t].
template <class Element, int M, int T>
HFKV_INLINE void dot_some(const uint8_t* rows, int64_t stride, int dim, const float* query, int query_pitch, float* scores,
                          int pitch) {
    Vec total[T][M];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) total[t][m] = splat(0.0f);
    int c = 0;
    for (; c + kLanes <= dim; c += kLanes) {
        Vec x[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) x[t] = Element::load_vec(rows + t * stride + c * Element::kBytes);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            const Vec q = load(query + m * query_pitch + c);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) total[t][m] += x[t] * q;
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) store_sums<M>(total[t], scores + t, pitch);
    for (; c < dim; c++)
        for (int t = 0; t < T; t++) {
            const float x = Element::load_one(rows + t * stride + c * Element::kBytes);
            for (int m = 0; m < M; m++) scores[m * pitch + t] += x * query[m * query_pitch + c];
        }
}

// Dot products of M queries with n rows of elements `stride` bytes apart: scores[m * pitch + t].
template <class Element, int M>
void dot_elements(const uint8_t* rows, int64_t stride, int n, int dim, const float* query, int query_pitch, float* scores,
                  int pitch, Stream& next) {
    // Several rows at once, so that there are other sums to add to while one is under way.
    constexpr int kRows = M == 1 ? 4 : 2;
    const int64_t ahead = next.bytes(6 * kRows, 16);
    int t = 0;
    for (; t + kRows <= n; t += kRows) {
        next.fetch(ahead);
        dot_some<Element, M, kRows>(rows + t * stride, stride, dim, query, query_pitch, scores + t, pitch);
    }
    for (; t < n; t++) dot_some<Element, M, 1>(rows + t * stride, stride, dim, query, query_pitch, scores + t, pitch);
}

// output[m * output_pitch + c] += sum over t of weights[m * pitch + t] * element[t][c], for V vectors of channels from c on; the
// sums stay in registers.
template <class Element, int M, int V>
HFKV_INLINE void weigh_some(const uint8_t* rows, int64_t stride, int n, int dim, int c, const float* weights, int pitch,
                            float* output, int output_pitch, Stream& next) {
    const int64_t ahead = next.bytes(12 * V * kLanes, 16 * dim);
    Vec total[M][V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) total[m][v] = load(output + m * output_pitch + c + v * kLanes);
    for (int t = 0; t < n; t++) {
        const uint8_t* row = rows + t * stride + c * Element::kBytes;
        if (t % 2 == 0) next.fetch(ahead);
        Vec x[V];
        for (int v = 0; v < V; v++) x[v] = Element::load_vec(row + v * kLanes * Element::kBytes);
        for (int m = 0; m < M; m++) {
            const Vec w = splat(weights[m * pitch + t]);
            for (int v = 0; v < V; v++) total[m][v] += w * x[v];
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) store(output + m * output_pitch + c + v * kLanes, total[m][v]);
}

// The same for all channels.
template <class Element, int M>
void weigh_elements(const uint8_t* rows, int64_t stride, int n, int dim, const float* weights, int pitch, float* output,
                    int output_pitch, Stream& next) {
    // Sums, elements and a weight have to fit in the registers.
    constexpr int kVectors = M <= 2 || kRegisters == 32 ? 4 : 2;
    int c = 0;
    for (; c + kVectors * kLanes <= dim; c += kVectors * kLanes)
        weigh_some<Element, M, kVectors>(rows, stride, n, dim, c, weights, pitch, output, output_pitch, next);
    for (; c + kLanes <= dim; c += kLanes)
        weigh_some<Element, M, 1>(rows, stride, n, dim, c, weights, pitch, output, output_pitch, next);
    for (; c < dim; c++)
        for (int t = 0; t < n; t++) {
            const float x = Element::load_one(rows + t * stride + c * Element::kBytes);
            for (int m = 0; m < M; m++) output[m * output_pitch + c] += weights[m * pitch + t] * x;
        }
}

}  // namespace
