// One side of a page and all the queries of a row: `page_scores` gives their scores with the keys, `page_output` the weighted
// sums of the values, and `decode` the elements. attention.h calls them; they choose between float32 and the
// integer products of AVX2, VNNI, AMX and NEON.
//
// With x_hat = (level * scale + zero) * other, scales per channel fold into the query (or the output), scales per token into the
// scores (or the weights), and a zero point is one more dot product. Scales are applied to elements only where they are shared
// by less than a page or a row.
#pragma once

#include "dot_amx.h"
#include "api.h"
#include "unpack.h"
#include "dot_avx2.h"
#include "dot_neon.h"
#include "dot_vnni.h"
#include "three_bits_vnni.h"

namespace {

// The buffers of one thread.
struct Scratch {
    // The queries of the row that the thread is at, [M, key pitch]: scaled, and rotated too; and what is added to their scores.
    int row = -1;
    float* row_queries;
    float* rotated_queries;
    float* shifts;
    float* queries;  // [M, key pitch], scaled for a page
    float* scores;   // [M, page pitch]
    float* weights;  // [M, page pitch]
    float* output;   // [M, value pitch]
    float* first;    // scales of a page
    float* second;
    float* third;
    float* decoded;  // [P, D]
    uint8_t* bytes;  // [P, D]
    uint8_t* woven;  // [P, D] levels in the order of tiles, in the memory of `decoded`: a page needs only one of the two
    int8_t* split;   // queries or weights in 16 bits each
    Stream next;
};

// Whether all tokens of a page (scales per channel), or all channels of a row (scales per token), share a scale.
inline bool whole(const HfkvSide& side, int page_size) {
    return side.group == (side.axis == HFKV_CHANNEL ? page_size : side.dim);
}

inline int scale_count(const HfkvSide& side, int page_size) {
    return side.axis == HFKV_CHANNEL ? page_size / side.group * side.dim : page_size * (side.dim / side.group);
}

// Runs op for the queries from 0 to count, at most four at a time, with their number as a constant.
template <class Op>
void by_fours(int count, const Op& op) {
    for (int m = 0; m < count; m += 4) {
        const int left = count - m;
        if (left >= 4)
            op.template run<4>(m);
        else if (left == 3)
            op.template run<3>(m);
        else if (left == 2)
            op.template run<2>(m);
        else
            op.template run<1>(m);
    }
}

// Bytes of an element, or of a code of 8 bits.
inline int width_of(int level) { return level == HFKV_FLOAT32 ? 4 : level >= HFKV_BFLOAT16 ? 2 : 1; }

// The elements of tokens before scaling; tokens are `stride` bytes apart.
struct Rows {
    int level, offset, dim;
    const uint8_t* data;
    int64_t stride;
};

struct DotOp {
    Rows rows;
    int n;
    const float* query;
    int query_pitch;
    float* scores;
    int pitch;
    Stream& next;

    template <int M>
    void run(int m) const {
        const float* q = query + (int64_t)m * query_pitch;
        float* s = scores + (int64_t)m * pitch;
        switch (rows.level) {
            case HFKV_CODES: dot_elements<Byte, M>(rows.data, rows.stride, n, rows.dim, q, query_pitch, s, pitch, next); break;
            case HFKV_FLOAT8: dot_elements<Float8, M>(rows.data, rows.stride, n, rows.dim, q, query_pitch, s, pitch, next); break;
            case HFKV_FLOAT32: dot_elements<Float32, M>(rows.data, rows.stride, n, rows.dim, q, query_pitch, s, pitch, next); break;
            case HFKV_BFLOAT16: dot_elements<BFloat16, M>(rows.data, rows.stride, n, rows.dim, q, query_pitch, s, pitch, next); break;
            default: dot_elements<Float16, M>(rows.data, rows.stride, n, rows.dim, q, query_pitch, s, pitch, next);
        }
    }
};

struct WeighOp {
    Rows rows;
    int n;
    const float* weights;
    int pitch;
    float* output;
    int output_pitch;
    Stream& next;

