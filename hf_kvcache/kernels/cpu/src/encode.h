// Packing of pages: rotates, quantizes and packs keys and values into records, hfkv_encode. kernels.inc exports it; the codecs in
// hf_kvcache/codecs define and explain the methods. Sums run in another order than in torch, so a number on the edge between two
// levels may get the other code.
#pragma once

#include <cstdlib>

#include "dot_float.h"
#include "nearest_level.h"
#include "rotate.h"
#include "workspace.h"

namespace {

constexpr float kTiny = 1e-6f, kLargestHalf = 65504.0f, kSmallestStep = 6.103515625e-05f;
constexpr int64_t kOneThreadElements = 1 << 16;  // packing fewer elements takes less time than waking a thread

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

// A side of a page being packed: `tokens` rows of `dim` numbers, `pitch` apart. Behind a row stand zeros up to a multiple of a
// vector. The pitch is more than that, so that the vectors of a column do not compete for the same few lines of the first cache.
struct Page {
    int tokens, dim, pitch;
    float* x;        // rotated, less the key mean
    float* levels;
    uint8_t* codes;
    float* gain;     // [tokens]
    float* inverse;  // [tokens], of the gain
    float* raw;      // [pitch]
    float* factor;   // [pitch], by which elements are multiplied before the rotation
    float* there;    // [pitch], 1 for channels, and 0 behind them
    float* by_channel[5];

    static int pitch_of(int dim) { return (dim + 15) / 16 * 16 + 16; }
    static size_t floats(int tokens, int dim) { return 2 * (size_t)(tokens + 8) * pitch_of(dim) + 2 * (size_t)tokens; }
    static size_t bytes(int tokens, int dim) {
        const size_t all = floats(tokens, dim) * sizeof(float) + (size_t)tokens * pitch_of(dim);
        return (all + 63) & ~(size_t)63;
    }

    Page(int tokens_, int dim_, float* memory) : tokens(tokens_), dim(dim_), pitch(pitch_of(dim_)) {
        x = memory, memory += (size_t)tokens * pitch;
        levels = memory, memory += (size_t)tokens * pitch;
        raw = memory, memory += pitch;
        factor = memory, memory += pitch;
        there = memory, memory += pitch;
        for (float*& row : by_channel) row = memory, memory += pitch;
        gain = memory, memory += tokens;
        inverse = memory, memory += tokens;
        codes = (uint8_t*)memory;
        for (int c = 0; c < pitch; c++) there[c] = c < dim ? 1.0f : 0.0f, raw[c] = 0;
    }

