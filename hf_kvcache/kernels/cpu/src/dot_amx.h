// Dot products and weighted sums of more than four queries with the codes of a page, by AMX: the same split of the float side and
// the same exact sums as in byte_rows.h. page_side.h calls `dot_tiles`, `weave` and `weigh_tiles`.
//
// The rows of bytes of a page are a tile as they lie, and queries of two bytes each are one too, so scores need no transposition.
// Four queries with a high and a low byte each are a quad: eight columns of a product with keys, or eight rows of a product with
// values. A tile has room for two quads; the room of a missing one is computed in vain.
#pragma once

#include "byte_rows.h"
#include "unpack_vnni.h"

#if defined(__AMX_INT8__)

namespace {

constexpr int kQuad = 4;
constexpr int kTileBytes = 16 * 64;
constexpr int kBlock = 64;  // pages here have a multiple of so many tokens, so that no tile reaches behind a record

// All tiles have 16 rows of 64 bytes; instructions on fewer rows take as long.
inline void configure_tiles() {
    struct alignas(64) {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.rows[i] = 16, config.row_bytes[i] = 64;
    // GCC takes it that the instruction reads the first bytes only, and might drop the writes to the others.
    asm volatile("" : : "m"(config));
    _tile_loadconfig(&config);
}

inline void release_tiles() { _tile_release(); }

inline bool tiles_fit(const HfkvSide& side, int page_size) {
    return side.level == HFKV_CODES && side.dim % 64 == 0 && side.dim <= kLargestExactDim && page_size % kBlock == 0
        && page_size <= kLargestExactTokens;
}

// Up to four rows of floats, each as multiples of a unit. Their length is a multiple of 16.
struct Quad {
    const float* rows[kQuad];
    int n;
    float units[kQuad], inverses[kQuad], totals[kQuad];
    __m512i sums[kQuad];

    Quad(const float* x, int pitch, int count, int length) : n(length) {
        for (int m = 0; m < kQuad; m++) {
            // A missing row is the first one times zero.
            rows[m] = x + (m < count ? (int64_t)m * pitch : 0);
            units[m] = 0, inverses[m] = 0, totals[m] = 0, sums[m] = _mm512_setzero_si512();
            if (m >= count) continue;
            __m512 top = _mm512_setzero_ps(), total = _mm512_setzero_ps();
            for (int c = 0; c < n; c += 16) {
                top = _mm512_max_ps(top, _mm512_abs_ps(load(m, c)));
                total = _mm512_add_ps(total, load(m, c));
            }
            totals[m] = _mm512_reduce_add_ps(total);
            const float peak = _mm512_reduce_max_ps(top);
            // A subnormal peak would have an infinite inverse.
            units[m] = peak > 1e-30f ? peak / kLargestUnits : 1.0f;
            inverses[m] = 1.0f / units[m];
        }
    }

    __m512 load(int m, int c) const { return _mm512_loadu_ps(rows[m] + c); }
    __m512i multiples(int m, int c) {
        const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(load(m, c), _mm512_set1_ps(inverses[m])));
        sums[m] = _mm512_add_epi32(sums[m], v);
        return v;
    }
    // start: what takes the bias of the bytes out of a total; call this after `multiples` of all columns.
    void copy(float* to_units, int32_t* start) const {
        std::memcpy(to_units, units, sizeof units);
        _mm_storeu_si128((__m128i*)start, _mm_mullo_epi32(four_sums(sums), _mm_set1_epi32(-kBias)));
    }
};

// A quad of queries as columns: row c / 4 of the tiles has the high bytes of four channels of each query, then the low bytes.
inline void split_queries(Quad& quad, int8_t* columns, Stream& next) {
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int c = 0; c < quad.n; c += 16) {
        next.work(1);
        __m512i v[kQuad], high, low;
#pragma GCC unroll 4
        for (int m = 0; m < kQuad; m++) v[m] = quad.multiples(m, c);
        split_bytes(v, high, low);
        const __m512i a = _mm512_permutex2var_epi64(high, first, low), b = _mm512_permutex2var_epi64(high, second, low);
        int8_t* to = columns + 16 * c;
        _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(a));
        _mm256_storeu_si256((__m256i*)(to + 64), _mm512_extracti64x4_epi64(a, 1));
        _mm256_storeu_si256((__m256i*)(to + 128), _mm512_castsi512_si256(b));
        _mm256_storeu_si256((__m256i*)(to + 192), _mm512_extracti64x4_epi64(b, 1));
    }
}

