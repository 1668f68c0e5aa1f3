// The attention of one layer (tech report section 2.3): projections, compressors, indexer, softmax with sinks, output.
#pragma once
#include "forward.h"

namespace nautile {

inline void Runner::attention(const Share& s, const Layer& layer) {
    multiply(layer.inputs, operand(s.t->input, s_.hidden), s.rows, s.panels(layer.inputs), proj_.get(), projected_);
    s.m->clock.lap(PROJECTIONS);
    meet(s);
    read_inputs(s, layer);
    s.m->clock.lap(REST);
    compress(s, layer);
    after_tokens(s, COMPRESSION);
    multiply(layer.queries, operand(s.t->q_low, s_.q_rank), s.rows, s.panels(layer.queries), q_.get(), queries_);
    s.m->clock.lap(PROJECTIONS);
    meet(s);
    save_tails(s, layer);
    prepare_queries(s, layer);
    s.m->clock.lap(REST);
    attend(s, layer);
    s.m->clock.lap(ATTENTION);
    meet(s);
    save_window(s, layer);
    s.m->clock.lap(REST);
    project_output(s, layer);
}

// The low-rank query and the new window row of each token.
inline void Runner::read_inputs(const Share& s, const Layer& layer) {
    const int c = (int)s_.head_dim, ci = (int)s_.index_dim;
    Rows low = operand(s.t->q_low, s_.q_rank);
    float row[4096];
    for (int m = s.tokens.begin; m < s.tokens.end; m++) {
        const float* x = proj_.get() + m * projected_;
        rms_norm(x + layer.at.q, layer.t.q_norm, (int)s_.q_rank, (float)model_.numbers.norm_eps, row);
        write_row((int)s_.main_kind, low.row(m), low.low, 0, row, (int)s_.q_rank);
        float factor = 1.0f / std::sqrt((float)ci) / std::sqrt((float)s_.index_heads);
        if (layer.ratio == 4)
            for (int h = 0; h < s_.index_heads; h++) s.t->index_weights[m * s_.index_heads + h] = x[layer.at.index_weights + h] * factor;
        if (!s.writes_tokens()) continue;
        rms_norm(x + layer.at.kv, layer.t.kv_norm, c, (float)model_.numbers.norm_eps, row);
        turn(row, c, cosine(m, layer.ratio != 0), sine(m, layer.ratio != 0), half_, 1.0f, 0, c);
        if (s_.quantise_kv) quantise_row(row, c - 2 * half_);
        write_state(row_type_, fresh_.get() + m * row_bytes(row_type_, c), row, c);
    }
}

// Every block of 4 or 128 tokens that the slice completes becomes an entry (and an indexer key), one after another in turn.
inline void Runner::compress(const Share& s, const Layer& layer) {
    if (!layer.ratio) return;
    int item = 0;
    for (const Segment& segment : *segments_)
        for (int64_t block = segment.start / layer.ratio; block < (segment.start + segment.count) / layer.ratio; block++)
            for (int index = 0; index < (layer.ratio == 4 ? 2 : 1); index++)
                if (item++ % s.parts == s.member) compress_block(s, layer, segment, block, index);
}

// Softmax per channel over the slots of a block; with ratio 4 the first halves of the block before take part.
inline void Runner::compress_block(const Share& s, const Layer& layer, const Segment& segment, int64_t block, bool index) {
    const int m = layer.ratio, dim = (int)(index ? s_.index_dim : s_.head_dim), ring = m == 4 ? 8 : 128, width = m == 4 ? 2 * dim : dim;
    const Pool& kv_pool = index ? pools_.index_kv : m == 4 ? pools_.csa_kv : pools_.hca_kv;
    const Pool& gate_pool = index ? pools_.index_gate : m == 4 ? pools_.csa_gate : pools_.hca_gate;
    const float* bias = index ? layer.t.index_ape : layer.t.ape;
    const float *kv[128], *gate[128], *ape[128];
    int slots = 0;
    for (int64_t p = std::max<int64_t>(0, m == 4 ? (block - 1) * m : block * m); p < (block + 1) * m; p++, slots++) {
        int64_t column = m == 4 && p >= block * m ? dim : 0;
        ape[slots] = bias + p % m * width + column;
        if (p >= segment.start) {
            const float* x = proj_.get() + (segment.first + p - segment.start) * projected_;
            kv[slots] = x + (index ? layer.at.index_kv : layer.at.entry_kv) + column;
            gate[slots] = x + (index ? layer.at.index_gate : layer.at.entry_gate) + column;
        } else {
            kv[slots] = (const float*)kv_pool.at(segment.piece->slot, layer.ordinal, p % ring) + column;
            gate[slots] = (const float*)gate_pool.at(segment.piece->slot, layer.ordinal, p % ring) + column;
        }
    }
    float* pooled = s.m->pooled.get();
    for (int i = 0; i < dim; i += LANES) {
        const int left = dim - i;
        vec top = spread(-3e38f), total = {}, value = {};
        for (int j = 0; j < slots; j++) top = larger(load_some(gate[j] + i, left) + load_some(ape[j] + i, left), top);
        for (int j = 0; j < slots; j++) {
            vec e = exponential(load_some(gate[j] + i, left) + load_some(ape[j] + i, left) - top);
            total = total + e;
            value = fma(e, load_some(kv[j] + i, left), value);
        }
        store_some(pooled + i, value / total, left);
    }
    rms_norm(pooled, index ? layer.t.index_norm : layer.t.comp_norm, dim, (float)model_.numbers.norm_eps, pooled);
    float cosines[512], sines[512];
    angles(block * m, true, cosines, sines);
    turn(pooled, dim, cosines, sines, half_, 1.0f, 0, dim);
    if (index && s_.quantise_index) quantise_index(pooled, dim);
    if (!index && s_.quantise_kv) quantise_row(pooled, dim - 2 * half_);
    const Pool& pool = index ? pools_.index : m == 4 ? pools_.csa : pools_.hca;
    const void* row;
    entry_rows(pool, layer, segment, block, 1, &row);
    write_state(index ? index_type_ : row_type_, (char*)row, pooled, dim);
    if (!index || !byte_keys_) return;
    const int64_t per_block = byte_keys_->rows();
    byte_keys_->put(segment.blocks[block / per_block], layer.ordinal, block % per_block, row, index_type_);
}

// The projections that later blocks still need go to the rings; nobody reads the old rows any more.
inline void Runner::save_tails(const Share& s, const Layer& layer) {
    if (!layer.ratio || !s.writes_tokens()) return;
    const int ring = layer.ratio == 4 ? 8 : 128, c = (int)s_.head_dim, ci = (int)s_.index_dim;
    for (int m = s.tokens.begin; m < s.tokens.end; m++) {
        const Segment& segment = (*segments_)[segment_of_[m]];
        if (segment.start + segment.count - positions_[m] > ring) continue;
        const float* x = proj_.get() + m * projected_;
        int64_t slot = segment.piece->slot, row = positions_[m] % ring;
        auto save = [&](const Pool& pool, int column, int size) {
            std::memcpy(pool.at(slot, layer.ordinal, row), x + column, (size_t)size * 4);
        };
        if (layer.ratio == 4) {
            save(pools_.csa_kv, layer.at.entry_kv, 2 * c), save(pools_.csa_gate, layer.at.entry_gate, 2 * c);
            save(pools_.index_kv, layer.at.index_kv, 2 * ci), save(pools_.index_gate, layer.at.index_gate, 2 * ci);
        } else {
            save(pools_.hca_kv, layer.at.entry_kv, c), save(pools_.hca_gate, layer.at.entry_gate, c);
        }
    }
}

inline void Runner::save_window(const Share& s, const Layer& layer) {
    if (!s.writes_tokens()) return;
    int64_t bytes = row_bytes(row_type_, s_.head_dim), number = &layer - model_.layers.data();
    for (int m = s.tokens.begin; m < s.tokens.end; m++) {
        const Segment& segment = (*segments_)[segment_of_[m]];
        if (segment.start + segment.count - positions_[m] > s_.window) continue;
        std::memcpy(pools_.window.at(segment.piece->slot, number, positions_[m] % s_.window), fresh_.get() + m * bytes, bytes);
    }
}

inline void Runner::prepare_queries(const Share& s, const Layer& layer) {
    const int c = (int)s_.head_dim, ci = (int)s_.index_dim;
    Rows query = operand(s.t->query, c), index = operand(s.t->index_query, ci), bytes = operand(s.t->byte_query, ci);
    float row[4096];
    for (int m = s.tokens.begin; m < s.tokens.end; m++) {
        const float *x = q_.get() + m * queries_, *cosines = cosine(m, layer.ratio != 0), *sines = sine(m, layer.ratio != 0);
        for (int h = 0; h < s_.heads; h++) {
            rms_norm(x + h * c, nullptr, c, (float)model_.numbers.norm_eps, row);
            turn(row, c, cosines, sines, half_, 1.0f, 0, c);
            write_row((int)s_.attention_kind, query.row(m * s_.heads + h), query.low, 0, row, c);
        }
        if (!selects(layer, m)) continue;
        s.t->margin[m] = {};
        for (int h = 0; h < s_.index_heads; h++) {
            std::memcpy(row, x + layer.index_column + h * ci, (size_t)ci * 4);
            turn(row, ci, cosines, sines, half_, 1.0f, 0, ci);
            if (s_.quantise_index) quantise_index(row, ci);
            const int64_t number = m * s_.index_heads + h;
            if (s_.index_kind != BYTES) write_row(key_kind(), index.row(number), index.low, 0, row, ci);
            if (!byte_keys_) continue;
            const float w = s.t->index_weights[number], unit = query_bytes(row, ci, bytes.row(number));
            s.t->byte_weights[number] = w * unit;
            if (byte_keys_->bounded()) s.t->margin[m].add(w, row, ci, (const uint8_t*)bytes.row(number), unit);
        }
    }
}

inline void Runner::attend(const Share& s, const Layer& layer) {
    for (int m = s.tokens.begin; m < s.tokens.end;) {
        int count = 1;
        while (count < INDEX_GROUP && m + count < s.tokens.end && segment_of_[m + count] == segment_of_[m]) count++;
        if (selects(layer, m + count - 1)) {
            s.m->clock.lap(ATTENTION);
            select_entries(s, layer, m, count);
            s.m->clock.lap(INDEXER);
        }
        for (int i = 0; i < count; i += GROUP) attend_group(s, layer, m + i, std::min(GROUP, count - i), i);
        m += count;
    }
}

// The index_topk best entries of each of `count` tokens that sees more, in m->selected. With one token in the slice, members
// share the keys and put their candidates together afterwards, each for itself. A group of tokens scores up to WHOLE
// times as many keys as it chooses in float32 throughout, where float32 is asked for: it turns keys around once for all its
// tokens, which costs each of them less than 8-bit scores of all keys and float32 scores of what they leave over.
inline void Runner::select_entries(const Share& s, const Layer& layer, int first, int count) {
    MemberBuffers& m = *s.m;
    const int k = (int)s_.index_topk, entries = (int)visible(layer, first + count - 1);
    const bool bytes = byte_keys_ && !(sifts() && count >= GROUP && entries <= WHOLE * k), sifted = bytes && sifts();
    const int unit = bytes ? (int)byte_keys_->rows() : KEYS, blocks = (entries + unit - 1) / unit;
    for (int i = 0; i < count; i++) {
        m.sees[i] = selects(layer, first + i) ? (int)visible(layer, first + i) : 0;
        m.selections[i].begin(k);
        if (sifted) m.sieves[i].begin(k, m.sees[i]);
    }
    Range mine = s.one ? part(blocks, s.member, s.parts) : Range{0, blocks};
    for (int b = mine.begin; b < mine.end; b++)
        if (bytes) score_bytes(s, layer, first, count, mine, b);
        else score_block(s, layer, first, count, b, b + 1 < mine.end);
    if (sifted) score_sifted(s, layer, first, count);
    const Selection* chosen = m.selections;
    if (s.one) {
        s.m->clock.lap(INDEXER);
        meet(s);
        m.merged.begin(k);
        for (const MemberBuffers& other : members_) m.merged.leave_out_under(other.selections[0].limit());
        for (const MemberBuffers& other : members_) m.merged.append(other.selections[0]);
        chosen = &m.merged;
    }
    for (int i = 0; i < count; i++)
        if (m.sees[i]) m.chosen[i] = const_cast<Selection&>(chosen[i]).finish();
}

// Scores 64 entries for every token of a group that selects, and passes them to its selection.
inline void Runner::score_block(const Share& s, const Layer& layer, int first, int count, int b, bool more) {
    const int heads = (int)s_.index_heads, last = (int)visible(layer, first + count - 1), here = std::min(KEYS, last - b * KEYS);
    const Segment& segment = (*segments_)[segment_of_[first]];
    KeyList& keys = s.m->entries;
    keys.resize(2 * KEYS);
    entry_rows(pools_.index, layer, segment, b * KEYS, here, keys.data());
    std::fill(keys.begin() + here, keys.begin() + KEYS, zeros_.get());
    if (more) {  // memory is slower than this arithmetic: ask for the next 64 now
        int next = std::min(KEYS, last - (b + 1) * KEYS);
        entry_rows(pools_.index, layer, segment, (b + 1) * KEYS, next, keys.data() + KEYS);
        s.m->keys->fetch(keys.data() + KEYS, next);
    }
    const uint32_t* panel = s.m->keys->keys(keys.data(), PANEL);
    Rows queries = operand(s.t->index_query, s_.index_dim);
    for (int i = 0; i < count; i++) {
        if (!s.m->sees[i]) continue;
        const float* w = s.t->index_weights.get() + (first + i) * heads;
        vec scores[PANEL];
        if (key_kind() == WIDE) panel_scores<WIDE>(queries, (first + i) * heads, heads, w, panel, PANEL, s.m->keys->depth, scores);
        else panel_scores<PAIRS>(queries, (first + i) * heads, heads, w, panel, PANEL, s.m->keys->depth, scores);
        s.m->selections[i].push_tiles(scores, PANEL, b * KEYS, s.m->sees[i]);
    }
}

// The same with 8-bit keys, for one block of the pool. Each tile of a later block is asked for beside the work on a tile of
// this one: all at once they would not find room on their way.
inline void Runner::score_bytes(const Share& s, const Layer& layer, int first, int count, Range mine, int b) {
    const int heads = (int)s_.index_heads, depth = byte_keys_->depth(), last = (int)visible(layer, first + count - 1);
    const int64_t rows = byte_keys_->rows(), stride = byte_keys_->tile_words();
    const int64_t* blocks = (*segments_)[segment_of_[first]].blocks;
    const uint32_t* tile = byte_keys_->tile(blocks[b], layer.ordinal, 0);
    const uint32_t* next = byte_keys_->tile(blocks[std::min(b + BLOCKS_AHEAD, mine.end - 1)], layer.ordinal, 0);
    Rows queries = operand(s.t->byte_query, s_.index_dim);
    const int here = (int)std::min<int64_t>(rows, last - b * rows);
    for (int row = 0; row < here; row += KEYS, tile += PANEL * stride, next += PANEL * stride) {
        const int tiles = std::min(PANEL, (int)(rows - row) / LANES);
        for (int64_t word = 0; word < tiles * stride; word += LANES) __builtin_prefetch(next + word, 0, 2);
        for (int i = 0; i < count; i++) {
            if (!s.m->sees[i]) continue;
            vec scores[PANEL];
            tile_scores(queries, (first + i) * heads, heads, s.t->byte_weights.get() + (first + i) * heads, tile, stride, tiles, depth, scores);
            const int index = (int)(b * rows) + row;
            if (!sifts()) {
                s.m->selections[i].push_tiles(scores, tiles, index, s.m->sees[i]);
                continue;
            }
            const Margin& margin = s.t->margin[first + i];
            for (int t = 0; t < tiles; t++) {
                const float* lengths = (const float*)tile + t * stride + (depth + 1) * LANES;
                s.m->sieves[i].push(scores[t], fma(spread(margin.rest), load(lengths + LANES), margin.whole * load(lengths)), index + t * LANES,
                                    s.m->sees[i]);
            }
        }
    }
}

// The exact scores of the keys that the 8-bit scores did not rule out. Members that share the keys of one token rule out by
// what they saw together.
inline void Runner::score_sifted(const Share& s, const Layer& layer, int first, int count) {
    MemberBuffers& m = *s.m;
    const int heads = (int)s_.index_heads;
    const int64_t per_block = byte_keys_->rows(), bytes = row_bytes(index_type_, s_.index_dim);
    const int64_t* blocks = (*segments_)[segment_of_[first]].blocks;
    auto row = [&](int32_t key) { return (const char*)pools_.index.at(blocks[key / per_block], layer.ordinal, key % per_block); };
    if (s.one) {
        s.m->clock.lap(INDEXER);
        meet(s);
        m.merged.begin((int)s_.index_topk);
        for (const MemberBuffers& other : members_) m.merged.append(other.sieves[0].lowest);
    }
    for (int i = 0; i < count; i++) {
        if (!m.sees[i]) continue;
        int left;
        const std::vector<int32_t>& keys = m.sieves[i].finish((s.one ? m.merged : m.sieves[i].lowest).kth_best(), left);
        for (int j = 0; j < left; j += LANES) {
            const void* rows[LANES];
            for (int lane = 0; lane < LANES; lane++) rows[lane] = j + lane < left ? row(keys[j + lane]) : zeros_.get();
            for (int next = j + 2 * LANES; next < std::min(left, j + 3 * LANES); next++)
                for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row(keys[next]) + byte);
            vec scores[1];
            panel_scores<WIDE>(operand(s.t->index_query, s_.index_dim), (first + i) * heads, heads,
                               s.t->index_weights.get() + (first + i) * heads, m.keys->keys(rows, 1), 1, m.keys->depth, scores);
            ivec at;
            std::memcpy(&at, keys.data() + j, sizeof at);
            m.selections[i].push_at(scores[0], at, left - j);
        }
    }
}

