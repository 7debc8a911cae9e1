// Gathering of single latents and rotary keys from pages and full-precision slots, hfkv_gather_latents: for attention to the
// tokens that a model's indexer picks. Only the picked tokens are read and decoded. kernels.inc exports it.
#pragma once

#include "latent_attention.h"

namespace {

// One side of a token of a page, as elements of `level`.
inline void gather_side(const HfkvSide& side, const uint8_t* record, int token, int level, const LatentRoom& room, Stream& next,
                        uint8_t* out) {
    if (!side.dim) return;
    if (side.level == level) {
        const int64_t row = (int64_t)side.dim * width_of(level);
        std::memcpy(out, record + side.codes + token * row, row);
        return;
    }
    const float* x = (const float*)page_floats(side, record, token, 1, room, next).data;
    store_elements(level, x, side.dim, out);
}

// One side of a full-precision token, rotated into the basis of the pages. turned: [dim].
inline void gather_dense_side(const HfkvSide& side, const uint8_t* from, int level, float* x, float* turned, uint8_t* out) {
    if (!side.dim) return;
    if (!side.rotation) {
        std::memcpy(out, from, (int64_t)side.dim * width_of(level));
        return;
    }
    load_elements(level, from, side.dim, x);
    rotate(side, x, false, turned);
    store_elements(level, turned, side.dim, out);
}

struct GatherRun {
    const HfkvLatentGather& gather;
    const HfkvLatent& call;
    size_t room_bytes;

    explicit GatherRun(const HfkvLatentGather& g) : gather(g), call(g.from) {
        Arena none{nullptr};
        room(none), room_bytes = (size_t)none.at;
    }
    LatentRoom side_room(Arena& a, const HfkvSide& side) const {
        LatentRoom r;
        r.floats = a.take<float>(side.dim + kLanes);
        r.factors = a.take<float>(2 * rounded(factor_count(side)) + larger_int(side.dim, kLatentChunk) + 16);
        r.bytes = a.take<uint8_t>(side.dim + 64);
        return r;
    }
    struct Room {
        LatentRoom latents, rotary;
        float* turned;
    };
    Room room(Arena& a) const {
        const HfkvSide &latents = call.layout->keys, &rotary = call.layout->values;
        return {side_room(a, latents), side_room(a, rotary), a.take<float>(larger_int(latents.dim, rotary.dim))};
    }
};

inline void gather_token(const GatherRun& run, int64_t i, const GatherRun::Room& room, Stream& next) {
    const HfkvLatent& c = run.call;
    const HfkvSide &latents = c.layout->keys, &rotary = c.layout->values;
    const int level = c.dense_level, page_size = c.layout->page_size;
    const int64_t width = width_of(level), sequence = i / run.gather.count, place = run.gather.places[i];
    uint8_t* to = (uint8_t*)run.gather.latents + i * width * latents.dim;
    uint8_t* to_rotary = (uint8_t*)run.gather.rotary + i * width * rotary.dim;
    if (place >= 0 && place < c.slots) {
        gather_dense_side(latents, (const uint8_t*)c.dense_latents + width * (sequence * c.latents_batch + place * c.latents_token),
                          level, room.latents.floats, room.turned, to);
        gather_dense_side(rotary, (const uint8_t*)c.dense_rotary + width * (sequence * c.rotary_batch + place * c.rotary_token),
                          level, room.rotary.floats, room.turned, to_rotary);
        return;
    }
    const int64_t token = place - c.slots, column = token / page_size;
    const uint8_t* record =
        place < 0 || column >= c.columns ? nullptr : (const uint8_t*)c.addresses[sequence * c.row_stride + column];
    if (!record) {
        std::memset(to, 0, width * latents.dim);
        if (rotary.dim) std::memset(to_rotary, 0, width * rotary.dim);
        return;
    }
    gather_side(latents, record, (int)(token % page_size), level, room.latents, next, to);
    gather_side(rotary, record, (int)(token % page_size), level, room.rotary, next, to_rotary);
}

inline int gather_latents(const HfkvLatentGather& gather) {
    const GatherRun run(gather);
    const int64_t tokens = gather.from.batch * gather.count;
    const int threads = tokens * (gather.from.layout->keys.dim + 64) < kOneThreadBytes / 4 ? 1 : gather.from.threads;
    const Workspace workspace(run.room_bytes * threads + 64);
    if (!workspace.at()) return 1;
#pragma omp parallel num_threads(threads)
    {
#if defined(_OPENMP)
        Arena own{workspace.at() + run.room_bytes * omp_get_thread_num()};
#else
        Arena own{workspace.at()};
#endif
        const GatherRun::Room room = run.room(own);
        Stream next;
        next.begin(nullptr, 0);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tokens; i++) gather_token(run, i, room, next);
    }
    return 0;
}

}  // namespace
