// The weights of a network, packed once, and the shape they have.
#pragma once
#include "attention.h"
#include "mhc.h"

namespace nautile {

// Whole numbers of the configuration, in the order of `Shape` in library.py.
struct Shape {
    int64_t vocabulary, hidden, layers, heads, head_dim, rotated, q_rank, groups, o_rank, window, index_heads, index_dim, index_topk;
    int64_t experts, chosen, inner, streams, iterations, main_kind, output_kind, expert_kind, head_kind, attention_kind, index_kind;
    int64_t quantise_kv, quantise_index, narrow;  // narrow: weights in 8 and 4 bits where they lie on such a grid
};
struct Numbers {
    double eps, norm_eps, limit, routed_scale;
};

// float32 tensors of one layer as they come from the checkpoint; null where the layer has none. Order of `LAYER` in library.py.
struct LayerTensors {
    const float *attn_norm, *ffn_norm, *attn_fn, *attn_base, *attn_scale, *ffn_fn, *ffn_base, *ffn_scale;
    const float *wq_a, *q_norm, *wq_b, *wkv, *kv_norm, *wo_a, *wo_b, *sink;
    const float *ape, *comp_wkv, *comp_wgate, *comp_norm;
    const float *index_wq_b, *index_weights, *index_ape, *index_wkv, *index_wgate, *index_norm;
    const float *gate, *gate_bias;
    const int64_t* table;
    const float *w1, *w3, *w2, *shared_w1, *shared_w3, *shared_w2;
};
struct GlobalTensors {
    const float *embed, *head, *norm, *fn, *base, *scale, *window_frequencies, *compressed_frequencies;
};

// A matrix of float rows padded with zeros to whole vectors.
struct Padded {
    float* data = nullptr;
    int64_t stride = 0;
    void put(Slab& slab, const float* x, int rows, int64_t size) {
        stride = round_up(size, LANES);
        data = slab.take<float>(rows * stride);
        for (int r = 0; r < rows; r++) std::memcpy(data + r * stride, x + r * size, (size_t)size * 4);
    }
};

struct Expert {
    Matrix up;    // gate and up projections, 16 units of the one then of the other
    Matrix down;
};

// Where the products of the layer's input stand in a row: each part starts at a multiple of 16.
struct InputColumns {
    int q, kv, entry_kv, entry_gate, index_kv, index_gate, index_weights, all;
};

struct Layer {
    int ratio, ordinal;  // ordinal among the layers of its kind
    LayerTensors t;
    Padded attn_fn, ffn_fn;
    InputColumns at;
    Matrix inputs, queries, gate, wo_b;
    std::vector<Matrix> wo_a;
    std::vector<Expert> experts;  // the shared one last
    int index_column = 0;         // of the indexer's queries among all queries
};

class Model {
  public:
    Model(const Shape& shape, const Numbers& numbers, const GlobalTensors& globals, const LayerTensors* layers, const int64_t* ratios)
        : shape(shape), numbers(numbers), t(globals) {
        head_ = single(shape.head_kind, globals.head, (int)shape.vocabulary, (int)shape.hidden);
        fn_.put(slab_, globals.fn, (int)shape.streams, shape.streams * shape.hidden);
        int seen[129] = {};
        for (int i = 0; i < shape.layers; i++) this->layers.push_back(pack(layers[i], (int)ratios[i], seen[ratios[i]]++));
    }
    int64_t weight_bytes() const { return slab_.taken(); }
    const Matrix& head() const { return head_; }
    const Padded& fn() const { return fn_; }
    Mixing mixing() const { return {(int)shape.streams, (int)shape.iterations, (float)numbers.eps, (float)numbers.norm_eps}; }

    const Shape shape;
    const Numbers numbers;
    const GlobalTensors t;
    std::vector<Layer> layers;