// Before a slice: blocks that it writes get a new version, and keys that it needs but somebody else wrote are copied.
inline void Runner::update_byte_keys(const Segment& segment) {
    const int64_t rows = byte_keys_->rows(), first = segment.start / 4, last = (segment.start + segment.count) / 4;
    for (int64_t b = first / rows; b * rows < last; b++) {
        int64_t block = segment.blocks[b], from = std::max<int64_t>(0, first - b * rows), to = std::min(rows, last - b * rows);
        if (from >= to) continue;
        int64_t version = pools_.version[block]++;
        byte_keys_->write(block, from, to, version, version + 1);
    }
    if (last <= s_.index_topk) return;
    for (int64_t b = 0; b * rows < first; b++)
        for (int64_t layer = 0; layer < csa_layers_; layer++) {
            int64_t block = segment.blocks[b], needed = std::min(rows, first - b * rows);
            for (int64_t row = byte_keys_->stale(block, layer, needed, pools_.version[block]); row < needed; row++)
                byte_keys_->put(block, layer, row, pools_.index.at(block, layer, row), index_type_);
        }
}

inline void Runner::list_window(const Layer& layer, int first, int last, KeyList& keys) const {
    const Segment& segment = (*segments_)[segment_of_[first]];
    const int64_t bytes = row_bytes(row_type_, s_.head_dim), number = &layer - model_.layers.data();
    int64_t oldest = std::max<int64_t>(0, positions_[first] - s_.window + 1), begin = oldest / LANES * LANES;
    keys.assign(round_up(positions_[last] + 1 - begin, LANES), zeros_.get());
    const int64_t ring_end = std::min(segment.start, positions_[last] + 1);
    const char* ring = pools_.window.at(segment.piece->slot, number, 0);
    for (int64_t p = oldest, row = oldest % s_.window; p < ring_end; p++, row++) {
        if (row == s_.window) row = 0;
        keys[p - begin] = ring + row * pools_.window.row;
    }
    const char* fresh = fresh_.get() + (segment.first - segment.start) * bytes;
    for (int64_t p = std::max(oldest, ring_end); p <= positions_[last]; p++) keys[p - begin] = fresh + p * bytes;
}

