// Attention of a few query rows (tokens x heads of one sequence) over rows found by pointer: ring slots, new rows of the chunk,
// entries in pages, all of one shared key-value head. Keys are packed 64 at a time so that lanes are keys for the logits and
// channels for the sum; both are then products with a packed panel. Key number j of a query always sits in the same lane and
// pair (window rows by absolute position, entries by number), and hidden keys weigh exactly zero, so grouping queries changes
// no bit.
#pragma once
#include <algorithm>

#include "gemm.h"

namespace nautile {

enum RowType { FLOAT32, BFLOAT16 };
constexpr int KEYS = PANEL * LANES;  // of one packed panel

// out[w][lane] = rows[lane][w] for 16 rows of `words` 32-bit words; consecutive w are `step` words apart.
static inline void transpose(const uint32_t* const* rows, int words, uint32_t* out, int64_t step) {
    int w = 0;
#if defined(__AVX512F__)
    for (; w + LANES <= words; w += LANES) {
        __m512i a[LANES], b[LANES];
        for (int i = 0; i < LANES; i++) a[i] = _mm512_loadu_si512(rows[i] + w);
        for (int i = 0; i < LANES; i += 2) {
            b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        }
        for (int i = 0; i < LANES; i += 4)
            for (int j = 0; j < 2; j++) {
                a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
                a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
            }
        for (int i = 0; i < 4; i++) {  // a[4 g + i] holds words i, 4 + i, 8 + i, 12 + i of rows 4 g .. 4 g + 3
            __m512i low0 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), high0 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xDD);
            __m512i low1 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88), high1 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xDD);
            b[i] = _mm512_shuffle_i32x4(low0, low1, 0x88);
            b[8 + i] = _mm512_shuffle_i32x4(low0, low1, 0xDD);
            b[4 + i] = _mm512_shuffle_i32x4(high0, high1, 0x88);
            b[12 + i] = _mm512_shuffle_i32x4(high0, high1, 0xDD);
        }
        for (int i = 0; i < LANES; i++) _mm512_storeu_si512(out + (w + i) * step, b[i]);
    }
#endif
    for (; w < words; w++)
        for (int i = 0; i < LANES; i++) out[w * step + i] = rows[i][w];
}

// Packs rows of one type for products of one kind. One object a thread.
class Packer {
  public:
    Packer(int kind, RowType type, int width) : kind(kind), type(type), width(width) {
        depth = kind == WIDE ? width : width / 2;
        panel_ = allocate<uint32_t>((int64_t)KEYS * std::max(width, KEYS));
        moved_ = allocate<uint32_t>((int64_t)LANES * width);
    }

    // Lanes are keys: [depth][tiles][16] of 16 * tiles rows.
    const uint32_t* keys(const void* const* rows, int tiles) {
        for (int t = 0; t < tiles; t++) {
            const uint32_t* words[LANES];
            for (int i = 0; i < LANES; i++) words[i] = converted(rows[t * LANES + i], i);
            transpose(words, depth, panel_.get() + t * LANES, (int64_t)tiles * LANES);
        }
        const int count = std::min(tiles * LANES, expected_left_);
        fetch(expected_, count);
        expected_ += count, expected_left_ -= count;
        return panel_.get();
    }

    // Lanes are channels: [count or count / 2][tiles][16] of channels from 16 * first on. count is even.
    const uint32_t* values(const void* const* rows, int count, int first, int tiles) {
        const int64_t step = (int64_t)tiles * LANES;
        uint32_t* out = panel_.get();
        for (int j = 0; j < count; j += 2)
            for (int t = 0; t < tiles; t++) {
                const int at = (first + t) * LANES;
                if (kind == PAIRS && type == BFLOAT16 && at + LANES <= width) {
                    uvec pair = widen((const uint16_t*)rows[j] + at) | (widen((const uint16_t*)rows[j + 1] + at) << 16);
                    std::memcpy(out + j / 2 * step + t * LANES, &pair, 64);
                } else if (kind == WIDE) {
                    uvec a = words(rows[j], at), b = words(rows[j + 1], at);
                    std::memcpy(out + j * step + t * LANES, &a, 64);
                    std::memcpy(out + (j + 1) * step + t * LANES, &b, 64);
                } else {
                    uvec pair = words(rows[j], at) | (words(rows[j + 1], at) << 16);
                    std::memcpy(out + j / 2 * step + t * LANES, &pair, 64);
                }
            }
        return out;
    }

