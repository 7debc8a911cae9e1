// Absorbed latent attention of queries that each see tokens of their own, hfkv_attend_picked: the tokens that a model's indexer
// picks. Only these are read. They are decoded 64 at a time and attended to while they lie in the cache of the processor.
// kernels.inc exports it.
#pragma once

#include "latent_attention.h"

namespace {

// Where a picked token lies: in a record of a page, in a full-precision slot, or nowhere.
struct PickedAt {
    const uint8_t* record;  // null: not in a page
    int64_t token;          // place in the page, or the slot; -1: nowhere
};

inline PickedAt locate_picked(const HfkvLatent& c, int64_t sequence, int64_t place) {
    if (place < c.slots) return {nullptr, place};
    const int64_t behind = place - c.slots, column = behind / c.layout->page_size;
    const int64_t address = column < c.columns ? c.addresses[sequence * c.row_stride + column] : 0;
    return address ? PickedAt{(const uint8_t*)address, behind % c.layout->page_size} : PickedAt{nullptr, -1};
}

// Asks for the lines in which `count` bytes lie.
inline void fetch_bytes(const uint8_t* at, int64_t count) {
    for (int64_t i = 0; i < count; i += 64) __builtin_prefetch(at + i, 0, 2);
    __builtin_prefetch(at + count - 1, 0, 2);
}

// Asks for the bytes of one side of a token of a page.
inline void fetch_side(const HfkvSide& side, const uint8_t* record, int64_t token) {
    if (!side.dim) return;
    const bool full = side.level >= HFKV_FLOAT32;
    const int64_t row = full ? (int64_t)side.dim * width_of(side.level) : (int64_t)side.dim * side.bits / 8;
    fetch_bytes(record + side.codes + token * row, row);
    if (full || side.axis == HFKV_CHANNEL) return;
    const int64_t factors = 2 * (int64_t)(side.dim / side.group);
    fetch_bytes(record + side.scale + token * factors, factors);
    if (side.has_zero) fetch_bytes(record + side.zero + token * factors, factors);
}

// Asks for the tokens at n places, which are decoded after the tokens before them have been attended to.
inline void fetch_picked(const LatentRun& run, int64_t sequence, const int64_t* places, int n) {
    for (int i = 0; i < n; i++) {
        const PickedAt at = locate_picked(run.call, sequence, places[i]);
        if (!at.record) continue;
        fetch_side(run.latents, at.record, at.token);
        fetch_side(run.rotary, at.record, at.token);
    }
}

// One side of a token of a page, as an element of `level` each.
inline void decode_picked(const HfkvSide& side, const uint8_t* record, int token, int level, LatentRoom room, Stream& next,
                          uint8_t* out) {
    if (level == HFKV_FLOAT32) room.floats = (float*)out;  // decoded in its place
    else if (side.level == level) {
        const int64_t row = (int64_t)side.dim * width_of(level);
        std::memcpy(out, record + side.codes + token * row, row);
        return;
    }
    const uint8_t* x = page_floats(side, record, token, 1, room, next).data;
    if (level != HFKV_FLOAT32) store_elements(level, (const float*)x, side.dim, out);
    else if (x != out) std::memcpy(out, x, sizeof(float) * side.dim);
}

// One side of a full-precision token in the basis of the pages.
inline void turn_picked(const HfkvSide& side, const uint8_t* from, int from_level, int level, const LatentRoom& room, uint8_t* out) {
    float *x = room.floats, *turned = room.floats + side.dim;
    load_elements(from_level, from, side.dim, x);
    if (side.rotation) rotate(side, x, false, turned);
    store_elements(level, side.rotation ? turned : x, side.dim, out);
}

// The picked tokens among n places that are stored, decoded side by side in s.picked and s.picked_rotary; returns their number.
inline int collect_picked(const LatentRun& run, int64_t sequence, const int64_t* places, int n, LatentScratch& s) {
    const HfkvLatent& c = run.call;
    const int level = run.picked_level(run.packed.latents), rotary_level = run.picked_level(run.packed.rotary);
    const int64_t width = width_of(c.dense_level), row = (int64_t)run.rank * width_of(level);
    const int64_t rotary_row = (int64_t)run.rotary.dim * width_of(rotary_level);
    int count = 0;
    for (int i = 0; i < n; i++) {
        const PickedAt at = locate_picked(c, sequence, places[i]);
        if (at.token < 0) continue;
        uint8_t *to = s.picked + count * row, *to_rotary = s.picked_rotary + count * rotary_row;
        count++;
        if (at.record) {
            decode_picked(run.latents, at.record, (int)at.token, level, s.latents, s.next, to);
            if (run.rotary.dim) decode_picked(run.rotary, at.record, (int)at.token, rotary_level, s.rotary, s.next, to_rotary);
            continue;
        }
        const uint8_t* from = (const uint8_t*)c.dense_latents + width * (sequence * c.latents_batch + at.token * c.latents_token);
        turn_picked(run.latents, from, c.dense_level, level, s.latents, to);
        if (!run.rotary.dim) continue;
        from = (const uint8_t*)c.dense_rotary + width * (sequence * c.rotary_batch + at.token * c.rotary_token);
        turn_picked(run.rotary, from, c.dense_level, rotary_level, s.rotary, to_rotary);
    }
    return count;
}

// Attention of a bundle to one chunk of the tokens that were picked for it.
inline void attend_picked_chunk(const LatentRun& run, int task, int query, int bundle, int chunk, bool last, LatentScratch& s) {
    const int64_t start = (int64_t)chunk * kLatentChunk, left = run.picks->count - start;
    const int64_t sequence = query / run.picks->queries, *places = run.picks->places + query * run.picks->count + start;
    const int n = collect_picked(run, sequence, places, left < kLatentChunk ? (int)left : kLatentChunk, s);
    const int64_t behind = left - kLatentChunk;
    if (!last) fetch_picked(run, sequence, places + kLatentChunk, behind < kLatentChunk ? (int)behind : kLatentChunk);
    if (!n) return;
    s.next.begin(nullptr, 0);
    LatentTokens tokens;
    tokens.n = n;
    const LatentSide &latents = run.packed.latents, &rotary = run.packed.rotary;
    const int level = run.picked_level(latents), rotary_level = run.picked_level(rotary);
    tokens.latents = dense_rows_of(latents, level, s.picked, (int64_t)run.rank * width_of(level), n, s.latents);
    tokens.rotary = dense_rows_of(rotary, rotary_level, s.picked_rotary, (int64_t)rotary.dim * width_of(rotary_level), n, s.rotary);
    attend_chunk(run, task, query, bundle, 0, tokens, Sight::kAll, s);
}

inline int attend_picked(const HfkvLatentPicked& picks) {
    HfkvLatent call = picks.attend;
    const int64_t page = call.layout->record_bytes / call.layout->page_size;
    if (call.batch * picks.count * page < kOneThreadBytes) call.threads = 1;
    LatentRun run(call, &picks);
    const Workspace workspace(run.bytes());
    if (!workspace.at()) return 1;
    run.memory = workspace.at();
    run_latents(run);
    return 0;
}

}  // namespace