inline void Runner::list_entries(const Share& s, const Layer& layer, const Segment& segment, int64_t count, const int32_t* chosen) {
    const Pool& pool = layer.ratio == 4 ? pools_.csa : pools_.hca;
    KeyList& keys = s.m->entries;
    keys.resize(round_up(count, LANES));
    std::fill(keys.begin() + count, keys.end(), zeros_.get());
    if (!count) return;
    if (!chosen) return entry_rows(pool, layer, segment, 0, count, keys.data());
    const uint32_t per_block = (uint32_t)(pools_.block_tokens / layer.ratio);
    const char* base = pool.at(0, layer.ordinal, 0);
    for (int64_t i = 0; i < count; i++) {  // no branches: chosen entries are all over the blocks
        const uint32_t entry = (uint32_t)chosen[i], block = entry / per_block;
        keys[i] = base + segment.blocks[block] * pool.first + (entry - block * per_block) * pool.row;
    }
}

// Attention of up to GROUP consecutive tokens of one sequence. The first `shared` of them take every entry they see and share
// them; the others each have entries of their own, which are read for the logits and, while they are near, for the sum: entries
// come before the window in every sum. With one token in the slice, members share the keys for the logits and the channels
// for the sum; the softmax between them is shared by heads where it is long, else done by each for itself.
inline void Runner::attend_group(const Share& s, const Layer& layer, int first, int count, int in_run) {
    const int c = (int)s_.head_dim, c_tiles = (c + LANES - 1) / LANES, heads = (int)s_.heads;
    Group g{first, count, shared_tokens(layer, first, count), s.one ? part(c_tiles, s.member, s.parts) : Range{0, c_tiles}};
    g.begin = std::max<int64_t>(0, positions_[first] - s_.window + 1) / LANES * LANES;
    list_window(layer, first, first + count - 1, s.m->window);
    expect_rows(s, layer, first + count);
    g.split = s.one && (int64_t)s.m->window.size() + std::min(visible(layer, first), s_.index_topk) > SPLIT;
    window_logits(s, g);
    if (g.shared) attend_shared(s, layer, g);
    for (int i = g.shared; i < count; i++) attend_own(s, layer, g, i, s.m->chosen[in_run + i]);
    window_sums(s, g);
    Rows out = operand(attended_, s_.heads * c);
    const int from = g.tiles.begin * LANES, to = std::min(c, g.tiles.end * LANES);
    for (int i = 0; i < count; i++)
        for (int h = 0; h < heads; h++) {
            float* x = s.m->sums.get() + (int64_t)(i * heads + h) * c_tiles * LANES;
            for (int j = from; j < to; j++) x[j] *= weigher(s, g).inverse[i * heads + h];
            turn(x, c, cosine(first + i, layer.ratio != 0), sine(first + i, layer.ratio != 0), half_, -1.0f, from, to);
            if (to > from) write_row((int)s_.output_kind, out.row(first + i), out.low, h * c + from, x + from, to - from);
        }
}

