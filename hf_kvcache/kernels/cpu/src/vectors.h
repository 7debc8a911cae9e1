// Vectors of floats by the vector extensions of GCC and Clang, so that one source serves SSE2, NEON, AVX2 and AVX-512; and
// the prefetch of the next record. All other headers build on this one.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define HFKV_LANES 16
#elif defined(__AVX__)
#define HFKV_LANES 8
#else
#define HFKV_LANES 4
#endif

// Small functions of inner loops. Left to itself, GCC stops inlining where a translation unit has grown by so much, and then leaves
// out of line whatever it comes to: a transposition of registers in the middle of a loop, by way of memory.
#define HFKV_INLINE inline __attribute__((always_inline))

// Nothing here may have external linkage. Every translation unit is compiled for another instruction set, and the linker would
// keep one copy of a function for all of them.
namespace {

constexpr int kLanes = HFKV_LANES;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
typedef float Vec __attribute__((vector_size(4 * HFKV_LANES)));
typedef int32_t VecInt __attribute__((vector_size(4 * HFKV_LANES)));

HFKV_INLINE Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

HFKV_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

HFKV_INLINE Vec splat(float x) { return x - Vec{}; }

HFKV_INLINE Vec select(VecInt condition, Vec yes, Vec no) {
    return (Vec)((condition & (VecInt)yes) | (~condition & (VecInt)no));
}

HFKV_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return select(a > b, a, b);
#endif
}

#if defined(__AVX__)
inline float sum_of_eight(__m256 v) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

inline float largest_of_eight(__m256 v) {
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}
#endif

#if defined(__AVX__)
// The sum of the lanes of each of four vectors.
inline __m128 sums_of_four(const Vec* v) {
    __m256 w[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
#if defined(__AVX512F__)
        w[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[i]), _mm512_extractf32x8_ps((__m512)v[i], 1));
#else
        w[i] = (__m256)v[i];
#endif
    const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(w[0], w[1]), _mm256_hadd_ps(w[2], w[3]));
    return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}
#endif

inline float sum(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX__)
    return sum_of_eight((__m256)v);
#elif defined(__aarch64__)
    return vaddvq_f32((float32x4_t)v);
#else
    float total = 0;
    for (int i = 0; i < kLanes; i++) total += v[i];
    return total;
#endif
}

// Prefetches the next record, a few cache lines at a time, while the current one is computed with. A core's own prefetcher
// stops at every 4 KiB; without this the core would wait for memory at the start of a record and leave memory idle at its end.
// A core can have few lines under way, so requests that come faster than memory answers would hold up the work. The lines go to
// the second-level cache: the first level has no room for two pages and the levels of one.
struct Stream {
    const uint8_t* at = nullptr;
    const uint8_t* goal = nullptr;  // how far to fetch for the work done so far
    const uint8_t* end = nullptr;
    int64_t share = 0;  // bytes to fetch for a unit of work

    // Units of work of a page: 48 for the scores, 48 for the weighted values, and four for the softmax of each query.
    static constexpr int kUnits = 108;

    void begin(const uint8_t* record, int64_t bytes) {
        at = goal = record, end = record ? record + bytes : nullptr;
        share = bytes / kUnits + 1;
    }
    void work(int units) { fetch(units * share); }
    // The bytes to fetch for so many units divided by `parts`, and their fetching: where records are so large that those of a unit
    // at once would hold up the work.
    int64_t bytes(int units, int parts) const { return units * share / parts + 1; }
    void fetch(int64_t bytes) {
        if (at >= end) return;
        // The last prefetch may be of a line behind the record, which is harmless wherever it lies.
        for (goal += bytes; at < goal; at += 64) __builtin_prefetch(at, 0, 2);
    }
};

inline float largest(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#elif defined(__AVX__)
    return largest_of_eight((__m256)v);
#elif defined(__aarch64__)
    return vmaxnmvq_f32((float32x4_t)v);
#else
    float top = v[0];
    for (int i = 1; i < kLanes; i++) top = v[i] > top ? v[i] : top;
    return top;
#endif
}

inline float larger(float a, float b) { return a > b ? a : b; }

constexpr float kMinusInfinity = -__builtin_inff();

// e^x for x <= 88 with a relative error below 2e-7, and 0 for x < -87, -inf included.
HFKV_INLINE Vec exponential(Vec x) {
#if !defined(__AVX512F__)
    const VecInt vanishes = x < splat(-87.0f);
    x = select(vanishes, splat(-87.0f), x);
#endif
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const Vec magic = splat(12582912.0f);
    const Vec shifted = x * splat(1.44269504088896341f) + magic;
    const Vec n = shifted - magic;
    const Vec r = (x - n * splat(0.693145751953125f)) - n * splat(1.428606765330187e-6f);
    Vec p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
#if defined(__AVX512F__)
    const __mmask16 remains = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);  // NaN too
    return (Vec)_mm512_maskz_scalef_ps(remains, (__m512)p, (__m512)n);
#else
    const VecInt power = ((VecInt)shifted - (VecInt)magic) << 23;
    return select(vanishes, splat(0.0f), (Vec)((VecInt)p + power));
#endif
}

inline Vec hyperbolic_tangent(Vec x) {
    // Beyond 20, tanh is 1 in float32 and e^(2x) would overflow further on.
    x = select(x > splat(20.0f), splat(20.0f), x);
    return splat(1.0f) - splat(2.0f) / (exponential(x + x) + splat(1.0f));
}

inline float from_half(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#elif defined(__aarch64__)
    __fp16 half;
    std::memcpy(&half, &h, 2);
    return half;
#else
    uint32_t bits = (uint32_t)(h & 0x7fff) << 13;
    float x;
    std::memcpy(&x, &bits, 4);
    x *= 0x1p112f;  // the biases of the exponents differ by 112; this is right for subnormal halves too
    if ((h & 0x7c00) == 0x7c00) x = (h & 0x3ff) ? __builtin_nanf("") : __builtin_inff();
    return (h & 0x8000) ? -x : x;
#endif
}

inline void halves(const uint8_t* p, int n, float* out) {
    int i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + 2 * i))));
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 2 * i))));
#elif defined(__aarch64__)
    for (; i + 4 <= n; i += 4) vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p + 2 * i))));
#endif
    for (; i < n; i++) {
        uint16_t h;
        std::memcpy(&h, p + 2 * i, 2);
        out[i] = from_half(h);
    }
}

// e4m3 by way of half precision, which has the same layout with another bias. e4m3 has no infinities, and codecs store no NaN.
inline float from_float8(uint8_t x) {
    return 256.0f * from_half((uint16_t)(((x & 0x80) << 8) | ((x & 0x7f) << 7)));
}

}  // namespace
