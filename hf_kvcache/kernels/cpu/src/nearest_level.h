// The nearest level of each element of a vector, found in a binary tree of the edges between levels. encode.h quantizes by it.
#pragma once

#include "api.h"
#include "vectors.h"

namespace {

// Up to 2^kDepth ascending levels. Node `p` at depth k is the edge that decides the next bit of codes that begin with the k bits p.
template <int kDepth>
class LevelTree {
public:
    explicit LevelTree(const HfkvGrid& grid) {
        constexpr int kLevels = 1 << kDepth;
        const int last = grid.count > 1 ? grid.count - 1 : 0;
        for (int i = 0; i < 16; i++) levels_[i] = grid.levels[i < last ? i : last];
        for (int k = 0; k < kDepth; k++)
            for (int p = 0; p < 16; p++) {
                const int edge = (p % (1 << k)) * (kLevels >> k) + (kLevels >> (k + 1)) - 1;
                nodes_[k][p] = edge < last ? grid.edges[edge] : __builtin_inff();
            }
    }

    // The levels nearest to x; their codes, the number of edges below x, are stored as bytes.
    Vec nearest(Vec x, uint8_t* codes) const {
#if defined(__AVX512F__)
        __m512i code = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int k = 0; k < kDepth; k++) {
            const __m512 edge = k ? _mm512_permutexvar_ps(code, _mm512_load_ps(nodes_[k])) : _mm512_set1_ps(nodes_[0][0]);
            const __mmask16 above = _mm512_cmp_ps_mask((__m512)x, edge, _CMP_GT_OQ);
            code = _mm512_add_epi32(code, code);
            code = _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(1));
        }
        _mm_storeu_si128((__m128i*)codes, _mm512_cvtepi32_epi8(code));
        return (Vec)_mm512_permutexvar_ps(code, _mm512_load_ps(levels_));
#elif defined(__AVX2__)
        __m256i code = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int k = 0; k < kDepth; k++) {
            const __m256 edge = k ? _mm256_permutevar8x32_ps(_mm256_load_ps(nodes_[k]), code) : _mm256_set1_ps(nodes_[0][0]);
            const __m256i above = _mm256_castps_si256(_mm256_cmp_ps((__m256)x, edge, _CMP_GT_OQ));
            code = _mm256_sub_epi32(_mm256_add_epi32(code, code), above);
        }
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
        _mm_storel_epi64((__m128i*)codes, _mm_packus_epi16(words, words));
        const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(levels_), code);
        if (kDepth < 4) return (Vec)low;
        const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(levels_ + 8), code);
        return (Vec)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
#else
        Vec levels;
        for (int i = 0; i < kLanes; i++) {
            int code = 0;
            for (int k = 0; k < kDepth; k++) code = 2 * code + (x[i] > nodes_[k][code]);
            codes[i] = (uint8_t)code;
            levels[i] = levels_[code];
        }
        return levels;
#endif
    }

private:
    alignas(64) float levels_[16];
    alignas(64) float nodes_[kDepth][16];
};

}  // namespace
