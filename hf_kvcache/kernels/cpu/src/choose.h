// The choice of pages for a decode step, hfkv_choose: products of the queries of a row with signed bytes that summarize its pages,
// and the pages with the largest of them. kernels.inc exports it.
#pragma once

#include <algorithm>

#include "api.h"
#include "vectors.h"
#include "workspace.h"

namespace {

constexpr int kPagesPerTask = 64;
constexpr int64_t kNoColumn = 1 << 30;
typedef int8_t Bytes __attribute__((vector_size(HFKV_LANES)));

inline Vec load_bytes(const int8_t* p) {
    Bytes bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, Vec);
}

// The largest product of N queries, `width` apart, with a vector of bytes.
template <int N>
float largest_product(const float* query, const int8_t* codes, int width) {
    Vec sums[N];
    float rest[N];
    for (int m = 0; m < N; m++) sums[m] = splat(0.0f), rest[m] = 0;
    int i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        const Vec x = load_bytes(codes + i);
        for (int m = 0; m < N; m++) sums[m] += x * load(query + (size_t)m * width + i);
    }
    for (; i < width; i++)
        for (int m = 0; m < N; m++) rest[m] += codes[i] * query[(size_t)m * width + i];
    float top = kMinusInfinity;
    for (int m = 0; m < N; m++) top = larger(top, sum(sums[m]) + rest[m]);
    return top;
}

inline float largest_product_of(const HfkvChoose& c, const float* query, const int8_t* codes) {
    float top = kMinusInfinity;
    int m = 0;
    for (; m + 4 <= c.queries; m += 4) top = larger(top, largest_product<4>(query + (size_t)m * c.width, codes, c.width));
    for (; m < c.queries; m++) top = larger(top, largest_product<1>(query + (size_t)m * c.width, codes, c.width));
    return top;
}

inline void score_pages(const HfkvChoose& c, int row, int first, int stop, float* scores) {
    const float* query = c.query + (size_t)row * c.queries * c.width;
    for (int column = first; column < stop; column++) {
        float top = kMinusInfinity;
        for (int part = 0; part < c.spans && !(c.missing && c.missing[row * c.missing_row + column]); part++) {
            const int64_t at = (int64_t)column * c.spans + part;
            const float product = largest_product_of(c, query, c.codes + row * c.codes_row + at * c.width);
            top = larger(top, product * from_half(c.scales[row * c.scales_row + at]));
        }
        scores[column] = top;
    }
}

// Writes the columns of the `count` largest scores, ascending; of equal ones those that come first. `sorted` is a buffer.
inline void choose_row(const HfkvChoose& c, int row, const float* scores, float* sorted) {
    int64_t* chosen = c.chosen + (size_t)row * c.count;
    const int count = c.limits && c.limits[row] < c.count ? (int)c.limits[row] : c.count;
    int found = 0;
    if (count > 0) {
        std::memcpy(sorted, scores, sizeof(float) * c.columns);
        std::nth_element(sorted, sorted + count - 1, sorted + c.columns, [](float a, float b) { return a > b; });
        const float least = sorted[count - 1];
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

inline int choose(const HfkvChoose& c) {
    const int blocks = (c.columns + kPagesPerTask - 1) / kPagesPerTask, tasks = c.rows * blocks;
    const Workspace workspace(sizeof(float) * 2 * (size_t)c.rows * c.columns);
    if (!workspace.at()) return 1;
    float* scores = (float*)workspace.at();
    float* sorted = scores + (size_t)c.rows * c.columns;
    const int threads = tasks == 1 ? 1 : c.threads;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int task = 0; task < tasks; task++) {
            const int row = task / blocks, first = task % blocks * kPagesPerTask;
            const int stop = first + kPagesPerTask < c.columns ? first + kPagesPerTask : c.columns;
            score_pages(c, row, first, stop, scores + (size_t)row * c.columns);
        }
#pragma omp for schedule(static)
        for (int row = 0; row < c.rows; row++)
            choose_row(c, row, scores + (size_t)row * c.columns, sorted + (size_t)row * c.columns);
    }
    return 0;
}

}  // namespace
