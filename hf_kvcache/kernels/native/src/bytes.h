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

// Wider rows or longer pages could overflow int32.
constexpr int kLargestExactDim = 256, kLargestExactTokens = 256;

#if defined(__AVX512VNNI__)

// The mean of the bytes of all codes less the bias. What rounding leaves of a factor multiplies it in all channels alike, and a
// rotation back would gather that in one: so the mean is multiplied by the factors as they are.
inline float mean_level(int offset) { return offset ? -0.5f : 0.0f; }

constexpr int kLargestUnits = 32512;  // 127 * 256: the high byte stays within 127

inline int padded(int n) { return (n + 63) & ~63; }

// Sums of each of four vectors.
inline __m128i four_sums(const __m512i v[4]) {
    const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    const __m512i c = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    const __m256i d = _mm256_add_epi32(_mm512_castsi512_si256(c), _mm512_extracti64x4_epi64(c, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(d), _mm256_extracti128_si256(d, 1));
}

#endif  // __AVX512VNNI__

}  // namespace
