// Attention of a few queries over pages and full-precision tokens, hfkv_attend; and decoding of pages, hfkv_decode_side. The tokens
// are split into tasks, whose partial results are merged by their log-sum-exp. kernels.inc exports both.
#pragma once

#include <cstdlib>

#include "rotate.h"
#include "page_side.h"
#include "workspace.h"

namespace {

constexpr int kDenseTile = 128;       // full-precision tokens that are taken at a time
constexpr int kLeastPagesPerTask = 4;
constexpr int kTasksPerThread = 4;    // so that threads end together although tasks are uneven
constexpr int64_t kOneThreadBytes = 48 << 10;  // reading fewer bytes takes less time than waking a thread

inline int rounded(int n) { return (n + 15) & ~15; }
inline int larger_int(int a, int b) { return a > b ? a : b; }

// The softmax over the keys so far, for each query of a row: largest score, sum of exponentials, weighted sum of values.
struct Partial {
    float* top;
    float* total;
    float* output;  // [M, value pitch]
};

// Sizes of a call, and where its partial results and buffers lie.
struct Run {
    const HfkvAttend& call;
    const HfkvSide& keys;
    const HfkvSide& values;
    int queries;  // of a row: query heads of a KV head times query tokens, head by head
    int page_size, page_pitch, key_pitch, value_pitch, rows, splits, tasks;
    char* memory;
    size_t task_floats, thread_bytes;

    explicit Run(const HfkvAttend& c) : call(c), keys(c.layout->keys), values(c.layout->values) {
        queries = c.query_heads / c.heads * c.length;
        page_size = c.layout->page_size;
        page_pitch = rounded(larger_int(page_size, kDenseTile)) + 16;
        key_pitch = rounded(keys.dim);
        value_pitch = rounded(values.dim);
        rows = c.batch * c.heads;
        splits = (kTasksPerThread * c.threads + rows - 1) / rows;
        if (c.threads == 1) splits = 1;
        const int most = larger_int(1, c.columns / kLeastPagesPerTask);
        splits = c.columns == 0 ? 0 : splits < most ? splits : most;
        tasks = rows * (splits + 1);
        memory = nullptr;
        task_floats = (size_t)rounded(2 * queries) + (size_t)queries * value_pitch;
        const size_t longest = larger_int(rounded(larger_int(keys.dim, values.dim)), page_pitch);
        const size_t widest = larger_int(keys.dim, values.dim);
        thread_bytes = sizeof(float) * (queries * (3 * key_pitch + 16 + 2 * page_pitch + value_pitch) + page_size * widest)
                     + sizeof(float) * 3 * (page_size * widest + longest)  // at most, every element has a scale
                     + page_size * widest + 256 + 16 * (longest + 64) + 256;
        thread_bytes = (thread_bytes + 63) & ~(size_t)63;
    }

    size_t bytes() const {
        return sizeof(float) * (counter_floats() + tasks * task_floats) + call.threads * thread_bytes + 64;
    }

    // For each row, how many of its tasks are done.
    int32_t* done() const { return (int32_t*)memory; }
    size_t counter_floats() const { return rounded(rows); }

    Partial partial(int task) const {
        float* at = (float*)memory + counter_floats() + task * task_floats;
        return {at, at + queries, at + rounded(2 * queries)};
    }

