// Scores of packed indexer keys: I = sum_h w_h relu(q_h . k), heads in ascending order. Lanes are keys.
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

}  // namespace nautile
