// Scores of indexer keys: I = sum_h w_h relu(q_h . k), heads in ascending order. Lanes are keys.
//
// With 8-bit keys the products are exact integers: a key is s_k times bytes, a query head s_q times bytes, and
// I = s_k sum_h w_h s_q relu(bytes . bytes). The bytes of a block's keys are kept beside the pool, already in the order of the
// lanes, so that long contexts read half of what their bfloat16 rows hold. A copy is used only while the block has the version
// it was made of.
#pragma once
#include "attention.h"
#include "select.h"

namespace nautile {

// Adds the share of R heads to the scores of the keys of a panel.
template <int KIND, int R, int T>
static inline void head_scores(const uint32_t* q, int64_t q_stride, int64_t low, const float* w, const uint32_t* panel, int64_t step, int depth,
                               vec* scores) {
    vec acc[R][T] = {};
    for (int k = 0; k < depth; k++, panel += step) {
        uvec column[T];
        for (int t = 0; t < T; t++) std::memcpy(&column[t], panel + t * LANES, 64);
        for (int r = 0; r < R; r++) {
            uint32_t word = q[r * q_stride + k];
            if (KIND == WIDE) {
                vec x = (vec)(uvec{} + word);
                for (int t = 0; t < T; t++) acc[r][t] = fma(x, (vec)column[t], acc[r][t]);
            } else {
                uvec x = uvec{} + word;
                for (int t = 0; t < T; t++) acc[r][t] = dot_pairs(acc[r][t], x, column[t]);
                if (KIND == SPLIT_PAIRS) {
                    uvec y = uvec{} + q[r * q_stride + k + low];
                    for (int t = 0; t < T; t++) acc[r][t] = dot_pairs(acc[r][t], y, column[t]);
                }
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) scores[t] = fma(spread(w[r]), larger(acc[r][t], vec{}), scores[t]);
}

// scores[t] = I of keys 16 t .. 16 t + 15 of a panel of `tiles` tiles for one query of `heads` operand rows.
template <int KIND>
static inline void panel_scores(const Rows& q, int64_t first, int heads, const float* w, const uint32_t* panel, int tiles, int depth,
                                vec* scores) {
    const int64_t step = (int64_t)tiles * LANES;
    for (int t = 0; t < tiles; t++) scores[t] = vec{};  // +0: a sum of zeros must not become -0
    int h = 0;
    for (; tiles == PANEL && TOGETHER == PANEL && h + 4 <= heads; h += 4)
        head_scores<KIND, 4, TOGETHER>(q.row(first + h), q.stride, q.low, w + h, panel, step, depth, scores);
    for (; h < heads; h++)
        for (int t = 0; t < tiles; t++) head_scores<KIND, 1, 1>(q.row(first + h), q.stride, q.low, w + h, panel + t * LANES, step, depth, scores + t);
}

// Four bytes a lane: acc + sum of unsigned (query) times signed (key).
static inline ivec dot_bytes(ivec acc, uint32_t query, uvec keys) {
#if defined(__AVX512VNNI__)
    return (ivec)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32((int)query), (__m512i)keys);
#else
    for (int i = 0; i < 4; i++)
        acc += (int32_t)(uint8_t)(query >> (8 * i)) * ((ivec)(keys << (24 - 8 * i)) >> 24);
    return acc;
#endif
}

// x [size] as bytes around `zero`, four a word; returns what one unit is worth.
static inline float to_bytes(const float* x, int size, int zero, uint8_t* bytes) {
    vec top = {};
    for (int i = 0; i < size; i += LANES) {
        vec v = load_some(x + i, size - i);
        top = larger(larger(v, -v), top);
    }
    const float most = maximum(top), inverse = most > 0 ? 127.0f / most : 0.0f, magic = 12582912.0f;
    for (int i = 0; i < size; i += LANES) {
        vec v = load_some(x + i, size - i) * inverse + magic;  // the integer is in the low bits, ties to even
        ivec whole = (ivec)v - 0x4B400000 + zero;
        for (int j = 0; j < LANES && i + j < size; j++) bytes[i + j] = (uint8_t)whole[j];
    }
    return most / 127.0f;
}

// The 8-bit keys of one pool. Tiles of 16 keys: [size / 4][16] words, then 16 scales and 16 sums of bytes.
class ByteKeys {
  public:
    ByteKeys(int64_t blocks, int64_t layers, int64_t rows, int size) : rows_(rows), layers_(layers), size_(size) {
        depth_ = (size + 3) / 4, tile_ = (depth_ + 2) * LANES;
        data_ = allocate<uint32_t>(blocks * layers * rows / LANES * tile_);
        seen_.assign(blocks * layers, -1), valid_.assign(blocks * layers, 0);
    }
    int depth() const { return depth_; }
    int64_t rows() const { return rows_; }
    uint32_t* tile(int64_t block, int64_t layer, int64_t row) const {
        return data_.get() + ((block * layers_ + layer) * (rows_ / LANES) + row / LANES) * tile_;
    }

    void put(int64_t block, int64_t layer, int64_t row, const void* stored, RowType type) {
        float x[4096];
        uint8_t bytes[4096] = {};
        for (int i = 0; i < size_; i++) x[i] = type == FLOAT32 ? ((const float*)stored)[i] : from_bf16(((const uint16_t*)stored)[i]);
        float unit = to_bytes(x, size_, 0, bytes);
        uint32_t* to = tile(block, layer, row);
        const int lane = (int)(row % LANES);
        int32_t sum = 0;
        for (int k = 0; k < depth_; k++) std::memcpy(to + k * LANES + lane, bytes + 4 * k, 4);
        for (int i = 0; i < size_; i++) sum += (int8_t)bytes[i];
        std::memcpy(to + depth_ * LANES + lane, &unit, 4), std::memcpy(to + (depth_ + 1) * LANES + lane, &sum, 4);
    }

    // Rows first .. last - 1 of a block are about to be put (and written to the pool): the block gets a new version.
    void write(int64_t block, int64_t first, int64_t last, int64_t old_version, int64_t new_version) {
        for (int64_t layer = 0; layer < layers_; layer++) {
            int64_t at = block * layers_ + layer;
            if (seen_[at] != old_version) valid_[at] = 0;
            if (valid_[at] >= first) valid_[at] = last;
            seen_[at] = new_version;
        }
    }
    // The rows of a block before `needed` that have no current copy: from the result on. Taken as copied afterwards.
    int64_t stale(int64_t block, int64_t layer, int64_t needed, int64_t version) {
        int64_t at = block * layers_ + layer;
        if (seen_[at] != version) seen_[at] = version, valid_[at] = 0;
        int64_t first = std::min(valid_[at], needed);
        valid_[at] = std::max(valid_[at], needed);
        return first;
    }

  private:
    int64_t rows_, layers_, tile_;
    int size_, depth_;
    Buffer<uint32_t> data_;
    std::vector<int64_t> seen_, valid_;
};

// The share of R heads in the scores of T tiles, without the keys' scales.
template <int R, int T>
static inline void byte_scores(const uint32_t* q, int64_t q_stride, const float* w, const uint32_t* tile, int64_t tile_stride, int depth,
                               vec* scores) {
    ivec acc[R][T];
    for (int t = 0; t < T; t++) {
        ivec sums;
        std::memcpy(&sums, tile + t * tile_stride + (depth + 1) * LANES, 64);
        for (int r = 0; r < R; r++) acc[r][t] = sums * -128;  // queries are stored with 128 added
    }
    for (int k = 0; k < depth; k++)
        for (int t = 0; t < T; t++) {
            uvec keys;
            std::memcpy(&keys, tile + t * tile_stride + k * LANES, 64);
            for (int r = 0; r < R; r++) acc[r][t] = dot_bytes(acc[r][t], q[r * q_stride + k], keys);
        }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) {
            ivec seen = acc[r][t] > 0 ? acc[r][t] : ivec{};
            scores[t] = fma(spread(w[r]), __builtin_convertvector(seen, vec), scores[t]);
        }
}

// scores[t] of `tiles` (at most 4) consecutive tiles for one query; w holds the heads' weights times the queries' units.
static inline void tile_scores(const Rows& q, int64_t first, int heads, const float* w, const uint32_t* tile, int64_t tile_stride, int tiles,
                               int depth, vec* scores) {
    for (int t = 0; t < tiles; t++) scores[t] = vec{};
    int h = 0;
    for (; tiles == PANEL && TOGETHER == PANEL && h + 4 <= heads; h += 4)
        byte_scores<4, TOGETHER>(q.row(first + h), q.stride, w + h, tile, tile_stride, depth, scores);
    for (; h < heads; h++)
        for (int t = 0; t < tiles; t++) byte_scores<1, 1>(q.row(first + h), q.stride, w + h, tile + t * tile_stride, tile_stride, depth, scores + t);
    for (int t = 0; t < tiles; t++) {
        vec unit;
        std::memcpy(&unit, tile + t * tile_stride + depth * LANES, 64);
        scores[t] = scores[t] * unit + 0.0f;  // a zero must not be negative
    }
}

}  // namespace nautile