    template <int M>
    void run(int m) const {
        const float* w = weights + (int64_t)m * pitch;
        float* o = output + (int64_t)m * output_pitch;
        switch (rows.level) {
            case HFKV_CODES: weigh_elements<Byte, M>(rows.data, rows.stride, n, rows.dim, w, pitch, o, output_pitch, next); break;
            case HFKV_FLOAT8: weigh_elements<Float8, M>(rows.data, rows.stride, n, rows.dim, w, pitch, o, output_pitch, next); break;
            case HFKV_FLOAT32: weigh_elements<Float32, M>(rows.data, rows.stride, n, rows.dim, w, pitch, o, output_pitch, next); break;
            case HFKV_BFLOAT16: weigh_elements<BFloat16, M>(rows.data, rows.stride, n, rows.dim, w, pitch, o, output_pitch, next); break;
            default: weigh_elements<Float16, M>(rows.data, rows.stride, n, rows.dim, w, pitch, o, output_pitch, next);
        }
    }
};

inline Rows page_rows(const HfkvSide& side, const uint8_t* record, int n, Scratch& s) {
    const uint8_t* codes = record + side.codes;
    if (side.level == HFKV_CODES && side.bits < 8) {
        unpack(codes, side.bits, n, side.dim, side.levels, s.bytes, s.next);
        codes = s.bytes;
    }
    return {side.level, side.offset, side.dim, codes, (int64_t)width_of(side.level) * side.dim};
}

inline float element(const Rows& rows, int t, int c) {
    const uint8_t* at = rows.data + t * rows.stride;
    switch (rows.level) {
        case HFKV_CODES: return (float)((int)at[c] - kBias + rows.offset);
        case HFKV_FLOAT8: return from_float8(at[c]);
        case HFKV_FLOAT32: return Float32::load_one(at + 4 * c);
        case HFKV_BFLOAT16: return BFloat16::load_one(at + 2 * c);
        default: return Float16::load_one(at + 2 * c);
    }
}

// The first n tokens of a side in float32, [n, D], in the rotated basis.
inline void decode(const HfkvSide& side, int page_size, const uint8_t* record, int n, Scratch& s, float* out) {
    const Rows rows = page_rows(side, record, n, s);
    const int dim = side.dim;
    if (side.level >= HFKV_FLOAT32) {
        for (int t = 0; t < n; t++)
            for (int c = 0; c < dim; c++) out[t * dim + c] = element(rows, t, c);
        return;
    }
    const int scales = scale_count(side, page_size), per_row = dim / side.group;
    halves(record + side.scale, scales, s.first);
    if (side.has_zero) halves(record + side.zero, scales, s.second);
    if (side.has_other) halves(record + side.other, side.axis == HFKV_CHANNEL ? page_size : dim, s.third);
    for (int t = 0; t < n; t++) {
        float* to = out + (int64_t)t * dim;
        const bool by_channel = side.axis == HFKV_CHANNEL;
        const int at = by_channel ? t / side.group * dim : t * per_row;
        for (int c = 0; c < dim; c++) {
            const int i = at + (by_channel ? c : c / side.group);
            const float x = element(rows, t, c) * (side.level == HFKV_CODES ? side.step : 1.0f) * s.first[i];
            to[c] = side.has_zero ? x + s.second[i] : x;
        }
        if (side.has_other)
            for (int c = 0; c < dim; c++) to[c] *= by_channel ? s.third[t] : s.third[c];
    }
}

// Rows that need no scaling: elements in full precision as they lie, all others decoded.
inline Rows plain_rows(const HfkvSide& side, int page_size, const uint8_t* record, int n, Scratch& s) {
    if (side.level >= HFKV_FLOAT32) return page_rows(side, record, n, s);
    decode(side, page_size, record, n, s, s.decoded);
    return {HFKV_FLOAT32, 0, side.dim, (const uint8_t*)s.decoded, 4 * (int64_t)side.dim};
}

inline float dot(const float* a, const float* b, int n) {
    Vec total = splat(0.0f);
    int c = 0;
    for (; c + kLanes <= n; c += kLanes) total += load(a + c) * load(b + c);
    float rest = 0;
    for (; c < n; c++) rest += a[c] * b[c];
    return sum(total) + rest;
}

inline float total(const float* x, int n) {
    Vec sums = splat(0.0f);
    int c = 0;
    for (; c + kLanes <= n; c += kLanes) sums += load(x + c);
    float rest = 0;
    for (; c < n; c++) rest += x[c];
    return sum(sums) + rest;
}

#if defined(__AVX512VNNI__)

// Whether dot_vnni.h computes a page: wider rows and longer pages are computed in float32, and more queries by AMX if there is
// any.
inline bool vnni_fits(const HfkvSide& side, int page_size, int count) {
#if defined(__AMX_INT8__)
    if (count > kVnniQueries && tiles_fit(side, page_size)) return false;
#endif
    (void)count;
    return side.level == HFKV_CODES && side.dim <= kLargestExactDim && page_size <= kLargestExactTokens;
}

struct VnniScores {
    const HfkvSide& side;
    const uint8_t* record;
    int n;
    const float* query;
    int query_pitch;
    const float* shifts;
    Scratch& s;
    int pitch;