    void set_gain(int t, float value) { gain[t] = value, inverse[t] = 1.0f / value; }
    // Sets the entries behind the last channel.
    void clear_rest(float* row) const {
        for (int c = dim; c < pitch; c++) row[c] = 0;
    }
    // A vector of levels, with 0 behind the last channel.
    Vec counted(Vec level, int c) const { return c + kLanes > dim ? level * load(there + c) : level; }
};

inline Vec square_root(Vec x) {
#if defined(__AVX512F__)
    return (Vec)_mm512_sqrt_ps((__m512)x);
#else
    for (int i = 0; i < kLanes; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// Mean and standard deviation of each channel of x / gain.
inline void moments(const Page& p, float* scale, float* mean) {
    const float share = 1.0f / (float)p.tokens;
    for (int c = 0; c < p.dim; c += kLanes) {
        Vec even = splat(0.0f), odd = splat(0.0f);
        int t = 0;
        for (; t + 2 <= p.tokens; t += 2) {
            even += load(p.x + t * p.pitch + c) * splat(p.inverse[t]);
            odd += load(p.x + (t + 1) * p.pitch + c) * splat(p.inverse[t + 1]);
        }
        for (; t < p.tokens; t++) even += load(p.x + t * p.pitch + c) * splat(p.inverse[t]);
        const Vec center = (even + odd) * splat(share);
        even = odd = splat(0.0f);
        for (t = 0; t + 2 <= p.tokens; t += 2) {
            const Vec a = load(p.x + t * p.pitch + c) * splat(p.inverse[t]) - center;
            const Vec b = load(p.x + (t + 1) * p.pitch + c) * splat(p.inverse[t + 1]) - center;
            even += a * a, odd += b * b;
        }
        for (; t < p.tokens; t++) {
            const Vec a = load(p.x + t * p.pitch + c) * splat(p.inverse[t]) - center;
            even += a * a;
        }
        store(mean + c, center);
        store(scale + c, max(square_root((even + odd) * splat(share)), splat(kTiny)));
    }
}

// inverse[c] = 1 / scale[c], and 0 behind the last channel.
inline void invert(const Page& p, const float* scale, float* inverse) {
    for (int c = 0; c < p.dim; c++) inverse[c] = 1.0f / scale[c];
    p.clear_rest(inverse);
}

// Finds a gain of each token, and a mean and a scale of each channel, that make the entries of a page close to N(0, 1).
inline void normalize(Page& p, float* scale, float* mean, float* inverse) {
    for (int t = 0; t < p.tokens; t++) p.set_gain(t, 1);
    for (int round = 0; round < 3; round++) {
        moments(p, scale, mean);
        if (round == 2) return;
        invert(p, scale, inverse);
        for (int t = 0; t < p.tokens; t++) {
            const float* x = p.x + t * p.pitch;
            const Vec gain = splat(p.gain[t]);
            Vec total = splat(0.0f);
            for (int c = 0; c < p.dim; c += kLanes) {
                const Vec d = (load(x + c) - load(mean + c) * gain) * load(inverse + c);
                total += d * d;
            }
            p.set_gain(t, at_least(__builtin_sqrtf(sum(total) / (float)p.dim), 1e-4f));
        }
    }
}

// Codes and levels of (x / gain - zero) / scale. Then finds the scale and the zero point of each channel that bring
// levels * scale + zero closest to x / gain.
template <int kDepth>
inline void quantize_and_fit(const Page& p, const LevelTree<kDepth>& tree, const float* zero, const float* scale, float* inverse,
                             float* fitted_scale, float* fitted_zero) {
    invert(p, scale, inverse);
    const Vec share = splat(1.0f / (float)p.tokens), tiny = splat(kTiny);
    for (int c = 0; c < p.dim; c += kLanes) {
        const Vec origin = load(zero + c), factor = load(inverse + c);
        Vec level_sum = splat(0.0f), x_sum = splat(0.0f);
        for (int t = 0; t < p.tokens; t++) {
            const int at = t * p.pitch + c;
            const Vec x = load(p.x + at) * splat(p.inverse[t]);
            const Vec level = tree.nearest((x - origin) * factor, p.codes + at);
            store(p.levels + at, level);
            level_sum += level, x_sum += x;
        }
        const Vec level_mean = level_sum * share, mean = x_sum * share;
        Vec products = splat(0.0f), squares = splat(0.0f);
        for (int t = 0; t < p.tokens; t++) {
            const int at = t * p.pitch + c;
            const Vec spread = load(p.levels + at) - level_mean;
            products += spread * (load(p.x + at) * splat(p.inverse[t]) - mean);
            squares += spread * spread;
        }
        const Vec slope = max(products / max(squares, tiny), tiny);
        store(fitted_scale + c, slope);
        store(fitted_zero + c, mean - slope * level_mean);
    }
    p.clear_rest(fitted_scale);
    p.clear_rest(fitted_zero);
}

struct Products {
    float xx, xy, yy;
};

// Products of a row with its approximation y(c), a vector from channel c on, which is 0 behind the last channel.
template <class Approximation>
inline Products products(const float* x, int dim, const Approximation& y) {
    Vec xx = splat(0.0f), xy = xx, yy = xx;
    for (int c = 0; c < dim; c += kLanes) {
        const Vec a = load(x + c), b = y(c);
        xx += a * a, xy += a * b, yy += b * b;
    }
    return {sum(xx), sum(xy), sum(yy)};
}

// hf_kvcache.codecs.unbiased.unbiased_gain
inline float unbiased_gain(const Products& p) {
    constexpr float kPoor = 0.75f;
    const float length = __builtin_sqrtf(p.xx), other = at_least(__builtin_sqrtf(p.yy), kTiny);
    const float cosine = p.xy / at_least(length * other, kTiny);
    const float slope = cosine >= kPoor ? 1.0f / cosine : at_least(cosine, 0) / (kPoor * kPoor);
    return slope * length / other;
}

template <int kDepth>
inline void encode_unbiased_keys(const HfkvSide& side, const LevelTree<kDepth>& tree, Page& p, uint8_t* record) {
    float *scale = p.by_channel[0], *zero = p.by_channel[1], *inverse = p.by_channel[4];
    float *fitted_scale = p.by_channel[2], *fitted_zero = p.by_channel[3];
    normalize(p, scale, zero, inverse);
    quantize_and_fit(p, tree, zero, scale, inverse, fitted_scale, fitted_zero);
    const auto of_row = [&](int t, const float* by, const float* plus) {
        const float* levels = p.levels + t * p.pitch;
        return products(p.x + t * p.pitch, p.dim, [=](int c) { return load(levels + c) * load(by + c) + load(plus + c); });
    };
    for (int t = 0; t < p.tokens; t++) {
        const Products sums = of_row(t, fitted_scale, fitted_zero);
        const float fitted = sums.xy / at_least(sums.yy, kTiny);
        if (fitted > p.gain[t] / 4) p.set_gain(t, fitted);
    }
    for (int c = 0; c < p.dim; c++) {
        scale[c] = at_least(from_half(to_half(fitted_scale[c])), kTiny);
        zero[c] = from_half(to_half(fitted_zero[c]));
    }
    p.clear_rest(zero);
    quantize_and_fit(p, tree, zero, scale, inverse, fitted_scale, fitted_zero);
    for (int c = 0; c < p.dim; c++) {
        scale[c] = stored(fitted_scale[c], record + side.scale, c);
        zero[c] = stored(fitted_zero[c], record + side.zero, c);
    }
    p.clear_rest(scale);
    // The gain is fitted last, to what will be decoded, and so takes up the rounding of the other two.
    for (int t = 0; t < p.tokens; t++) stored(unbiased_gain(of_row(t, scale, zero)), record + side.other, t);
}

// Codes and levels of x * inverse for a row; returns its products with the levels.
template <int kDepth>
inline Products quantize_row(const Page& p, const LevelTree<kDepth>& tree, int t, float inverse) {
    const float* x = p.x + t * p.pitch;
    uint8_t* codes = p.codes + t * p.pitch;
    const Vec factor = splat(inverse);
    return products(x, p.dim, [&](int c) { return p.counted(tree.nearest(load(x + c) * factor, codes + c), c); });
}

inline float square_sum(const float* x, int dim) {
    Vec total = splat(0.0f);
    for (int c = 0; c < dim; c += kLanes) total += load(x + c) * load(x + c);
    return sum(total);
}

template <int kDepth>
inline void encode_unbiased_values(const HfkvSide& side, const LevelTree<kDepth>& tree, Page& p, uint8_t* record) {
    for (int t = 0; t < p.tokens; t++) {
        float scale = at_least(__builtin_sqrtf(square_sum(p.x + t * p.pitch, p.dim) / (float)p.dim), kTiny);
        const Products first = quantize_row(p, tree, t, 1.0f / scale);
        scale = at_least(from_half(to_half(first.xy / first.yy)), kTiny);
        stored(unbiased_gain(quantize_row(p, tree, t, 1.0f / scale)), record + side.scale, t);
    }
}

// TurboQuant: the scale is the norm, corrected so that the decoded vector is as long as the original one.
template <int kDepth>
inline void encode_norm(const HfkvSide& side, const LevelTree<kDepth>& tree, Page& p, uint8_t* record) {
    for (int t = 0; t < p.tokens; t++) {
        const float norm = __builtin_sqrtf(square_sum(p.x + t * p.pitch, p.dim));
        const Products sums = quantize_row(p, tree, t, __builtin_sqrtf((float)p.dim) / at_least(norm, 1e-12f));
        stored(norm / __builtin_sqrtf(sums.yy), record + side.scale, t);
    }
}

inline uint8_t integer_code(float x, float low, float step, float most) {
    const float code = __builtin_rintf((x - low) / step);
    return (uint8_t)(int)(!(code > 0) ? 0 : code > most ? most : code);  // NaN becomes 0
}

// The codes of n numbers, with a lowest value and a step for each of them, or one for all if `each` is 0.
inline void integer_codes(const float* x, int n, const float* low, const float* step, int each, float most, uint8_t* codes) {
    typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
    // Adding 1.5 * 2^23 rounds to an integer, ties to even, as rintf does.
    const Vec magic = splat(12582912.0f), top = splat(most);
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Vec lows = each ? load(low + i) : splat(*low), steps = each ? load(step + i) : splat(*step);
        Vec code = (load(x + i) - lows) / steps;
        code = select(code > splat(0.0f), code, splat(0.0f));  // NaN becomes 0
        code = (select(code > top, top, code) + magic) - magic;
        const Bytes bytes = __builtin_convertvector(__builtin_convertvector(code, VecInt), Bytes);
        std::memcpy(codes + i, &bytes, kLanes);
    }
    for (; i < n; i++) codes[i] = integer_code(x[i], low[each * i], step[each * i], most);
}

// KIVI: a scale and a zero point for each group of tokens, in every channel. Both are rounded before the codes are chosen.
inline void encode_integer_channels(const HfkvSide& side, Page& p, uint8_t* record) {
    const float most = (float)((1 << side.bits) - 1);
    float *low = p.by_channel[0], *high = p.by_channel[1];
    for (int first = 0; first < p.tokens; first += side.group) {
        const float* x = p.x + first * p.pitch;
        uint8_t* codes = p.codes + first * p.pitch;
        for (int c = 0; c < p.dim; c++) low[c] = high[c] = x[c];
        for (int i = 1; i < side.group; i++)
            for (int c = 0; c < p.dim; c++) {
                const float v = x[i * p.pitch + c];
                low[c] = v < low[c] ? v : low[c];
                high[c] = v > high[c] ? v : high[c];
            }
        const int at = first / side.group * p.dim;
        for (int c = 0; c < p.dim; c++) {
            low[c] = stored(low[c], record + side.zero, at + c);
            high[c] = stored(at_least((high[c] - low[c]) / most, kSmallestStep), record + side.scale, at + c);
        }
        for (int i = 0; i < side.group; i++) integer_codes(x + i * p.pitch, p.dim, low, high, 1, most, codes + i * p.pitch);
    }
}

// The same for each group of channels, of every token.
inline void encode_integer_tokens(const HfkvSide& side, Page& p, uint8_t* record) {
    const float most = (float)((1 << side.bits) - 1);
    const int groups = p.dim / side.group;
    for (int t = 0; t < p.tokens; t++)
        for (int g = 0; g < groups; g++) {
            const float* x = p.x + t * p.pitch + g * side.group;
            uint8_t* codes = p.codes + t * p.pitch + g * side.group;
            float low = x[0], high = x[0];
            int c = 0;
            if (side.group >= kLanes) {
                Vec lows = load(x), highs = lows;
                for (; c + kLanes <= side.group; c += kLanes) {
                    const Vec v = load(x + c);
                    lows = select(v < lows, v, lows), highs = select(v > highs, v, highs);
                }
                for (int i = 0; i < kLanes; i++) low = lows[i] < low ? lows[i] : low, high = highs[i] > high ? highs[i] : high;
            }
            for (; c < side.group; c++) low = x[c] < low ? x[c] : low, high = x[c] > high ? x[c] : high;
            low = stored(low, record + side.zero, t * groups + g);
            const float step = stored(at_least((high - low) / most, kSmallestStep), record + side.scale, t * groups + g);
            integer_codes(x, side.group, &low, &step, 0, most, codes);
        }
}

// The codes of a plane of kWidth bits: bits shift to shift + kWidth - 1 of each.
template <int kWidth>
inline void pack_plane(const uint8_t* __restrict codes, int shift, int length, uint8_t* __restrict out) {
    for (int j = 0; j < length; j++) {
        unsigned byte = 0;
#pragma GCC unroll 8
        for (int s = 0; s < 8 / kWidth; s++) byte |= ((codes[s * length + j] >> shift) & ((1u << kWidth) - 1)) << (s * kWidth);
        out[j] = (uint8_t)byte;
    }
}

// Packs codes of a byte each to planes of 1, 2, 4 or 8 bits, the widest first; hf_kvcache/kernels/reference/pack.py defines this.
inline void pack_row(const uint8_t* codes, int bits, int dim, uint8_t* out) {
    int shift = 0;
    if (bits & 8) std::memcpy(out, codes, dim), out += dim, shift += 8;
    if (bits & 4) pack_plane<4>(codes, shift, dim / 2, out), out += dim / 2, shift += 4;
    if (bits & 2) pack_plane<2>(codes, shift, dim / 4, out), out += dim / 4, shift += 2;
    if (bits & 1) pack_plane<1>(codes, shift, dim / 8, out);
}

// out[c] = x[c] * factor[c]; x has elements of a level.
template <class Element>
inline void scale_row(const uint8_t* x, const float* factor, int dim, float* out) {
    int c = 0;
    for (; c + kLanes <= dim; c += kLanes) store(out + c, Element::load_vec(x + c * Element::kBytes) * load(factor + c));
    for (; c < dim; c++) out[c] = Element::load_one(x + c * Element::kBytes) * factor[c];
}

inline void scale_row(int level, const uint8_t* x, const float* factor, int dim, float* out) {
    if (level == HFKV_FLOAT32) return scale_row<Float32>(x, factor, dim, out);
    if (level == HFKV_BFLOAT16) return scale_row<BFloat16>(x, factor, dim, out);
    scale_row<Float16>(x, factor, dim, out);
}

// Fills in p.x: tokens `token` bytes apart, divided by key_scale, rotated, less key_mean.
inline void rotate_page(const HfkvSide& side, int level, const uint8_t* x, int64_t token, const float* key_scale,
                        const float* key_mean, Page& p) {
    const float norm = side.rotation == 2 ? 1.0f / __builtin_sqrtf((float)p.dim) : 1.0f;
    for (int c = 0; c < p.dim; c++)
        p.factor[c] = norm * (side.rotation == 2 ? side.signs[c] : 1.0f) / (key_scale ? key_scale[c] : 1.0f);
    for (int t = 0; t < p.tokens; t++) {
        float* to = p.x + t * p.pitch;
        scale_row(level, x + t * token, p.factor, p.dim, side.rotation == 1 ? p.raw : to);
        if (side.rotation == 1) rotate_by_matrix(p.raw, side.matrix, p.dim, false, to);
        if (side.rotation == 2) walsh_hadamard(to, p.dim);
        if (key_mean)
            for (int c = 0; c < p.dim; c++) to[c] -= key_mean[c];
        p.clear_rest(to);
    }
}

template <int kDepth>
inline void encode_levels(const HfkvSide& side, const HfkvEncodeSide& given, Page& p, uint8_t* record) {
    const LevelTree<kDepth> tree(given.grid);
    if (given.method == HFKV_UNBIASED_KEYS) return encode_unbiased_keys(side, tree, p, record);
    if (given.method == HFKV_UNBIASED_VALUES) return encode_unbiased_values(side, tree, p, record);
    encode_norm(side, tree, p, record);
}

inline void encode_side(const HfkvSide& side, const HfkvEncodeSide& given, Page& p, uint8_t* record) {
    if (given.method == HFKV_INTEGER) {
        if (side.axis == HFKV_CHANNEL) encode_integer_channels(side, p, record);
        else encode_integer_tokens(side, p, record);
    } else if (given.grid.count <= 2) {
        encode_levels<1>(side, given, p, record);
    } else if (given.grid.count <= 4) {
        encode_levels<2>(side, given, p, record);
    } else if (given.grid.count <= 8) {
        encode_levels<3>(side, given, p, record);
    } else {
        encode_levels<4>(side, given, p, record);
    }
    for (int t = 0; t < p.tokens; t++)
        pack_row(p.codes + t * p.pitch, side.bits, side.dim, record + side.codes + t * (side.dim * side.bits / 8));
}

// One side of record `index`, [pages, rows]. The bytes between its fields become 0.
inline void encode_record(const HfkvEncode& call, int64_t index, bool values, float* memory) {
    const HfkvSide& side = values ? call.layout->values : call.layout->keys;
    const HfkvEncodeSide& given = values ? call.values : call.keys;
    const int64_t start = values ? call.layout->values.codes : 0;
    const int64_t stop = values ? call.layout->record_bytes : call.layout->values.codes;
    const int64_t column = index / call.rows, row = index % call.rows, width = call.level == HFKV_FLOAT32 ? 4 : 2;
    uint8_t* record = (uint8_t*)call.addresses[index];
    const HfkvVectors& from = given.x;
    const int64_t token = width * from.token;
    const uint8_t* x = (const uint8_t*)from.at + width * (row / call.heads * from.batch + row % call.heads * from.head);
    x += column * call.layout->page_size * token;
    std::memset(record + start, 0, (size_t)(stop - start));
    if (side.dim == 0) return;
    if (given.method == HFKV_COPY) {
        const int64_t bytes = width * side.dim;
        for (int t = 0; t < call.layout->page_size; t++)
            std::memcpy(record + side.codes + t * bytes, x + t * token, (size_t)bytes);
        return;
    }
    Page page(call.layout->page_size, side.dim, memory);
    const float* scale = values || !call.key_scale ? nullptr : call.key_scale + row * side.dim;
    const float* mean = values || !call.key_mean ? nullptr : call.key_mean + row * side.dim;
    rotate_page(side, call.level, x, token, scale, mean, page);
    encode_side(side, given, page, record);
}

inline int encode_pages(const HfkvEncode& call) {
    const HfkvLayout& layout = *call.layout;
    const int tokens = layout.page_size, dim = layout.keys.dim > layout.values.dim ? layout.keys.dim : layout.values.dim;
    const int64_t records = call.pages * call.rows;
    const bool few = records * tokens * (layout.keys.dim + layout.values.dim) < kOneThreadElements;
    const int threads = few ? 1 : (int)(call.threads < 2 * records ? call.threads : 2 * records);
    const size_t bytes = Page::bytes(tokens, dim);
    const Workspace workspace(bytes * threads);
    char* memory = workspace.at();
    if (!memory) return 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < 2 * records; task++) {
#if defined(_OPENMP)
        float* own = (float*)(memory + bytes * omp_get_thread_num());
#else
        float* own = (float*)memory;
#endif
        encode_record(call, task / 2, task % 2, own);
    }
    return 0;
}

}  // namespace