    // Whether `values` would only copy: rows are whole vectors of the product's type (pairs cost more than a copy for many rows).
    bool direct(int first, int tiles, int rows) const {
        if ((first + tiles) * LANES > width) return false;
        return kind == WIDE ? type == FLOAT32 : kind == PAIRS && type == BFLOAT16 && rows <= ROWS;
    }

    // Whether a row of keys is an operand as it lies there, in whole vectors of four words.
    bool in_place() const { return depth % 4 == 0 && ((kind == WIDE && type == FLOAT32) || (kind == PAIRS && type == BFLOAT16)); }

    // Rows that will be packed after those at hand: asked for as many at a time as are packed.
    void expect(const void* const* rows, int count) { expected_ = rows, expected_left_ = count; }

    // Asks for the bytes of rows that are to be packed soon: they lie anywhere.
    void fetch(const void* const* rows, int count) const {
        const int bytes = width * (type == FLOAT32 ? 4 : 2);
        for (int i = 0; i < count; i++)
            for (int at = 0; at < bytes; at += 64) __builtin_prefetch((const char*)rows[i] + at, 0, 2);  // a block would fill the first cache
    }

    const int kind;
    const RowType type;
    const int width;
    int depth;

  private:
    // The row as words of the operand's kind.
    const uint32_t* converted(const void* row, int i) {
        if ((kind == WIDE) == (type == FLOAT32)) return (const uint32_t*)row;
        uint32_t* to = moved_.get() + (int64_t)i * width;
        if (kind == WIDE)
            for (int k = 0; k < width; k++) ((float*)to)[k] = from_bf16(((const uint16_t*)row)[k]);
        else
            write_row(PAIRS, to, 0, 0, (const float*)row, width);
        return to;
    }
    // Channels at .. at + 15 as floats, or as bfloat16 in the low halves.
    uvec words(const void* row, int at) const {
        int left = width - at;
        if (type == FLOAT32) {
            vec v = load_some((const float*)row + at, left);
            if (kind == WIDE) return (uvec)v;
            uint16_t half[LANES];
            store_bf16(half, v);
            return widen(half);
        }
        uint16_t half[LANES] = {};
        std::memcpy(half, (const uint16_t*)row + at, (size_t)(left < LANES ? left : LANES) * 2);
        uvec wide = widen(half);
        return kind == WIDE ? wide << 16 : wide;
    }

    Buffer<uint32_t> panel_, moved_;
    const void* const* expected_ = nullptr;
    int expected_left_ = 0;
};

// Keys of a group of queries: rows by pointer, padded to a multiple of 16 with rows of zeros.
typedef std::vector<const void*> KeyList;

