// Dot products and weighted sums of latents with 16 queries at a time by AMX: products of bfloat16 with float32 sums.
// latent_attention.h calls it for pages and full-precision tokens that are bfloat16 or become it without rounding.
//
// Codes, levels and e4m3 have at most eight significant bits, so bfloat16 holds them exactly. Their scales are applied to the sums,
// by token and group of channels. The float side (queries, weights) is a sum of up to three bfloat16 parts, each the remainder
// of truncating the one before; three of them are float32 again.
#pragma once

#include "dot_amx.h"
#include "latent_dot_float.h"

#if defined(__AMX_BF16__)

namespace {

// Transposes 16 rows of 16 groups of four bytes: lane i of v[g] becomes group g of row i.
inline void transpose(__m512i v[16]) {
    __m512i w[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        w[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        w[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        v[4 * i] = _mm512_unpacklo_epi64(w[4 * i], w[4 * i + 2]);
        v[4 * i + 1] = _mm512_unpackhi_epi64(w[4 * i], w[4 * i + 2]);
        v[4 * i + 2] = _mm512_unpacklo_epi64(w[4 * i + 1], w[4 * i + 3]);
        v[4 * i + 3] = _mm512_unpackhi_epi64(w[4 * i + 1], w[4 * i + 3]);
    }
    // Quarter q of v[4 r + c] is group 4 q + c of rows 4 r to 4 r + 3; what is left is to transpose the quarters.
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        const __m512i even_low = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88), odd_low = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xdd);
        const __m512i even_high = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88);
        const __m512i odd_high = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xdd);
        w[c] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        w[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        w[8 + c] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        w[12 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) v[i] = w[i];
}

constexpr int kTileChannels = 32;  // channels of a tile of 16 rows
constexpr int kMostParts = 3;

// Makes the compiler write memory before tiles are loaded, since it does not know what the load instruction reads.
inline void write_out() { asm volatile("" : : : "memory"); }

inline bool side_fits_tiles(const HfkvSide& side) {
    if (side.dim % kTileChannels) return false;
    if (side.level == HFKV_BFLOAT16) return true;
    const bool levels = side.level == HFKV_CODES || side.level == HFKV_FLOAT8;
    return levels && side.axis == HFKV_TOKEN && !side.has_other && side.group % kTileChannels == 0;
}

// The upper halves of two vectors of float32: bfloat16, in the same order.
inline __m512i upper_halves(__m512i a, __m512i b) {
    alignas(64) static const struct Odd {
        uint16_t index[32];
        Odd() {
            for (int i = 0; i < 32; i++) index[i] = (uint16_t)(2 * i + 1);
        }
    } odd;
    return _mm512_permutex2var_epi16(a, _mm512_load_si512(odd.index), b);
}

inline __m512i truncated(__m512 x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32((int)0xffff0000)); }

// What remains of x after kBefore parts.
template <int kBefore>
inline __m512 remainder(__m512 x) {
#pragma GCC unroll 3
    for (int i = 0; i < kBefore; i++) x = _mm512_sub_ps(x, _mm512_castsi512_ps(truncated(x)));
    return x;
}

// Part kPart of 16 queries, `pitch` floats apart, as tiles of 32 channels: row i has channels 2 i and 2 i + 1 of each query.
// Returns whether anything remains for another part.
template <int kPart>
bool pack_query_part(const float* rows, int pitch, int dim, uint8_t* tiles) {
    __m512 left = _mm512_setzero_ps();
    for (int c = 0; c < dim; c += kTileChannels, tiles += kTileBytes) {
        __m512i v[16];
#pragma GCC unroll 16
        for (int m = 0; m < 16; m++) {
            const __m512 a = remainder<kPart>(_mm512_loadu_ps(rows + m * pitch + c));
            const __m512 b = remainder<kPart>(_mm512_loadu_ps(rows + m * pitch + c + 16));
            v[m] = upper_halves(_mm512_castps_si512(a), _mm512_castps_si512(b));
            left = _mm512_or_ps(left, _mm512_or_ps(remainder<1>(a), remainder<1>(b)));
        }
        transpose(v);
#pragma GCC unroll 16
        for (int g = 0; g < 16; g++) _mm512_storeu_si512(tiles + 64 * g, v[g]);
    }
    return _mm512_cmp_ps_mask(left, _mm512_setzero_ps(), _CMP_NEQ_UQ) != 0;
}

