// Which pages a row reads, by their scores: the largest of the row, or of all heads of a sequence that share them. choose.h includes
// it.
#pragma once

#include <cstring>

#include "api.h"

namespace {

constexpr int64_t kNoColumn = 1 << 30;
constexpr int kMostOfShare = 2;  // times what a head would have by itself

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

// How many pages a row may have: where heads share, what it brings to them.
inline int allowed(const HfkvChoose& c, int row) {
    const int most = c.shared ? c.shared : c.count;
    return c.limits && c.limits[row] < most ? (int)c.limits[row] : most;
}

// Writes the columns of the `count` largest scores, ascending; of equal ones those that come first. `sorted` is a buffer.
inline void choose_row(const HfkvChoose& c, int row, const float* scores, float* sorted) {
    int64_t* chosen = c.chosen + (size_t)row * c.count;
    const int count = allowed(c, row);
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

// How many pages of a row are candidates for what the heads of its sequence share.
inline int candidates(const HfkvChoose& c, int row) {
    const int most = kMostOfShare * allowed(c, row);
    return most < c.columns ? most : c.columns;
}

// Moves the scores of a row's candidates to the front of `sorted`.
inline void part_candidates(const HfkvChoose& c, int row, const float* scores, float* sorted) {
    if (candidates(c, row) == 0) return;
    std::memcpy(sorted, scores, sizeof(float) * c.columns);
    part_largest(sorted, c.columns, candidates(c, row));
}

// The smallest of some scores, and how many of those that equal it are taken, from the first on.
struct Threshold {
    float least;
    int equal;

    // Of the `count` numbers that are taken, the last of which is the smallest one.
    Threshold(const float* taken, int count) : least(count ? taken[count - 1] : 0), equal(count) {
        for (int i = 0; i < count; i++) equal -= taken[i] > least;
    }

    bool takes(float score) {
        if (score == least) return equal-- > 0;
        return score > least;
    }
};

// Writes the columns of the rows of a sequence whose scores are the largest of all its candidates, as many as its rows may have
// together; of equal ones those of the first rows, and in a row those that come first. `sorted` is what part_candidates has left of
// all rows, `together` a buffer as large.
inline void choose_together(const HfkvChoose& c, int first, const float* scores, const float* sorted, float* together) {
    int n = 0, total = 0;
    for (int row = first; row < first + c.heads; row++) {
        std::memcpy(together + n, sorted + (size_t)row * c.columns, sizeof(float) * candidates(c, row));
        n += candidates(c, row), total += allowed(c, row);
    }
    if (total > n) total = n;
    if (total) part_largest(together, n, total);
    Threshold of_all(together, total);
    for (int row = first; row < first + c.heads; row++) {
        const size_t begin = (size_t)row * c.columns;
        int64_t* chosen = c.chosen + (size_t)row * c.count;
        Threshold of_row(sorted + begin, candidates(c, row));
        int found = 0;
        for (int column = 0; total && column < c.columns && found < c.count; column++)
            if (of_row.takes(scores[begin + column]) && of_all.takes(scores[begin + column])) chosen[found++] = column;
        for (; found < c.count; found++) chosen[found] = kNoColumn;
    }
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

}  // namespace