// Where another sequence's token comes next, its rows are asked for while those of this one are packed.
inline void Runner::expect_rows(const Share& s, const Layer& layer, int token) {
    KeyList& keys = s.m->upcoming;
    keys.clear();
    if (token < s.tokens.end && segment_of_[token] != segment_of_[token - 1]) {
        list_window(layer, token, token, keys);
        if (layer.ratio && !selects(layer, token)) {
            const int64_t window = (int64_t)keys.size(), entries = visible(layer, token);
            keys.resize(window + entries);
            entry_rows(layer.ratio == 4 ? pools_.csa : pools_.hca, layer, (*segments_)[segment_of_[token]], 0, entries, keys.data() + window);
        }
    }
    s.m->rows->expect(keys.data(), (int)keys.size());
}

// How many tokens of a group come before the first that selects.
inline int Runner::shared_tokens(const Layer& layer, int first, int count) const {
    int shared = 0;
    while (shared < count && !selects(layer, first + shared)) shared++;
    return shared;
}

inline void Runner::window_logits(const Share& s, const Group& g) {
    MemberBuffers& m = *s.m;
    const int heads = (int)s_.heads;
    m.rows->fetch(m.window.data(), std::min((int)m.window.size(), KEYS));
    key_logits(*m.rows, m.window, key_share(s, m.window), operand(s.t->query, s_.head_dim), g.first * heads, g.count * heads, logits_of(s),
               lanes_, 0);
}