// Packs as many parts as the queries need, at most `most`, each of dim / 32 tiles; returns their number.
inline int pack_query(const float* rows, int pitch, int dim, int most, uint8_t* tiles) {
    const int64_t size = (int64_t)dim / kTileChannels * kTileBytes;
    if (!pack_query_part<0>(rows, pitch, dim, tiles) || most == 1) return 1;
    if (!pack_query_part<1>(rows, pitch, dim, tiles + size) || most == 2) return 2;
    pack_query_part<2>(rows, pitch, dim, tiles + 2 * size);
    return 3;
}

template <class Element>
void narrow(const uint8_t* bytes, int64_t count, uint8_t* out) {
    for (int64_t i = 0; i < count; i += 32)
        _mm512_storeu_si512(out + 2 * i,
                            upper_halves((__m512i)Element::load_vec(bytes + i), (__m512i)Element::load_vec(bytes + i + 16)));
}

// Levels of 4-bit codes whose rows are a multiple of 32 bytes, as bfloat16, by a look-up of words. The instruction heeds five bits
// of an index, and the table repeats itself, so bits above the code change nothing.
inline void look_up_words(const HfkvSide& side, const uint8_t* codes, int n, uint8_t* out, Stream& next) {
    alignas(64) uint16_t words[32];
    for (int i = 0; i < 32; i++) {
        const float level = (float)((int)side.levels[i % 16] - kBias);
        uint32_t bits;
        std::memcpy(&bits, &level, 4);
        words[i] = (uint16_t)(bits >> 16);
    }
    const __m512i table = _mm512_load_si512(words);
    const int length = side.dim / 2;
    for (int t = 0; t < n; t++, codes += length, out += 2 * side.dim) {
        if (t % 8 == 0) next.work(2);
        for (int j = 0; j < length; j += 32) {
            const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(codes + j)));
            _mm512_storeu_si512(out + 2 * j, _mm512_permutexvar_epi16(pairs, table));
            _mm512_storeu_si512(out + 2 * (length + j), _mm512_permutexvar_epi16(_mm512_srli_epi16(pairs, 4), table));
        }
    }
}

// The bfloat16 rows of some tokens; memory can be read up to a multiple of 16 rows.
struct TileRows {
    const uint8_t* data;
    int64_t stride;
};

inline TileRows copied_rows(const uint8_t* data, int64_t stride, int n, int dim, uint8_t* out) {
    const int64_t row = 2 * (int64_t)dim;
    for (int t = 0; t < n; t++) std::memcpy(out + t * row, data + t * stride, row);
    for (int t = n; t % 16; t++) std::memset(out + t * row, 0, row);
    return {out, row};
}

inline TileRows dense_tiles(const uint8_t* data, int64_t stride, int n, int dim, const LatentRoom& room) {
    return n % 16 ? copied_rows(data, stride, n, dim, (uint8_t*)room.floats) : TileRows{data, stride};
}

// The levels of n tokens of a page from `start` on, without their scales.
inline TileRows page_tiles(const HfkvSide& side, int page_size, const uint8_t* record, int start, int n, const LatentRoom& room,
                           Stream& next) {
    const int64_t row = 2 * (int64_t)side.dim;
    uint8_t* out = (uint8_t*)room.floats;
    if (side.level == HFKV_BFLOAT16) {
        const uint8_t* data = record + side.codes + start * row;
        return page_size % 16 ? copied_rows(data, row, n, side.dim, out) : TileRows{data, row};
    }
    if (side.level == HFKV_CODES && side.bits == 4 && side.dim % 64 == 0) {
        look_up_words(side, record + side.codes + (int64_t)start * (side.dim / 2), n, out, next);
    } else {
        const uint8_t* bytes = code_bytes(side, record, start, n, room.bytes, next);
        if (side.level == HFKV_FLOAT8) narrow<Float8>(bytes, (int64_t)n * side.dim, out);
        else narrow<Byte>(bytes, (int64_t)n * side.dim, out);
    }
    // The rows behind the last one are multiplied too, although nothing uses the products.
    for (int t = n; t % 16; t++) std::memset(out + t * row, 0, row);
    return {out, row};
}

