// Scores of indexer keys: I = sum_h w_h relu(q_h . k), heads in ascending order. Lanes are keys.
//
// With 8-bit keys the products are exact integers: a key is s_k times bytes, a query head s_q times bytes, and
// I = s_k sum_h w_h s_q relu(bytes . bytes). The bytes of a block's keys are kept beside the pool, already in the order of the
// lanes, so that long contexts read half of what their bfloat16 rows hold. A copy is used only while the block has the version
// it was made of.
//
// Exact float32 scores are found with the same bytes: |q . k - s_q s_k bytes . bytes| <= |q| |k - s_k bytes| + |q - s_q bytes| |s_k bytes|
// (Cauchy-Schwarz), so a key whose 8-bit score plus that bound does not pass the k-th best score so far cannot be chosen. Only
// the others are scored in float32: a few in a hundred at length.
#pragma once
#include "attention.h"
#include "select.h"

namespace nautile {

// Adds the share of R heads to the scores of the keys of a panel. A function of its own: among other code its accumulators
// would not all find a register.
template <int KIND, int R, int T>
__attribute__((noinline)) static void head_scores(const uint32_t* q, int64_t q_stride, int64_t low, const float* w, const uint32_t* panel,
                                                  int64_t step, int depth, vec* scores) {
    vec acc[R][T] = {};
    for (int k = 0; k < depth; k++, panel += step) {
        uvec column[T];
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) {
            std::memcpy(&column[t], panel + t * LANES, 64);
            hold(column[t]);
        }
#pragma GCC unroll 16
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
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) {
        vec sum = scores[t];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) sum = fma(spread(w[r]), larger(acc[r][t], vec{}), sum);
        scores[t] = sum;
    }
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
    for (; tiles == 1 && h + 4 <= heads; h += 4)
        head_scores<KIND, 4, 1>(q.row(first + h), q.stride, q.low, w + h, panel, step, depth, scores);
    for (; h < heads; h++)
        for (int t = 0; t < tiles; t++) head_scores<KIND, 1, 1>(q.row(first + h), q.stride, q.low, w + h, panel + t * LANES, step, depth, scores + t);
}

// Four bytes a lane: acc + sum of unsigned (key) times signed (query).
static inline ivec dot_bytes(ivec acc, uint32_t query, uvec keys) {
#if defined(__AVX512VNNI__)
    return (ivec)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)keys, _mm512_set1_epi32((int)query));
#else
    for (int i = 0; i < 4; i++)
        acc += (int32_t)(int8_t)(query >> (8 * i)) * (ivec)((keys >> (8 * i)) & 255);
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

// The lengths of unit * bytes and of what they leave of x.
struct Lengths {
    float whole, rest;
};
static inline Lengths byte_lengths(const float* x, int size, int zero, const uint8_t* bytes, float unit) {
    double whole = 0, rest = 0;
    for (int i = 0; i < size; i++) {
        double y = (double)unit * (zero ? (int)bytes[i] - zero : (int)(int8_t)bytes[i]), z = (double)x[i] - y;
        whole += y * y, rest += z * z;
    }
    return {(float)(std::sqrt(whole) * 1.000001), (float)(std::sqrt(rest) * 1.000001)};
}

// A query head as bytes: [size / 4] words, then 128 times the sum of the bytes, which keys with 128 added to theirs ask for.
static inline float query_bytes(const float* x, int size, uint32_t* to) {
    const int depth = (size + 3) / 4;
    std::memset(to, 0, (size_t)depth * 4);
    float unit = to_bytes(x, size, 0, (uint8_t*)to);
    int32_t sum = 0;
    for (int i = 0; i < size; i++) sum += ((int8_t*)to)[i];
    sum *= 128;
    std::memcpy(to + depth, &sum, 4);
    return unit;
}

// How far the exact score of a key may lie above its 8-bit score: rest * (the key's rest) + whole * (its length).
struct Margin {
    float rest = 0, whole = 0;
    // One more head of weight w. The last term is for what float32 sums of up to 4,096 products round off.
    void add(float w, const float* x, int size, const uint8_t* bytes, float unit) {
        Lengths q = byte_lengths(x, size, 0, bytes, unit);
        float length = std::fabs(w) * (q.whole + q.rest);
        rest += length * 1.001f, whole += std::fabs(w) * q.rest * 1.001f + length * 6e-8f * (float)(size + 64);
    }
};

