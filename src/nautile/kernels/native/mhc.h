// Hyper-connections: the projection of a token's streams, and the mappings made of it with Sinkhorn (tech report section 2.2).
#pragma once
#include "gemm.h"

namespace nautile {

constexpr int MOST_STREAMS = 8;

// z[i][o] = x_i . f_o for rows of `size` floats (a multiple of 16): lanes walk k, four chains a product would hide nothing more
// than the block of 4 x 3 products does.
template <int R, int O>
static inline void dot_block(const float* const* x, const float* f, int64_t f_stride, int64_t size, float* const* z) {
    vec acc[R][O] = {};
    for (int64_t k = 0; k < size; k += LANES) {
        vec column[O];
        for (int o = 0; o < O; o++) column[o] = load(f + o * f_stride + k);
        for (int r = 0; r < R; r++) {
            vec value = load(x[r] + k);
            for (int o = 0; o < O; o++) acc[r][o] = fma(value, column[o], acc[r][o]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int o = 0; o < O; o++) z[r][o] = sum(acc[r][o]);
}

// Outputs in `outs` of rows in `rows`: x [rows][x_stride], f [outputs][f_stride], z [rows][z_stride].
static inline void dot_rows(const float* x, int64_t x_stride, Range rows, const float* f, int64_t f_stride, Range outs, int64_t size,
                            float* z, int64_t z_stride) {
    constexpr int R = 4, O = 3;
    for (int o = outs.begin; o < outs.end;) {
        int wide = outs.end - o >= O ? O : 1;
        for (int m = rows.begin; m < rows.end;) {
            int tall = rows.end - m >= R ? R : 1;
            const float* from[R];
            float* to[R];
            for (int r = 0; r < tall; r++) from[r] = x + (m + r) * x_stride, to[r] = z + (m + r) * z_stride + o;
            const float* weight = f + o * f_stride;
            if (tall == R && wide == O) dot_block<R, O>(from, weight, f_stride, size, to);
            else if (tall == R) dot_block<R, 1>(from, weight, f_stride, size, to);
            else if (wide == O) dot_block<1, O>(from, weight, f_stride, size, to);
            else dot_block<1, 1>(from, weight, f_stride, size, to);
            m += tall;
        }
        o += wide;
    }
}

static inline float sum_of_squares(const float* x, int64_t size) {
    vec acc[4] = {};
    int64_t k = 0;
    for (; k + 64 <= size; k += 64)
        for (int i = 0; i < 4; i++) {
            vec v = load(x + k + i * LANES);
            acc[i] = fma(v, v, acc[i]);
        }
    for (; k < size; k += LANES) {
        vec v = load_some(x + k, (int)(size - k));
        acc[0] = fma(v, v, acc[0]);
    }
    return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// y = w x / sqrt(mean(x^2) + eps); w null: without a weight.
static inline void rms_norm(const float* x, const float* w, int size, float eps, float* y) {
    float factor = 1.0f / std::sqrt(sum_of_squares(x, size) / (float)size + eps);
    for (int i = 0; i < size; i += LANES) {
        vec v = load_some(x + i, size - i) * factor;
        if (w) v = v * load_some(w + i, size - i);
        store_some(y + i, v, size - i);
    }
}

// One site's small parameters. `base` has (2 + n) n elements, `scale` three.
struct Site {
    const float *fn = nullptr, *base = nullptr, *scale = nullptr;
    int64_t stride = 0;  // of fn's rows, in floats
};
struct Mixing {
    int streams, iterations;
    float eps, norm_eps;
    int outputs() const { return (2 + streams) * streams; }
};

// For `count` tokens (at most the lanes of V): z [count][stride] unscaled projections and the mean squares of their streams
// -> out [count][stride] = pre [n], post [n], M [n][n] with M[j][k] from stream j to stream k. Lanes are tokens.
template <class V>
static void mappings(const Mixing& mix, const Site& site, const float* z, const float* mean_square, int count, int64_t stride,
                     float* out) {
    constexpr int WIDTH = sizeof(V) / 4;
    const int n = mix.streams, all = mix.outputs();
    V value[(2 + MOST_STREAMS) * MOST_STREAMS], root = V{} + 1.0f;
    for (int i = 0; i < count; i++) root[i] = 1.0f / std::sqrt(mean_square[i] + mix.norm_eps);
    for (int o = 0; o < all; o++) {
        V v = {};
        for (int i = 0; i < count; i++) v[i] = z[i * stride + o];
        float scale = site.scale[o < n ? 0 : o < 2 * n ? 1 : 2];
        value[o] = scale * (v * root) + site.base[o];
    }
    for (int j = 0; j < n; j++) value[j] = sigmoid(value[j]) + mix.eps;
    for (int j = n; j < 2 * n; j++) value[j] = 2.0f * sigmoid(value[j]);
    V* m = value + 2 * n;
    for (int j = 0; j < n; j++) {
        V top = m[j * n], total = {};
        for (int k = 1; k < n; k++) top = m[j * n + k] > top ? m[j * n + k] : top;
        for (int k = 0; k < n; k++) total = total + (m[j * n + k] = exponential(m[j * n + k] - top));
        for (int k = 0; k < n; k++) m[j * n + k] = m[j * n + k] / total + mix.eps;
    }
    for (int step = 0; step < 2 * mix.iterations - 1; step++) {
        const int across = step % 2 ? 1 : n, along = step % 2 ? n : 1;  // even steps: columns, odd steps: rows
        for (int line = 0; line < n; line++) {
            V total = m[line * along];
            for (int i = 1; i < n; i++) total = total + m[line * along + i * across];
            V factor = 1.0f / (total + mix.eps);
            for (int i = 0; i < n; i++) m[line * along + i * across] = m[line * along + i * across] * factor;
        }
    }
    for (int o = 0; o < all; o++)
        for (int i = 0; i < count && i < WIDTH; i++) out[i * stride + o] = value[o][i];
}

// x = sum_j pre_j X_j over streams [n][size].
static inline void collapse(const float* streams, const float* pre, int n, int size, float* x) {
    for (int i = 0; i < size; i += LANES) {
        vec acc = {};
        for (int j = 0; j < n; j++) acc = fma(spread(pre[j]), load_some(streams + (int64_t)j * size + i, size - i), acc);
        store_some(x + i, acc, size - i);
    }
}

// X'_k = post_k y + sum_j M[j][k] X_j for columns [begin, end) of streams [n][size], in place.
static inline void distribute(float* streams, const float* y, const float* post, const float* m, int n, int size, int begin, int end) {
    for (int i = begin; i < end; i += LANES) {
        vec old[MOST_STREAMS], add = load_some(y + i, end - i);
        for (int j = 0; j < n; j++) old[j] = load_some(streams + (int64_t)j * size + i, end - i);
        for (int k = 0; k < n; k++) {
            vec acc = spread(post[k]) * add;
            for (int j = 0; j < n; j++) acc = fma(spread(m[j * n + k]), old[j], acc);
            store_some(streams + (int64_t)k * size + i, acc, end - i);
        }
    }
}

}  // namespace nautile
