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

// Dot products of `count` queries with n rows of elements `stride` bytes apart: scores[m * pitch + t].
template <class Element, int M>
void dot_elements(const uint8_t* rows, int64_t stride, int n, int dim, const float* query, int query_pitch, float* scores,
                  int pitch, Stream& next) {
    for (int t = 0; t < n; t++) {
        const uint8_t* row = rows + t * stride;
        if (t % 16 == 0) next.work(6);
        Vec total[M];
        for (int m = 0; m < M; m++) total[m] = splat(0.0f);
        int c = 0;
        for (; c + kLanes <= dim; c += kLanes) {
            const Vec x = Element::load_vec(row + c * Element::kBytes);
            for (int m = 0; m < M; m++) total[m] += x * load(query + m * query_pitch + c);
        }
        float rest[M];
        for (int m = 0; m < M; m++) rest[m] = 0;
        for (; c < dim; c++) {
            const float x = Element::load_one(row + c * Element::kBytes);
            for (int m = 0; m < M; m++) rest[m] += x * query[m * query_pitch + c];
        }
        for (int m = 0; m < M; m++) scores[m * pitch + t] = sum(total[m]) + rest[m];
    }
}

// output[m * output_pitch + c] += sum over t of weights[m * pitch + t] * element[t][c]; the sums stay in registers.
template <class Element, int M>
void weigh_elements(const uint8_t* rows, int64_t stride, int n, int dim, const float* weights, int pitch, float* output,
                    int output_pitch, Stream& next) {
    constexpr int kVectors = 16 / M > 4 ? 4 : 16 / M;
    int c = 0;
    for (; c + kVectors * kLanes <= dim; c += kVectors * kLanes) {
        Vec total[M][kVectors];
        for (int m = 0; m < M; m++)
            for (int v = 0; v < kVectors; v++) total[m][v] = load(output + m * output_pitch + c + v * kLanes);
        for (int t = 0; t < n; t++) {
            const uint8_t* row = rows + t * stride + c * Element::kBytes;
            if (c == 0 && t % 16 == 0) next.work(6);
            Vec x[kVectors];
            for (int v = 0; v < kVectors; v++) x[v] = Element::load_vec(row + v * kLanes * Element::kBytes);
            for (int m = 0; m < M; m++) {
                const Vec w = splat(weights[m * pitch + t]);
                for (int v = 0; v < kVectors; v++) total[m][v] += w * x[v];
            }
        }
        for (int m = 0; m < M; m++)
            for (int v = 0; v < kVectors; v++) store(output + m * output_pitch + c + v * kLanes, total[m][v]);
    }
    for (; c + kLanes <= dim; c += kLanes) {
        Vec total[M];
        for (int m = 0; m < M; m++) total[m] = load(output + m * output_pitch + c);
        for (int t = 0; t < n; t++) {
            const Vec x = Element::load_vec(rows + t * stride + c * Element::kBytes);
            for (int m = 0; m < M; m++) total[m] += splat(weights[m * pitch + t]) * x;
        }
        for (int m = 0; m < M; m++) store(output + m * output_pitch + c, total[m]);
    }
    for (; c < dim; c++)
        for (int t = 0; t < n; t++) {
            const float x = Element::load_one(rows + t * stride + c * Element::kBytes);
            for (int m = 0; m < M; m++) output[m * output_pitch + c] += weights[m * pitch + t] * x;
        }
}

}  // namespace