// The keys of one token that may be among its k best: those whose highest possible score is not under the k-th best of the
// lowest possible scores.
class Sieve {
  public:
    void begin(int k, int keys) {
        lowest.begin(k), count_ = 0;
        if ((int)index_.size() < keys + LANES) index_.resize(keys + LANES), most_.resize(keys + LANES);
    }
    // 16 keys from `index` on; those at or past `end` are not there.
    void push(vec scores, vec margin, int index, int end) {
        const vec most = scores + margin;
        const float limit = lowest.limit();
#if defined(__AVX512F__)
        __mmask16 mask = _mm512_cmp_ps_mask((__m512)most, _mm512_set1_ps(limit), _CMP_GE_OQ);
        if (end - index < LANES) mask &= (1u << (end > index ? end - index : 0)) - 1;
        if (!mask) return;
        const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        _mm512_storeu_ps(most_.data() + count_, _mm512_maskz_compress_ps(mask, (__m512)most));
        _mm512_storeu_si512(index_.data() + count_, _mm512_maskz_compress_epi32(mask, (__m512i)(lane + index)));
        count_ += __builtin_popcount(mask);
#else
        for (int i = 0; i < LANES && index + i < end; i++)
            if (most[i] >= limit) most_[count_] = most[i], index_[count_++] = index + i;
#endif
        lowest.push(scores - margin, index, end);
    }
    // What remains: indices in ascending order.
    const std::vector<int32_t>& finish(float limit, int& count) {
        count = 0;
        for (int i = 0; i < count_; i++) {
            index_[count] = index_[i];
            count += most_[i] >= limit;
        }
        return index_;
    }
    Selection lowest;

  private:
    int count_ = 0;
    std::vector<int32_t> index_;
    std::vector<float> most_;
};

// The 8-bit keys of one pool, with 128 added. Tiles of 16 keys: [size / 4][16] words, then 16 units and, where exact scores
// are to be bounded, 16 lengths and 16 lengths of what the bytes leave out.
class ByteKeys {
  public:
    ByteKeys(int64_t blocks, int64_t layers, int64_t rows, int size, bool bounded)
        : rows_(rows), layers_(layers), size_(size), bounded_(bounded) {
        depth_ = (size + 3) / 4, tile_ = (depth_ + (bounded ? 3 : 1)) * LANES;
        data_ = allocate<uint32_t>(blocks * layers * rows / LANES * tile_);
        seen_.assign(blocks * layers, -1), valid_.assign(blocks * layers, 0);
    }
    int depth() const { return depth_; }
    int64_t rows() const { return rows_; }
    int64_t tile_words() const { return tile_; }
    bool bounded() const { return bounded_; }
    uint32_t* tile(int64_t block, int64_t layer, int64_t row) const {
        return data_.get() + ((block * layers_ + layer) * (rows_ / LANES) + row / LANES) * tile_;
    }

    void put(int64_t block, int64_t layer, int64_t row, const void* stored, RowType type) {
        float x[4096];
        uint8_t bytes[4096];
        std::memset(bytes, 128, (size_t)depth_ * 4);
        for (int i = 0; i < size_; i++) x[i] = type == FLOAT32 ? ((const float*)stored)[i] : from_bf16(((const uint16_t*)stored)[i]);
        float unit = to_bytes(x, size_, 128, bytes);
        uint32_t* to = tile(block, layer, row) + row % LANES;
        for (int k = 0; k < depth_; k++) std::memcpy(to + k * LANES, bytes + 4 * k, 4);
        std::memcpy(to + depth_ * LANES, &unit, 4);
        if (!bounded_) return;
        Lengths lengths = byte_lengths(x, size_, 128, bytes, unit);
        std::memcpy(to + (depth_ + 1) * LANES, &lengths.whole, 4), std::memcpy(to + (depth_ + 2) * LANES, &lengths.rest, 4);
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
    bool bounded_;
    Buffer<uint32_t> data_;
    std::vector<int64_t> seen_, valid_;
};

// The share of R heads in the scores of T tiles, without the keys' scales. A function of its own: among other code its
// accumulators would not all find a register.
template <int R, int T>
__attribute__((noinline)) static void byte_scores(const uint32_t* q, int64_t q_stride, const float* w, const uint32_t* tile, int64_t tile_stride,
                                                  int depth, vec* scores) {
    ivec acc[R][T];
    const uint32_t* rows[R];
    const uint32_t* tiles[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) tiles[t] = tile + t * tile_stride;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        rows[r] = q + r * q_stride;
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) acc[r][t] = ivec{} - (int32_t)rows[r][depth];
    }
    for (int k = 0; k < depth; k++) {
        uint32_t words[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) words[r] = rows[r][k];
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) {
            uvec keys;
            std::memcpy(&keys, tiles[t] + k * LANES, 64);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) acc[r][t] = dot_bytes(acc[r][t], words[r], keys);
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) {
        vec sum = scores[t];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            ivec seen = acc[r][t] > 0 ? acc[r][t] : ivec{};
            sum = fma(spread(w[r]), __builtin_convertvector(seen, vec), sum);
        }
        scores[t] = sum;
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