// Logits, weights and sums of the tokens that share their entries.
inline void Runner::attend_shared(const Share& s, const Layer& layer, const Group& g) {
    MemberBuffers& m = *s.m;
    const int heads = (int)s_.heads, lanes = (int)m.window.size();
    const int64_t all = visible(layer, g.first + g.shared - 1);
    list_entries(s, layer, (*segments_)[segment_of_[g.first]], all, nullptr);
    key_logits(*m.rows, m.entries, key_share(s, m.entries), operand(s.t->query, s_.head_dim), g.first * heads, g.shared * heads, logits_of(s),
               lanes_, lanes);
    meet_alone(s);
    for (int i = 0; i < g.shared; i++) soften_token(s, layer, g, i, visible(layer, g.first + i), all);
    sum_entries(s, g, 0, g.shared);
}

// The same for one token with entries of its own.
inline void Runner::attend_own(const Share& s, const Layer& layer, const Group& g, int i, const int32_t* chosen) {
    MemberBuffers& m = *s.m;
    const int heads = (int)s_.heads, lanes = (int)m.window.size();
    list_entries(s, layer, (*segments_)[segment_of_[g.first]], s_.index_topk, chosen);
    own_logits(*m.rows, m.entries, key_share(s, m.entries), operand(s.t->query, s_.head_dim), (g.first + i) * heads, heads,
               logits_of(s) + i * heads * lanes_, lanes_, lanes);
    meet_alone(s);
    soften_token(s, layer, g, i, s_.index_topk, s_.index_topk);
    sum_entries(s, g, i, 1);
}

