// Products of bytes on the tile unit (AMX): the same 16-bit split of the float side as in bytes.h, the same exact sums.
//
// A page's rows of bytes are a tile as they lie, and so are four queries by two bytes each: no transposing for scores.
#pragma once

#include "bytes.h"

#if defined(__AMX_INT8__)

namespace {

constexpr int kColumns = 8;  // four queries, a high and a low byte each

// All tiles are 16 rows of 64 bytes; where four queries fill half of one, the rest is computed for nothing.
inline void configure_tiles() {
    struct alignas(64) {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.rows[i] = 16, config.row_bytes[i] = 64;
    _tile_loadconfig(&config);
}

inline void release_tiles() { _tile_release(); }

// Eight columns of 16 rows: lane t of column c is sums[t][c].
inline void transpose_columns(const int32_t sums[16][16], __m512i columns[kColumns]) {
    __m512i v[8], w[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        v[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)sums[i])),
                                  _mm256_loadu_si256((const __m256i*)sums[8 + i]), 1);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        w[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        w[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    // Quarters of v[c] (c < 4): columns c and 4 + c of rows 0-3, then of rows 8-11; of v[4 + c]: of rows 4-7 and 12-15.
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        v[4 * i] = _mm512_unpacklo_epi64(w[4 * i], w[4 * i + 2]);
        v[4 * i + 1] = _mm512_unpackhi_epi64(w[4 * i], w[4 * i + 2]);
        v[4 * i + 2] = _mm512_unpacklo_epi64(w[4 * i + 1], w[4 * i + 3]);
        v[4 * i + 3] = _mm512_unpackhi_epi64(w[4 * i + 1], w[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        const __m512i low = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88), high = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xdd);
        columns[c] = _mm512_shuffle_i32x4(low, low, 0xd8);
        columns[4 + c] = _mm512_shuffle_i32x4(high, high, 0xd8);
    }
}

inline bool tiles_fit_scores(int room, int dim) { return room % 32 == 0 && dim % 64 == 0 && dim <= kLargestExactDim; }

// As dot_bytes; rows up to a multiple of 32 are read.
template <int M>
void dot_bytes_amx(const uint8_t* rows, int n, int dim, const float* query, int query_pitch, float* scores, int pitch,
                   int8_t* scratch, Stream& next) {
    alignas(64) int8_t tiles[kLargestExactDim / 64][16][64];
    int32_t start[M];
    float units[M];
    for (int m = 0; m < M; m++) {
        int8_t* high = scratch;
        int8_t* low = scratch + dim;
        units[m] = split(query + m * query_pitch, dim, high, low);
        start[m] = -kBias * (256 * byte_sum(high, dim) + byte_sum(low, dim));
        for (int c = 0; c < dim; c += 4) {
            int8_t* to = tiles[c / 64][c % 64 / 4];
            std::memcpy(to + 8 * m, high + c, 4);
            std::memcpy(to + 8 * m + 4, low + c, 4);
        }
    }
    const int blocks = dim / 64;
    for (int t = 0; t < n; t += 32) {
        const uint8_t* from = rows + (int64_t)t * dim;
        _tile_zero(0);
        _tile_zero(1);
        for (int b = 0; b < blocks; b++) {
            _tile_loadd(4, tiles[b], 64);
            _tile_loadd(2, from + 64 * b, dim);
            _tile_loadd(3, from + 64 * b + 16 * (int64_t)dim, dim);
            _tile_dpbusd(0, 2, 4);
            _tile_dpbusd(1, 3, 4);
        }
        next.work(6);
        alignas(64) int32_t sums[2][16][16];
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m512i columns[kColumns];
            transpose_columns(sums[half], columns);
            const int left = n - t - 16 * half;
            const __mmask16 out = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1 << left) - 1);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                const __m512i total = _mm512_add_epi32(_mm512_slli_epi32(columns[2 * m], 8),
                                                       _mm512_add_epi32(columns[2 * m + 1], _mm512_set1_epi32(start[m])));
                _mm512_mask_storeu_ps(scores + m * pitch + t + 16 * half, out,
                                      _mm512_mul_ps(_mm512_cvtepi32_ps(total), _mm512_set1_ps(units[m])));
            }
        }
    }
}

