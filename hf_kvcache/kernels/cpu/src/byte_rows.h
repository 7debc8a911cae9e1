// Rows of bytes (levels, or codes of 8 bits) as numbers, and the split of floats into bytes for integer products with them.
// page_side.h reads rows as floats by `Byte`; dot_vnni.h, dot_amx.h and dot_neon.h use the split, and dot_avx2.h keeps the 16 bits
// together.
//
// The value of a byte is `byte - kBias`, centered: rounding errors are proportional to the values, and the rotation back would
// gather the error of a mean that all channels share in one channel. For integer products the float side is split in two signed
// bytes, 16 bits in all: x = unit * (256 * high + low). The sums are exact in int32, so the error is that of the split: at most
// 2^-16 of the largest |x|.
#pragma once

#include "dot_float.h"

namespace {

constexpr int kBias = 128;

struct Byte {
    static constexpr int kBytes = 1;
    static Vec load_vec(const uint8_t* p) {
// GCC would convert a vector byte by byte.
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

#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)

constexpr int kLargestUnits = 32512;  // 127 * 256: the high byte stays within 127

// What to add to the sums of a row of factors because of its rounding. The rounding error of the row, total - unit * sum,
// multiplies the mean of the codes in all channels alike, and the rotation back would gather these errors in one channel.
// offset: as in HfkvSide; start: -kBias times the sum.
inline float rest_of_mean(int offset, float total, float unit, int32_t start) {
    const float mean = offset ? -0.5f : 0.0f;  // of the bytes less the bias; tables are symmetric
    return mean * (total - unit * (float)(start / -kBias));
}

#endif  // __AVX2__ || __ARM_FEATURE_DOTPROD

#if defined(__AVX512VNNI__)

inline int padded(int n) { return (n + 63) & ~63; }

// The sum of the lanes of each of four vectors.
inline __m128i four_sums(const __m512i v[4]) {
    const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    const __m512i c = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    const __m256i d = _mm256_add_epi32(_mm512_castsi512_si256(c), _mm512_extracti64x4_epi64(c, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(d), _mm256_extracti128_si256(d, 1));
}

// The high and the low bytes of the 64 numbers of four vectors: byte 16 r + 4 j + i belongs to v[j][4 r + i].
inline void split_bytes(const __m512i v[4], __m512i& high, __m512i& low) {
    const __m512i a = _mm512_packs_epi32(v[0], v[1]), b = _mm512_packs_epi32(v[2], v[3]);
    const __m512i half = _mm512_set1_epi16(128), mask = _mm512_set1_epi16(255);
    high = _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(a, half), 8), _mm512_srai_epi16(_mm512_add_epi16(b, half), 8));
    low = _mm512_packus_epi16(_mm512_and_si512(a, mask), _mm512_and_si512(b, mask));
}

#endif  // __AVX512VNNI__

}  // namespace