// logits[r][at + j] = query row r . key j for the panels in `blocks`; rows of logits are `stride` floats apart.
static inline void key_logits(Packer& packer, const KeyList& keys, Range blocks, const Rows& queries, int first_row, int rows,
                              float* logits, int64_t stride, int64_t at) {
    for (int b = blocks.begin; b < blocks.end; b++) {
        int tiles = std::min(PANEL, (int)keys.size() / LANES - b * PANEL), left = (int)keys.size() - (b + 1) * KEYS;
        if (left > 0) packer.fetch(keys.data() + (int64_t)(b + 1) * KEYS, std::min(left, KEYS));
        const uint32_t* panel = packer.keys(keys.data() + (int64_t)b * KEYS, tiles);
        const uint32_t* from[ROWS];
        float* to[ROWS];
        for (int r = 0; r < rows; r += ROWS) {
            int count = std::min(ROWS, rows - r);
            for (int i = 0; i < count; i++) {
                from[i] = queries.row(first_row + r + i);
                to[i] = logits + (r + i) * stride + at + (int64_t)b * KEYS;
            }
            panel_product(packer.kind, count, from, queries.low, panel, tiles, packer.depth, to, false);
        }
    }
}
// Logits of R query rows with sixteen keys of `depth` words each, found by pointer, for rows of keys that only one token reads:
// turning them around would cost as much as the products. Four keys meet four words of the query at once, so a logit is four
// sums of every fourth word (or pair), added as (0 + 2) + (1 + 3). `next` are sixteen rows to be asked for meanwhile, or null.
#if defined(__AVX512F__)
template <int KIND, int R>
static inline void quad_logits(const uint32_t* const* q, const void* const* keys, int depth, const void* const* next, float* const* out) {
    vec acc[R][4] = {};
    for (int k = 0; k < depth; k += 4) {
        if (next) {
            const char* row = (const char*)next[k / 4 % LANES] + k / (4 * LANES) * 256;
            for (int at = 0; at < 256; at += 64) __builtin_prefetch(row + at, 0, 2);
        }
        __m512i part[4];
        for (int g = 0; g < 4; g++) {  // lanes 4 i .. 4 i + 3 hold four words of key 4 i + g
            auto words = [&](int i) { return _mm_loadu_si128((const __m128i*)((const uint32_t*)keys[4 * i + g] + k)); };
            part[g] = _mm512_castsi128_si512(words(0));
            part[g] = _mm512_mask_broadcast_i32x4(part[g], 0x00F0, words(1));
            part[g] = _mm512_mask_broadcast_i32x4(part[g], 0x0F00, words(2));
            part[g] = _mm512_mask_broadcast_i32x4(part[g], 0xF000, words(3));
        }
        for (int r = 0; r < R; r++) {
            const uvec x = (uvec)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(q[r] + k)));
            for (int g = 0; g < 4; g++)
                acc[r][g] = KIND == WIDE ? fma((vec)x, (vec)part[g], acc[r][g]) : dot_pairs(acc[r][g], x, (uvec)part[g]);
        }
    }
    for (int r = 0; r < R; r++) {
        __m512 half[2];
        for (int i = 0; i < 2; i++) {
            const __m512 a = (__m512)acc[r][2 * i], b = (__m512)acc[r][2 * i + 1];
            half[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));  // 0 + 2 of a, of b, 1 + 3 of a, of b
        }
        const __m512d a = (__m512d)half[0], b = (__m512d)half[1];
        const __m512 sums = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
        _mm512_storeu_ps(out[r], sums);
    }
}
template <int KIND>
static void quad_rows(int rows, const uint32_t* const* q, const void* const* keys, int depth, const void* const* next, float* const* out) {
    switch (rows) {
        case 6: return quad_logits<KIND, 6>(q, keys, depth, next, out);
        case 5: return quad_logits<KIND, 5>(q, keys, depth, next, out);
        case 4: return quad_logits<KIND, 4>(q, keys, depth, next, out);
        case 3: return quad_logits<KIND, 3>(q, keys, depth, next, out);
        case 2: return quad_logits<KIND, 2>(q, keys, depth, next, out);
        default: return quad_logits<KIND, 1>(q, keys, depth, next, out);
    }
}
#endif

static inline int key_blocks(const KeyList& keys) { return ((int)keys.size() + KEYS - 1) / KEYS; }

// `key_logits` for the rows of one token with keys of its own. Whether a token's keys are its own does not depend on what is
// computed beside it, so every logit is always made in the same way.
static inline void own_logits(Packer& packer, const KeyList& keys, Range blocks, const Rows& queries, int first_row, int rows, float* logits,
                              int64_t stride, int64_t at) {
#if defined(__AVX512F__)
    if (packer.in_place()) {
        const int end = std::min((int)keys.size(), blocks.end * KEYS);
        for (int j = blocks.begin * KEYS; j < end; j += LANES)
            for (int r = 0; r < rows; r += ROWS) {
                const int count = std::min(ROWS, rows - r);
                const uint32_t* from[ROWS];
                float* to[ROWS];
                for (int i = 0; i < count; i++) from[i] = queries.row(first_row + r + i), to[i] = logits + (r + i) * stride + at + j;
                const void* const* next = r == 0 && j + 3 * LANES <= end ? keys.data() + j + 2 * LANES : nullptr;
                if (packer.kind == WIDE) quad_rows<WIDE>(count, from, keys.data() + j, packer.depth, next, to);
                else quad_rows<PAIRS>(count, from, keys.data() + j, packer.depth, next, to);
            }
        return;
    }
#endif
    key_logits(packer, keys, blocks, queries, first_row, rows, logits, stride, at);
}