// 64 channels of n tokens, four tokens side by side: part p, group g, lane i is channel 16 (i / 4) + 4 p + i % 4.
inline void interleave(const uint8_t* rows, int n, int dim, uint8_t* parts, int groups, Stream& next) {
    for (int t = 0; t < n; t += 4) {
        if (t % 8 == 0) next.work(1);
        __m512i row[4];
        for (int i = 0; i < 4; i++) row[i] = _mm512_loadu_si512(rows + (int64_t)(t + i < n ? t + i : n - 1) * dim);
        const __m512i ab_low = _mm512_unpacklo_epi8(row[0], row[1]), ab_high = _mm512_unpackhi_epi8(row[0], row[1]);
        const __m512i cd_low = _mm512_unpacklo_epi8(row[2], row[3]), cd_high = _mm512_unpackhi_epi8(row[2], row[3]);
        uint8_t* to = parts + 16 * t;
        _mm512_storeu_si512(to, _mm512_unpacklo_epi16(ab_low, cd_low));
        _mm512_storeu_si512(to + 64 * groups, _mm512_unpackhi_epi16(ab_low, cd_low));
        _mm512_storeu_si512(to + 128 * groups, _mm512_unpacklo_epi16(ab_high, cd_high));
        _mm512_storeu_si512(to + 192 * groups, _mm512_unpackhi_epi16(ab_high, cd_high));
    }
}

inline bool tiles_fit_output(int n, int dim) { return dim % 64 == 0 && n <= 128; }

// As weigh_bytes.
template <int M>
void weigh_bytes_amx(const uint8_t* rows, int n, int dim, const float* weights, int pitch, float* output,
                     int output_pitch, int8_t* scratch, Stream& next) {
    alignas(64) uint8_t parts[4 * 32 * 64];
    const int width = padded(n), groups = width / 4;
    __m512i high_start[M], low_start[M];
    __m512 units[M];
    for (int m = 0; m < M; m++) {
        int8_t* high = scratch + 2 * m * width;
        units[m] = _mm512_set1_ps(split(weights + m * pitch, n, high, high + width));
        high_start[m] = _mm512_set1_epi32(-kBias * byte_sum(high, n));
        low_start[m] = _mm512_set1_epi32(-kBias * byte_sum(high + width, n));
    }
    for (int c = 0; c < dim; c += 64) {
        interleave(rows + c, n, dim, parts, groups, next);
        alignas(64) int32_t sums[4][16][16];
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int t = 0; t < n; t += 64) {
            const uint8_t* group = parts + 16 * t;
            _tile_loadd(4, scratch + t, width);
            _tile_loadd(5, group, 64);
            _tile_dpbsud(0, 4, 5);
            _tile_loadd(6, group + 64 * groups, 64);
            _tile_dpbsud(1, 4, 6);
            _tile_loadd(5, group + 128 * groups, 64);
            _tile_dpbsud(2, 4, 5);
            _tile_loadd(6, group + 192 * groups, 64);
            _tile_dpbsud(3, 4, 6);
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            __m512 total[4];
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) {
                const __m512i high = _mm512_add_epi32(_mm512_load_si512(sums[p][2 * m]), high_start[m]);
                const __m512i low = _mm512_add_epi32(_mm512_load_si512(sums[p][2 * m + 1]), low_start[m]);
                total[p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(low));
            }
            // Quarter q of part p holds channels 16 q + 4 p on: transpose the quarters.
            const __m512 a = _mm512_shuffle_f32x4(total[0], total[1], 0x88), b = _mm512_shuffle_f32x4(total[2], total[3], 0x88);
            const __m512 d = _mm512_shuffle_f32x4(total[0], total[1], 0xdd), e = _mm512_shuffle_f32x4(total[2], total[3], 0xdd);
            const __m512 quarter[4] = {_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(d, e, 0x88),
                                       _mm512_shuffle_f32x4(a, b, 0xdd), _mm512_shuffle_f32x4(d, e, 0xdd)};
            float* to = output + m * output_pitch + c;
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++)
                _mm512_storeu_ps(to + 16 * q, _mm512_fmadd_ps(quarter[q], units[m], _mm512_loadu_ps(to + 16 * q)));
        }
    }
}

}  // namespace

#endif  // __AMX_INT8__