    Scratch scratch(int thread) const {
        float* at = (float*)(memory + sizeof(float) * (counter_floats() + tasks * task_floats) + thread * thread_bytes);
        const size_t widest = larger_int(keys.dim, values.dim);
        const size_t longest = larger_int(rounded((int)widest), page_pitch);
        Scratch s;
        s.row_queries = at, at += (size_t)queries * key_pitch;
        s.rotated_queries = at, at += (size_t)queries * key_pitch;
        s.shifts = at, at += (size_t)queries * 16;
        s.queries = at, at += (size_t)queries * key_pitch;
        s.scores = at, at += (size_t)queries * page_pitch;
        s.weights = at, at += (size_t)queries * page_pitch;
        s.output = at, at += (size_t)queries * value_pitch;
        s.decoded = at, at += page_size * widest;
        s.woven = (uint8_t*)s.decoded;
        s.first = at, at += page_size * widest + longest;
        s.second = at, at += page_size * widest + longest;
        s.third = at, at += page_size * widest + longest;
        s.bytes = (uint8_t*)at;
        s.split = (int8_t*)(s.bytes + page_size * widest + 256);
        return s;
    }
};

// Scales the queries of a row, rotates them, and computes what the mean that was subtracted from the packed keys adds to their
// scores. Each thread does so for the rows that it comes to, which costs less than waiting for one that does it for all.
inline void prepare_row(const Run& run, int row, Scratch& s) {
    if (s.row == row) return;
    s.row = row;
    const HfkvAttend& c = run.call;
    const int b = row / c.heads, head = row % c.heads, group = c.query_heads / c.heads;
    for (int m = 0; m < run.queries; m++) {
        const int g = m / c.length, at = m % c.length;
        const float* from = c.query + b * c.query_batch + (head * group + g) * c.query_head + at * c.query_token;
        float* to = s.row_queries + (size_t)m * run.key_pitch;
        for (int i = 0; i < run.keys.dim; i++) to[i] = from[i] * c.inner_scale;
        if (run.splits == 0) continue;
        float* rotated = s.rotated_queries + (size_t)m * run.key_pitch;
        if (c.key_scale) {
            const float* scale = c.key_scale + (size_t)row * run.keys.dim;
            for (int i = 0; i < run.keys.dim; i++) to[i] *= scale[i];
            rotate(run.keys, to, false, rotated);
            for (int i = 0; i < run.keys.dim; i++) to[i] /= scale[i];  // exact: a power of two
        } else {
            rotate(run.keys, to, false, rotated);
        }
        s.shifts[m] = c.key_mean ? dot(rotated, c.key_mean + (size_t)row * run.keys.dim, run.keys.dim) : 0.0f;
    }
}

inline void begin(const Run& run, Partial& p) {
    for (int m = 0; m < run.queries; m++) p.top[m] = kMinusInfinity, p.total[m] = 0;
    std::memset(p.output, 0, sizeof(float) * run.queries * run.value_pitch);
}

// Scales the sums of a query down to a new maximum.
inline void lower_sums(const Run& run, int m, float top, Partial& p) {
    const float decay = exponential(splat(p.top[m] - top))[0];
    p.total[m] *= decay;
    float* output = p.output + (size_t)m * run.value_pitch;
    for (int i = 0; i < run.values.dim; i++) output[i] *= decay;
    p.top[m] = top;
}

// Turns scores into weights, in place, and scales the partial result down to the new maximum. Hidden scores are -inf. Four queries
// take turns, since a reduction over the lanes of a vector takes long but depends on no other query.
inline void weigh_scores(const Run& run, float* scores, int n, Partial& p, Stream& next) {
    const int stop = (n + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);  // within the pitch, which has room for one more vector
    const int pitch = run.page_pitch;
    for (int first = 0; first < run.queries; first += 4) {
        const int count = run.queries - first < 4 ? run.queries - first : 4;
        float tops[4];
        for (int m = 0; m < count; m++) {
            float* s = scores + (size_t)(first + m) * pitch;
            for (int t = n; t < stop; t++) s[t] = kMinusInfinity;
            Vec even = load(s), odd = load(s + kLanes);
            for (int t = 2 * kLanes; t < stop; t += 2 * kLanes) even = max(even, load(s + t)), odd = max(odd, load(s + t + kLanes));
            tops[m] = largest(max(even, odd));
        }
        for (int m = 0; m < count; m++)
            if (tops[m] > p.top[first + m]) lower_sums(run, first + m, tops[m], p);
        for (int m = 0; m < count; m++) {
            float* s = scores + (size_t)(first + m) * pitch;
            // Before the first visible key the maximum is -inf, and -inf - -inf is not a number.
            const float top = p.top[first + m];
            const Vec shift = splat(top == kMinusInfinity ? 0.0f : top);
            Vec even = splat(0.0f), odd = splat(0.0f);
            next.work(4);
            for (int t = 0; t < stop; t += 2 * kLanes) {
                const Vec a = exponential(load(s + t) - shift), b = exponential(load(s + t + kLanes) - shift);
                store(s + t, a);
                store(s + t + kLanes, b);
                even += a;
                odd += b;
            }
            p.total[first + m] += sum(even + odd);
        }
    }
}

inline void cap_scores(const Run& run, float* scores, int n) {
    const Vec cap = splat(run.call.softcap);
    for (int m = 0; m < run.queries; m++)
        for (int t = 0; t < n; t += kLanes) {
            float* s = scores + (size_t)m * run.page_pitch + t;
            store(s, cap * hyperbolic_tangent(load(s)));
        }
}

// Adds the bias of each of the first n tokens of a page, if its pages have any, to the scores of all queries.
inline void add_bias(const Run& run, const uint8_t* record, int n, Scratch& s) {
    const int64_t at = run.call.layout->bias;
    if (!at) return;
    halves(record + at, n, s.first);
    for (int m = 0; m < run.queries; m++) {
        float* scores = s.scores + (size_t)m * run.page_pitch;
        for (int t = 0; t < n; t++) scores[t] += s.first[t];
    }
}

// Hides keys by their positions at(t): if causal those after a query, and those that have left its window.
template <class Positions>
void hide_by_position(const Run& run, float* scores, int n, bool causal, const Positions& at) {
    const HfkvAttend& c = run.call;
    for (int t = 0; t < n; t++) {
        const int64_t position = at(t);
        for (int i = 0; i < c.length; i++) {
            const int64_t query = c.start + i;
            if ((causal && position > query) || (c.window && position <= query - c.window))
                for (int m = i; m < run.queries; m += c.length) scores[(size_t)m * run.page_pitch + t] = kMinusInfinity;
        }
    }
}

inline void copy_scores(const Run& run, const float* scores, int n, int row, int64_t key, int64_t keys, float* sums) {
    if (!sums) return;
    float* to = sums + (size_t)row * run.queries * keys + key;
    for (int m = 0; m < run.queries; m++)
        std::memcpy(to + (size_t)m * keys, scores + (size_t)m * run.page_pitch, sizeof(float) * n);
}

inline void attend_page(const Run& run, int row, int column, bool last, float* all_scores, Scratch& s, Partial& p) {
    const HfkvAttend& c = run.call;
    const int64_t cell = row * c.row_stride + column;
    const int n = c.counts[cell];
    const int64_t keys = (int64_t)c.columns * run.page_size;
    if (n == 0 || c.addresses[cell] == 0) return;
    const int64_t* positions = c.positions ? (const int64_t*)c.positions[cell] : nullptr;
    const int64_t first = c.first[cell];
    const auto at = [&](int t) { return positions ? positions[t] : first + t; };
    // The first query sees furthest back. A page that has left its window has left the windows of all.
    if (c.window && at(n - 1) <= c.start - c.window) return;
    const uint8_t* record = (const uint8_t*)c.addresses[cell];
    s.next.begin(last ? nullptr : (const uint8_t*)c.addresses[cell + 1], c.layout->record_bytes);
    page_scores(run.keys, run.page_size, record, n, s.rotated_queries, run.queries, run.key_pitch, s.shifts, s, run.page_pitch);
    if (c.softcap > 0) cap_scores(run, s.scores, n);
    add_bias(run, record, n, s);
    if (c.window && at(0) <= c.start + c.length - 1 - c.window) hide_by_position(run, s.scores, n, false, at);
    copy_scores(run, s.scores, n, row, (int64_t)column * run.page_size, keys, all_scores);
    weigh_scores(run, s.scores, n, p, s.next);
    page_output(run.values, run.page_size, record, n, s.scores, run.queries, run.page_pitch, s, p.output, run.value_pitch);
}

// The full-precision slots that a sequence uses, those of its new tokens included. `slots` is the number of the call.
inline int slots_of(const HfkvToken& token, int slots, int sequence) {
    return token.first && token.ragged ? (int)token.lengths[sequence] + token.count : slots;
}

// A vector of each sequence, head and token, with strides in bytes.
struct Vectors {
    const void* at;
    int64_t batch, head, token;
};

// Copies one side of the new tokens, vectors of so many bytes, to the last of the slots in use.
inline void store_side(const HfkvToken& token, const Vectors& from, const Vectors& to, int slots, int batches, int heads, int64_t bytes) {
    if (bytes == 0) return;
    for (int b = 0; b < batches; b++) {
        const int64_t first = slots_of(token, slots, b) - token.count;
        for (int h = 0; h < heads; h++)
            for (int t = 0; t < token.count; t++)
                std::memcpy((uint8_t*)to.at + b * to.batch + h * to.head + (first + t) * to.token,
                            (const uint8_t*)from.at + b * from.batch + h * from.head + t * from.token, bytes);
    }
}

// Notes the positions of the new tokens: `position` is that of the first.
inline void note_positions(const HfkvToken& token, int batches, int slots, int64_t position) {
    for (int b = 0; b < batches; b++) {
        int64_t* to = token.positions + b * token.positions_batch + slots_of(token, slots, b) - token.count;
        for (int t = 0; t < token.count; t++) to[t] = position + t;
    }
}

inline void count_tokens(const HfkvToken& token, int batches, int slots) {
    if (!token.first) return;
    for (int b = 0; b < batches; b++) token.lengths[b] = slots_of(token, slots, b);
}

// Stores the new tokens in the last slots. They are counted only once nothing can fail any more.
inline void store_tokens(const HfkvAttend& c) {
    const HfkvToken& t = c.token;
    if (!t.first) return;
    const int64_t width = width_of(c.dense_level);
    store_side(t, {t.first, width * t.first_batch, width * t.first_head, width * t.first_token},
               {c.dense_keys, width * c.keys_batch, width * c.keys_head, width * c.keys_token}, c.slots, c.batch, c.heads,
               width * c.layout->keys.dim);
    store_side(t, {t.second, width * t.second_batch, width * t.second_head, width * t.second_token},
               {c.dense_values, width * c.values_batch, width * c.values_head, width * c.values_token}, c.slots, c.batch, c.heads,
               width * c.layout->values.dim);
    note_positions(t, c.batch, c.slots, c.start);
}

// Hides new tokens from the queries before them. Their scores are those from `first` on of the n ones at `scores`.
inline void hide_later(const Run& run, float* scores, int first, int n) {
    const int length = run.call.length;
    for (int t = first < 0 ? 0 : first; t < n; t++)
        for (int i = 0; i < t - first && i < length; i++)
            for (int m = i; m < run.queries; m += length) scores[(size_t)m * run.page_pitch + t] = kMinusInfinity;
}

inline void attend_dense(const Run& run, int row, float* all_scores, Scratch& s, Partial& p) {
    const HfkvAttend& c = run.call;
    const int b = row / c.heads, head = row % c.heads;
    const int64_t width = width_of(c.dense_level);
    const int slots = slots_of(c.token, c.slots, b);
    for (int start = 0; start < slots; start += kDenseTile) {
        const int n = slots - start < kDenseTile ? slots - start : kDenseTile;
        const uint8_t* keys = (const uint8_t*)c.dense_keys + width * (b * c.keys_batch + head * c.keys_head + start * c.keys_token);
        const Rows key_rows{c.dense_level, 0, run.keys.dim, keys, width * c.keys_token};
        by_fours(run.queries, DotOp{key_rows, n, s.row_queries, run.key_pitch, s.scores, run.page_pitch, s.next});
        if (c.softcap > 0) cap_scores(run, s.scores, n);
        if (c.dense_positions) {
            const int64_t* positions = c.dense_positions + b * c.positions_batch + start;
            hide_by_position(run, s.scores, n, c.causal, [&](int t) { return positions[t]; });
        } else if (c.token.first) {
            hide_later(run, s.scores, slots - c.token.count - start, n);
        }
        if (c.dense_unused) {
            const uint8_t* unused = c.dense_unused + b * c.unused_batch + start;
            for (int t = 0; t < n; t++)
                if (unused[t])
                    for (int m = 0; m < run.queries; m++) s.scores[(size_t)m * run.page_pitch + t] = kMinusInfinity;
        }
        copy_scores(run, s.scores, n, row, start, c.slots, all_scores);
        weigh_scores(run, s.scores, n, p, s.next);
        const uint8_t* values =
            (const uint8_t*)c.dense_values + width * (b * c.values_batch + head * c.values_head + start * c.values_token);
        const Rows value_rows{c.dense_level, 0, run.values.dim, values, width * c.values_token};
        by_fours(run.queries, WeighOp{value_rows, n, s.scores, run.page_pitch, p.output, run.value_pitch, s.next});
    }
}

inline float exp_of(float x) { return exponential(splat(x))[0]; }

// Merges the partial results of a row. A query that sees nothing has output 0 and log-sum-exp -inf.
inline void finish_row(const Run& run, int row, float* buffer) {
    const HfkvAttend& c = run.call;
    const int b = row / c.heads, head = row % c.heads, group = c.query_heads / c.heads, dim = run.values.dim;
    for (int m = 0; m < run.queries; m++) {
        const int query_head = head * group + m / c.length, at = m % c.length;
        float top = kMinusInfinity, total = 0;
        for (int part = 0; part <= run.splits; part++) top = larger(top, run.partial(row * (run.splits + 1) + part).top[m]);
        float* packed = buffer;
        float* out = c.output + (((size_t)b * c.length + at) * c.query_heads + query_head) * dim;
        for (int i = 0; i < dim; i++) packed[i] = 0;
        if (top == kMinusInfinity) {
            for (int i = 0; i < dim; i++) out[i] = 0;
        } else {
            for (int part = 0; part < run.splits; part++) {
                const Partial p = run.partial(row * (run.splits + 1) + part);
                const float weight = exp_of(p.top[m] - top);
                total += weight * p.total[m];
                for (int i = 0; i < dim; i++) packed[i] += weight * p.output[(size_t)m * run.value_pitch + i];
            }
            if (run.splits) rotate(run.values, packed, true, out);
            else for (int i = 0; i < dim; i++) out[i] = 0;
            const Partial p = run.partial(row * (run.splits + 1) + run.splits);
            const float weight = exp_of(p.top[m] - top);
            total += weight * p.total[m];
            for (int i = 0; i < dim; i++) out[i] = (out[i] + weight * p.output[(size_t)m * run.value_pitch + i]) / total;
        }
        float log_sum_exp = top == kMinusInfinity ? top : top + __builtin_logf(total);
        if (c.sink_logits) {
            const float sink = c.sink_logits[query_head], most = larger(sink, log_sum_exp);
            const float with_sink = most + __builtin_logf(exp_of(sink - most) + exp_of(log_sum_exp - most));
            const float share = log_sum_exp == kMinusInfinity ? 0.0f : exp_of(log_sum_exp - with_sink);
            for (int i = 0; i < dim; i++) out[i] *= share;
            log_sum_exp = with_sink;
        }
        c.log_sum_exp[((size_t)b * c.query_heads + query_head) * c.length + at] = log_sum_exp;
    }
}

// Turns the scores [Hq, q, keys] of the queries of a row into probabilities, summed over the query tokens: sums [Hq, keys].
inline void add_sums(const Run& run, int row, const float* all_scores, int64_t keys, float* sums) {
    const HfkvAttend& c = run.call;
    const int b = row / c.heads, head = row % c.heads, group = c.query_heads / c.heads;
    for (int g = 0; g < group; g++) {
        const size_t query_head = (size_t)b * c.query_heads + head * group + g;
        float* to = sums + query_head * keys;
        for (int i = 0; i < c.length; i++) {
            const float* from = all_scores + ((size_t)row * run.queries + g * c.length + i) * keys;
            const float log_sum_exp = c.log_sum_exp[query_head * c.length + i];
            for (int64_t t = 0; t < keys; t++) {
                const float p = log_sum_exp == kMinusInfinity ? 0.0f : exp_of(from[t] - log_sum_exp);
                to[t] = i ? to[t] + p : p;
            }
        }
    }
}

inline float* room_for_scores(const Run& run, int64_t keys, const float* sums) {
    if (!sums) return nullptr;
    const size_t n = (size_t)run.rows * run.queries * keys;
    float* all_scores = (float*)std::malloc(sizeof(float) * (n ? n : 1));
    if (all_scores)
        for (size_t i = 0; i < n; i++) all_scores[i] = kMinusInfinity;
    return all_scores;
}

inline int attend(const HfkvAttend& given) {
    HfkvAttend call = given;
    const int64_t read = (int64_t)call.batch * call.heads
                       * (call.columns * call.layout->record_bytes + (int64_t)call.slots * 4 * (call.layout->keys.dim + call.layout->values.dim));
    if (read < kOneThreadBytes) call.threads = 1;
    Run run(call);
    const int64_t page_keys = (int64_t)call.columns * run.page_size;
    float* page_scores = room_for_scores(run, page_keys, call.page_sums);
    float* dense_scores = room_for_scores(run, call.slots, call.dense_sums);
    const Workspace workspace(run.bytes());
    const bool failed = !workspace.at() || (call.page_sums && !page_scores) || (call.dense_sums && !dense_scores);
    if (!failed) {
        run.memory = workspace.at();
        std::memset(run.done(), 0, sizeof(int32_t) * run.rows);
        store_tokens(call);
#pragma omp parallel num_threads(call.threads)
        {
#if defined(_OPENMP)
            Scratch s = run.scratch(omp_get_thread_num());
#else
            Scratch s = run.scratch(0);
#endif
#if defined(__AMX_INT8__)
            configure_tiles();
#endif
#pragma omp for schedule(dynamic, 1) nowait
            for (int task = 0; task < run.tasks; task++) {
                const int row = task / (run.splits + 1), part = task % (run.splits + 1);
                prepare_row(run, row, s);
                Partial p = run.partial(task);
                begin(run, p);
                if (part == run.splits) {
                    attend_dense(run, row, dense_scores, s, p);
                } else {
                    const int64_t first = (int64_t)call.columns * part / run.splits;
                    const int64_t stop = (int64_t)call.columns * (part + 1) / run.splits;
                    for (int64_t column = first; column < stop; column++)
                        attend_page(run, row, (int)column, column + 1 == stop, page_scores, s, p);
                }
                // Who does the last task of a row merges them all.
                if (__atomic_add_fetch(run.done() + row, 1, __ATOMIC_ACQ_REL) <= run.splits) continue;
                finish_row(run, row, s.decoded);
                if (page_scores) add_sums(run, row, page_scores, page_keys, call.page_sums);
                if (dense_scores) add_sums(run, row, dense_scores, call.slots, call.dense_sums);
            }
#if defined(__AMX_INT8__)
            release_tiles();
#endif
        }
        count_tokens(call.token, call.batch, call.slots);
    }
    std::free(page_scores);
    std::free(dense_scores);
    return failed;
}

inline void decode_pages(const HfkvLayout& layout, bool values, const int64_t* addresses, int64_t n, float* out, int threads) {
    const HfkvSide& side = values ? layout.values : layout.keys;
    const size_t elements = (size_t)layout.page_size * side.dim;
#pragma omp parallel num_threads(threads)
    {
        Scratch s{};
        s.bytes = (uint8_t*)std::malloc(elements + 64);
        s.first = (float*)std::malloc(sizeof(float) * 3 * elements);
        s.second = s.first + elements;
        s.third = s.second + elements;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++)
            decode(side, layout.page_size, (const uint8_t*)addresses[i], layout.page_size, s, out + i * elements);
        std::free(s.bytes);
        std::free(s.first);
    }
}

}  // namespace