// A quad of weights as eight rows of a tile for every 64 tokens, the high bytes first. Tokens are in the order of split_bytes.
inline void split_weights(Quad& quad, int8_t* rows, Stream& next) {
    for (int t = 0; t < quad.n; t += kBlock, rows += kTileBytes)
#pragma GCC unroll 4
        for (int m = 0; m < kQuad; m++) {
            next.work(1);
            __m512i v[4], high, low;
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) v[j] = quad.multiples(m, t + 16 * j);
            split_bytes(v, high, low);
            _mm512_storeu_si512(rows + 64 * m, high);
            _mm512_storeu_si512(rows + 64 * (kQuad + m), low);
        }
}

// Rows i and i + 4 of sums, each of the high and the low bytes of four queries.
inline __m512i two_rows(const int32_t* sums, int i) {
    const __m256i a = _mm256_loadu_si256((const __m256i*)(sums + 16 * i));
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), _mm256_loadu_si256((const __m256i*)(sums + 16 * (i + 4))), 1);
}

// The totals of 16 tokens, a vector for each query of a quad. sums: eight columns of 16 rows.
inline void by_query(const int32_t* sums, __m512i totals[kQuad]) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512i a = two_rows(sums, i), b = two_rows(sums, 8 + i);
        const __m512i high = _mm512_shuffle_i64x2(a, b, 0x88), low = _mm512_shuffle_i64x2(a, b, 0xdd);
        v[i] = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);  // a lane of 16 bytes: token 4 lane + i
    }
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpacklo_epi32(v[2], v[3]);
    const __m512i c = _mm512_unpackhi_epi32(v[0], v[1]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    totals[0] = _mm512_unpacklo_epi64(a, b), totals[1] = _mm512_unpackhi_epi64(a, b);
    totals[2] = _mm512_unpacklo_epi64(c, d), totals[3] = _mm512_unpackhi_epi64(c, d);
}

constexpr int kStep = 64;  // tokens that are looked up and multiplied at a time

// Tiles 0 to 3 hold sums, tiles 4 to 7 the factors.
inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// sums: [4, 16, 16]
inline void store_sums(int32_t* sums) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 16 * 16, 64);
    _tile_stored(2, sums + 32 * 16, 64);
    _tile_stored(3, sums + 48 * 16, 64);
}

// sums [kStep, 16] of rows of `dim` bytes with two quads of queries.
inline void multiply_keys(const uint8_t* rows, int dim, const int8_t* columns, int32_t* sums, Stream& next) {
    const int64_t tile = 16 * (int64_t)dim;
    zero_sums();
    for (int c = 0; c < dim; c += 64) {
        _tile_loadd(6, columns + 16 * c, 64);
        _tile_loadd(4, rows + c, dim);
        _tile_dpbusd(0, 4, 6);
        next.work(1);
        _tile_loadd(5, rows + c + tile, dim);
        _tile_dpbusd(1, 5, 6);
        next.work(1);
        _tile_loadd(4, rows + c + 2 * tile, dim);
        _tile_dpbusd(2, 4, 6);
        next.work(1);
        _tile_loadd(5, rows + c + 3 * tile, dim);
        _tile_dpbusd(3, 5, 6);
        next.work(1);
    }
    store_sums(sums);
}

template <class LevelVectors>
void look_up(const LevelVectors& vectors, int start, int dim, uint8_t* levels, Stream& next) {
    for (int c = 0; c < vectors.rows.length; c += 64)
        for (int t = 0; t < kStep; t += 4) {
            if (t % 8 == 0 && c == 0) next.work(1);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const __m512i bytes = vectors.load(start + t + i, c);
#pragma GCC unroll 4
                for (int k = 0; k < LevelVectors::kOutputs; k++)
                    _mm512_store_si512(levels + (t + i) * dim + 64 * vectors.block(k, c), vectors.level(bytes, k));
            }
        }
}

