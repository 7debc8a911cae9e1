// The choice of pages for a decode step, hfkv_choose: products of what the queries of a row ask with signed bytes that summarize
// its pages, and the pages with the largest scores, of each row or of all heads of a sequence. kernels.inc exports it.
#pragma once

#include "api.h"
#include "page_side.h"
#include "pick.h"
#include "vectors.h"
#include "workspace.h"

namespace {

constexpr int kPagesPerTask = 64;

inline Vec load_bytes(const int8_t* p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__) && defined(__F16C__)
    return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    Vec v{};
    for (int i = 0; i < kLanes; i++) v[i] = p[i];
    return v;
#endif
}

// The first n bytes, fewer than kLanes, and 0 behind them.
inline Vec load_few_bytes(const int8_t* p, int n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8((__mmask16)((1u << n) - 1), p)));
#else
    int8_t few[16] = {};
    std::memcpy(few, p, n);
    return load_bytes(few);
#endif
}

inline int whole_lanes(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

// The vectors of a part of a page whose pages are scored by their attention: a mean of `dim` numbers and `bands` deviations. What a
// query asks has both in whole lanes, `pitch` numbers in all.
struct Widths {
    int dim, bands, pitch;

    explicit Widths(const HfkvChoose& c) : dim(c.width * c.band / (c.band + 1)), bands(c.width - dim) {
        pitch = whole_lanes(dim) + whole_lanes(bands);
    }
};

// The product of floats with bytes, in four sums, so that additions need not wait for each other.
inline float product(const float* query, const int8_t* codes, int width) {
    Vec sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    float rest = 0;
    int i = 0;
    for (; i + 4 * kLanes <= width; i += 4 * kLanes)
        for (int m = 0; m < 4; m++) sums[m] += load_bytes(codes + i + m * kLanes) * load(query + i + m * kLanes);
    for (; i + kLanes <= width; i += kLanes) sums[0] += load_bytes(codes + i) * load(query + i);
    for (; i < width; i++) rest += codes[i] * query[i];
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

// Writes what a query asks, whose elements are followed by the mean of the squares of each band: [pitch].
inline void ask_moments(const HfkvChoose& c, const float* query, const Widths& w, float* asked) {
    float* squares = asked + whole_lanes(w.dim);
    std::memset(asked, 0, sizeof(float) * w.pitch);
    for (int i = 0; i < w.dim; i++) {
        asked[i] = query[i] * c.scaling;
        squares[i / c.band] += asked[i] * asked[i];
    }
    for (int i = 0; i < w.bands; i++) squares[i] /= (float)c.band;
}

// Writes what the queries of a row ask: [width] together, or [queries, pitch] by each of them.
inline void ask(const HfkvChoose& c, int row, float* asked) {
    const float* query = c.query + row / c.heads * c.query_batch + (int64_t)(row % c.heads) * c.queries * c.query_head;
    if (c.reach > 0) {
        const Widths w(c);
        for (int m = 0; m < c.queries; m++) ask_moments(c, query + m * c.query_head, w, asked + (size_t)m * w.pitch);
        return;
    }
    const int dim = c.width / c.vectors;
    for (int i = 0; i < dim; i++) {
        float total = 0, size = 0;
        for (int m = 0; m < c.queries; m++) {
            const float x = query[m * c.query_head + i];
            total += x, size += x < 0 ? -x : x;
        }
        for (int v = 0; v < c.vectors; v++) asked[v * dim + i] = total + c.size_weights[v] * size;
    }
}

// Products of each query with the mean of a part of a page, and of its squares with the squared deviations, in codes.
struct Moments {
    const float* asked;   // [queries, pitch]
    const int8_t* codes;  // [dim + bands]
    Widths w;
    float *means, *squares;
    int64_t pitch;  // from one query's product to the next one's

    template <int N>
    void run(int first) const {
        const float* query = asked + (size_t)first * w.pitch;
        Vec mean[N], square[N];
        for (int m = 0; m < N; m++) mean[m] = square[m] = splat(0.0f);
        int i = 0;
        for (; i + kLanes <= w.dim; i += kLanes) add<N>(load_bytes(codes + i), query + i, mean);
        if (i < w.dim) add<N>(load_few_bytes(codes + i, w.dim - i), query + i, mean);
        const int8_t* deviations = codes + w.dim;
        query += whole_lanes(w.dim);
        for (i = 0; i + kLanes <= w.bands; i += kLanes) {
            const Vec deviation = load_bytes(deviations + i);
            add<N>(deviation * deviation, query + i, square);
        }
        if (i < w.bands) {
            const Vec deviation = load_few_bytes(deviations + i, w.bands - i);
            add<N>(deviation * deviation, query + i, square);
        }
        for (int m = 0; m < N; m++) means[(first + m) * pitch] = sum(mean[m]), squares[(first + m) * pitch] = sum(square[m]);
    }

    template <int N>
    HFKV_INLINE void add(Vec numbers, const float* query, Vec* sums) const {
        for (int m = 0; m < N; m++) sums[m] += numbers * load(query + m * w.pitch);
    }
};

inline bool lacks(const HfkvChoose& c, int row, int column) { return c.missing && c.missing[row * c.missing_row + column]; }

inline void score_pages(const HfkvChoose& c, int row, int first, int stop, const float* query, float* scores) {
    for (int column = first; column < stop; column++) {
        float top = kMinusInfinity;
        for (int part = 0; part < c.spans && !lacks(c, row, column); part++) {
            const int64_t at = (int64_t)column * c.spans + part;
            const float found = product(query, c.codes + row * c.codes_row + at * c.width, c.width);
            top = larger(top, found * from_half(c.scales[row * c.scales_row + at]));
        }
        scores[column] = top;
    }
}

// The buffers of a row whose pages are scored by their attention: [queries, parts] twice, and [parts].
struct Masses {
    int64_t parts;  // columns * spans
    float *logs, *squares, *scales;

    static size_t floats(const HfkvChoose& c) { return ((size_t)2 * c.queries + 1) * c.columns * c.spans; }

    Masses(const HfkvChoose& c, float* buffer) : parts((int64_t)c.columns * c.spans), logs(buffer) {
        squares = logs + c.queries * parts, scales = squares + c.queries * parts;
    }
};

// Writes the logarithm of the attention of each query to the parts of some pages, up to what all parts have in common.
inline void score_parts(const HfkvChoose& c, int row, int first, int stop, const float* asked, const Masses& x) {
    const int64_t begin = (int64_t)first * c.spans, end = (int64_t)stop * c.spans;
    const int8_t* codes = c.codes + row * c.codes_row;
    const Widths widths(c);
    halves((const uint8_t*)(c.scales + row * c.scales_row + begin), (int)(end - begin), x.scales + begin);
    for (int64_t at = begin; at < end; at++)
        by_fours(c.queries, Moments{asked, codes + at * c.width, widths, x.logs + at, x.squares + at, x.parts});
    for (int m = 0; m < c.queries; m++) {
        float *logs = x.logs + m * x.parts, *squares = x.squares + m * x.parts;
        for (int64_t at = begin; at < end; at++) {
            const float deviation = __builtin_sqrtf(squares[at]) * x.scales[at];
            const float near = 0.5f * deviation * deviation, far = c.reach * (deviation - 0.5f * c.reach);
            logs[at] = logs[at] * x.scales[at] + (deviation < c.reach ? near : far);
        }
        for (int column = first; c.missing && column < stop; column++)
            for (int part = 0; part < c.spans && lacks(c, row, column); part++) logs[column * c.spans + part] = kMinusInfinity;
    }
}

// Writes the logarithm of the attention of a query to each sink of a row, on the scale of parts, and returns the largest.
inline float score_sinks(const HfkvChoose& c, int row, const float* query, float* known) {
    const int dim = Widths(c).dim;
    const float* key = c.sinks + (int64_t)row * c.sink_count * dim;
    float top = kMinusInfinity;
    for (int s = 0; s < c.sink_count; s++, key += dim) {
        Vec found = splat(0.0f);
        int i = 0;
        for (; i + kLanes <= dim; i += kLanes) found += load(query + i) * load(key + i);
        float score = sum(found);
        for (; i < dim; i++) score += query[i] * key[i];
        known[s] = score - c.part_log;
        top = larger(top, known[s]);
    }
    return top;
}

// Writes the probabilities of the pages of a row among pages and sinks, summed over the queries: [columns]. `known` is a buffer for the
// sinks.
inline void sum_probabilities(const HfkvChoose& c, int row, const float* asked, const Masses& x, float* known, float* sums) {
    const int parts = (int)x.parts;
    for (int column = 0; column < c.columns; column++) sums[column] = lacks(c, row, column) ? kMinusInfinity : 0;
    for (int m = 0; m < c.queries; m++) {
        float* masses = x.logs + m * x.parts;
        Vec tops = splat(kMinusInfinity), totals = splat(0.0f);
        const int whole = parts - parts % kLanes;
        for (int i = 0; i < whole; i += kLanes) tops = max(tops, load(masses + i));
        float top = larger(largest(tops), score_sinks(c, row, asked + (size_t)m * Widths(c).pitch, known)), total = 0;
        for (int i = whole; i < parts; i++) top = larger(top, masses[i]);
        if (top == kMinusInfinity) continue;
        for (int i = 0; i < whole; i += kLanes) {
            const Vec mass = exponential(load(masses + i) - splat(top));
            totals += mass;
            store(masses + i, mass);
        }
        total = sum(totals);
        for (int i = whole; i < parts; i++) total += masses[i] = exponential(splat(masses[i] - top))[0];
        for (int s = 0; s < c.sink_count; s++) total += exponential(splat(known[s] - top))[0];
        const float share = 1 / total;
        for (int column = 0; column < c.columns; column++)
            for (int part = 0; part < c.spans; part++) sums[column] += masses[column * c.spans + part] * share;
    }
}

inline int choose(const HfkvChoose& c) {
    const int blocks = (c.columns + kPagesPerTask - 1) / kPagesPerTask, tasks = c.rows * blocks;
    const bool by_mass = c.reach > 0;
    const size_t cells = (size_t)c.rows * c.columns;
    const size_t asked_by_row = by_mass ? (size_t)c.queries * Widths(c).pitch : (size_t)c.width;
    const size_t masses_by_row = by_mass ? Masses::floats(c) : 0;
    const size_t by_row = asked_by_row + masses_by_row + c.sink_count;
    const Workspace workspace(sizeof(float) * ((c.shared ? 3 : 2) * cells + c.rows * by_row));
    if (!workspace.at()) return 1;
    float* scores = (float*)workspace.at();
    float *sorted = scores + cells, *all_asked = sorted + cells, *masses = all_asked + c.rows * asked_by_row;
    float *known = masses + c.rows * masses_by_row, *together = known + (size_t)c.rows * c.sink_count;
    const int threads = tasks == 1 ? 1 : c.threads;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int row = 0; row < c.rows; row++) ask(c, row, all_asked + row * asked_by_row);
#pragma omp for schedule(dynamic, 1)
        for (int task = 0; task < tasks; task++) {
            const int row = task / blocks, first = task % blocks * kPagesPerTask;
            const int stop = first + kPagesPerTask < c.columns ? first + kPagesPerTask : c.columns;
            const float* asked = all_asked + row * asked_by_row;
            if (by_mass) score_parts(c, row, first, stop, asked, Masses(c, masses + row * masses_by_row));
            else score_pages(c, row, first, stop, asked, scores + (size_t)row * c.columns);
        }
#pragma omp for schedule(static)
        for (int row = 0; row < c.rows; row++) {
            const size_t begin = (size_t)row * c.columns;
            float *own = scores + begin, *of_sinks = known + (size_t)row * c.sink_count;
            const float* asked = all_asked + row * asked_by_row;
            if (by_mass) sum_probabilities(c, row, asked, Masses(c, masses + row * masses_by_row), of_sinks, own);
            if (c.shared) part_candidates(c, row, own, sorted + begin);
            else choose_row(c, row, own, sorted + begin);
            if (c.table && !c.shared) copy_entries(c, row);
        }
        if (c.shared) {
#pragma omp for schedule(static)
            for (int first = 0; first < c.rows; first += c.heads) {
                choose_together(c, first, scores, sorted, together + (size_t)first * c.columns);
                for (int row = first; c.table && row < first + c.heads; row++) copy_entries(c, row);
            }
        }
    }
    return 0;
}

}  // namespace
