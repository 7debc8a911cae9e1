// The C interface of the CPU kernels: the structs of their arguments and the functions of the library. library.py mirrors the
// structs with ctypes. Every change of a struct changes HFKV_ABI_VERSION, and library.py refuses a library of another version.
#pragma once

#include <cstdint>

#define HFKV_ABI_VERSION 20

// How the elements of a side become numbers before scaling.
enum HfkvLevel : int32_t {
    HFKV_CODES = 0,    // codes; those below 8 bits become bytes by a look-up in HfkvSide.levels
    HFKV_FLOAT8 = 1,   // e4m3
    HFKV_FLOAT32 = 2,  // this and the next two are elements in full precision
    HFKV_BFLOAT16 = 3,
    HFKV_FLOAT16 = 4,
};

enum HfkvAxis : int32_t { HFKV_CHANNEL = 0, HFKV_TOKEN = 1 };

// One side (keys or values) of a page: SideFormat and the offsets of its fields in hf_kvcache/kernels/page.py.
struct HfkvSide {
    int32_t dim, bits, level, axis, group;
    int32_t has_zero, has_other;
    int32_t offset;        // level = step * (byte - 128 + offset); a code of 8 bits is its own byte
    float step;
    uint8_t levels[64];    // the byte of each code of up to 4 bits: a table of 16 bytes, four times
    int64_t codes, scale, zero, other;  // byte offsets in a record
    int32_t rotation;      // 0: none; 1: by `matrix`; 2: fast Walsh-Hadamard transform after multiplication by `signs`
    const float* matrix;   // [dim, dim]: rotated = x @ matrix
    const float* signs;    // [dim]
};

struct HfkvLayout {
    HfkvSide keys, values;
    int32_t page_size;
    int64_t record_bytes;
    int64_t bias;  // byte offset of what is added to the score of each token, in half precision; 0: there is none
};

// `count` new tokens of each sequence, at the positions of the queries. The call first stores them in the full-precision slots
// behind those in use and then attends to them too. Their sides, `first` and `second` [B, H, count, D], have the level of the
// slots; strides are in elements. Without new tokens `first` is null.
struct HfkvToken {
    const void* first;
    const void* second;
    int64_t first_batch, first_head, first_token, second_batch, second_head, second_token;
    int64_t* positions;  // [B, slots], the positions of the slots; sequences are positions_batch apart
    int64_t positions_batch;
    int64_t* lengths;    // [B], the number of slots in use; set once nothing can fail any more
    int32_t count;
    // Whether sequences use different numbers of slots. Else all of them use the slots of the call, new tokens included.
    int32_t ragged;
};

struct HfkvAttend {
    const HfkvLayout* layout;
    // Query float32 [B, Hq, q, Dk], strides in elements; output [B, q, Hq, Dv]; log_sum_exp [B, Hq, q].
    const float* query;
    int64_t query_batch, query_head, query_token;
    float* output;
    float* log_sum_exp;
    int32_t batch, query_heads, heads, length;
    // Pages: arrays [rows, columns] whose rows are row_stride apart. A row is a KV head of a sequence. positions: the address
    // of the int64 positions [P] of a page, or 0 where its tokens stand side by side from `first` on.
    const int64_t* addresses;
    const int32_t* counts;
    const int64_t* first;
    const int64_t* positions;
    int64_t row_stride;
    int32_t columns;
    const float* key_mean;  // [rows, Dk], subtracted from the packed keys in the rotated basis; or null
    const float* key_scale;  // [rows, Dk], by which the packed keys were divided before the rotation; or null
    // Full-precision tokens [B, Hkv, n, D], strides in elements; positions and unused [B, n]. Of a ragged batch, n is the most that
    // a sequence has.
    const void* dense_keys;
    const void* dense_values;
    int32_t dense_level, slots;
    int64_t keys_batch, keys_head, keys_token, values_batch, values_head, values_token;
    const int64_t* dense_positions;
    const uint8_t* dense_unused;
    int64_t positions_batch, unused_batch;
    HfkvToken token;  // first: keys, second: values
    // What the queries may see, and how scores are made.
    int64_t start, window;  // window 0: none
    int32_t causal;
    float inner_scale, softcap;  // factor of the dot products; softcap 0: none
    const float* sink_logits;    // [Hq] or null
    // Probability of each key, summed over the queries: [B, Hq, columns * P] and [B, Hq, n]; or null.
    float* page_sums;
    float* dense_sums;
    int32_t threads;
};

