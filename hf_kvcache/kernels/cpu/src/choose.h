// The choice of pages for a decode step, hfkv_choose: products of what the queries of a row ask with signed bytes that summarize its pages,
// and the pages with the largest of them. kernels.inc exports it.
#pragma once

#include "api.h"
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

// Writes what the queries of a row ask: [width].
inline void ask(const HfkvChoose& c, int row, float* asked) {
    const int dim = c.width / c.vectors;
    const float* query = c.query + row / c.heads * c.query_batch + (int64_t)(row % c.heads) * c.queries * c.query_head;
    for (int i = 0; i < dim; i++) {
        float total = 0, size = 0;
        for (int m = 0; m < c.queries; m++) {
            const float x = query[m * c.query_head + i];
            total += x, size += x < 0 ? -x : x;
        }
        for (int v = 0; v < c.vectors; v++) asked[v * dim + i] = total + c.size_weights[v] * size;
    }
}

inline void score_pages(const HfkvChoose& c, int row, int first, int stop, const float* query, float* scores) {
    for (int column = first; column < stop; column++) {
        float top = kMinusInfinity;
        for (int part = 0; part < c.spans && !(c.missing && c.missing[row * c.missing_row + column]); part++) {
            const int64_t at = (int64_t)column * c.spans + part;
            const float found = product(query, c.codes + row * c.codes_row + at * c.width, c.width);
            top = larger(top, found * from_half(c.scales[row * c.scales_row + at]));
        }
        scores[column] = top;
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
    const size_t cells = (size_t)c.rows * c.columns, asked_by_row = (size_t)c.width;
    const Workspace workspace(sizeof(float) * (2 * cells + c.rows * asked_by_row));
    if (!workspace.at()) return 1;
    float* scores = (float*)workspace.at();
    float *sorted = scores + cells, *asked = sorted + cells;
    const int threads = tasks == 1 ? 1 : c.threads;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int row = 0; row < c.rows; row++) ask(c, row, asked + row * asked_by_row);
#pragma omp for schedule(dynamic, 1)
        for (int task = 0; task < tasks; task++) {
            const int row = task / blocks, first = task % blocks * kPagesPerTask;
            const int stop = first + kPagesPerTask < c.columns ? first + kPagesPerTask : c.columns;
            score_pages(c, row, first, stop, asked + row * asked_by_row, scores + (size_t)row * c.columns);
        }
#pragma omp for schedule(static)
        for (int row = 0; row < c.rows; row++) {
            choose_row(c, row, scores + (size_t)row * c.columns, sorted + (size_t)row * c.columns);
            if (c.table) copy_entries(c, row);
        }
    }
    return 0;
}

}  // namespace
