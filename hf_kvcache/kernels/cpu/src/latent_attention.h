// Absorbed latent attention of a few queries (DeepSeek-V2, arXiv:2405.04434), hfkv_latent_attend: latents are keys and values in
// one, which all heads share, and a rotary part adds to the scores. As in attention.h, the tokens are split into tasks and their
// partial results merged by log-sum-exp. kernels.inc exports it, and latent_projection.h calls it.
#pragma once

#include <cstdlib>

#include "attention.h"
#include "encode.h"
#include "latent_dot_float.h"
#include "latent_dot_amx.h"

namespace {

constexpr int kMostBlocks = 4;  // blocks of 16 queries that a task computes for a chunk of tokens
constexpr int kLeastLatentPages = 2;

// A block of 16 queries in one basis: as float rows, as columns for float32, and as tiles for AMX.
struct LatentQuery {
    float* rows;     // [16, width]: latents first
    float* columns;  // [width, 16]
    float* sums;     // over each group of channels: [groups of latents, 16], then [groups of rotary, 16]
    uint8_t* tiles;  // of the latents, then of the rotary part
    int* parts;      // number of bfloat16 parts of the latents, then of the rotary part
};

// How a side is read: by tiles or in float32, and how many channels share a scale.
struct LatentSide {
    int dim, group;
    bool tiles;
    int groups() const { return group ? dim / group : 0; }
};

struct LatentBasis {
    LatentSide latents, rotary;
};

// The softmax over the tokens so far, for a block of queries of a task: largest score, sum of exponentials, weighted sum of the
// latents, and what zero points add to each group of channels.
struct LatentPartial {
    float* top;     // [16]
    float* total;   // [16]
    float* zeros;   // [groups, 16]
    float* output;  // [16, rank]
};

struct LatentScratch {
    LatentRoom latents, rotary;
    float* scores;    // [blocks, 64, 16]
    uint8_t* weights; // [blocks, groups, steps, parts] tiles
    uint8_t* woven;   // 64 channels of a chunk, in the order of tiles
    uint8_t* seen;    // [heads or 1, q, 64], whether a query sees a token
    uint8_t *picked, *picked_rotary;  // [64, dim] each, where tokens are picked
    Stream next;
};

// Divides one allocation into pieces that begin at multiples of 64 bytes.
struct Arena {
    char* at;
    template <class T>
    T* take(size_t count) {
        T* out = (T*)at;
        at += (count * sizeof(T) + 63) & ~(size_t)63;
        return out;
    }
};

inline LatentSide dense_side(int level, int dim) {
#if defined(__AMX_BF16__)
    return {dim, dim, level == HFKV_BFLOAT16 && dim && dim % kTileChannels == 0};
#else
    (void)level;
    return {dim, dim, false};
#endif
}

inline LatentSide page_side(const HfkvSide& side) {
#if defined(__AMX_BF16__)
    if (side.dim && side_fits_tiles(side)) return {side.dim, side.level == HFKV_BFLOAT16 ? side.dim : side.group, true};
#endif
    return {side.dim, side.dim, false};
}

// Sizes of a call, and where its queries, partial results and buffers lie.
struct LatentRun {
    const HfkvLatent& call;
    const HfkvSide& latents;
    const HfkvSide& rotary;
    LatentBasis packed, dense;
    int rank, width, queries, blocks, bundles;  // blocks have 16 queries, bundles up to kMostBlocks blocks
    int page_splits, dense_splits, tasks, weight_parts;
    bool by_head;  // whether heads see different tokens
    const HfkvLatentPicked* picks;  // null: the queries read all pages and slots
    char* memory = nullptr;
    size_t query_bytes, partial_bytes, scratch_bytes;