// Absorbed latent attention: the keys of pages and of full-precision tokens are latents, their values are rotary keys.
struct HfkvLatent {
    const HfkvLayout* layout;
    // Query [B, H, q, r + dr], strides in elements, and output [B, q, H, r] are of query_level; log_sum_exp [B, H, q].
    const void* query;
    int32_t query_level;
    int64_t query_batch, query_head, query_token;
    void* output;
    float* log_sum_exp;
    int32_t batch, heads, length;
    // Pages as in HfkvAttend; a row is a sequence.
    const int64_t* addresses;
    const int32_t* counts;
    const int64_t* first;
    const int64_t* positions;
    int64_t row_stride;
    int32_t columns;
    // Full-precision tokens [B, n, r] and [B, n, dr], strides in elements; positions and unused [B, n].
    const void* dense_latents;
    const void* dense_rotary;
    int32_t dense_level, slots;
    int64_t latents_batch, latents_token, rotary_batch, rotary_token;
    const int64_t* dense_positions;
    const uint8_t* dense_unused;
    int64_t positions_batch, unused_batch;
    HfkvToken token;  // first: latents, second: rotary keys; of one head
    // What the queries may see. mask [B, H, q, mask_width], or null; a stride is 0 where all share one mask.
    int64_t start, window;  // window 0: none
    int32_t causal;
    const uint8_t* mask;
    int64_t mask_batch, mask_head, mask_query, mask_start, mask_width;
    float inner_scale, softcap;  // softcap 0: none
    const float* sink_logits;    // [H] or null
    int32_t threads;
};

// Absorbed latent attention of queries that see tokens of their own each: `count` places, in any order, none of them twice. Of
// `attend`, `batch` is the number of all queries, whose `length` is 1. Each `queries` of them after another are of one sequence. The
// token, positions, mask and visibility do not count. A place is a full-precision slot, or slots + column * P + the place in a page,
// or -1 for no token.
struct HfkvLatentPicked {
    HfkvLatent attend;
    const int64_t* places;  // [batch, count]
    int64_t count;
    int32_t queries;
};

// A projection of few vectors by a matrix of each head. weight: [H, n, width], strides in elements; width is a multiple of 16.
// out [width] is the sum of the weight's rows by x [n]; if transposed, out [n] are the products of its rows with x [width].
struct HfkvProject {
    const void* x;  // [B, H, q, n or width], strides in elements, as out; x, weight and out are of one level
    const void* weight;
    void* out;
    int32_t level, transposed;
    int32_t batch, heads, length, n, width;
    int64_t x_batch, x_head, x_token, out_batch, out_head, out_token, weight_head, weight_row;
    int32_t threads;
};

// A whole decode step of latent attention, with one query a sequence and everything of one level. The first dn elements of
// the queries [B, H, dn + dr] at absorb.x are projected to attend.query, and the other dr are copied behind them. attend.output
// is then projected to expand.out.
struct HfkvLatentStep {
    HfkvProject absorb;
    HfkvLatent attend;
    HfkvProject expand;
};

// Which pages a decode step reads. A row is a KV head of a sequence, and `queries` are those of its query heads. A page is
// summarized in `spans` parts, each by one or two vectors of signed bytes, which share a scale in half precision. Where `table` is
// not null, the entries of the chosen pages are copied there. There are two ways to score pages:
// - `reach` is 0: every vector has one product with what all query heads ask together (`size_weights`), and a page has the score of
//   its best part.
// - `reach` is above 0: the vectors are mean and standard deviation of the keys, of which `band` elements have one together, the root
//   of the sum of their variances. A query head's scores have mean m = q * mean * scaling and deviation s = sqrt(q^2 * deviation^2) *
//   scaling in a part, where q^2 has the mean of the squares of each band; the logarithm of its attention there is taken to be
//   m + s^2 / 2, or m + reach * (s - reach / 2) where s is beyond reach. The score of a page is its probability, summed over the
//   query heads.
struct HfkvChoose {
    const float* query;      // elements side by side; query_batch and query_head apart
    const int8_t* codes;     // [rows, columns * spans, width]; rows are codes_row apart
    const uint16_t* scales;  // [rows, columns * spans]; rows are scales_row apart
    const int64_t* limits;   // [rows], how many columns a row may have; or null
    const uint8_t* missing;  // [rows, columns], where a row has no page; rows are missing_row apart; or null
    int64_t* chosen;         // [rows, count], ascending columns, then 2^30 where there are fewer
    const int64_t *addresses, *first;  // [rows, columns], the table of all pages; rows are table_row apart
    const int32_t* counts;   // the same
    int64_t* table;          // [3, rows, count], addresses, counts and first positions, 0 where nothing is chosen; or null
    int32_t* table_counts;   // [rows, count], the counts once more
    const float* sinks;      // [rows, sink_count, D], keys with which pages share attention; read where reach is above 0
    int64_t query_batch, query_head, codes_row, scales_row, missing_row, table_row;
    int32_t rows, heads, queries, width, vectors, columns, spans, count;  // width is that of all vectors, count at most columns
    float size_weights[2];   // of each vector: it meets the queries' sum plus this times the sum of their absolute values
    float scaling, reach;    // see above
    float part_log;          // the logarithm of the tokens of a part, if there are sinks
    int32_t sink_count;
    int32_t band;            // where reach is above 0: neighboring elements that have one deviation; width is D + D / band
    int32_t shared;          // pages that a row brings to those which its sequence's heads share, where limits is null; 0: none shared
    int32_t threads;
};