  private:
    Layer pack(const LayerTensors& t, int ratio, int ordinal) {
        Layer layer{};
        layer.ratio = ratio, layer.ordinal = ordinal, layer.t = t;
        layer.attn_fn.put(slab_, t.attn_fn, (int)((2 + shape.streams) * shape.streams), shape.streams * shape.hidden);
        layer.ffn_fn.put(slab_, t.ffn_fn, (int)((2 + shape.streams) * shape.streams), shape.streams * shape.hidden);
        pack_inputs(layer);
        int d = (int)shape.hidden, c = (int)shape.head_dim, groups = (int)shape.groups, slice = (int)(shape.heads * c / groups);
        for (int g = 0; g < groups; g++)
            layer.wo_a.push_back(single(shape.output_kind, t.wo_a + g * shape.o_rank * slice, (int)shape.o_rank, slice));
        layer.wo_b = single(shape.output_kind, t.wo_b, d, (int)(groups * shape.o_rank));
        layer.gate = single(WIDE, t.gate, (int)shape.experts, d);
        int64_t size = shape.inner * shape.hidden;
        for (int64_t e = 0; e < shape.experts; e++) layer.experts.push_back(expert(t.w1 + e * size, t.w3 + e * size, t.w2 + e * size));
        layer.experts.push_back(expert(t.shared_w1, t.shared_w3, t.shared_w2));
        return layer;
    }

    Matrix single(int64_t kind, const float* weight, int outputs, int inputs) {
        return joined(kind, outputs, inputs, {{weight, 0, outputs}});
    }
    Matrix joined(int64_t kind, int outputs, int inputs, const std::vector<Source>& sources) {
        return Matrix(slab_, (int)kind, shape.narrow != 0, outputs, inputs, sources);
    }

    void pack_inputs(Layer& layer) {
        const LayerTensors& t = layer.t;
        int width = layer.ratio == 4 ? 2 : 1, c = (int)shape.head_dim, ci = (int)shape.index_dim;
        struct Input { const float* weight; int rows; int* at; };
        InputColumns& at = layer.at;
        const Input inputs[] = {
            {t.wq_a, (int)shape.q_rank, &at.q}, {t.wkv, c, &at.kv},
            {layer.ratio ? t.comp_wkv : nullptr, width * c, &at.entry_kv}, {layer.ratio ? t.comp_wgate : nullptr, width * c, &at.entry_gate},
            {t.index_wkv, 2 * ci, &at.index_kv}, {t.index_wgate, 2 * ci, &at.index_gate},
            {t.index_weights, (int)shape.index_heads, &at.index_weights},
        };
        std::vector<Source> parts;
        for (const Input& input : inputs)
            if (input.weight) {
                *input.at = at.all, at.all += (int)round_up(input.rows, LANES);
                parts.push_back({input.weight, *input.at, input.rows});
            }
        layer.inputs = joined(shape.main_kind, at.all, (int)shape.hidden, parts);
        int queries = (int)(shape.heads * c);
        layer.index_column = (int)round_up(queries, LANES);
        int all = t.index_wq_b ? layer.index_column + (int)(shape.index_heads * ci) : queries;
        parts = {{t.wq_b, 0, queries}};
        if (t.index_wq_b) parts.push_back({t.index_wq_b, layer.index_column, (int)(shape.index_heads * ci)});
        layer.queries = joined(shape.main_kind, all, (int)shape.q_rank, parts);
    }

    Expert expert(const float* gate, const float* up, const float* down) {
        int inner = (int)shape.inner, d = (int)shape.hidden, tiles = (inner + LANES - 1) / LANES;
        std::vector<Source> parts;
        for (int t = 0; t < tiles; t++) {
            int count = std::min(LANES, inner - t * LANES);
            parts.push_back({gate + (int64_t)t * LANES * d, 2 * t * LANES, count});
            parts.push_back({up + (int64_t)t * LANES * d, (2 * t + 1) * LANES, count});
        }
        return {joined(shape.expert_kind, 2 * tiles * LANES, d, parts), single(shape.expert_kind, down, d, inner)};
    }

    Slab slab_;  // of all weights
    Matrix head_;
    Padded fn_;
};

// The tensors of the state (pages.py): where they begin and how far apart, in bytes, their first three indices are.
struct Pool {
    char* base;
    int64_t first, layer, row;
    char* at(int64_t index, int64_t layer_index, int64_t row_index) const {
        return base + index * first + layer_index * layer + row_index * row;
    }
};
struct Pools {
    Pool csa, index, hca, window, csa_kv, csa_gate, index_kv, index_gate, hca_kv, hca_gate;
    int64_t row_type, index_type, block_tokens, blocks;
    int64_t* version;  // of every block: raised with each write of its rows
};

// New tokens of one sequence. Order of the columns of a piece in native.py.
struct Piece {
    int64_t slot, start, count, wanted;  // wanted: 0 no logits, 1 of the last token, 2 of all
    int64_t block_offset;                // into the array of block numbers
};

}  // namespace nautile