    const uint8_t* field(bool there, int64_t at) const { return there ? record + at : nullptr; }

    template <int M>
    void run(int m) const {
        const bool by_channel = side.axis == HFKV_CHANNEL;
        const uint8_t* channel = by_channel ? record + side.scale : field(side.has_other, side.other);
        const uint8_t* token = by_channel ? field(side.has_other, side.other) : record + side.scale;
        const uint8_t* token_zero = field(!by_channel && side.has_zero, side.zero);
        const Scaled sums = scale_rows<M>(query + (int64_t)m * query_pitch, query_pitch, side.dim, channel,
                                          field(by_channel && side.has_zero, side.zero), side.step, s.queries, query_pitch);
        const Split split = split_rows<M>(s.queries, query_pitch, side.dim, sums.tops, s.split);
        __m512 before[M], lifts[M];  // what centering the bytes left out, and the factors of zero points per token
        for (int i = 0; i < M; i++) {
            before[i] = _mm512_set1_ps(split.lift(i, side.offset, sums.totals[i]) + sums.zeros[i]);
            lifts[i] = _mm512_set1_ps(sums.totals[i] / side.step);
        }
        const auto put = [&](int t, const __m512* totals) __attribute__((always_inline)) {
            const __mmask16 in = first_lanes(n - t);
            const __m512 scale = factors(token ? token + 2 * t : nullptr, in);
            const __m512 zero = token_zero ? factors(token_zero + 2 * t, in) : _mm512_setzero_ps();
#pragma GCC unroll 4
            for (int i = 0; i < M; i++) {
                const __m512 x = _mm512_fmadd_ps(totals[i], _mm512_set1_ps(split.units[i]), before[i]);
                const __m512 y = _mm512_fmadd_ps(x, scale, _mm512_fmadd_ps(lifts[i], zero, _mm512_set1_ps(shifts[m + i])));
                _mm512_storeu_ps(s.scores + (int64_t)(m + i) * pitch + t, y);
            }
        };
        const uint8_t* codes = record + side.codes;
        const int length = side.dim * side.bits / 8;
        if (side.bits == 8) return dot_codes<M>(CodeRows<8>(side, codes, length, n), split, s.next, put);
        if (side.bits == 4 && length % 16 == 0) return dot_codes<M>(CodeRows<4>(side, codes, length, n), split, s.next, put);
        if (side.bits == 2 && length % 16 == 0) return dot_codes<M>(CodeRows<2>(side, codes, length, n), split, s.next, put);
        if (three_bits_fit(side)) {
            if (side.dim == 64) return dot_three_bits<M, 64>(side, codes, n, split, s.next, put);
            return dot_three_bits<M, 128>(side, codes, n, split, s.next, put);
        }
        unpack(codes, side.bits, n, side.dim, side.levels, s.bytes, s.next);
        dot_codes<M>(CodeRows<8>(side, s.bytes, side.dim, n), split, s.next, put);
    }
};

struct VnniOutput {
    const HfkvSide& side;
    const uint8_t* record;
    int n;
    const float* weights;
    int pitch;
    Scratch& s;
    float* output;
    int output_pitch;

