// The mixture of experts of one layer (tech report section 2.4), and what follows the last layer.
#pragma once
#include "forward.h"

namespace nautile {

inline void Runner::experts(const Share& s, const Layer& layer) {
    Rows wide;
    wide.base = (uint32_t*)s.t->wide.get(), wide.stride = d_;
    multiply(layer.gate, wide, s.tokens, {0, layer.gate.panels}, s.t->gate.get(), layer.gate.tiles * LANES);
    for (int m = s.tokens.begin; m < s.tokens.end; m++) route(s, layer, m);
    after_tokens(s, EXPERTS);
    group_by_expert(s);
    expert_up(s, layer);
    after_product(s, EXPERTS);
    expert_down(s, layer);
    s.m->clock.lap(EXPERTS);
    write_streams(s, layer.experts.back().down);
}

// p = sqrt(softplus(logit)); the k largest of p + bias (ties to the lowest expert) or those of the table, ascending by number;
// weights are p at them, normalised and scaled.
inline void Runner::route(const Share& s, const Layer& layer, int token) {
    const int n = (int)s_.experts, k = (int)s_.chosen;
    float* p = s.t->gate.get() + (int64_t)token * layer.gate.tiles * LANES;
    int* chosen = s.t->route.get() + token * k;
    float* weight = s.t->route_weights.get() + token * k;
    for (int e = 0; e < n; e += LANES) store_some(p + e, softplus(load_some(p + e, n - e)), n - e);
    for (int e = 0; e < n; e++) p[e] = std::sqrt(p[e]);
    if (layer.t.table) {
        for (int j = 0; j < k; j++) chosen[j] = (int)layer.t.table[ids_[token] * k + j];
    } else {
        for (int j = 0; j < k; j++) {
            int best = -1;
            for (int e = 0; e < n; e++) {
                if (std::find(chosen, chosen + j, e) != chosen + j) continue;
                if (best < 0 || p[e] + layer.t.gate_bias[e] > p[best] + layer.t.gate_bias[best]) best = e;
            }
            chosen[j] = best;
        }
    }
    std::sort(chosen, chosen + k);
    float total = 1e-20f;
    for (int j = 0; j < k; j++) total += p[chosen[j]];
    for (int j = 0; j < k; j++) weight[j] = p[chosen[j]] / total * (float)model_.numbers.routed_scale;
}

// Slots token * (k + 1) + choice of this member's rows in order of their expert; the shared expert comes last with all tokens.
inline void Runner::group_by_expert(const Share& s) {
    const int n = (int)s_.experts, k = (int)s_.chosen;
    std::vector<int>&first = s.m->expert_first, &slots = s.m->expert_slots;
    first.assign(n + 2, 0);
    slots.resize(s.rows.count() * (k + 1));
    for (int m = s.rows.begin; m < s.rows.end; m++)
        for (int j = 0; j < k; j++) first[s.t->route[m * k + j] + 1]++;
    first[n + 1] = s.rows.count();
    for (int e = 0; e <= n; e++) first[e + 1] += first[e];
    std::vector<int>& next = s.m->expert_next;
    next.assign(first.begin(), first.end());
    for (int m = s.rows.begin; m < s.rows.end; m++) {
        for (int j = 0; j < k; j++) slots[next[s.t->route[m * k + j]]++] = m * (k + 1) + j;
        slots[next[n]++] = m * (k + 1) + k;
    }
}

// hidden = weight * silu(min(gate, L)) * clip(up, -L, L), one operand row a slot.
inline void Runner::expert_up(const Share& s, const Layer& layer) {
    const int k = (int)s_.chosen, kind = (int)s_.expert_kind;
    const vec limit = spread((float)model_.numbers.limit);
    Rows input = operand(s.t->input, s_.hidden), hidden = operand(hidden_, s_.inner);
    float* product = s.m->products.get();
    for (int e = 0; e <= s_.experts; e++) {
        const Matrix& up = layer.experts[e].up;
        const int *slots = s.m->expert_slots.data() + s.m->expert_first[e], count = s.m->expert_first[e + 1] - s.m->expert_first[e];
        if (!count) continue;
        const Range panels = s.panels(up);
        for (int p = panels.begin; p < panels.end; p++)
            for (int i = 0; i < count; i += TALL) {
                int rows = std::min(TALL, count - i);
                multiply_panel(
                    up, p, input.low, rows, [&](int r) { return input.row(slots[i + r] / (k + 1)); },
                    [&](int r) { return product + r * KEYS; }, false);
                for (int r = 0; r < rows; r++) {
                    int slot = slots[i + r], token = slot / (k + 1), choice = slot % (k + 1);
                    float weight = choice == k ? 1.0f : s.t->route_weights[token * k + choice];
                    for (int t = 0; t < up.panel_tiles(p); t += 2) {
                        vec g = smaller(load(product + r * KEYS + t * LANES), limit), u = load(product + r * KEYS + (t + 1) * LANES);
                        u = smaller(larger(u, -limit), limit);
                        float x[LANES];
                        store(x, weight * (g * sigmoid(g)) * u);
                        write_row(kind, hidden.row(slot), hidden.low, (p * PANEL + t) / 2 * LANES, x, LANES);
                    }
                }
            }
    }
}

// y = sum of the chosen experts' outputs, ascending by number, then the shared one.
inline void Runner::expert_down(const Share& s, const Layer& layer) {
    const int k = (int)s_.chosen;
    Rows hidden = operand(hidden_, s_.inner);
    Range panels = s.panels(layer.experts[0].down);
    int begin = panels.begin * KEYS, end = std::min<int>(panels.end * KEYS, (int)d_);
    for (int m = s.rows.begin; m < s.rows.end; m++) std::fill(y_.get() + m * d_ + begin, y_.get() + m * d_ + std::max(begin, end), 0.0f);
    for (int e = 0; e <= s_.experts; e++) {
        const int *slots = s.m->expert_slots.data() + s.m->expert_first[e], count = s.m->expert_first[e + 1] - s.m->expert_first[e];
        for (int p = panels.begin; count && p < panels.end; p++)
            multiply_panel(
                layer.experts[e].down, p, hidden.low, count, [&](int r) { return hidden.row(slots[r]); },
                [&](int r) { return y_.get() + slots[r] / (k + 1) * d_ + p * KEYS; }, true);
    }
}

// Final collapse, norm and head for the tokens whose logits are wanted.
inline void Runner::finish(const Share& s) {
    std::vector<int> wanted;
    for (int m = 0; m < tokens_; m++) {
        const Piece& piece = *(*segments_)[segment_of_[m]].piece;
        if (piece.wanted == 2 || (piece.wanted == 1 && positions_[m] == piece.start + piece.count - 1)) wanted.push_back(m);
    }
    const int count = (int)wanted.size();
    if (s.member == 0) wanted_count_ = count;
    if (!count) return;
    meet(s);
    Range mine = part(count, s.member, s.parts);
    for (int i = mine.begin; i < mine.end; i++) read_head(s, i, wanted[i]);
    s.m->clock.lap(HEAD);
    meet(s);
    const Matrix& head = model_.head();
    const int64_t stride = (int64_t)head.tiles * LANES;
    const bool direct = stride == s_.vocabulary;
    Range panels = part(head.panels, s.member, s.parts);
    multiply(head, operand(shared_.input, s_.hidden), {0, count}, panels, direct ? out_ : logits_.get(), stride);
    if (direct) return;
    int64_t begin = panels.begin * KEYS, end = std::min<int64_t>(panels.end * KEYS, s_.vocabulary);
    for (int i = 0; i < count; i++)
        std::memcpy(out_ + i * s_.vocabulary + begin, logits_.get() + i * stride + begin, (size_t)std::max<int64_t>(0, end - begin) * 4);
}

// h = sum_j (sigmoid(scale z_j + base_j) + eps) X_j, normalised, as operand row `row` of the head.
inline void Runner::read_head(const Share& s, int row, int token) {
    const int n = (int)s_.streams;
    const float* streams = streams_.get() + token * nd_;
    float z[LANES] = {}, pre[LANES];
    dot_rows(streams, nd_, {0, 1}, model_.fn().data, model_.fn().stride, {0, n}, nd_, z, LANES);
    float root = 1.0f / std::sqrt(sum_of_squares(streams, nd_) / (float)(n * s_.hidden) + (float)model_.numbers.norm_eps);
    vec value = model_.t.scale[0] * (load(z) * root) + load_some(model_.t.base, n);
    store(pre, sigmoid(value) + (float)model_.numbers.eps);
    float* x = s.m->own.wide.get();
    collapse(streams, pre, n, (int)s_.hidden, x);
    rms_norm(x, model_.t.norm, (int)s_.hidden, (float)model_.numbers.norm_eps, x);
    Rows input = operand(shared_.input, s_.hidden);
    write_row((int)s_.head_kind, input.row(row), input.low, 0, x, (int)s_.hidden);
}

}  // namespace nautile
