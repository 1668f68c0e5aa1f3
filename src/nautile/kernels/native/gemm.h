// Products of a few rows with a packed matrix. Lanes are outputs: output n of row m is one accumulator that walks k from first
// to last, whatever the number of rows, threads or panels, so a result never depends on what else is computed beside it.
//
// Packed matrices are panels of up to 64 outputs, kept as storage.h says. Rows are floats, or pairs of bfloat16 in either one
// term (8 bits of mantissa) or two (high and low part, 16 bits).
#pragma once
#include <vector>
#include "storage.h"

namespace nautile {

// float32; bfloat16 rows in one term; in two; 8-bit indexer keys; float32 indexer keys of which 8-bit copies rule most out.
enum Kind { WIDE, PAIRS, SPLIT_PAIRS, BYTES, SIFTED };

constexpr int ROWS = 6;          // of one register block
constexpr int64_t FETCH = 1024;  // words that weights are fetched ahead of their use
constexpr int TALL = 96;         // rows that meet a panel before the next one
constexpr int FEW = 3 * ROWS;    // rows for which codes are read anew by each block of rows
constexpr int NEAR = 64;         // pairs of inputs of a panel that are made of codes together: 16 KB, which stay near

// Rows as the kernels read them: `low` is the distance from the high to the low terms in 32-bit words.
struct Rows {
    uint32_t* base = nullptr;
    int64_t stride = 0;  // 32-bit words
    int64_t low = 0;
    uint32_t* row(int64_t m) const { return base + m * stride; }
};

// acc += rows' elements of one step times the columns.
template <int KIND, bool COLUMN_PAIRS, int R, int T>
static inline void products(vec (&acc)[R][T], const uvec* column, const uint32_t* const* a, int64_t low, int k) {
    for (int r = 0; r < R; r++) {
        if (KIND == WIDE && !COLUMN_PAIRS) {
            vec x = spread(((const float*)a[r])[k]);
            for (int t = 0; t < T; t++) acc[r][t] = fma(x, (vec)column[t], acc[r][t]);
        } else if (KIND == WIDE) {
            vec x = spread(((const float*)a[r])[2 * k]), y = spread(((const float*)a[r])[2 * k + 1]);
            for (int t = 0; t < T; t++) acc[r][t] = fma(x, (vec)(column[t] << 16), acc[r][t]);
            for (int t = 0; t < T; t++) acc[r][t] = fma(y, (vec)(column[t] & 0xFFFF0000u), acc[r][t]);
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

template <int KIND, int R, class Columns>
static inline void block(const uint32_t* const* a, int64_t low, Columns columns, int steps, float* const* c, bool add) {
    constexpr int T = Columns::TILES;
    vec acc[R][T];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) acc[r][t] = add ? load(c[r] + t * LANES) : vec{};
    for (int k = 0; k < steps;) {
        columns.begin();
        for (int i = 0; i < Columns::GROUP; i++, k++) {
            uvec column[T];
            columns.read(column);
            products<KIND, Columns::PAIRS, R, T>(acc, column, a, low, k);
        }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) store(c[r] + t * LANES, acc[r][t]);
}

// For 1 to ROWS rows.
template <int KIND, class Columns>
static void blocks(int rows, const uint32_t* const* a, int64_t low, const Columns& columns, int steps, float* const* c, bool add) {
    switch (rows) {
        case 6: return block<KIND, 6>(a, low, columns, steps, c, add);
        case 5: return block<KIND, 5>(a, low, columns, steps, c, add);
        case 4: return block<KIND, 4>(a, low, columns, steps, c, add);
        case 3: return block<KIND, 3>(a, low, columns, steps, c, add);
        case 2: return block<KIND, 2>(a, low, columns, steps, c, add);
        default: return block<KIND, 1>(a, low, columns, steps, c, add);
    }
}

template <int KIND>
static void plain_panel(int rows, const uint32_t* const* a, int64_t low, const uint32_t* b, int tiles, int depth, float* const* c,
                        bool add, int64_t ahead) {
    constexpr bool PAIRED_ = KIND != WIDE;
    const int64_t step = (int64_t)tiles * LANES;
    if (TOGETHER == PANEL) {
        switch (tiles) {
            case 4: return blocks<KIND>(rows, a, low, Plain<TOGETHER, PAIRED_>{b, step, ahead}, depth, c, add);
            case 3: return blocks<KIND>(rows, a, low, Plain<TOGETHER == 1 ? 1 : 3, PAIRED_>{b, step, ahead}, depth, c, add);
            case 2: return blocks<KIND>(rows, a, low, Plain<TOGETHER == 1 ? 1 : 2, PAIRED_>{b, step, ahead}, depth, c, add);
            default: return blocks<KIND>(rows, a, low, Plain<1, PAIRED_>{b, step, ahead}, depth, c, add);
        }
    }
    for (int t = 0; t < tiles; t++) {
        float* moved[ROWS];
        for (int r = 0; r < rows; r++) moved[r] = c[r] + t * LANES;
        blocks<KIND>(rows, a, low, Plain<1, PAIRED_>{b + t * LANES, step, ahead}, depth, moved, add);
    }
}

// c[r][0 .. 16 tiles) = (c +) a[r] . panel of floats or of pairs, for 1 to ROWS rows. Memory is fetched `ahead` words early.
static inline void panel_product(int kind, int rows, const uint32_t* const* a, int64_t low, const uint32_t* b, int tiles,
                                 int depth, float* const* c, bool add, int64_t ahead = 0) {
    if (kind == WIDE) return plain_panel<WIDE>(rows, a, low, b, tiles, depth, c, add, ahead);
    if (kind == PAIRS) return plain_panel<PAIRS>(rows, a, low, b, tiles, depth, c, add, ahead);
    return plain_panel<SPLIT_PAIRS>(rows, a, low, b, tiles, depth, c, add, ahead);
}

// Rows of one product: where each begins and where its result goes.
struct Pointers {
    const uint32_t* a[TALL];
    float* c[TALL];
    int count;
};

// A panel of PANEL tiles whose codes become pairs of bfloat16. Few rows take them straight from registers; for many the pairs
// are written out, a piece that stays near at a time, and all rows meet that piece.
template <int KIND, class Codes>
static void coded_panel(const Pointers& rows, int64_t low, Codes codes, int pairs, bool add) {
    constexpr int64_t WIDTH = PANEL * LANES;
    if (rows.count <= FEW) {
        for (int i = 0; i < rows.count; i += ROWS)
            blocks<KIND>(std::min(ROWS, rows.count - i), rows.a + i, low, codes, pairs, rows.c + i, add);
        return;
    }
    alignas(64) uint32_t near[NEAR * WIDTH];
    for (int first = 0; first < pairs; first += NEAR) {
        const int here = std::min(NEAR, pairs - first);
        for (int k = 0; k < here;) {
            codes.begin();
            for (int i = 0; i < Codes::GROUP; i++, k++) {
                uvec column[PANEL];
                codes.read(column);
                std::memcpy(near + k * WIDTH, column, sizeof column);
            }
        }
        for (int i = 0; i < rows.count; i += ROWS) {
            const uint32_t* a[ROWS];
            const int some = std::min(ROWS, rows.count - i);
            for (int r = 0; r < some; r++) a[r] = rows.a[i + r] + (KIND == WIDE ? 2 * first : first);
            blocks<KIND>(some, a, low, Plain<PANEL, true>{near, WIDTH, 0}, here, rows.c + i, add || first);
        }
    }
}

template <int KIND>
static void stored_panel(const Panel& panel, const Pointers& rows, int64_t low, int tiles, int inputs, bool add) {
    const int depth = panel.storage == FLOATS ? inputs : (inputs + 1) / 2;
#if defined(__AVX512BW__) && defined(__AVX512VBMI__)
    if (panel.storage == FOURS) return coded_panel<KIND>(rows, low, Fours(panel.data, 4 * FETCH), depth, add);
    if (panel.storage == EIGHTS) return coded_panel<KIND>(rows, low, Eights(panel.data, 4 * FETCH), depth, add);
#endif
    for (int i = 0; i < rows.count; i += ROWS) {
        const int some = std::min(ROWS, rows.count - i);
        const int64_t ahead = i ? 0 : FETCH;
        if (KIND == WIDE && panel.storage == PAIRED)
            blocks<WIDE>(some, rows.a + i, low, Plain<TOGETHER, true>{panel.data, PANEL * LANES, ahead}, depth, rows.c + i, add);
        else plain_panel<KIND>(some, rows.a + i, low, panel.data, tiles, depth, rows.c + i, add, ahead);
    }
}

// Rows of a weight [count, inputs] that become outputs first, first + 1, ... of a matrix.
struct Source {
    const float* weight;
    int first, count;
};

// A packed matrix W [outputs, inputs]: y = W x. Its rows may come from several tensors, each starting at a multiple of 16.
class Matrix {
  public:
    Matrix() = default;
    Matrix(Slab& slab, int kind, bool narrow, int outputs, int inputs, const std::vector<Source>& sources) : kind(kind), inputs(inputs) {
        tiles = (int)round_up(outputs, LANES) / LANES;
        panels = (tiles + PANEL - 1) / PANEL;
        std::vector<float> weights;
        for (int p = 0; p < panels; p++) {
            weights.assign((size_t)panel_tiles(p) * LANES * inputs, 0.0f);
            for (const Source& source : sources) copy(source, p * PANEL * LANES, weights);
            panels_.push_back(Panel::make(slab, weights.data(), panel_tiles(p), inputs, kind != WIDE, narrow));
        }
    }
    int panel_tiles(int p) const { return p + 1 < panels ? PANEL : tiles - (panels - 1) * PANEL; }
    const Panel& panel(int p) const { return panels_[p]; }

    int kind = WIDE, inputs = 0, tiles = 0, panels = 0;

  private:
    // What of a source falls into the panel whose first output is `begin`.
    void copy(const Source& source, int begin, std::vector<float>& weights) const {
        const int end = begin + (int)(weights.size() / inputs), from = std::max(begin, source.first), to = std::min(end, source.first + source.count);
        if (from < to)
            std::memcpy(&weights[(size_t)(from - begin) * inputs], source.weight + (int64_t)(from - source.first) * inputs,
                        (size_t)(to - from) * inputs * 4);
    }
    std::vector<Panel> panels_;
};

// One panel of a matrix with `count` rows, found by a(i) and c(i) (c already at the panel's first column).
template <class A, class C>
static inline void multiply_panel(const Matrix& w, int p, int64_t low, int count, A a, C c, bool add) {
    Pointers rows;
    for (int first = 0; first < count; first += TALL) {
        rows.count = std::min(TALL, count - first);
        for (int i = 0; i < rows.count; i++) rows.a[i] = a(first + i), rows.c[i] = c(first + i);
        const Panel& panel = w.panel(p);
        const int tiles = w.panel_tiles(p);
        if (w.kind == WIDE) stored_panel<WIDE>(panel, rows, low, tiles, w.inputs, add);
        else if (w.kind == PAIRS) stored_panel<PAIRS>(panel, rows, low, tiles, w.inputs, add);
        else stored_panel<SPLIT_PAIRS>(panel, rows, low, tiles, w.inputs, add);
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
    uint16_t rounded[LANES], rest[LANES];
    for (int i = 0; i < n; i += LANES) {
        const int size = std::min(LANES, n - i);
        const bool whole = size == LANES;  // the usual case goes where it belongs at once
        const vec left = store_bf16(whole ? high_part + i : rounded, load_some(x + i, size));
        if (kind == SPLIT_PAIRS) store_bf16(whole ? low_part + i : rest, left);
        if (whole) continue;
        std::memcpy(high_part + i, rounded, (size_t)size * 2);
        if (kind == SPLIT_PAIRS) std::memcpy(low_part + i, rest, (size_t)size * 2);
    }
}

}  // namespace nautile
