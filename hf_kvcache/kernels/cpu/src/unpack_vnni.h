// Looks packed codes up in registers, for AVX512-VNNI and AMX, so that levels take no detour over memory. A vector of bytes holds
// one code of every segment of a row, and a shift and a look-up give its levels. dot_vnni.h and dot_amx.h read pages by it.
#pragma once

#include "api.h"
#include "unpack.h"

#if defined(__AVX512VNNI__)

namespace {

// The look-up of the levels of codes of kBits bits.
template <int kBits>
struct Lookup {
    static constexpr int kSegments = 8 / kBits;
    __m512i table;

    explicit Lookup(const HfkvSide& side) : table(_mm512_loadu_si512(side.levels)) {
#if defined(__AVX512VBMI__)
        // The instruction heeds six bits of a byte, so the table repeats itself for all values of the bits above the code.
        alignas(64) uint8_t place[64];
        for (int i = 0; i < 64; i++) place[i] = (uint8_t)(i & ((1 << kBits) - 1));
        table = _mm512_permutexvar_epi8(_mm512_load_si512(place), table);
#endif
    }
    HFKV_INLINE __m512i find(__m512i codes) const {
        if (kBits == 8) return codes;
#if defined(__AVX512VBMI__)
        return _mm512_permutexvar_epi8(codes, table);
#else
        return _mm512_shuffle_epi8(table, _mm512_and_si512(codes, _mm512_set1_epi8((char)((1 << kBits) - 1))));
#endif
    }
    HFKV_INLINE __m512i segment(__m512i bytes, int s) const { return find(s ? _mm512_srli_epi16(bytes, s * kBits) : bytes); }
};

// Packed rows, or rows of levels.
template <int kBits_>
struct CodeRows {
    static constexpr int kBits = kBits_;
    const uint8_t* data;
    int length, n;  // bytes of a row, rows
    Lookup<kBits> levels;

    CodeRows(const HfkvSide& side, const uint8_t* bytes, int row_bytes, int rows)
        : data(bytes), length(row_bytes), n(rows), levels(side) {}
    // `count` rows from t on. If some lie behind the last row, a copy in `room`, in which these are 0.
    HFKV_INLINE const uint8_t* from(int t, int count, uint8_t* room) const {
        const uint8_t* rows = data + (int64_t)t * length;
        if (t + count <= n) return rows;
        std::memset(room, 0, (size_t)count * length);
        std::memcpy(room, rows, (size_t)(n - t) * length);
        return room;
    }
};

// Rows as vectors of 64 levels. Where a row has 64 bytes or more, 64 of them make a vector for each segment. A shorter row is
// repeated to fill a vector, and every lane is shifted by the segment that its channels belong to.
template <int kBits_, int kLength>
struct LevelVectors {
    static constexpr int kBits = kBits_;
    static constexpr int kOutputs = 8 / kBits * kLength / 64;  // vectors of 64 levels from one of bytes
    static_assert(kOutputs > 0, "a vector of bytes must hold the codes of 64 channels");
    CodeRows<kBits> rows;
    __m512i shifts[kOutputs];

    explicit LevelVectors(const CodeRows<kBits>& given) : rows(given) {
        const __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (int k = 0; k < kOutputs; k++)  // lane i holds bytes 4 i to 4 i + 3 of a vector
            shifts[k] = _mm512_mullo_epi32(_mm512_set1_epi32(kBits * 0x10001),
                                           _mm512_srli_epi32(_mm512_add_epi32(place, _mm512_set1_epi32(16 * k)), kShift));
    }
    HFKV_INLINE __m512i row(const uint8_t* from, __mmask64 in) const {
        if (kLength == 64) return _mm512_maskz_loadu_epi8(in, from);
        if (kLength == 32) return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)from));
        return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)from));
    }
    // 64 bytes of row t of a page from c on. Behind the last row that counts, the record holds bytes that may be read.
    __m512i load(int64_t t, int c) const { return row(rows.data + t * rows.length + c, ~0ull); }
    HFKV_INLINE __m512i level(__m512i bytes, int k) const {
        if (kBits == 8) return bytes;
        const bool first = kLength == 64 && k == 0;  // nothing to shift
        return rows.levels.find(first ? bytes : _mm512_srlv_epi16(bytes, shifts[k]));
    }
    // Which 64 channels of a row are output k of the vector at byte c.
    int block(int k, int c) const { return k * (kLength == 64 ? (rows.length + 63) / 64 : 1) + c / 64; }
    // What weighing all rows by 64 of these channels is worth in units of Stream, for every 32 rows.
    int units() const { return 6 * 64 / (rows.length * Lookup<kBits>::kSegments); }

private:
    static constexpr int kShift = kLength == 64 ? 4 : kLength == 32 ? 3 : 2;
};

// Calls op with the first n rows of a side. bytes: room for a page of levels, for codes that do not fill whole vectors.
template <class Op>
void with_level_vectors(const HfkvSide& side, const uint8_t* codes, int n, uint8_t* bytes, Stream& next, const Op& op) {
    const int length = side.dim * side.bits / 8;
    if (side.bits == 8) return op(LevelVectors<8, 64>(CodeRows<8>(side, codes, length, n)));
    if (side.dim % 64 == 0) {
        if (side.bits == 4 && length % 64 == 0) return op(LevelVectors<4, 64>(CodeRows<4>(side, codes, length, n)));
        if (side.bits == 4 && length == 32) return op(LevelVectors<4, 32>(CodeRows<4>(side, codes, length, n)));
        if (side.bits == 2 && length == 64) return op(LevelVectors<2, 64>(CodeRows<2>(side, codes, length, n)));
        if (side.bits == 2 && length == 32) return op(LevelVectors<2, 32>(CodeRows<2>(side, codes, length, n)));
        if (side.bits == 2 && length == 16) return op(LevelVectors<2, 16>(CodeRows<2>(side, codes, length, n)));
    }
    unpack(codes, side.bits, n, side.dim, side.levels, bytes, next);
    op(LevelVectors<8, 64>(CodeRows<8>(side, bytes, side.dim, n)));
}

}  // namespace

#endif  // __AVX512VNNI__