    explicit LatentRun(const HfkvLatent& c, const HfkvLatentPicked* picked = nullptr)
        : call(c), latents(c.layout->keys), rotary(c.layout->values), picks(picked) {
        rank = latents.dim, width = rank + rotary.dim, queries = c.heads * c.length;
        packed = {page_side(latents), page_side(rotary)};
        dense = {dense_side(c.dense_level, rank), dense_side(c.dense_level, rotary.dim)};
        // Tiles write 64 channels of the output at a time.
        if (rank % 64) packed.latents = dense.latents = {rank, rank, false};
        // Picked tokens are decoded to rows like full-precision ones, but in the basis of the pages.
        if (picks) packed = dense;
        blocks = (queries + kQueries - 1) / kQueries;
        bundles = (blocks + kMostBlocks - 1) / kMostBlocks;
        by_head = c.mask && c.mask_head;
        weight_parts = c.query_level == HFKV_FLOAT32 ? 3 : 2;
        const int rows = c.batch * bundles, wanted = (kTasksPerThread * c.threads + rows - 1) / rows;
        const int chunks = (c.slots + kLatentChunk - 1) / kLatentChunk;
        page_splits = splits(picks ? picked_chunks() : c.columns, c.threads == 1 ? 1 : wanted, kLeastLatentPages);
        dense_splits = picks ? 0 : splits(chunks, c.threads == 1 ? 1 : wanted, kLeastLatentPages);
        tasks = rows * (page_splits + dense_splits);
        Arena none{nullptr};
        query_at(none), query_bytes = (size_t)none.at;
        none.at = nullptr, partial_at(none), partial_bytes = (size_t)none.at;
        none.at = nullptr, scratch_at(none), scratch_bytes = (size_t)none.at;
    }

    static int splits(int units, int wanted, int least) {
        const int most = larger_int(1, units / least);
        return units == 0 ? 0 : wanted < most ? wanted : most;
    }

    size_t bytes() const { return 2 * call.batch * blocks * query_bytes + tasks * partial_bytes * kMostBlocks + call.threads * scratch_bytes + 64; }

    LatentQuery query_at(Arena& a) const {
        LatentQuery q;
        q.rows = a.take<float>(kQueries * width);
        q.columns = a.take<float>(kQueries * width);
        q.sums = a.take<float>(kQueries * (most_groups() + most_rotary_groups()));
        q.tiles = a.take<uint8_t>(3 * 64 * (size_t)(width + 64));
        q.parts = a.take<int>(2);
        return q;
    }
    LatentPartial partial_at(Arena& a) const {
        LatentPartial p;
        p.top = a.take<float>(kQueries);
        p.total = a.take<float>(kQueries);
        p.zeros = a.take<float>(kQueries * most_groups());
        p.output = a.take<float>(kQueries * rank);
        return p;
    }
    LatentRoom room_at(Arena& a, const HfkvSide& side) const {
        LatentRoom room;
        room.floats = a.take<float>(kLatentChunk * side.dim);
        room.factors = a.take<float>(larger_int(2 * rounded(factor_count(side)), larger_int(side.dim, kLatentChunk)) + 16);
        room.bytes = a.take<uint8_t>(kLatentChunk * side.dim + 64);
        return room;
    }
    LatentScratch scratch_at(Arena& a) const {
        LatentScratch s;
        s.latents = room_at(a, latents);
        s.rotary = room_at(a, rotary);
        s.scores = a.take<float>(kMostBlocks * kLatentChunk * kQueries);
        s.weights = a.take<uint8_t>((size_t)kMostBlocks * most_groups() * 6 * 1024);
        s.woven = a.take<uint8_t>(8 * 1024);
        s.seen = a.take<uint8_t>((size_t)call.length * (by_head ? call.heads : 1) * kLatentChunk);
        s.picked = a.take<uint8_t>(picks ? sizeof(float) * kLatentChunk * rank : 0);
        s.picked_rotary = a.take<uint8_t>(picks ? sizeof(float) * kLatentChunk * rotary.dim : 0);
        return s;
    }

    int most_groups() const { return larger_int(packed.latents.groups(), dense.latents.groups()); }
    int most_rotary_groups() const { return larger_int(packed.rotary.groups(), dense.rotary.groups()); }