#define HFKV_MULTIPLY_TILE(i)                                                  \
    do {                                                                       \
        _tile_loadd(4, at + 16 * i * rows.stride, rows.stride);                \
        _tile_dpbf16ps(i, 4, 5);                                               \
        if (kCount > 1) _tile_dpbf16ps(i, 4, 6);                               \
        if (kCount > 2) _tile_dpbf16ps(i, 4, 7);                               \
        next.work(1);                                                          \
    } while (0)

// sums [64, 16]: products of up to 64 rows with 16 queries over steps of 32 channels. size: bytes of a part of the queries.
template <int kCount>
void multiply_latents(const TileRows& rows, int n, int first, int last, const uint8_t* query, int64_t size, float* sums,
                      Stream& next) {
    write_out();
    zero_sums();
    for (int k = first; k < last; k++) {
        const uint8_t* at = rows.data + 2 * kTileChannels * k;
        const uint8_t* q = query + (int64_t)k * kTileBytes;
        _tile_loadd(5, q, 64);
        if (kCount > 1) _tile_loadd(6, q + size, 64);
        if (kCount > 2) _tile_loadd(7, q + 2 * size, 64);
        HFKV_MULTIPLY_TILE(0);
        if (n > 16) HFKV_MULTIPLY_TILE(1);
        if (n > 32) HFKV_MULTIPLY_TILE(2);
        if (n > 48) HFKV_MULTIPLY_TILE(3);
    }
    store_sums((int32_t*)sums);
}

// 16 queries as tiles, dim / 32 for each part, and the sum of each query over each group of channels, [groups, 16].
struct TileQuery {
    const uint8_t* tiles;
    const float* sums;
    int parts;
};

// scores [n, 16] += products of n rows with 16 queries; f: scales and zeros [n, groups], or null.
inline void dot_latent_tiles(const TileRows& rows, int n, int dim, int group, const Factors* f, const TileQuery& query,
                             float* scores, Stream& next) {
    alignas(64) float sums[kLatentChunk * 16];
    const int groups = dim / group, steps = group / kTileChannels;
    const int64_t size = (int64_t)dim / kTileChannels * kTileBytes;
    for (int g = 0; g < groups; g++) {
        const int first = g * steps, last = first + steps;
        if (query.parts == 1) multiply_latents<1>(rows, n, first, last, query.tiles, size, sums, next);
        else if (query.parts == 2) multiply_latents<2>(rows, n, first, last, query.tiles, size, sums, next);
        else multiply_latents<3>(rows, n, first, last, query.tiles, size, sums, next);
        if (!f) {
            for (int t = 0; t < n; t++) store(scores + 16 * t, load(scores + 16 * t) + load(sums + 16 * t));
            continue;
        }
        const Vec whole = load(query.sums + 16 * g);
        for (int t = 0; t < n; t++) {
            const int at = t * groups + g;
            store(scores + 16 * t, load(scores + 16 * t) + load(sums + 16 * t) * splat(f->scale[at]) + whole * splat(f->zero[at]));
        }
    }
}

// Part kPart of weights [64, 16] as tiles of 32 tokens. Weights are multiplied by a scale of each token, `stride` apart (null: 1).
template <int kPart>
void pack_weight_part(const float* weights, const float* scale, int stride, int steps, int64_t size, uint8_t* tiles) {
    for (int step = 0; step < steps; step++, tiles += size) {
        __m512i v[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const int t = kTileChannels * step + 2 * i;
            __m512 a = _mm512_loadu_ps(weights + 16 * t), b = _mm512_loadu_ps(weights + 16 * (t + 1));
            if (scale) {
                a = _mm512_mul_ps(a, _mm512_set1_ps(scale[t * stride]));
                b = _mm512_mul_ps(b, _mm512_set1_ps(scale[(t + 1) * stride]));
            }
            a = remainder<kPart>(a), b = remainder<kPart>(b);
            v[i] = _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(a), 16), truncated(b));
        }
        transpose(v);