// Pairs of two rows' channels, in the order in which a machine pairs them with one instruction: of 32 channels those whose
// number has no 4 in it, then the others. `interleave` brings two tiles of sums into that order, or back.
template <int T>
static inline void value_pairs(const char* row, const char* other, uvec* column) {
#if defined(__AVX512BW__)
    if (T % 2 == 0) {
        for (int t = 0; t + 1 < T; t += 2) {
            const __m512i a = _mm512_loadu_si512(row + t * 32), b = _mm512_loadu_si512(other + t * 32);
            column[t] = (uvec)_mm512_unpacklo_epi16(a, b), column[t + 1] = (uvec)_mm512_unpackhi_epi16(a, b);
        }
        return;
    }
#endif
    for (int t = 0; t < T; t++) column[t] = widen((const uint16_t*)row + t * LANES) | widen((const uint16_t*)other + t * LANES) << 16;
}
template <int T, bool APART>
static inline void interleave(vec* tiles) {
#if defined(__AVX512BW__)
    for (int t = 0; t + 1 < T && T % 2 == 0; t += 2) {
        const vec a = tiles[t], b = tiles[t + 1];
        if (APART) {
            tiles[t] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
            tiles[t + 1] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
        } else {
            tiles[t] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
            tiles[t + 1] = __builtin_shufflevector(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        }
    }
#endif
}

// Values where rows already are what the product reads: no copy is made. `first` is in bytes of a row, `count` even.
template <int KIND, int R, int T>
static inline void value_block(const uint32_t* const* a, const void* const* rows, int64_t first, int count, float* const* c) {
    vec acc[R][T];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) acc[r][t] = load(c[r] + t * LANES);
    if (KIND != WIDE)
        for (int r = 0; r < R; r++) interleave<T, true>(acc[r]);
    for (int j = 0; j < count; j += KIND == WIDE ? 1 : 2) {
        const char* row = (const char*)rows[j] + first;
        uvec column[T];
        if (KIND == WIDE)
            for (int t = 0; t < T; t++) std::memcpy(&column[t], row + t * LANES * 4, 64);
        else value_pairs<T>(row, (const char*)rows[j + 1] + first, column);
        for (int t = 0; t < T; t++) hold(column[t]);
        for (int r = 0; r < R; r++) {
            uvec x = uvec{} + a[r][KIND == WIDE ? j : j / 2];
            for (int t = 0; t < T; t++)
                acc[r][t] = KIND == WIDE ? fma((vec)x, (vec)column[t], acc[r][t]) : dot_pairs(acc[r][t], x, column[t]);
        }
    }
    for (int r = 0; r < R; r++) {
        if (KIND != WIDE) interleave<T, false>(acc[r]);
        for (int t = 0; t < T; t++) store(c[r] + t * LANES, acc[r][t]);
    }
}
template <int KIND>
static void value_rows(int rows, const uint32_t* const* a, const void* const* keys, int64_t first, int count, float* const* c) {
    constexpr int T = TOGETHER;
    switch (rows) {
        case 6: return value_block<KIND, 6, T>(a, keys, first, count, c);
        case 5: return value_block<KIND, 5, T>(a, keys, first, count, c);
        case 4: return value_block<KIND, 4, T>(a, keys, first, count, c);
        case 3: return value_block<KIND, 3, T>(a, keys, first, count, c);
        case 2: return value_block<KIND, 2, T>(a, keys, first, count, c);
        default: return value_block<KIND, 1, T>(a, keys, first, count, c);
    }
}