    // basis: 0 for that of the pages, 1 for the model's.
    LatentQuery query(int sequence, int block, int basis) const {
        Arena a{memory + ((size_t)(sequence * blocks + block) * 2 + basis) * query_bytes};
        return query_at(a);
    }
    LatentPartial partial(int task, int block) const {
        Arena a{memory + 2 * call.batch * blocks * query_bytes + ((size_t)task * kMostBlocks + block) * partial_bytes};
        return partial_at(a);
    }
    LatentScratch scratch(int thread) const {
        Arena a{memory + 2 * call.batch * blocks * query_bytes + tasks * kMostBlocks * partial_bytes + thread * scratch_bytes};
        return scratch_at(a);
    }
    int picked_chunks() const { return (int)((picks->count + kLatentChunk - 1) / kLatentChunk); }
    // How the elements of picked tokens are given to the products.
    int picked_level(const LatentSide& side) const { return side.tiles ? HFKV_BFLOAT16 : HFKV_FLOAT32; }
    int bundle_blocks(int bundle) const {
        const int left = blocks - bundle * kMostBlocks;
        return left < kMostBlocks ? left : kMostBlocks;
    }
    int block_queries(int block) const {
        const int left = queries - block * kQueries;
        return left < kQueries ? left : kQueries;
    }
};

inline void load_elements(int level, const uint8_t* from, int n, float* to) {
    if (level == HFKV_FLOAT32) std::memcpy(to, from, sizeof(float) * n);
    else if (level == HFKV_BFLOAT16) widen<BFloat16>(from, 0, 1, n, to);
    else halves(from, n, to);
}

inline void store_elements(int level, const float* from, int n, uint8_t* to) {
    if (level == HFKV_FLOAT32) {
        std::memcpy(to, from, sizeof(float) * n);
        return;
    }
    uint16_t* out = (uint16_t*)to;
    if (level == HFKV_FLOAT16) {
        for (int i = 0; i < n; i++) out[i] = to_half(from[i]);
        return;
    }
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        std::memcpy(&bits, from + i, 4);
        const bool nan = (bits & 0x7fffffff) > 0x7f800000;
        out[i] = (uint16_t)(nan ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}

// Prepares one side of a block of queries: columns for float32, or tiles and the sums over groups for AMX.
inline void prepare_side(const LatentRun& run, const LatentSide& side, const float* rows, int pitch, float* columns, float* sums,
                         uint8_t* tiles, int* parts) {
    *parts = 0;
    if (!side.tiles) {
        for (int c = 0; c < side.dim; c++)
            for (int m = 0; m < kQueries; m++) columns[c * kQueries + m] = rows[m * pitch + c];
        return;
    }
#if defined(__AMX_BF16__)
    *parts = pack_query(rows, pitch, side.dim, run.weight_parts, tiles);
    for (int g = 0; g < side.groups(); g++)
        for (int m = 0; m < kQueries; m++) sums[g * kQueries + m] = total(rows + m * pitch + g * side.group, side.group);
#else
    (void)run, (void)sums, (void)tiles;
#endif
}

// Prepares the queries of a block in one basis; query m is head m % H of token m / H.
inline void prepare_block(const LatentRun& run, int sequence, int block, int basis) {
    const HfkvLatent& c = run.call;
    const LatentQuery q = run.query(sequence, block, basis);
    const LatentBasis& how = basis ? run.dense : run.packed;
    const int width = c.query_level == HFKV_FLOAT32 ? 4 : 2, dr = run.rotary.dim;
    for (int i = 0; i < kQueries; i++) {
        float* to = q.rows + i * run.width;
        const int m = block * kQueries + i;
        if (m >= run.queries) {
            std::memset(to, 0, sizeof(float) * run.width);
            continue;
        }
        const uint8_t* from = (const uint8_t*)c.query
                            + width * (sequence * c.query_batch + m % c.heads * c.query_head + m / c.heads * c.query_token);
        load_elements(c.query_level, from, run.width, to);
        if (basis) continue;
        // The columns are written after the rows, so until then their memory is free.
        if (run.latents.rotation) rotate(run.latents, to, false, q.columns), std::memcpy(to, q.columns, sizeof(float) * run.rank);
        if (run.rotary.rotation && dr)
            rotate(run.rotary, to + run.rank, false, q.columns), std::memcpy(to + run.rank, q.columns, sizeof(float) * dr);
    }
    const int64_t skipped = 3 * 64 * (int64_t)run.rank;
    prepare_side(run, how.latents, q.rows, run.width, q.columns, q.sums, q.tiles, q.parts);
    prepare_side(run, how.rotary, q.rows + run.rank, run.width, q.columns + kQueries * run.rank,
                 q.sums + kQueries * run.most_groups(), q.tiles + skipped, q.parts + 1);
}

// One side of some tokens, for float32 or for tiles.
struct LatentRows {
    LatentSide side;
    FloatRows floats;
    const Factors* factors;  // scales and zero points of the rows of tiles; null: none
};

// Some tokens of a page, or some full-precision tokens.
struct LatentTokens {
    int n;
    LatentRows latents, rotary;
    Factors latent_factors, rotary_factors;
};

// What the queries of a call see of some tokens.
enum class Sight { kNothing, kSome, kAll };

// Finds which tokens each query sees, `seen` [heads or 1, q, 64], by the tokens' positions (null: all are seen) and the mask.
template <class Position>
Sight find_seen(const LatentRun& run, int sequence, int n, bool causal, const Position* at, const uint8_t* unused, uint8_t* seen) {
    const HfkvLatent& c = run.call;
    int count = 0;
    const int heads = run.by_head ? c.heads : 1;
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < c.length; i++) {
            const int64_t query = c.start + i;
            const uint8_t* mask = c.mask ? c.mask + sequence * c.mask_batch + h * c.mask_head + i * c.mask_query : nullptr;
            uint8_t* to = seen + (h * c.length + i) * kLatentChunk;
            for (int t = 0; t < n; t++) {
                bool sees = !(unused && unused[t]);
                if (at && sees) {
                    const int64_t position = (*at)(t), column = position - c.mask_start;
                    sees = !(causal && position > query) && !(c.window && position <= query - c.window);
                    if (mask) sees = sees && column >= 0 && column < c.mask_width && mask[column];
                }
                to[t] = sees;
                count += sees;
            }
        }
    return count == 0 ? Sight::kNothing : count == heads * c.length * n ? Sight::kAll : Sight::kSome;
}

inline void hide_unseen(const LatentRun& run, int block, const uint8_t* seen, int n, float* scores) {
    const HfkvLatent& c = run.call;
    for (int i = 0; i < run.block_queries(block); i++) {
        const int m = block * kQueries + i, row = (run.by_head ? m % c.heads * c.length : 0) + m / c.heads;
        const uint8_t* sees = seen + row * kLatentChunk;
        for (int t = 0; t < n; t++)
            if (!sees[t]) scores[t * kQueries + i] = kMinusInfinity;
    }
}

inline void scale_scores(const LatentRun& run, int n, float* scores) {
    const Vec inner = splat(run.call.inner_scale), cap = splat(run.call.softcap);
    for (int i = 0; i < n * kQueries; i += kLanes) {
        const Vec x = load(scores + i) * inner;
        store(scores + i, run.call.softcap > 0 ? cap * hyperbolic_tangent(x) : x);
    }
}

// Turns the scores of a chunk into weights, in place and 0 behind the last token, and scales the partial result down to the new
// maximum.
inline void weigh_chunk(const LatentRun& run, int n, int count, int groups, float* scores, const LatentPartial& p) {
    alignas(64) float decays[kQueries];
    bool higher = false;
    for (int lane = 0; lane < kQueries; lane += kLanes) {
        const Vec before = load(p.top + lane);
        Vec top = before;
        for (int t = 0; t < n; t++) top = max(top, load(scores + t * kQueries + lane));
        // Before the first visible key the maximum is -inf, and -inf - -inf is not a number.
        const Vec shift = select(top == splat(kMinusInfinity), splat(0.0f), top);
        Vec sums = splat(0.0f);
        for (int t = 0; t < n; t++) {
            const Vec e = exponential(load(scores + t * kQueries + lane) - shift);
            store(scores + t * kQueries + lane, e);
            sums += e;
        }
        for (int t = n; t < kLatentChunk; t++) store(scores + t * kQueries + lane, splat(0.0f));
        const Vec decay = exponential(before - shift);
        store(decays + lane, decay);
        store(p.total + lane, load(p.total + lane) * decay + sums);
        store(p.top + lane, top);
    }
    for (int m = 0; m < count; m++) higher = higher || decays[m] != 1.0f;
    if (!higher) return;
    for (int m = 0; m < count; m++) {
        const float decay = decays[m];
        if (decay == 1.0f) continue;
        float* o = p.output + (int64_t)m * run.rank;
        for (int c = 0; c < run.rank; c += kLanes) store(o + c, load(o + c) * splat(decay));
    }
    for (int g = 0; g < groups; g++)
        for (int lane = 0; lane < kQueries; lane += kLanes)
            store(p.zeros + g * kQueries + lane, load(p.zeros + g * kQueries + lane) * load(decays + lane));
}

inline void add_scores(const LatentRows& rows, int n, const float* columns, const uint8_t* tiles, const float* sums, int parts,
                       float* scores, Stream& next) {
    if (!rows.side.tiles) {
        dot_rows(rows.floats, n, rows.side.dim, columns, scores, next);
        return;
    }
#if defined(__AMX_BF16__)
    dot_latent_tiles({rows.floats.data, rows.floats.stride}, n, rows.side.dim, rows.side.group, rows.factors, {tiles, sums, parts},
                     scores, next);
#else
    (void)tiles, (void)sums, (void)parts;
#endif
}

inline void score_block(const LatentRun& run, const LatentTokens& tokens, const LatentQuery& q, float* scores, Stream& next) {
    std::memset(scores, 0, sizeof(float) * tokens.n * kQueries);
    add_scores(tokens.latents, tokens.n, q.columns, q.tiles, q.sums, q.parts[0], scores, next);
    if (run.rotary.dim)
        add_scores(tokens.rotary, tokens.n, q.columns + kQueries * run.rank, q.tiles + 3 * 64 * (int64_t)run.rank,
                   q.sums + kQueries * run.most_groups(), q.parts[1], scores, next);
}

#if defined(__AMX_BF16__)

// Packs the weights of a block as tiles and sums what zero points add, for each group of channels.
inline void pack_block(const LatentRun& run, const LatentTokens& tokens, int steps, const float* weights, uint8_t* tiles,
                       const LatentPartial& p) {
    const int groups = tokens.latents.side.groups();
    const Factors* f = tokens.latents.factors;
    for (int g = 0; g < groups; g++) {
        pack_weights(weights, f ? f->scale + g : nullptr, groups, steps, run.weight_parts,
                     tiles + (int64_t)g * steps * run.weight_parts * kTileBytes);
        if (!f) continue;
        Vec zeros = load(p.zeros + g * kQueries);
        for (int t = 0; t < tokens.n; t++) zeros += load(weights + t * kQueries) * splat(f->zero[t * groups + g]);
        store(p.zeros + g * kQueries, zeros);
    }
}

inline void add_block_latents(const LatentRun& run, const LatentTokens& tokens, int count, int task, LatentScratch& s) {
    const int steps = (tokens.n + kTileChannels - 1) / kTileChannels, group = tokens.latents.side.group;
    const int64_t size = (int64_t)steps * run.weight_parts * kTileBytes, block_size = size * tokens.latents.side.groups();
    const TileRows rows{tokens.latents.floats.data, tokens.latents.floats.stride};
    for (int b = 0; b < count; b++)
        pack_block(run, tokens, steps, s.scores + b * kLatentChunk * kQueries, s.weights + b * block_size, run.partial(task, b));
    for (int c = 0; c < run.rank; c += 64) {
        weave_latents(rows, c, tokens.n, steps, s.woven, s.next);
        for (int b = 0; b < count; b++) {
            const uint8_t* weights = s.weights + b * block_size;
            const uint8_t *left = weights + c / group * size, *right = weights + (c + kTileChannels) / group * size;
            float* output = run.partial(task, b).output + c;
            if (run.weight_parts == 2) add_latents<2>(s.woven, left, right, steps, output, run.rank);
            else add_latents<3>(s.woven, left, right, steps, output, run.rank);
        }
    }
}

#endif

// Attention of a bundle of queries over some tokens. If sight is kSome, the table s.seen says which tokens are seen.
inline void attend_chunk(const LatentRun& run, int task, int sequence, int bundle, int basis, const LatentTokens& tokens,
                         Sight sight, LatentScratch& s) {
    const int first = bundle * kMostBlocks, count = run.bundle_blocks(bundle);
    const bool tiles = tokens.latents.side.tiles;
    for (int b = 0; b < count; b++) {
        float* scores = s.scores + b * kLatentChunk * kQueries;
        score_block(run, tokens, run.query(sequence, first + b, basis), scores, s.next);
        scale_scores(run, tokens.n, scores);
        if (sight == Sight::kSome) hide_unseen(run, first + b, s.seen, tokens.n, scores);
        const int rows = run.block_queries(first + b);
        const LatentPartial p = run.partial(task, b);
        weigh_chunk(run, tokens.n, rows, tiles ? tokens.latents.side.groups() : 0, scores, p);
        if (!tiles) weigh_rows(tokens.latents.floats, tokens.n, run.rank, scores, rows, p.output, s.next);
    }
#if defined(__AMX_BF16__)
    if (tiles) add_block_latents(run, tokens, count, task, s);
#endif
}

inline void page_rows_of(const HfkvSide& side, const LatentSide& how, int page_size, const uint8_t* record, int start, int n,
                         const LatentRoom& room, Stream& next, LatentRows& rows, Factors& factors) {
    rows = {how, {nullptr, 0}, nullptr};
    if (!side.dim) return;
    if (!how.tiles) {
        rows.floats = page_floats(side, record, start, n, room, next);
        return;
    }
#if defined(__AMX_BF16__)
    const TileRows t = page_tiles(side, page_size, record, start, n, room, next);
    rows.floats = {t.data, t.stride};
    if (side.level == HFKV_BFLOAT16) return;
    factors = read_factors(side, record, start, n, room.factors);
    const int groups = how.groups();
    for (int i = n * groups; i < kLatentChunk * groups; i++) factors.scale[i] = 0;
    rows.factors = &factors;
#else
    (void)page_size, (void)factors;
#endif
}

inline void attend_latent_page(const LatentRun& run, int task, int sequence, int bundle, int column, bool last, LatentScratch& s) {
    const HfkvLatent& c = run.call;
    const int64_t cell = sequence * c.row_stride + column;
    const int held = c.counts[cell], page_size = c.layout->page_size;
    if (held == 0 || c.addresses[cell] == 0) return;
    const int64_t* positions = c.positions ? (const int64_t*)c.positions[cell] : nullptr;
    const int64_t from = c.first[cell];
    const auto position = [&](int t) { return positions ? positions[t] : from + t; };
    // The first query sees furthest back. A page that has left its window has left the windows of all.
    if (c.window && position(held - 1) <= c.start - c.window) return;
    const bool all = !c.mask && !(c.window && position(0) <= c.start + c.length - 1 - c.window);
    const uint8_t* record = (const uint8_t*)c.addresses[cell];
    s.next.begin(last ? nullptr : (const uint8_t*)c.addresses[cell + 1], c.layout->record_bytes);
    for (int start = 0; start < held; start += kLatentChunk) {
        const int n = held - start < kLatentChunk ? held - start : kLatentChunk;
        Sight sight = Sight::kAll;
        if (!all) {
            const auto at = [&](int t) { return position(start + t); };
            sight = find_seen(run, sequence, n, false, &at, nullptr, s.seen);
        }
        if (sight == Sight::kNothing) continue;
        LatentTokens tokens;
        tokens.n = n;
        page_rows_of(run.latents, run.packed.latents, page_size, record, start, n, s.latents, s.next, tokens.latents, tokens.latent_factors);
        page_rows_of(run.rotary, run.packed.rotary, page_size, record, start, n, s.rotary, s.next, tokens.rotary, tokens.rotary_factors);
        attend_chunk(run, task, sequence, bundle, 0, tokens, sight, s);
    }
}

inline LatentRows dense_rows_of(const LatentSide& how, int level, const uint8_t* data, int64_t stride, int n, const LatentRoom& room) {
    if (!how.dim) return {how, {nullptr, 0}, nullptr};
#if defined(__AMX_BF16__)
    if (how.tiles) {
        const TileRows t = dense_tiles(data, stride, n, how.dim, room);
        return {how, {t.data, t.stride}, nullptr};
    }
#endif
    return {how, dense_floats(level, data, stride, n, how.dim, room.floats), nullptr};
}

inline void attend_dense_latents(const LatentRun& run, int task, int sequence, int bundle, int start, LatentScratch& s) {
    const HfkvLatent& c = run.call;
    const int left = slots_of(c.token, c.slots, sequence) - start;
    if (left <= 0) return;  // other sequences use more slots
    const int n = left < kLatentChunk ? left : kLatentChunk, width = width_of(c.dense_level);
    const int64_t* positions = c.dense_positions ? c.dense_positions + sequence * c.positions_batch + start : nullptr;
    const auto position = [&](int t) { return positions[t]; };
    const uint8_t* unused = c.dense_unused ? c.dense_unused + sequence * c.unused_batch + start : nullptr;
    const Sight sight = find_seen(run, sequence, n, c.causal, positions ? &position : nullptr, unused, s.seen);
    if (sight == Sight::kNothing) return;
    s.next.begin(nullptr, 0);
    LatentTokens tokens;
    tokens.n = n;
    tokens.latents = dense_rows_of(run.dense.latents, c.dense_level,
                                   (const uint8_t*)c.dense_latents + width * (sequence * c.latents_batch + start * c.latents_token),
                                   width * c.latents_token, n, s.latents);
    tokens.rotary = dense_rows_of(run.dense.rotary, c.dense_level,
                                  (const uint8_t*)c.dense_rotary + width * (sequence * c.rotary_batch + start * c.rotary_token),
                                  width * c.rotary_token, n, s.rotary);
    attend_chunk(run, task, sequence, bundle, 1, tokens, sight, s);
}

inline void begin_latents(const LatentRun& run, const LatentPartial& p) {
    for (int m = 0; m < kQueries; m++) p.top[m] = kMinusInfinity, p.total[m] = 0;
    std::memset(p.zeros, 0, sizeof(float) * kQueries * run.most_groups());
    std::memset(p.output, 0, sizeof(float) * kQueries * run.rank);
}

// Restores the order of the channels that tiles have summed, and adds what zero points add.
inline void end_latents(const LatentRun& run, const LatentSide& side, int count, const LatentPartial& p) {
    if (!side.tiles) return;
#if defined(__AMX_BF16__)
    for (int m = 0; m < count; m++) {
        float* row = p.output + (int64_t)m * run.rank;
        in_order(row, run.rank);
        for (int c = 0; c < run.rank; c += kLanes)
            store(row + c, load(row + c) + splat(p.zeros[c / side.group * kQueries + m]));
    }
#else
    (void)run, (void)count, (void)p;
#endif
}

inline void attend_picked_chunk(const LatentRun& run, int task, int query, int bundle, int chunk, bool last, LatentScratch& s);

inline void run_latent_task(const LatentRun& run, int task, LatentScratch& s) {
    const int splits = run.page_splits + run.dense_splits, row = task / splits, part = task % splits;
    const int sequence = row / run.bundles, bundle = row % run.bundles, count = run.bundle_blocks(bundle);
    for (int b = 0; b < count; b++) begin_latents(run, run.partial(task, b));
    const bool packed = part < run.page_splits;
    if (packed) {
        const int64_t units = run.picks ? run.picked_chunks() : run.call.columns;
        const int first = (int)(units * part / run.page_splits), stop = (int)(units * (part + 1) / run.page_splits);
        for (int i = first; i < stop; i++) {
            if (run.picks) attend_picked_chunk(run, task, sequence, bundle, i, i + 1 == stop, s);
            else attend_latent_page(run, task, sequence, bundle, i, i + 1 == stop, s);
        }
    } else {
        const int chunks = (run.call.slots + kLatentChunk - 1) / kLatentChunk, i = part - run.page_splits;
        for (int chunk = chunks * i / run.dense_splits; chunk < chunks * (i + 1) / run.dense_splits; chunk++)
            attend_dense_latents(run, task, sequence, bundle, chunk * kLatentChunk, s);
    }
    for (int b = 0; b < count; b++)
        end_latents(run, packed ? run.packed.latents : run.dense.latents, run.block_queries(bundle * kMostBlocks + b),
                    run.partial(task, b));
}

// Adds the weighted latents of some parts of a query to `sums` and returns the sum of their weights, both relative to `top`.
inline float merge_latents(const LatentRun& run, int first, int count, int block, int m, float top, float* sums) {
    float total = 0;
    for (int part = first; part < first + count; part++) {
        const LatentPartial p = run.partial(part, block);
        const float weight = exp_of(p.top[m] - top);
        if (weight == 0) continue;
        total += weight * p.total[m];
        const float* from = p.output + (int64_t)m * run.rank;
        for (int c = 0; c < run.rank; c += kLanes) store(sums + c, load(sums + c) + splat(weight) * load(from + c));
    }
    return total;
}

// Merges the partial results of a query. A query that sees nothing has output 0 and log-sum-exp -inf. buffer: [2, rank].
inline void finish_latent_query(const LatentRun& run, int sequence, int query, float* buffer) {
    const HfkvLatent& c = run.call;
    const int block = query / kQueries, m = query % kQueries, head = query % c.heads, at = query / c.heads, rank = run.rank;
    const int splits = run.page_splits + run.dense_splits;
    const int first = (sequence * run.bundles + block / kMostBlocks) * splits, inner = block % kMostBlocks;
    float *packed = buffer, *out = buffer + rank;
    float top = kMinusInfinity, total = 0;
    for (int part = first; part < first + splits; part++) top = larger(top, run.partial(part, inner).top[m]);
    std::memset(buffer, 0, sizeof(float) * 2 * rank);
    if (top > kMinusInfinity) {
        if (run.page_splits) {
            total = merge_latents(run, first, run.page_splits, inner, m, top, packed);
            rotate(run.latents, packed, true, out);
        }
        total += merge_latents(run, first + run.page_splits, run.dense_splits, inner, m, top, out);
    }
    float log_sum_exp = top == kMinusInfinity ? top : top + __builtin_logf(total), factor = total > 0 ? 1 / total : 0.0f;
    if (c.sink_logits) {
        const float sink = c.sink_logits[head], most = larger(sink, log_sum_exp);
        const float with_sink = most + __builtin_logf(exp_of(sink - most) + exp_of(log_sum_exp - most));
        factor *= log_sum_exp == kMinusInfinity ? 0.0f : exp_of(log_sum_exp - with_sink);
        log_sum_exp = with_sink;
    }
    for (int i = 0; i < rank; i += kLanes) store(out + i, load(out + i) * splat(factor));
    const int64_t cell = ((int64_t)sequence * c.length + at) * c.heads + head;
    store_elements(c.query_level, out, rank, (uint8_t*)c.output + width_of(c.query_level) * cell * rank);
    c.log_sum_exp[((int64_t)sequence * c.heads + head) * c.length + at] = log_sum_exp;
}

inline int64_t bytes_read(const HfkvLatent& c) {
    const int64_t dense = (int64_t)c.slots * width_of(c.dense_level) * (c.layout->keys.dim + c.layout->values.dim);
    return c.batch * (c.columns * c.layout->record_bytes + dense);
}

// Stores the new token in the last slot, as in attention.h.
inline void store_tokens(const HfkvLatent& c) {
    const HfkvToken& t = c.token;
    if (!t.first) return;
    const int64_t width = width_of(c.dense_level);
    store_side(t, {t.first, width * t.first_batch, 0, width * t.first_token},
               {c.dense_latents, width * c.latents_batch, 0, width * c.latents_token}, c.slots, c.batch, 1, width * c.layout->keys.dim);
    store_side(t, {t.second, width * t.second_batch, 0, width * t.second_token},
               {c.dense_rotary, width * c.rotary_batch, 0, width * c.rotary_token}, c.slots, c.batch, 1, width * c.layout->values.dim);
    note_positions(t, c.batch, c.slots, c.start);
}

// Computes the partial results of a call, whose memory is there, and merges them.
inline void run_latents(const LatentRun& run) {
    const HfkvLatent& call = run.call;
    const int prepared = call.batch * run.blocks, first = run.page_splits ? 0 : 1, bases = (run.page_splits > 0) + (run.dense_splits > 0);
#pragma omp parallel num_threads(call.threads)
    {
#if defined(_OPENMP)
        LatentScratch s = run.scratch(omp_get_thread_num());
#else
        LatentScratch s = run.scratch(0);
#endif
#if defined(__AMX_BF16__)
        configure_tiles();
#endif
#pragma omp for schedule(static)
        for (int i = 0; i < prepared * bases; i++)
            prepare_block(run, i / bases / run.blocks, i / bases % run.blocks, first + i % bases);
#pragma omp for schedule(dynamic, 1)
        for (int task = 0; task < run.tasks; task++) run_latent_task(run, task, s);
#if defined(__AMX_BF16__)
        release_tiles();
#endif
#pragma omp for schedule(static)
        for (int i = 0; i < call.batch * run.queries; i++)
            finish_latent_query(run, i / run.queries, i % run.queries, s.latents.floats);
    }
}

// Stores the new token, if there is one, and attends. The caller counts the token.
inline int attend_latents(const HfkvLatent& given) {
    HfkvLatent call = given;
    if (bytes_read(call) < kOneThreadBytes) call.threads = 1;
    LatentRun run(call);
    const Workspace workspace(run.bytes());
    if (!workspace.at()) return 1;
    run.memory = workspace.at();
    store_tokens(call);
    run_latents(run);
    return 0;
}

}  // namespace