// How a side is encoded; the codecs of hf_kvcache/codecs define the methods.
enum HfkvMethod : int32_t { HFKV_INTEGER = 0, HFKV_UNBIASED_KEYS = 1, HFKV_UNBIASED_VALUES = 2, HFKV_NORM = 3, HFKV_COPY = 4 };

struct HfkvGrid {
    int32_t count;     // levels
    float levels[16];
    float edges[16];   // count - 1 numbers half-way between neighboring levels
};

// Vectors of keys, values or queries, [B, H, n, D]: D is contiguous, other strides are in elements.
struct HfkvVectors {
    const void* at;
    int64_t batch, head, token;
};

struct HfkvEncodeSide {
    int32_t method;
    HfkvGrid grid;
    HfkvVectors x;  // [B, H, pages * P, D] in the model's basis
};

struct HfkvEncode {
    const HfkvLayout* layout;
    HfkvEncodeSide keys, values;
    int32_t level;  // of the elements of both sides
    int32_t heads, rows;  // rows: B * H
    int64_t pages;
    const float* key_mean;   // [rows, Dk], to be subtracted from the rotated vectors; or null
    const float* key_scale;  // [rows, Dk], powers of two by which to divide the vectors before the rotation; or null
    const int64_t* addresses;  // [pages, rows], of records of which every byte is written
    int32_t threads;
};

// The rotated mean of keys [B, H, tokens, Dk], of elements of a level.
struct HfkvKeyMean {
    const HfkvLayout* layout;
    HfkvVectors keys;
    int32_t level, batch, heads;
    int64_t tokens;
    const float* key_scale;  // [B * H, Dk], by which to divide the mean before the rotation; or null
    float* mean;             // [B * H, Dk]
    int32_t threads;
};

// The scale of each channel of keys [B, H, tokens, Dk] for queries [B, Hq, tokens, Dk], of elements of a level.
struct HfkvKeyScale {
    HfkvVectors query, keys;
    int32_t level, batch, query_heads, heads, dim;
    int64_t tokens;
    float* scale;  // [B * H, Dk]
    int32_t threads;
};

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif
extern "C" {
int32_t hfkv_abi_version();
// Name of the instruction set in use: "portable", "avx2", "avx512-vnni", "avx512-amx", "neon-dotprod", "neon-i8mm".
const char* hfkv_isa();
// Use that instruction set (for tests); returns 0, or 1 if this CPU lacks it or it was not compiled.
int32_t hfkv_set_isa(const char* name);
// Attention of a few queries; returns 0, or 1 if memory ran out (nothing is written then).
int32_t hfkv_attend(const HfkvAttend* call);
// Absorbed latent attention of a few queries; returns 0, or 1 if memory ran out (nothing is written then).
int32_t hfkv_latent_attend(const HfkvLatent* call);
// Projection of a few vectors; returns 0, or 1 if memory ran out.
int32_t hfkv_project(const HfkvProject* call);
// A whole decode step of latent attention; returns 0, or 1 if memory ran out (the token is not counted then).
int32_t hfkv_latent_step(const HfkvLatentStep* call);
// Absorbed latent attention to picked tokens; returns 0, or 1 if memory ran out (nothing is written then).
int32_t hfkv_attend_picked(const HfkvLatentPicked* call);
// Decode one side of the n records at `addresses` into float32 [n, P, D], in the rotated basis and without the key mean.
void hfkv_decode_side(const HfkvLayout* layout, int32_t values, const int64_t* addresses, int64_t n, float* out,
                      int32_t threads);
// Choose the pages of a decode step; returns 0, or 1 if memory ran out.
int32_t hfkv_choose(const HfkvChoose* call);
// Encode pages; returns 0, or 1 if memory ran out.
int32_t hfkv_encode(const HfkvEncode* call);
// Compute the mean or the scale of keys; return 0, or 1 if memory ran out.
int32_t hfkv_key_mean(const HfkvKeyMean* call);
int32_t hfkv_key_scale(const HfkvKeyScale* call);
}
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
