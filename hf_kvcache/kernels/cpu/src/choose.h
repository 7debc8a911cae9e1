// The choice of pages for a decode step, hfkv_choose: products of what the queries of a row ask with signed bytes that summarize
// its pages, and the pages with the largest scores. kernels.inc exports it.
#pragma once

#include "api.h"
#include "page_side.h"
#include "vectors.h"
#include "workspace.h"

namespace {

constexpr int kPagesPerTask = 64;
constexpr int64_t kNoColumn = 1 << 30;

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

// Writes what the queries of a row ask: [width] together, or [queries, width] by each of them, whose elements are followed by their
// squares.
inline void ask(const HfkvChoose& c, int row, float* asked) {
    const int dim = c.width / c.vectors;
    const float* query = c.query + row / c.heads * c.query_batch + (int64_t)(row % c.heads) * c.queries * c.query_head;
    if (c.reach > 0) {
        for (int m = 0; m < c.queries; m++, asked += c.width)
            for (int i = 0; i < dim; i++) {
                const float x = query[m * c.query_head + i] * c.scaling;
                asked[i] = x, asked[dim + i] = x * x;
            }
        return;
    }
    for (int i = 0; i < dim; i++) {
        float total = 0, size = 0;
        for (int m = 0; m < c.queries; m++) {
            const float x = query[m * c.query_head + i];
            total += x, size += x < 0 ? -x : x;
        }
        for (int v = 0; v < c.vectors; v++) asked[v * dim + i] = total + c.size_weights[v] * size;
    }
}

// Products of each query with the mean of a part of a page, and of its squares with the squared deviation, in codes.
struct Moments {
    const float* asked;   // [queries, 2 * dim]
    const int8_t* codes;  // [2 * dim]
    int dim;
    float *means, *squares;
    int64_t pitch;  // from one query's product to the next one's