// scores[m, t] of up to two quads of queries with n rows of codes. levels: room for kStep rows of levels.
template <class LevelVectors>
void dot_tiles(const LevelVectors& given, int n, int dim, const float* query, int query_pitch, int count, float* scores, int pitch,
               uint8_t* levels, int8_t* tiles, Stream& next) {
    const LevelVectors vectors = given;  // a local copy: the bytes written below could, to the compiler, belong to any other object
    alignas(64) int32_t sums[kStep * 16];
    float units[2 * kQuad];
    int32_t start[2 * kQuad];
    for (int m = 0; m < count; m += kQuad) {
        Quad quad(query + (int64_t)m * query_pitch, query_pitch, count - m, dim);
        split_queries(quad, tiles + 8 * m, next);
        quad.copy(units + m, start + m);
    }
    for (int t = 0; t < n; t += kStep) {
        if (LevelVectors::kBits == 8) {
            multiply_keys(vectors.rows.data + (int64_t)t * dim, dim, tiles, sums, next);
        } else {
            look_up(vectors, t, dim, levels, next);
            multiply_keys(levels, dim, tiles, sums, next);
        }
        for (int half = 0; half < kStep && t + half < n; half += 16) {
            const int left = n - t - half;
            const __mmask16 out = left >= 16 ? 0xffff : (__mmask16)((1 << left) - 1);
            for (int m = 0; m < count; m += kQuad) {
                next.work(1);
                __m512i totals[kQuad];
                by_query(sums + 16 * half + 2 * m, totals);
#pragma GCC unroll 4
                for (int i = 0; i < kQuad; i++) {
                    if (m + i >= count) break;
                    const __m512 total = _mm512_cvtepi32_ps(_mm512_add_epi32(totals[i], _mm512_set1_epi32(start[m + i])));
                    _mm512_mask_storeu_ps(scores + (int64_t)(m + i) * pitch + t + half, out,
                                          _mm512_mul_ps(total, _mm512_set1_ps(units[m + i])));
                }
            }
        }
    }
}

// Levels of n tokens, with the bytes of four tokens side by side, as tiles [64 channels, 64 tokens, part]. Lane i of part p is
// channel 16 (i / 4) + 4 p + i % 4. The groups of four tokens are in the order of split_bytes.
template <class LevelVectors>
void weave(const LevelVectors& given, int n, uint8_t* tiles, Stream& next) {
    const LevelVectors vectors = given;  // as above
    const int steps = padded(n) / kBlock;
    for (int step = 0; step < steps; step++)
        for (int group = 0; group < 16; group++) {
            const int64_t t = kBlock * step + 4 * (group / 4 + group % 4 * 4);
            if (group % 2 == 0) next.work(1);
            for (int c = 0; c < vectors.rows.length; c += 64) {
                const __m512i row0 = vectors.load(t, c), row1 = vectors.load(t + 1, c);
                const __m512i row2 = vectors.load(t + 2, c), row3 = vectors.load(t + 3, c);
                const __m512i ab_low = _mm512_unpacklo_epi8(row0, row1), ab_high = _mm512_unpackhi_epi8(row0, row1);
                const __m512i cd_low = _mm512_unpacklo_epi8(row2, row3), cd_high = _mm512_unpackhi_epi8(row2, row3);
                const __m512i parts[4] = {_mm512_unpacklo_epi16(ab_low, cd_low), _mm512_unpackhi_epi16(ab_low, cd_low),
                                          _mm512_unpacklo_epi16(ab_high, cd_high), _mm512_unpackhi_epi16(ab_high, cd_high)};
#pragma GCC unroll 4
                for (int k = 0; k < LevelVectors::kOutputs; k++) {
                    uint8_t* to = tiles + (vectors.block(k, c) * steps + step) * 4 * kTileBytes + 64 * group;
#pragma GCC unroll 4
                    for (int p = 0; p < 4; p++)
                        _mm512_store_si512(to + p * kTileBytes, vectors.level(parts[p], k));
                }
            }
        }
}