    template <int M>
    void run(int m) const {
        const uint8_t* zero = side.has_zero ? record + side.zero : nullptr;
        const Scaled sums = scale_rows<M>(weights + (int64_t)m * pitch, pitch, n, record + side.scale, zero, side.step, s.weights, pitch);
        const Split split = split_rows<M>(s.weights, pitch, n, sums.tops, s.split);
        if (side.has_other && m == 0) halves(record + side.other, side.dim, s.third);
        float shifts[M];
        for (int i = 0; i < M; i++) shifts[i] = split.lift(i, side.offset, sums.totals[i]) + sums.zeros[i];
        const auto put = [&](int block, int part, const __m512* totals) __attribute__((always_inline)) {
            add_part<M>(split, shifts, side.has_other ? s.third : nullptr, block, part, totals, side.dim,
                        output + (int64_t)m * output_pitch, output_pitch);
        };
        const uint8_t* codes = record + side.codes;
        if (three_bits_fit(side)) {
            const auto put_sixteen = [&](int c, const __m512* totals) __attribute__((always_inline)) {
                add_sixteen<M>(split, shifts, side.has_other ? s.third : nullptr, c, totals, output + (int64_t)m * output_pitch,
                               output_pitch);
            };
            if (side.dim == 64) return weigh_three_bits<M, 64>(side, codes, n, split, s.bytes, s.next, put_sixteen);
            return weigh_three_bits<M, 128>(side, codes, n, split, s.bytes, s.next, put_sixteen);
        }
        with_level_vectors(side, codes, n, s.bytes, s.next,
                  [&](const auto& vectors) { weigh_codes<M>(vectors, split, s.next, put); });
    }
};

#endif  // __AVX512VNNI__

#if defined(HFKV_MULTIPLES)

// Whether dot_avx2.h or dot_neon.h computes a page: the sums of wider rows and longer pages could overflow.
inline bool multiples_fit(const HfkvSide& side, int page_size) {
    return side.level == HFKV_CODES && side.dim <= kLargestExactDim && page_size <= kLargestExactTokens;
}

struct LevelScores {
    const HfkvSide& side;
    Rows rows;
    int n, query_pitch, pitch;
    Scratch& s;

    template <int M>
    void run(int m) const {
        const float* from = s.queries + (int64_t)m * query_pitch;
        const Multiples queries = multiples_of<M>(from, query_pitch, side.dim, side.offset, s.split);
        dot_levels<M>(rows.data, n, side.dim, queries, s.scores + (int64_t)m * pitch, pitch, s.next);
    }
};

struct LevelOutput {
    const HfkvSide& side;
    Rows rows;
    int n, pitch;
    Scratch& s;
    float* output;
    int output_pitch;