    template <int N>
    void run(int first) const {
        const float* query = asked + (size_t)first * 2 * dim;
        Vec mean[N], square[N];
        for (int m = 0; m < N; m++) mean[m] = square[m] = splat(0.0f);
        int i = 0;
        for (; i + kLanes <= dim; i += kLanes) {
            const Vec a = load_bytes(codes + i), b = load_bytes(codes + dim + i), c = b * b;
            for (int m = 0; m < N; m++) {
                mean[m] += a * load(query + m * 2 * dim + i);
                square[m] += c * load(query + m * 2 * dim + dim + i);
            }
        }
        for (int m = 0; m < N; m++) {
            float one = sum(mean[m]), other = sum(square[m]);
            for (int j = i; j < dim; j++) {
                one += codes[j] * query[m * 2 * dim + j];
                other += (float)(codes[dim + j] * codes[dim + j]) * query[m * 2 * dim + dim + j];
            }
            means[(first + m) * pitch] = one, squares[(first + m) * pitch] = other;
        }
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
    halves((const uint8_t*)(c.scales + row * c.scales_row + begin), (int)(end - begin), x.scales + begin);
    for (int64_t at = begin; at < end; at++)
        by_fours(c.queries, Moments{asked, codes + at * c.width, c.width / 2, x.logs + at, x.squares + at, x.parts});
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

// Writes the probabilities of the pages of a row, summed over the queries: [columns].
inline void sum_probabilities(const HfkvChoose& c, int row, const Masses& x, float* sums) {
    const int parts = (int)x.parts;
    for (int column = 0; column < c.columns; column++) sums[column] = lacks(c, row, column) ? kMinusInfinity : 0;
    for (int m = 0; m < c.queries; m++) {
        float* masses = x.logs + m * x.parts;
        Vec tops = splat(kMinusInfinity), totals = splat(0.0f);
        const int whole = parts - parts % kLanes;
        for (int i = 0; i < whole; i += kLanes) tops = max(tops, load(masses + i));
        float top = largest(tops), total = 0;
        for (int i = whole; i < parts; i++) top = larger(top, masses[i]);
        if (top == kMinusInfinity) continue;
        for (int i = 0; i < whole; i += kLanes) {
            const Vec mass = exponential(load(masses + i) - splat(top));
            totals += mass;
            store(masses + i, mass);
        }
        total = sum(totals);
        for (int i = whole; i < parts; i++) total += masses[i] = exponential(splat(masses[i] - top))[0];
        const float share = 1 / total;
        for (int column = 0; column < c.columns; column++)
            for (int part = 0; part < c.spans; part++) sums[column] += masses[column * c.spans + part] * share;
    }
}

// Moves the `count` largest of n numbers to the front, and returns the smallest of these: quickselect. The standard library's
// functions could be linked from the unit of another instruction set.
inline float part_largest(float* x, int n, int count) {
    int low = 0, high = n - 1;
    while (low < high) {
        const float a = x[low], b = x[(low + high) / 2], c = x[high];
        const float pivot = a > b ? (b > c ? b : (a > c ? c : a)) : (a > c ? a : (b > c ? c : b));
        int i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i > j) break;
            const float other = x[i];
            x[i++] = x[j];
            x[j--] = other;
        }
        if (count - 1 <= j) high = j;
        else if (count - 1 >= i) low = i;
        else break;
    }
    return x[count - 1];
}

// Writes the columns of the `count` largest scores, ascending; of equal ones those that come first. `sorted` is a buffer.
inline void choose_row(const HfkvChoose& c, int row, const float* scores, float* sorted) {
    int64_t* chosen = c.chosen + (size_t)row * c.count;
    const int count = c.limits && c.limits[row] < c.count ? (int)c.limits[row] : c.count;
    int found = 0;
    if (count > 0) {
        std::memcpy(sorted, scores, sizeof(float) * c.columns);
        const float least = part_largest(sorted, c.columns, count);
        int equal = count;  // how many of those that equal the least one are chosen
        for (int i = 0; i < count; i++) equal -= sorted[i] > least;
        for (int column = 0; column < c.columns && found < count; column++) {
            const bool same = scores[column] == least;
            if (scores[column] > least || (same && equal > 0)) {
                equal -= same;
                chosen[found++] = column;
            }
        }
    }
    for (; found < c.count; found++) chosen[found] = kNoColumn;
}

// Copies the entries of the chosen pages of a row from one table to the other.
inline void copy_entries(const HfkvChoose& c, int row) {
    const size_t begin = (size_t)row * c.count, cells = (size_t)c.rows * c.count;
    const int64_t from = row * c.table_row;
    for (int i = 0; i < c.count; i++) {
        const int64_t column = c.chosen[begin + i];
        const bool held = column < c.columns;
        c.table[begin + i] = held ? c.addresses[from + column] : 0;
        c.table_counts[begin + i] = held ? c.counts[from + column] : 0;
        c.table[cells + begin + i] = c.table_counts[begin + i];
        c.table[2 * cells + begin + i] = held ? c.first[from + column] : 0;
    }
}

inline int choose(const HfkvChoose& c) {
    const int blocks = (c.columns + kPagesPerTask - 1) / kPagesPerTask, tasks = c.rows * blocks;
    const bool by_mass = c.reach > 0;
    const size_t cells = (size_t)c.rows * c.columns;
    const size_t asked_by_row = by_mass ? (size_t)c.queries * c.width : (size_t)c.width;
    const size_t masses_by_row = by_mass ? Masses::floats(c) : 0;
    const Workspace workspace(sizeof(float) * (2 * cells + c.rows * (asked_by_row + masses_by_row)));
    if (!workspace.at()) return 1;
    float* scores = (float*)workspace.at();
    float *sorted = scores + cells, *all_asked = sorted + cells, *masses = all_asked + c.rows * asked_by_row;
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
            float* own = scores + (size_t)row * c.columns;
            if (by_mass) sum_probabilities(c, row, Masses(c, masses + row * masses_by_row), own);
            choose_row(c, row, own, sorted + (size_t)row * c.columns);
            if (c.table) copy_entries(c, row);
        }
    }
    return 0;
}

}  // namespace
