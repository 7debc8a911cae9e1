// Packed codes as vectors of 64 levels, a byte each, without a detour over memory (AVX512-VBMI).
//
// A byte of a row holds a code of each of its segments. A vector of 64 such bytes gives one vector of levels for each
// segment, by a shift and a look-up; where a row is shorter than a vector, it is repeated to fill one, and every lane is
// shifted to the segment that its channels belong to. The look-up heeds the low six bits of a byte only, and a table that
// repeats itself makes the bits above the code irrelevant: nothing is masked.
#pragma once

#include "api.h"
#include "expand.h"

#if defined(__AVX512VBMI__)

namespace {

// How the rows of a packing are read: kLength bytes of them at a time, each vector of which gives kOutputs of levels.
template <int kLength_, int kOutputs_>
struct Packing {
    static constexpr int kLength = kLength_, kOutputs = kOutputs_;
    static constexpr bool kPlain = false;  // bytes that are levels already
    static __m512i load(const uint8_t* row) {
        if (kLength == 64) return _mm512_loadu_si512(row);
        if (kLength == 32) return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)row));
        return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)row));
    }
};
struct Plain : Packing<64, 1> {
    static constexpr bool kPlain = true;
};

// The rows of a page, to be read 64 channels at a time.
template <class Packing>
struct Rows64 {
    const uint8_t* data;
    int stride, sources;  // bytes and vectors of a row
    __m512i table, shifts[Packing::kOutputs];

    Rows64(const uint8_t* bytes, int row_bytes) : data(bytes), stride(row_bytes), sources((row_bytes + 63) / 64) {}

    Rows64(const HfkvSide& side, const uint8_t* codes) : Rows64(codes, side.dim * side.bits / 8) {
        alignas(64) uint8_t count[64];
        for (int i = 0; i < 64; i++) count[i] = (uint8_t)i;
        const __m512i place = _mm512_load_si512(count), code = _mm512_set1_epi8((char)((1 << side.bits) - 1));
        table = _mm512_permutexvar_epi8(_mm512_and_si512(place, code), _mm512_loadu_si512(side.levels));
        // A pair of bytes is shifted by what its lower one needs: its place, over the length of a row, is its segment.
        constexpr int kLog = Packing::kLength == 64 ? 6 : Packing::kLength == 32 ? 5 : 4;
        const __m512i segment = _mm512_srli_epi16(_mm512_and_si512(place, _mm512_set1_epi16(63)), kLog);
        for (int k = 0; k < Packing::kOutputs; k++)
            shifts[k] = _mm512_mullo_epi16(_mm512_set1_epi16((short)side.bits),
                                           _mm512_add_epi16(segment, _mm512_set1_epi16((short)((k << 6) >> kLog))));
    }

    // Which 64 channels of a row output k of a source has.
    int block(int source, int k) const { return k * sources + source; }
    __m512i load(int64_t row, int source) const { return Packing::load(data + row * stride + 64 * source); }
    __m512i levels(__m512i bytes, int k) const {
        if (Packing::kPlain) return bytes;
        const bool first = Packing::kLength == 64 && k == 0;  // nothing to shift
        return _mm512_permutexvar_epi8(first ? bytes : _mm512_srlv_epi16(bytes, shifts[k]), table);
    }
};

// Calls op with the rows of codes of a side. `bytes` is room for a page of levels, for packings that do not come in vectors.
template <class Op>
void with_rows(const HfkvSide& side, const uint8_t* codes, int n, uint8_t* bytes, Stream& next, const Op& op) {
    const int length = side.dim * side.bits / 8;
    if (side.bits == 8) return op(Rows64<Plain>(codes, length));
    if (side.bits == 4 && length % 64 == 0) return op(Rows64<Packing<64, 2>>(side, codes));
    if (side.bits == 4 && length == 32) return op(Rows64<Packing<32, 1>>(side, codes));
    if (side.bits == 2 && length == 64) return op(Rows64<Packing<64, 4>>(side, codes));
    if (side.bits == 2 && length == 32) return op(Rows64<Packing<32, 2>>(side, codes));
    if (side.bits == 2 && length == 16) return op(Rows64<Packing<16, 1>>(side, codes));
    expand(codes, side.bits, n, side.dim, side.levels, bytes, next);
    op(Rows64<Plain>(bytes, side.dim));
}

}  // namespace

#endif  // __AVX512VBMI__