    template <int M>
    void run(int m) const {
        const Multiples weights = multiples_of<M>(s.weights + (int64_t)m * pitch, pitch, n, side.offset, s.split);
        weigh_levels<M>(rows.data, n, side.dim, weights, output + (int64_t)m * output_pitch, output_pitch, s.next);
    }
};

#endif  // HFKV_MULTIPLES

// scores[m, t] of the first n rows of codes, before scaling.
inline void code_scores(const HfkvSide& side, int page_size, const uint8_t* record, int n, int count, int query_pitch, Scratch& s,
                        int pitch) {
#if defined(__AMX_INT8__)
    if (tiles_fit(side, page_size)) {
        with_level_vectors(side, record + side.codes, n, s.bytes, s.next, [&](const auto& vectors) {
            for (int m = 0; m < count; m += 2 * kQuad)
                dot_tiles(vectors, n, side.dim, s.queries + (int64_t)m * query_pitch, query_pitch,
                          count - m < 2 * kQuad ? count - m : 2 * kQuad, s.scores + (int64_t)m * pitch, pitch, s.woven, s.split,
                          s.next);
        });
        return;
    }
#endif
    (void)page_size;
    const Rows rows = page_rows(side, record, n, s);
#if defined(HFKV_MULTIPLES)
    if (multiples_fit(side, page_size)) return by_fours(count, LevelScores{side, rows, n, query_pitch, pitch, s});
#endif
    by_fours(count, DotOp{rows, n, s.queries, query_pitch, s.scores, pitch, s.next});
}

// output[m, c] += the sum of the first n rows of codes by s.weights, before scaling.
inline void code_output(const HfkvSide& side, int page_size, const uint8_t* record, int n, int count, int pitch, Scratch& s,
                        float* output, int output_pitch) {
#if defined(__AMX_INT8__)
    if (tiles_fit(side, page_size)) {
        with_level_vectors(side, record + side.codes, n, s.bytes, s.next,
                  [&](const auto& vectors) { weave(vectors, n, s.woven, s.next); });
        for (int m = 0; m < count; m += 2 * kQuad)
            weigh_tiles(s.woven, n, side.dim, side.offset, s.weights + (int64_t)m * pitch, pitch,
                        count - m < 2 * kQuad ? count - m : 2 * kQuad, output + (int64_t)m * output_pitch, output_pitch, s.split, s.next);
        return;
    }
#endif
    (void)page_size;
    const Rows rows = page_rows(side, record, n, s);
#if defined(HFKV_MULTIPLES)
    if (multiples_fit(side, page_size)) return by_fours(count, LevelOutput{side, rows, n, pitch, s, output, output_pitch});
#endif
    by_fours(count, WeighOp{rows, n, s.weights, pitch, output, output_pitch, s.next});
}

// x = (x + before) * scale + after, for n numbers rounded up to whole vectors; scale may be null.
inline void adjust(float* x, int n, float before, const float* scale, float after) {
    for (int t = 0; t < n; t += kLanes) {
        const Vec y = load(x + t) + splat(before);
        store(x + t, (scale ? y * load(scale + t) : y) + splat(after));
    }
}

// s.scores[m, t] of the first n tokens of a page. query: [M, query_pitch], rotated and scaled; shifts [M] are added to the
// scores.
inline void page_scores(const HfkvSide& side, int page_size, const uint8_t* record, int n, const float* query, int count,
                        int query_pitch, const float* shifts, Scratch& s, int pitch) {
    const int dim = side.dim;
    if (side.level >= HFKV_FLOAT32 || !whole(side, page_size)) {
        const Rows rows = plain_rows(side, page_size, record, n, s);
        by_fours(count, DotOp{rows, n, query, query_pitch, s.scores, pitch, s.next});
        for (int m = 0; m < count; m++) adjust(s.scores + (int64_t)m * pitch, n, 0, nullptr, shifts[m]);
        return;
    }
#if defined(__AVX512VNNI__)
    if (vnni_fits(side, page_size, count)) {
        by_fours(count, VnniScores{side, record, n, query, query_pitch, shifts, s, pitch});
        return;
    }
#endif
    const bool by_channel = side.axis == HFKV_CHANNEL;
    const float step = side.level == HFKV_CODES ? side.step : 1.0f;
    // The scales per channel and per token; null: none.
    const float* channel = nullptr;
    const float* token = nullptr;
    halves(record + side.scale, by_channel ? dim : page_size, s.first);
    (by_channel ? channel : token) = s.first;
    if (side.has_other) {
        halves(record + side.other, by_channel ? page_size : dim, s.third);
        (by_channel ? token : channel) = s.third;
    }
    if (side.has_zero) halves(record + side.zero, by_channel ? dim : page_size, s.second);
    for (int m = 0; m < count; m++) {
        s.next.work(1);
        const float* from = query + (int64_t)m * query_pitch;
        float* to = s.queries + (int64_t)m * query_pitch;
        for (int c = 0; c < dim; c++) to[c] = from[c] * (channel ? channel[c] * step : step);
    }
    code_scores(side, page_size, record, n, count, query_pitch, s, pitch);
    for (int m = 0; m < count; m++) {
        s.next.work(1);
        float* to = s.scores + (int64_t)m * pitch;
        const float* from = query + (int64_t)m * query_pitch;
        // What centering the bytes left out.
        float shift = side.offset ? (float)side.offset * total(s.queries + (int64_t)m * query_pitch, dim) : 0.0f;
        if (by_channel && side.has_zero) shift += dot(from, s.second, dim);
        adjust(to, n, shift, token, shifts[m]);
        if (!by_channel && side.has_zero) {
            const float sum = channel ? dot(from, channel, dim) : total(from, dim);
            for (int t = 0; t < n; t++) to[t] += sum * s.second[t];
        }
    }
}

// output[m, c] += the weighted sum of the first n values of a page, in the rotated basis.
inline void page_output(const HfkvSide& side, int page_size, const uint8_t* record, int n, const float* weights, int count,
                        int pitch, Scratch& s, float* output, int output_pitch) {
    const int dim = side.dim;
    if (side.level >= HFKV_FLOAT32 || side.axis == HFKV_CHANNEL || !whole(side, page_size)) {
        const Rows rows = plain_rows(side, page_size, record, n, s);
        by_fours(count, WeighOp{rows, n, weights, pitch, output, output_pitch, s.next});
        return;
    }
#if defined(__AVX512VNNI__)
    if (vnni_fits(side, page_size, count)) {
        by_fours(count, VnniOutput{side, record, n, weights, pitch, s, output, output_pitch});
        return;
    }
#endif
    halves(record + side.scale, page_size, s.first);
    if (side.has_zero) halves(record + side.zero, page_size, s.second);
    if (side.has_other) halves(record + side.other, dim, s.third);
    const float step = side.level == HFKV_CODES ? side.step : 1.0f;
    // A scale per channel applies to the sum of this page alone; without one, the page is added to the output directly.
    float* to = side.has_other ? s.output : output;
    if (side.has_other) std::memset(s.output, 0, sizeof(float) * count * output_pitch);
    for (int m = 0; m < count; m++) {
        s.next.work(1);
        const float* from = weights + (int64_t)m * pitch;
        float* scaled = s.weights + (int64_t)m * pitch;
        for (int t = 0; t < n; t++) scaled[t] = from[t] * s.first[t] * step;
        for (int t = n; t < page_size; t++) scaled[t] = 0;
    }
    code_output(side, page_size, record, n, count, pitch, s, to, output_pitch);
    for (int m = 0; m < count; m++) {
        float shift = side.offset ? (float)side.offset * total(s.weights + (int64_t)m * pitch, n) : 0.0f;
        if (side.has_zero) shift += dot(weights + (int64_t)m * pitch, s.second, n);
        float* sums = to + (int64_t)m * output_pitch;
        float* all = output + (int64_t)m * output_pitch;
        if (side.has_other)
            for (int c = 0; c < dim; c++) all[c] += (sums[c] + shift) * s.third[c];
        else if (shift != 0)
            for (int c = 0; c < dim; c++) all[c] += shift;
    }
}

}  // namespace