// sums [4, 16, 16] of two quads of weights with 64 channels of woven levels.
inline void multiply_values(const uint8_t* woven, const int8_t* weights, int steps, int32_t* sums, Stream& next) {
    zero_sums();
    for (int step = 0; step < steps; step++, weights += kTileBytes, woven += 4 * kTileBytes) {
        _tile_loadd(4, weights, 64);
        _tile_loadd(6, woven, 64);
        _tile_dpbsud(0, 4, 6);
        next.work(1);
        _tile_loadd(7, woven + kTileBytes, 64);
        _tile_dpbsud(1, 4, 7);
        next.work(1);
        _tile_loadd(6, woven + 2 * kTileBytes, 64);
        _tile_dpbsud(2, 4, 6);
        next.work(1);
        _tile_loadd(7, woven + 3 * kTileBytes, 64);
        _tile_dpbsud(3, 4, 7);
        next.work(1);
    }
    store_sums(sums);
}

// output [64] += unit * totals + lift of one query, in the order of channels. sums: the row of the query's high bytes.
inline void add_channels(const int32_t* sums, int32_t start, float unit, float lift, float* output) {
    __m512i total[4];
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) {
        const __m512i high = _mm512_load_si512(sums + 256 * p), low = _mm512_load_si512(sums + 256 * p + 16 * kQuad);
        total[p] = _mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low), _mm512_set1_epi32(start));
    }
    // Quarter q of part p holds channels 16 q + 4 p on: transpose the quarters.
    const __m512i a = _mm512_shuffle_i32x4(total[0], total[1], 0x88), b = _mm512_shuffle_i32x4(total[2], total[3], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(total[0], total[1], 0xdd), d = _mm512_shuffle_i32x4(total[2], total[3], 0xdd);
    const __m512i quarters[4] = {_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(c, d, 0x88),
                                 _mm512_shuffle_i32x4(a, b, 0xdd), _mm512_shuffle_i32x4(c, d, 0xdd)};
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++)
        _mm512_storeu_ps(output + 16 * q, _mm512_fmadd_ps(_mm512_cvtepi32_ps(quarters[q]), _mm512_set1_ps(unit),
                                                          _mm512_add_ps(_mm512_loadu_ps(output + 16 * q), _mm512_set1_ps(lift))));
}

// output[m, c] += the sums of n rows of woven levels by up to two quads of weights. Behind the n-th, weights are 0 up to a multiple
// of 64. offset: as in HfkvSide.
inline void weigh_tiles(const uint8_t* woven, int n, int dim, int offset, const float* weights, int pitch, int count,
                        float* output, int output_pitch, int8_t* tiles, Stream& next) {
    alignas(64) int32_t sums[4 * 16 * 16];
    float units[2 * kQuad], lifts[2 * kQuad];
    int32_t start[2 * kQuad];
    const int steps = padded(n) / kBlock;
    for (int m = 0; m < count; m += kQuad) {
        Quad quad(weights + (int64_t)m * pitch, pitch, count - m, padded(n));
        split_weights(quad, tiles + 2 * m * 64, next);
        quad.copy(units + m, start + m);
        for (int i = 0; i < kQuad; i++)
            lifts[m + i] = rest_of_mean(offset, quad.totals[i], quad.units[i], start[m + i]);
    }
    for (int c = 0; c < dim; c += 64, woven += steps * 4 * kTileBytes) {
        multiply_values(woven, tiles, steps, sums, next);
        for (int m = 0; m < count; m++) {
            next.work(1);
            const int row = m / kQuad * 2 * kQuad + m % kQuad;
            add_channels(sums + 16 * row, start[m], units[m], lifts[m], output + (int64_t)m * output_pitch + c);
        }
    }
}

}  // namespace

#endif  // __AMX_INT8__