#pragma GCC unroll 16
        for (int m = 0; m < 16; m++) _mm512_storeu_si512(tiles + 64 * m, v[m]);
    }
}

// Weights as tiles [steps, parts]. Tokens behind the last one have weight and scale 0.
inline void pack_weights(const float* weights, const float* scale, int stride, int steps, int parts, uint8_t* tiles) {
    const int64_t size = (int64_t)parts * kTileBytes;
    pack_weight_part<0>(weights, scale, stride, steps, size, tiles);
    pack_weight_part<1>(weights, scale, stride, steps, size, tiles + kTileBytes);
    if (parts == 3) pack_weight_part<2>(weights, scale, stride, steps, size, tiles + 2 * kTileBytes);
}

// 64 channels of n rows as four tiles for every 32 tokens, with two tokens side by side. Of every 32 channels, the first tile has
// the first four of every eight and the second tile the others.
inline void weave_latents(const TileRows& rows, int c, int n, int steps, uint8_t* woven, Stream& next) {
    const __m512i none = _mm512_setzero_si512();
    for (int i = 0; i < 16 * steps; i++) {
        const uint8_t* a = rows.data + 2 * i * rows.stride + 2 * c;
        const uint8_t* b = a + rows.stride;
        const bool first = 2 * i < n, second = 2 * i + 1 < n;
        if (i % 4 == 0) next.work(1);
        uint8_t* to = woven + i / 16 * 4 * kTileBytes + i % 16 * 64;
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const __m512i x = first ? _mm512_loadu_si512(a + 64 * half) : none, y = second ? _mm512_loadu_si512(b + 64 * half) : none;
            _mm512_storeu_si512(to + (2 * half) * kTileBytes, _mm512_unpacklo_epi16(x, y));
            _mm512_storeu_si512(to + (2 * half + 1) * kTileBytes, _mm512_unpackhi_epi16(x, y));
        }
    }
}

// output [16, 64] += weights times woven latents. left, right: the weights for the first and for the other 32 channels.
template <int kCount>
void add_latents(const uint8_t* woven, const uint8_t* left, const uint8_t* right, int steps, float* output, int pitch) {
    const int64_t row = 4 * (int64_t)pitch;
    write_out();
    _tile_loadd(0, output, row);
    _tile_loadd(1, output + 16, row);
    _tile_loadd(2, output + 32, row);
    _tile_loadd(3, output + 48, row);
    for (int step = 0; step < steps; step++, woven += 4 * kTileBytes, left += kCount * kTileBytes, right += kCount * kTileBytes) {
        _tile_loadd(6, woven, 64);
        _tile_loadd(7, woven + kTileBytes, 64);
        for (int part = 0; part < kCount; part++) {
            _tile_loadd(4, left + part * kTileBytes, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_loadd(6, woven + 2 * kTileBytes, 64);
        _tile_loadd(7, woven + 3 * kTileBytes, 64);
        for (int part = 0; part < kCount; part++) {
            _tile_loadd(5, right + part * kTileBytes, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, output, row);
    _tile_stored(1, output + 16, row);
    _tile_stored(2, output + 32, row);
    _tile_stored(3, output + 48, row);
}

// Restores the order of the channels of a row of sums that weave_latents has changed.
inline void in_order(float* row, int dim) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int c = 0; c < dim; c += 32) {
        const __m512 a = _mm512_loadu_ps(row + c), b = _mm512_loadu_ps(row + c + 16);
        _mm512_storeu_ps(row + c, _mm512_permutex2var_ps(a, low, b));
        _mm512_storeu_ps(row + c + 16, _mm512_permutex2var_ps(a, high, b));
    }
}

}  // namespace

#endif  // __AMX_BF16__
