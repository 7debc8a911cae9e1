// Packing of pages: rotates, quantizes and packs one side of pages into records, hfkv_encode. kernels.inc exports it; the codecs in
// hf_kvcache/codecs define and explain the methods. Sums run in another order than in torch, so a number on the edge between two
// levels may get the other code.
#pragma once

#include <cstdlib>

#include "rotate.h"
#include "workspace.h"

namespace {

constexpr float kTiny = 1e-6f, kLargestHalf = 65504.0f, kSmallestStep = 6.103515625e-05f;

inline uint16_t to_half(float x) {
    x = x > kLargestHalf ? kLargestHalf : x < -kLargestHalf ? -kLargestHalf : x;
#if defined(__F16C__)
    return (uint16_t)_cvtss_sh(x, 0);
#else
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
    bits &= 0x7fffffff;
    if (bits < 0x38800000) {  // subnormal: after adding 0.5, the low bits are x in units of 2^-24, rounded
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        std::memcpy(&bits, &magnitude, 4);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    bits += 0xfff + ((bits >> 13) & 1);  // to nearest, ties to even
    return (uint16_t)(sign | ((bits - 0x38000000) >> 13));
#endif
}

// Stores x in half precision and returns it as it will be read.
inline float stored(float x, uint8_t* field, int index) {
    const uint16_t h = to_half(x);
    std::memcpy(field + 2 * index, &h, 2);
    return from_half(h);
}

inline float at_least(float x, float least) { return x > least ? x : least; }

// A page being packed: `tokens` vectors of `dim` floats.
struct Page {
    int tokens, dim;
    float* x;        // [tokens, dim], rotated, less the key mean
    float* levels;   // [tokens, dim]
    uint8_t* codes;  // [tokens, dim]
    float* by_token;
    float* by_channel[6];
};

// Levels nearest to x, and their codes: a code is the number of edges between levels that lie below x.
inline void nearest_levels(const float* x, int n, const HfkvGrid& grid, float* levels, uint8_t* codes) {
    int i = 0;
#if defined(__AVX512F__)
    const __m512 table = _mm512_loadu_ps(grid.levels);
    for (; i + 16 <= n; i += 16) {
        const __m512 v = _mm512_loadu_ps(x + i);
        __m512i code = _mm512_setzero_si512();
        for (int e = 0; e + 1 < grid.count; e++)
            code = _mm512_mask_add_epi32(code, _mm512_cmp_ps_mask(v, _mm512_set1_ps(grid.edges[e]), _CMP_GT_OQ), code,
                                         _mm512_set1_epi32(1));
        _mm512_storeu_ps(levels + i, _mm512_permutexvar_ps(code, table));
        _mm_storeu_si128((__m128i*)(codes + i), _mm512_cvtepi32_epi8(code));
    }
#endif
    for (; i < n; i++) {
        int code = 0;
        for (int e = 0; e + 1 < grid.count; e++) code += x[i] > grid.edges[e];
        levels[i] = grid.levels[code];
        codes[i] = (uint8_t)code;
    }
}

// Levels of (x / gain - zero) / scale, and their codes.
inline void quantize_page(Page& p, const float* gain, const float* zero, const float* scale, const HfkvGrid& grid) {
    for (int t = 0; t < p.tokens; t++) {
        const float* x = p.x + t * p.dim;
        float* y = p.levels + t * p.dim;
        const float inverse = 1.0f / gain[t];
        for (int c = 0; c < p.dim; c++) y[c] = (x[c] * inverse - zero[c]) / scale[c];
        nearest_levels(y, p.dim, grid, y, p.codes + t * p.dim);
    }
}

// Finds the scale and the zero point of each channel that bring levels * scale + zero closest to x / gain.
inline void fit_line(const Page& p, const float* gain, float* scale, float* zero) {
    float* level_mean = p.by_channel[4];
    float* mean = p.by_channel[5];
    for (int c = 0; c < p.dim; c++) level_mean[c] = mean[c] = 0;
    for (int t = 0; t < p.tokens; t++) {
        const float inverse = 1.0f / gain[t];
        for (int c = 0; c < p.dim; c++) {
            level_mean[c] += p.levels[t * p.dim + c];
            mean[c] += p.x[t * p.dim + c] * inverse;
        }
    }
    for (int c = 0; c < p.dim; c++) level_mean[c] /= (float)p.tokens, mean[c] /= (float)p.tokens, scale[c] = zero[c] = 0;
    for (int t = 0; t < p.tokens; t++) {
        const float inverse = 1.0f / gain[t];
        for (int c = 0; c < p.dim; c++) {
            const float spread = p.levels[t * p.dim + c] - level_mean[c];
            scale[c] += spread * (p.x[t * p.dim + c] * inverse - mean[c]);
            zero[c] += spread * spread;
        }
    }
    for (int c = 0; c < p.dim; c++) {
        scale[c] = at_least(scale[c] / at_least(zero[c], kTiny), kTiny);
        zero[c] = mean[c] - scale[c] * level_mean[c];
    }
}

// Finds a gain of each token, and a mean and a scale of each channel, that make the entries of a page close to N(0, 1).
inline void normalize(const Page& p, float* gain, float* scale, float* mean) {
    for (int t = 0; t < p.tokens; t++) gain[t] = 1;
    for (int round = 0; round < 3; round++) {
        for (int c = 0; c < p.dim; c++) mean[c] = scale[c] = 0;
        for (int t = 0; t < p.tokens; t++) {
            const float inverse = 1.0f / gain[t];
            for (int c = 0; c < p.dim; c++) mean[c] += p.x[t * p.dim + c] * inverse;
        }
        for (int c = 0; c < p.dim; c++) mean[c] /= (float)p.tokens;
        for (int t = 0; t < p.tokens; t++) {
            const float inverse = 1.0f / gain[t];
            for (int c = 0; c < p.dim; c++) {
                const float d = p.x[t * p.dim + c] * inverse - mean[c];
                scale[c] += d * d;
            }
        }
        for (int c = 0; c < p.dim; c++) scale[c] = at_least(__builtin_sqrtf(scale[c] / (float)p.tokens), kTiny);
        if (round == 2) return;
        for (int t = 0; t < p.tokens; t++) {
            float total = 0;
            for (int c = 0; c < p.dim; c++) {
                const float d = (p.x[t * p.dim + c] - mean[c] * gain[t]) / scale[c];
                total += d * d;
            }
            gain[t] = at_least(__builtin_sqrtf(total / (float)p.dim), 1e-4f);
        }
    }
}

struct Products {
    float xx, xy, yy;
};

template <class Approximation>
inline Products products(const float* x, int dim, const Approximation& y) {
    Products sums = {0, 0, 0};
    for (int c = 0; c < dim; c++) {
        const float b = y(c);
        sums.xx += x[c] * x[c], sums.xy += x[c] * b, sums.yy += b * b;
    }
    return sums;
}

// hf_kvcache.codecs.unbiased.unbiased_gain
inline float unbiased_gain(const Products& p) {
    constexpr float kPoor = 0.75f;
    const float length = __builtin_sqrtf(p.xx), other = at_least(__builtin_sqrtf(p.yy), kTiny);
    const float cosine = p.xy / at_least(length * other, kTiny);
    const float slope = cosine >= kPoor ? 1.0f / cosine : at_least(cosine, 0) / (kPoor * kPoor);
    return slope * length / other;
}

inline void encode_unbiased_keys(const HfkvSide& side, const HfkvGrid& grid, Page& p, uint8_t* record) {
    float* gain = p.by_token;
    float* scale = p.by_channel[0];
    float* zero = p.by_channel[1];
    float* fitted_scale = p.by_channel[2];
    float* fitted_zero = p.by_channel[3];
    normalize(p, gain, scale, zero);
    quantize_page(p, gain, zero, scale, grid);
    fit_line(p, gain, fitted_scale, fitted_zero);
    for (int t = 0; t < p.tokens; t++) {
        const float* levels = p.levels + t * p.dim;
        const Products sums =
            products(p.x + t * p.dim, p.dim, [&](int c) { return levels[c] * fitted_scale[c] + fitted_zero[c]; });
        const float fitted = sums.xy / at_least(sums.yy, kTiny);
        if (fitted > gain[t] / 4) gain[t] = fitted;
    }
    for (int c = 0; c < p.dim; c++) {
        scale[c] = at_least(from_half(to_half(fitted_scale[c])), kTiny);
        zero[c] = from_half(to_half(fitted_zero[c]));
    }
    quantize_page(p, gain, zero, scale, grid);
    fit_line(p, gain, fitted_scale, fitted_zero);
    for (int c = 0; c < p.dim; c++) {
        scale[c] = stored(fitted_scale[c], record + side.scale, c);
        zero[c] = stored(fitted_zero[c], record + side.zero, c);
    }
    // The gain is fitted last, to what will be decoded, and so takes up the rounding of the other two.
    for (int t = 0; t < p.tokens; t++) {
        const float* levels = p.levels + t * p.dim;
        const Products sums = products(p.x + t * p.dim, p.dim, [&](int c) { return levels[c] * scale[c] + zero[c]; });
        stored(unbiased_gain(sums), record + side.other, t);
    }
}

inline void encode_unbiased_values(const HfkvSide& side, const HfkvGrid& grid, Page& p, uint8_t* record) {
    for (int t = 0; t < p.tokens; t++) {
        const float* x = p.x + t * p.dim;
        float* levels = p.levels + t * p.dim;
        uint8_t* codes = p.codes + t * p.dim;
        const auto level = [&](int c) { return levels[c]; };
        float total = 0;
        for (int c = 0; c < p.dim; c++) total += x[c] * x[c];
        float scale = at_least(__builtin_sqrtf(total / (float)p.dim), kTiny);
        for (int pass = 0; pass < 2; pass++) {
            const float inverse = 1.0f / scale;
            for (int c = 0; c < p.dim; c++) levels[c] = x[c] * inverse;
            nearest_levels(levels, p.dim, grid, levels, codes);
            const Products sums = products(x, p.dim, level);
            scale = pass ? unbiased_gain(sums) : at_least(from_half(to_half(sums.xy / sums.yy)), kTiny);
        }
        stored(scale, record + side.scale, t);
    }
}

// TurboQuant: the scale is the norm, corrected so that the decoded vector is as long as the original one.
inline void encode_norm(const HfkvSide& side, const HfkvGrid& grid, Page& p, uint8_t* record) {
    for (int t = 0; t < p.tokens; t++) {
        const float* x = p.x + t * p.dim;
        float* levels = p.levels + t * p.dim;
        float total = 0, decoded = 0;
        for (int c = 0; c < p.dim; c++) total += x[c] * x[c];
        const float norm = __builtin_sqrtf(total), inverse = __builtin_sqrtf((float)p.dim) / at_least(norm, 1e-12f);
        for (int c = 0; c < p.dim; c++) levels[c] = x[c] * inverse;
        nearest_levels(levels, p.dim, grid, levels, p.codes + t * p.dim);
        for (int c = 0; c < p.dim; c++) decoded += levels[c] * levels[c];
        stored(norm / __builtin_sqrtf(decoded), record + side.scale, t);
    }
}

// KIVI: a scale and a zero point for each group of tokens or channels, both rounded before the codes are chosen.
inline void encode_integer(const HfkvSide& side, Page& p, uint8_t* record) {
    const bool by_channel = side.axis == HFKV_CHANNEL;
    const float most = (float)((1 << side.bits) - 1);
    const int groups = by_channel ? p.tokens / side.group : p.dim / side.group;
    const int lanes = by_channel ? p.dim : 1;  // neighboring elements that have scales of their own
    float* low = p.by_channel[0];
    float* high = p.by_channel[1];
    for (int outer = 0; outer < (by_channel ? groups : p.tokens); outer++) {
        for (int g = 0; g < (by_channel ? 1 : groups); g++) {
            const float* x = by_channel ? p.x + outer * side.group * p.dim : p.x + outer * p.dim + g * side.group;
            uint8_t* codes = p.codes + (x - p.x);
            const int step = by_channel ? p.dim : 1;  // from a member of a group to the next
            for (int c = 0; c < lanes; c++) low[c] = high[c] = x[c];
            for (int i = 1; i < side.group; i++)
                for (int c = 0; c < lanes; c++) {
                    const float v = x[i * step + c];
                    low[c] = v < low[c] ? v : low[c];
                    high[c] = v > high[c] ? v : high[c];
                }
            const int first = by_channel ? outer * p.dim : outer * groups + g;
            for (int c = 0; c < lanes; c++) {
                low[c] = stored(low[c], record + side.zero, first + c);
                high[c] = stored(at_least((high[c] - low[c]) / most, kSmallestStep), record + side.scale, first + c);
            }
            for (int i = 0; i < side.group; i++)
                for (int c = 0; c < lanes; c++) {
                    const float code = __builtin_rintf((x[i * step + c] - low[c]) / high[c]);
                    codes[i * step + c] = (uint8_t)(!(code > 0) ? 0 : code > most ? most : code);  // NaN becomes 0
                }
        }
    }
}

// Packs codes of a byte each to planes of 1, 2, 4 or 8 bits, the widest first; hf_kvcache/kernels/reference/pack.py defines this.
inline void pack_row(const uint8_t* codes, int bits, int dim, uint8_t* out) {
    int shift = 0;
    for (int width = 8; width; width /= 2) {
        if (!(bits & width)) continue;
        const int length = dim * width / 8, mask = (1 << width) - 1;
        for (int j = 0; j < length; j++) out[j] = (uint8_t)((codes[j] >> shift) & mask);
        for (int s = 1; s < 8 / width; s++)
            for (int j = 0; j < length; j++) out[j] |= (uint8_t)(((codes[s * length + j] >> shift) & mask) << (s * width));
        out += length;
        shift += width;
    }
}

inline void encode_page(const HfkvEncode& call, const HfkvSide& side, int64_t index, Page& p, float* raw) {
    uint8_t* record = call.records + index * call.layout->record_bytes;
    const float* key_mean = call.key_mean ? call.key_mean + index * side.dim : nullptr;
    const float* key_scale = call.key_scale ? call.key_scale + index * side.dim : nullptr;
    for (int t = 0; t < p.tokens; t++) {
        const float* from = call.x + (index * p.tokens + t) * side.dim;
        float* to = p.x + t * side.dim;
        if (side.rotation == 2 && !key_scale) {
            rotate(side, from, false, to);
        } else {
            for (int c = 0; c < side.dim; c++) raw[c] = key_scale ? from[c] / key_scale[c] : from[c];
            rotate(side, raw, false, to);
        }
        if (key_mean)
            for (int c = 0; c < side.dim; c++) to[c] -= key_mean[c];
    }
    switch (call.method) {
        case HFKV_INTEGER: encode_integer(side, p, record); break;
        case HFKV_UNBIASED_KEYS: encode_unbiased_keys(side, call.grid, p, record); break;
        case HFKV_UNBIASED_VALUES: encode_unbiased_values(side, call.grid, p, record); break;
        default: encode_norm(side, call.grid, p, record);
    }
    for (int t = 0; t < p.tokens; t++)
        pack_row(p.codes + t * side.dim, side.bits, side.dim, record + side.codes + t * (side.dim * side.bits / 8));
}

inline int encode_pages(const HfkvEncode& call) {
    const HfkvSide& side = call.values ? call.layout->values : call.layout->keys;
    const int tokens = call.layout->page_size, dim = side.dim;
    const size_t elements = (size_t)tokens * dim, floats = 2 * elements + tokens + 7 * (size_t)dim;
    const size_t bytes = (floats * sizeof(float) + elements + 63) & ~(size_t)63;
    const Workspace workspace(bytes * call.threads);
    char* memory = workspace.at();
    if (!memory) return 1;
#pragma omp parallel num_threads(call.threads)
    {
#if defined(_OPENMP)
        float* at = (float*)(memory + bytes * omp_get_thread_num());
#else
        float* at = (float*)memory;
#endif
        Page p = {tokens, dim, at, at + elements, nullptr, at + 2 * elements, {}};
        float* channels = p.by_token + tokens;
        for (int i = 0; i < 6; i++) p.by_channel[i] = channels + (size_t)i * dim;
        float* raw = channels + 6 * (size_t)dim;
        p.codes = (uint8_t*)(raw + dim);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < call.pages; i++) encode_page(call, side, i, p, raw);
    }
    return 0;
}

}  // namespace
