// Products of a few rows with a packed matrix. Lanes are outputs: output n of row m is one accumulator that walks k from first
// to last, whatever the number of rows, threads or panels, so a result never depends on what else is computed beside it.
//
// Packed matrices are panels of up to 64 outputs, [k][tiles][16] floats, or [k / 2][tiles][16] pairs of bfloat16. Rows that
// meet bfloat16 panels are pairs of bfloat16 too, either one term (8 bits of mantissa) or two (high and low part, 16 bits).
#pragma once
#include "memory.h"
#include "vec.h"

namespace nautile {

// float32; bfloat16 rows in one term; in two; 8-bit indexer keys; float32 indexer keys of which 8-bit copies rule most out.
enum Kind { WIDE, PAIRS, SPLIT_PAIRS, BYTES, SIFTED };

constexpr int ROWS = 6;          // of one register block
constexpr int PANEL = 4;         // tiles of one panel
constexpr int64_t FETCH = 1024;  // words that weights are fetched ahead of their use
#if defined(__AVX512F__)
constexpr int TOGETHER = PANEL;  // tiles of one register block
#else
constexpr int TOGETHER = 1;
#endif

// Rows as the kernels read them: `low` is the distance from the high to the low terms in 32-bit words.
struct Rows {
    uint32_t* base = nullptr;
    int64_t stride = 0;  // 32-bit words
    int64_t low = 0;
    uint32_t* row(int64_t m) const { return base + m * stride; }
};

template <int KIND, int R, int T>
static inline void block(const uint32_t* const* a, int64_t low, const uint32_t* b, int64_t step, int depth, float* const* c,
                         bool add, int64_t ahead) {
    vec acc[R][T];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) acc[r][t] = add ? load(c[r] + t * LANES) : vec{};
    for (int k = 0; k < depth; k++, b += step) {
        uvec column[T];
        for (int t = 0; t < T; t++) std::memcpy(&column[t], b + t * LANES, 64);
        for (int t = 0; t < T; t++) __builtin_prefetch(b + t * LANES + ahead);
        for (int r = 0; r < R; r++) {
            if (KIND == WIDE) {
                vec x = spread(((const float*)a[r])[k]);
                for (int t = 0; t < T; t++) acc[r][t] = fma(x, (vec)column[t], acc[r][t]);
            } else {
                uvec x = uvec{} + a[r][k];
                for (int t = 0; t < T; t++) acc[r][t] = dot_pairs(acc[r][t], x, column[t]);
                if (KIND == SPLIT_PAIRS) {
                    uvec y = uvec{} + a[r][k + low];
                    for (int t = 0; t < T; t++) acc[r][t] = dot_pairs(acc[r][t], y, column[t]);
                }
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) store(c[r] + t * LANES, acc[r][t]);
}

template <int KIND, int R>
static void panel_rows(const uint32_t* const* a, int64_t low, const uint32_t* b, int tiles, int depth, float* const* c, bool add,
                       int64_t ahead) {
    int64_t step = (int64_t)tiles * LANES;
    if (TOGETHER == PANEL) {
        switch (tiles) {
            case 4: return block<KIND, R, TOGETHER>(a, low, b, step, depth, c, add, ahead);
            case 3: return block<KIND, R, TOGETHER == 1 ? 1 : 3>(a, low, b, step, depth, c, add, ahead);
            case 2: return block<KIND, R, TOGETHER == 1 ? 1 : 2>(a, low, b, step, depth, c, add, ahead);
            default: return block<KIND, R, 1>(a, low, b, step, depth, c, add, ahead);
        }
    }
    for (int t = 0; t < tiles; t++) {
        float* moved[R];
        for (int r = 0; r < R; r++) moved[r] = c[r] + t * LANES;
        block<KIND, R, 1>(a, low, b + t * LANES, step, depth, moved, add, ahead);
    }
}

template <int KIND>
static void panel_kind(int rows, const uint32_t* const* a, int64_t low, const uint32_t* b, int tiles, int depth, float* const* c,
                       bool add, int64_t ahead) {
    switch (rows) {
        case 6: return panel_rows<KIND, 6>(a, low, b, tiles, depth, c, add, ahead);
        case 5: return panel_rows<KIND, 5>(a, low, b, tiles, depth, c, add, ahead);
        case 4: return panel_rows<KIND, 4>(a, low, b, tiles, depth, c, add, ahead);
        case 3: return panel_rows<KIND, 3>(a, low, b, tiles, depth, c, add, ahead);
        case 2: return panel_rows<KIND, 2>(a, low, b, tiles, depth, c, add, ahead);
        default: return panel_rows<KIND, 1>(a, low, b, tiles, depth, c, add, ahead);
    }
}

// c[r][0 .. 16 tiles) = (c +) a[r] . panel, for 1 to ROWS rows. Memory is fetched `ahead` words before it is read.
static inline void panel_product(int kind, int rows, const uint32_t* const* a, int64_t low, const uint32_t* b, int tiles,
                                 int depth, float* const* c, bool add, int64_t ahead = 0) {
    if (kind == WIDE) return panel_kind<WIDE>(rows, a, low, b, tiles, depth, c, add, ahead);
    if (kind == PAIRS) return panel_kind<PAIRS>(rows, a, low, b, tiles, depth, c, add, ahead);
    return panel_kind<SPLIT_PAIRS>(rows, a, low, b, tiles, depth, c, add, ahead);
}

// A packed matrix W [outputs, inputs]: y = W x. Its parts may come from several tensors, each starting at a multiple of 16.
class Matrix {
  public:
    Matrix() = default;
    Matrix(Slab& slab, int kind, int outputs, int inputs) : kind(kind), inputs(inputs) {
        tiles = (int)round_up(outputs, LANES) / LANES;
        panels = (tiles + PANEL - 1) / PANEL;
        depth = kind == WIDE ? inputs : (inputs + 1) / 2;
        data_ = slab.take<uint32_t>((int64_t)tiles * LANES * depth);
    }
    // Puts rows of weight [count, inputs] at outputs first, first + 1, ...
    void put(const float* weight, int first, int count) {
        for (int n = 0; n < count; n++)
            for (int k = 0; k < inputs; k++) set(first + n, k, weight[(int64_t)n * inputs + k]);
    }
    int panel_tiles(int p) const { return p + 1 < panels ? PANEL : tiles - (panels - 1) * PANEL; }
    const uint32_t* panel(int p) const { return data_ + (int64_t)p * PANEL * LANES * depth; }
    int64_t bytes() const { return (int64_t)tiles * LANES * depth * 4; }

    int kind = WIDE, inputs = 0, tiles = 0, panels = 0, depth = 0;

  private:
    void set(int n, int k, float value) {
        int p = n / (PANEL * LANES), width = panel_tiles(p) * LANES, column = n % (PANEL * LANES);
        uint32_t* base = data_ + (int64_t)p * PANEL * LANES * depth;
        if (kind == WIDE) {
            std::memcpy(base + (int64_t)k * width + column, &value, 4);
        } else {
            ((uint16_t*)(base + (int64_t)(k / 2) * width + column))[k % 2] = to_bf16(value);
        }
    }
    uint32_t* data_ = nullptr;
};

// One panel of a matrix with `count` rows, found by a(i) and c(i) (c already at the panel's first column). The first pass over
// the panel waits for memory; the second one, which finds it near, asks for the next panel meanwhile.
template <class A, class C>
static inline void multiply_panel(const Matrix& w, int p, int64_t low, int count, A a, C c, bool add) {
    const uint32_t* from[ROWS];
    float* to[ROWS];
    for (int i = 0; i < count; i += ROWS) {
        int rows = count - i < ROWS ? count - i : ROWS;
        int64_t ahead = i == 0 ? FETCH : i == ROWS && p + 1 < w.panels ? w.panel(p + 1) - w.panel(p) : 0;
        for (int r = 0; r < rows; r++) from[r] = a(i + r), to[r] = c(i + r);
        panel_product(w.kind, rows, from, low, w.panel(p), w.panel_tiles(p), w.depth, to, add, ahead);
    }
}

struct Range {
    int begin, end;
    int count() const { return end - begin; }
};
// Part `index` of `parts` equal parts of 0 .. n - 1.
static inline Range part(int n, int index, int parts) {
    return {(int)((int64_t)n * index / parts), (int)((int64_t)n * (index + 1) / parts)};
}

// c[m][first + 64 p ..] = W a[m] for rows and panels in these ranges.
static inline void multiply(const Matrix& w, const Rows& a, Range rows, Range panels, float* c, int64_t stride) {
    for (int p = panels.begin; p < panels.end; p++)
        multiply_panel(
            w, p, a.low, rows.count(), [&](int i) { return a.row(rows.begin + i); },
            [&](int i) { return c + (rows.begin + i) * stride + (int64_t)p * PANEL * LANES; }, false);
}

// Writes n floats as one row of an operand of this kind; what lies behind them up to the next even k is zero.
static inline void write_row(int kind, uint32_t* row, int64_t low, int64_t at, const float* x, int n) {
    if (kind == WIDE) {
        std::memcpy((float*)row + at, x, (size_t)n * 4);
        return;
    }
    uint16_t *high_part = (uint16_t*)row + at, *low_part = (uint16_t*)(row + low) + at;
    for (int i = 0; i < n; i += LANES) {
        vec v = load_some(x + i, n - i);
        uint16_t rounded[LANES], rest[LANES];
        vec left = store_bf16(rounded, v);
        int size = n - i < LANES ? n - i : LANES;
        std::memcpy(high_part + i, rounded, (size_t)size * 2);
        if (kind == SPLIT_PAIRS) {
            store_bf16(rest, left);
            std::memcpy(low_part + i, rest, (size_t)size * 2);
        }
    }
}

}  // namespace nautile