// With one token in the slice its logits come from all members.
inline void Runner::meet_alone(const Share& s) {
    if (!s.one) return;
    s.m->clock.lap(ATTENTION);
    meet(s);
}

// Logits of a token to weights, as operand rows, and the inverse of every total; it sees `entries` of the `all` that are listed.
inline void Runner::soften_token(const Share& s, const Layer& layer, const Group& g, int i, int64_t entries, int64_t all) {
    const int heads = (int)s_.heads;
    const int64_t lanes = (int64_t)s.m->window.size(), t = positions_[g.first + i];
    const Span spans[2] = {
        {0, (int)lanes, (int)(std::max<int64_t>(0, t - s_.window + 1) - g.begin), (int)(t + 1 - g.begin)},
        {lanes, (int)round_up(all, LANES), 0, (int)entries},
    };
    const float* logits = logits_of(s);
    MemberBuffers& to = weigher(s, g);
    const Range mine = g.split ? part(heads, s.member, s.parts) : Range{0, heads};
    for (int h = mine.begin; h < mine.end; h++)
        to.inverse[i * heads + h] = soften(logits + (i * heads + h) * lanes_, spans, 2, 1.0f / std::sqrt((float)s_.head_dim), layer.t.sink[h],
                                           (int)s_.attention_kind, to.weights.get() + (i * heads + h) * lanes_);
    if (g.split) meet_alone(s);
}