// out[r][16 t ..] += sum_j weight[r][at + j] key_j for channel tiles t in `tiles`. Weights are operand rows of the packer's kind.
static inline void weighted_values(Packer& packer, const KeyList& keys, Range tiles, const Rows& weights, int rows, int64_t at,
                                   float* out, int64_t stride) {
    int per_word = packer.kind == WIDE ? 1 : 2;
    for (int first = 0; first < (int)keys.size(); first += KEYS) {
        int count = std::min(KEYS, (int)keys.size() - first);
        for (int t = tiles.begin; t < tiles.end; t += PANEL) {
            int wide = std::min(PANEL, tiles.end - t);
            const bool direct = wide == TOGETHER && packer.direct(t, wide, rows);
            const uint32_t* panel = direct ? nullptr : packer.values(keys.data() + first, count, t, wide);
            const uint32_t* from[ROWS];
            float* to[ROWS];
            for (int r = 0; r < rows; r += ROWS) {
                int tall = std::min(ROWS, rows - r);
                for (int i = 0; i < tall; i++) {
                    from[i] = weights.row(r + i) + (at + first) / per_word;
                    to[i] = out + (r + i) * stride + (int64_t)t * LANES;
                }
                if (!direct) panel_product(packer.kind, tall, from, weights.low, panel, wide, count / per_word, to, true);
                else if (packer.kind == WIDE) value_rows<WIDE>(tall, from, keys.data() + first, (int64_t)t * LANES * 4, count, to);
                else value_rows<PAIRS>(tall, from, keys.data() + first, (int64_t)t * LANES * 2, count, to);
            }
        }
    }
}

// A span of keys that a query may see, as lanes of its row of logits.
struct Span {
    int64_t at;       // first lane of the region, a multiple of 16
    int size;         // lanes of the region, a multiple of 16
    int begin, end;   // visible lanes within it
};

// The logits of 16 lanes of a span, minus infinity where a key is hidden.
static inline vec seen_logits(const float* logits, const Span& span, int j) {
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vec v = load(logits + span.at + j);
    if (j >= span.begin && j + LANES <= span.end) return v;
    ivec number = lane + j, seen = (number >= span.begin) & (number < span.end);
    return seen ? v : spread(-__builtin_inff());
}

// Sixteen weights to an operand row of this kind. They are at least e^-87 or zero, so no rounding meets a denormal.
static inline void store_weights(int kind, uint32_t* weights, int64_t at, vec e) {
    if (kind == WIDE) return store((float*)weights + at, e);
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i*)((uint16_t*)weights + at), (__m256i)_mm512_cvtneps_pbh((__m512)e));
#else
    store_bf16((uint16_t*)weights + at, e);
#endif
}

// Softmax over the visible lanes of some spans and the sink: weights e^(l - top) as one operand row (zero where hidden).
// Returns 1 / total.
static inline float soften(const float* logits, const Span* spans, int count, float scale, float sink, int kind, uint32_t* weights) {
    vec high = spread(-__builtin_inff()), total = {};
    for (int s = 0; s < count; s++)
        for (int j = 0; j < spans[s].size; j += LANES) high = larger(seen_logits(logits, spans[s], j), high);
    float most = maximum(high) * scale;  // rounding keeps order, so this is the largest of the scaled ones
    most = most > sink ? most : sink;
    for (int s = 0; s < count; s++)
        for (int j = 0; j < spans[s].size; j += LANES) {
            vec v = seen_logits(logits, spans[s], j) * scale;
            vec e = exponential(v - most);
            e = v == -__builtin_inff() ? vec{} : e;
            total = total + e;
            store_weights(kind, weights, spans[s].at + j, e);
        }
    return 1.0f / (sum(total) + std::exp(sink - most));
}

// Pairs (2 i, 2 i + 1) of the last 2 * half of x [size], turned by (cos, sin); sign -1 turns back. Only channels begin .. end - 1.
static inline void turn(float* x, int size, const float* cosine, const float* sine, int half, float sign, int begin, int end) {
    int start = size - 2 * half;
    for (int at = std::max(start, begin); at + 1 < end; at += 2) {
        int i = (at - start) / 2;
        float even = x[at], odd = x[at + 1], s = sign * sine[i];
        x[at] = even * cosine[i] - odd * s;
        x[at + 1] = even * s + odd * cosine[i];
    }
}

// One row of the state.
static inline void write_state(RowType type, char* to, const float* x, int size) {
    if (type == FLOAT32) std::memcpy(to, x, (size_t)size * 4);
    else write_row(PAIRS, (uint32_t*)to, 0, 0, x, size);
}
static inline int64_t row_bytes(RowType type, int64_t size) { return size * (type == FLOAT32 ? 4 : 2); }

}  // namespace nautile