// Begins the sums of tokens i .. i + count - 1 of a group with the listed entries, weighted.
inline void Runner::sum_entries(const Share& s, const Group& g, int i, int count) {
    const int heads = (int)s_.heads;
    const int64_t stride = round_up(s_.head_dim, LANES);
    float* sums = s.m->sums.get() + i * heads * stride;
    for (int r = 0; r < count * heads; r++) std::fill(sums + r * stride + g.tiles.begin * LANES, sums + r * stride + g.tiles.end * LANES, 0.0f);
    weighted_values(*s.m->rows, s.m->entries, g.tiles, weights_of(s, g, i), count * heads, (int64_t)s.m->window.size(), sums, stride);
}

inline void Runner::window_sums(const Share& s, const Group& g) {
    weighted_values(*s.m->rows, s.m->window, g.tiles, weights_of(s, g, 0), g.count * (int)s_.heads, 0, s.m->sums.get(),
                    round_up(s_.head_dim, LANES));
}

// Heads in groups, each projected on its own; then all of them together, added to the streams.
inline void Runner::project_output(const Share& s, const Layer& layer) {
    const int64_t slice = s_.heads * s_.head_dim / s_.groups;
    const int rank = (int)s_.o_rank, kind = (int)s_.output_kind;
    Rows low = operand(s.one ? members_[0].own.low : shared_.low, s_.groups * s_.o_rank);
    for (int g = 0; g < s_.groups; g++) {
        const Matrix& w = layer.wo_a[g];
        const Range panels = s.panels(w);
        Rows heads = operand(attended_, s_.heads * s_.head_dim);
        heads.base += kind == WIDE ? g * slice : g * slice / 2;
        multiply(w, heads, s.rows, panels, u_.get() + g * rank_, s_.groups * rank_);
        const int begin = panels.begin * KEYS, count = std::min(panels.end * KEYS, rank) - begin;
        for (int m = s.rows.begin; m < s.rows.end && count > 0; m++)
            write_row(kind, low.row(m), low.low, g * rank + begin, u_.get() + (m * s_.groups + g) * rank_ + begin, count);
    }
    after_product(s, PROJECTIONS);
    multiply(layer.wo_b, low, s.rows, s.panels(layer.wo_b), y_.get(), d_);
    s.m->clock.lap(PROJECTIONS);
    write_streams(s, layer.wo_b);
}

}  // namespace nautile
