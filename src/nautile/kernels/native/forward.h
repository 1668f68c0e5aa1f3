// One slice of a step: some tokens of some sequences through all layers. Every member of the team runs the same functions;
// what differs is its share. With one token, products are split by outputs and the small per-token work is done by every
// member for itself, which is cheaper than waiting. With a few tokens, products are split by outputs and per-token work by
// tokens. With many, everything is split by tokens and members meet only where a token needs another one's keys.
#pragma once
#include "clock.h"
#include "indexer.h"
#include "model.h"
#include "quantise.h"
#include "team.h"

namespace nautile {

constexpr int SLICE = 256;  // tokens of a slice: bounds the scratch memory
constexpr int MANY = 48;    // tokens from which work is split by tokens
constexpr int GROUP = 8;    // tokens whose attention shares packed keys
constexpr int WHOLE = 12;        // see select_entries
constexpr int INDEX_GROUP = 16;  // tokens that are scored against a block of indexer keys together

constexpr int SPLIT = 512;  // keys of one token from which members share its softmax: a barrier costs less then
constexpr int BLOCKS_AHEAD = 2;  // of 8-bit keys: how early they are fetched

struct Segment {
    const Piece* piece;
    const int64_t* blocks;
    int64_t start;  // position of its first token in this slice
    int first, count;
};

// Buffers with one row a token that a member fills for its own tokens (or, with one token, for itself).
struct TokenBuffers {
    Buffer<float> mix, wide, head_rows, gate, index_weights, byte_weights, route_weights;
    Buffer<uint32_t> input, q_low, query, index_query, byte_query, output, low;
    Buffer<Margin> margin;
    Buffer<int> route;
};

struct MemberBuffers {
    Clock clock;
    TokenBuffers own;  // for one token
    std::unique_ptr<Packer> rows, keys;
    Selection selections[INDEX_GROUP], merged;
    Sieve sieves[INDEX_GROUP];
    const int32_t* chosen[INDEX_GROUP];  // the entries of each token of a run
    int sees[INDEX_GROUP];               // how many entries each sees; 0 where it takes all of them
    Buffer<float> logits, sums, products, pooled;
    Buffer<uint32_t> weights;
    KeyList window, entries, upcoming;
    std::vector<int> expert_first, expert_next, expert_slots;
    std::vector<float> inverse;  // 1 / total of each softmax
    int64_t logits_size = 0;
};

class Runner {
  public:
    Runner(const Model& model, int threads, const Pools& pools)
        : model_(model), s_(model.shape), row_type_((RowType)pools.row_type), index_type_((RowType)pools.index_type), pools_(pools), team_(threads),
          members_(threads) {
        for (const Pool* pool : {&pools.csa, &pools.index, &pools.hca}) ask_for_large_pages(pool->base, pool->first * pools.blocks);
        nd_ = round_up(s_.streams * s_.hidden, LANES);
        d_ = round_up(s_.hidden, LANES);
        outs_ = round_up(model.mixing().outputs(), LANES);
        half_ = (int)s_.rotated / 2;
        prepare(shared_, SLICE);
        int64_t projected = 0, queries = 0;
        for (const Layer& layer : model.layers) {
            projected = std::max<int64_t>(projected, layer.inputs.tiles * LANES);
            queries = std::max<int64_t>(queries, layer.queries.tiles * LANES);
        }
        projected_ = projected, queries_ = queries, rank_ = round_up(s_.o_rank, LANES), inner_ = round_up(s_.inner, LANES);
        streams_ = allocate<float>(SLICE * nd_), z_ = allocate<float>(SLICE * outs_), y_ = allocate<float>(SLICE * d_);
        proj_ = allocate<float>(SLICE * projected_), q_ = allocate<float>(SLICE * queries_);
        u_ = allocate<float>(SLICE * s_.groups * rank_);
        hidden_ = allocate<uint32_t>(SLICE * (s_.chosen + 1) * inner_ * 2);
        attended_ = allocate<uint32_t>(SLICE * operand(s_.heads * s_.head_dim).stride);
        fresh_ = allocate<char>(SLICE * s_.head_dim * 4), zeros_ = allocate<char>(std::max(s_.head_dim, s_.index_dim) * 4);
        turns_ = allocate<float>(SLICE * 4 * half_);
        logits_ = allocate<float>(SLICE * model.head().tiles * LANES);
        for (const Layer& layer : model.layers) csa_layers_ += layer.ratio == 4;
        if (s_.index_kind == BYTES || sifts())
            byte_keys_ = std::make_unique<ByteKeys>(pools.blocks, csa_layers_, pools.block_tokens / 4, (int)s_.index_dim, sifts());
        for (MemberBuffers& member : members_) {
            prepare(member.own, 1);
            member.rows = std::make_unique<Packer>((int)s_.attention_kind, row_type_, (int)s_.head_dim);
            if (s_.index_kind != BYTES) member.keys = std::make_unique<Packer>(key_kind(), index_type_, (int)s_.index_dim);
            member.sums = allocate<float>(GROUP * s_.heads * round_up(s_.head_dim, LANES));
            member.products = allocate<float>(TALL * KEYS);
            member.pooled = allocate<float>(round_up(std::max(s_.head_dim, s_.index_dim), LANES));
            member.inverse.resize(GROUP * s_.heads);
        }
    }

    // Takes the pieces in, writes the state, and returns the wanted rows of logits in order. With `streams_in` [tokens, n d] the
    // residual streams begin there instead of at the embedding; `streams_out`, the same shape, gets them after the last layer.
    void step(const Piece* pieces, int count, const int64_t* ids, const int64_t* blocks, float* logits, const float* streams_in,
              float* streams_out) {
        int64_t longest = 0;
        for (int i = 0; i < count; i++) longest = std::max(longest, pieces[i].start + pieces[i].count);
        grow(longest);
        out_ = logits, streams_in_ = streams_in, streams_out_ = streams_out;
        const int64_t* next = ids;
        std::vector<Segment> segments;
        int filled = 0;
        for (int i = 0; i < count; i++) {
            for (int64_t done = 0; done < pieces[i].count;) {
                int take = (int)std::min<int64_t>(SLICE - filled, pieces[i].count - done);
                segments.push_back({&pieces[i], blocks + pieces[i].block_offset, pieces[i].start + done, filled, take});
                for (int j = 0; j < take; j++) ids_[filled + j] = *next++;
                filled += take, done += take;
                if (filled == SLICE) slice(segments, filled), segments.clear(), filled = 0;
            }
        }
        if (filled) slice(segments, filled);
    }

    // Seconds by part since the last call, as wall time: every member counts equally.
    void parts(double* seconds) {
        int64_t ticks[PARTS] = {}, all = 0;
        for (int part = 0; part < PARTS; part++) {
            for (MemberBuffers& member : members_) ticks[part] += member.clock.take(part);
            all += ticks[part];
        }
        for (int part = 0; part < PARTS; part++) seconds[part] = all ? seconds_ * (double)ticks[part] / (double)all : 0.0;
        seconds_ = 0;
    }

  private:
    // What a member knows about its share of the slice.
    struct Share {
        int member, parts;
        bool one, many;
        Range tokens, rows;  // of per-token work; of products
        TokenBuffers* t;
        MemberBuffers* m;
        Range panels(const Matrix& w) const { return many ? Range{0, w.panels} : part(w.panels, member, parts); }
        bool writes_tokens() const { return !one || member == 0; }  // of shared buffers
    };

    bool sifts() const { return s_.index_kind == SIFTED; }
    int key_kind() const { return sifts() ? WIDE : (int)s_.index_kind; }
    Rows operand(int64_t inputs) const {  // every operand row has room for both kinds
        Rows rows;
        rows.stride = round_up(inputs, LANES), rows.low = rows.stride / 2;
        return rows;
    }
    Rows operand(const Buffer<uint32_t>& buffer, int64_t inputs) const {
        Rows rows = operand(inputs);
        rows.base = buffer.get();
        return rows;
    }

    void prepare(TokenBuffers& t, int64_t tokens) {
        t.mix = allocate<float>(tokens * outs_), t.wide = allocate<float>(tokens * d_);
        t.head_rows = allocate<float>(tokens * round_up(std::max(s_.heads * s_.head_dim, s_.index_heads * s_.index_dim), LANES));
        t.gate = allocate<float>(tokens * round_up(s_.experts, LANES));
        t.index_weights = allocate<float>(tokens * s_.index_heads);
        t.route_weights = allocate<float>(tokens * s_.chosen), t.route = allocate<int>(tokens * s_.chosen);
        t.input = allocate<uint32_t>(tokens * operand(s_.hidden).stride);
        t.q_low = allocate<uint32_t>(tokens * operand(s_.q_rank).stride);
        t.query = allocate<uint32_t>(tokens * s_.heads * operand(s_.head_dim).stride);
        t.index_query = allocate<uint32_t>(tokens * s_.index_heads * operand(s_.index_dim).stride);
        t.byte_query = allocate<uint32_t>(tokens * s_.index_heads * operand(s_.index_dim).stride);
        t.byte_weights = allocate<float>(tokens * s_.index_heads), t.margin = allocate<Margin>(tokens);
        t.low = allocate<uint32_t>(tokens * operand(s_.groups * s_.o_rank).stride);
    }

    // Lanes of a row of logits: the window with room on both sides, and the entries of either kind of layer.
    void grow(int64_t longest) {
        int64_t csa = std::min(longest / 4, s_.index_topk), hca = longest / 128;
        lanes_ = s_.window + GROUP + 3 * LANES + round_up(std::max(csa, hca), LANES) + LANES;
        lanes_ = round_up(lanes_ * 2, 512);
        for (MemberBuffers& member : members_) {
            if (member.logits_size < lanes_) {
                member.logits = allocate<float>(GROUP * s_.heads * lanes_);
                member.weights = allocate<uint32_t>(GROUP * s_.heads * lanes_);
                member.logits_size = lanes_;
            }
            lanes_ = member.logits_size;
        }
    }

    void slice(const std::vector<Segment>& segments, int tokens) {
        segments_ = &segments, tokens_ = tokens;
        for (const Segment& segment : segments)
            for (int i = 0; i < segment.count; i++)
                positions_[segment.first + i] = segment.start + i, segment_of_[segment.first + i] = (int)(&segment - segments.data());
        if (byte_keys_)
            for (const Segment& segment : segments) update_byte_keys(segment);
        const std::function<void(int)> job = [this](int member) { work(member); };
        const auto began = std::chrono::steady_clock::now();
        team_.run(job);
        seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
        out_ += wanted_count_ * s_.vocabulary;
        if (streams_in_) streams_in_ += tokens * s_.streams * s_.hidden;
        if (streams_out_) streams_out_ += tokens * s_.streams * s_.hidden;
    }

    void work(int member) {
        Share s{};
        s.member = member, s.parts = team_.size(), s.one = tokens_ == 1, s.many = tokens_ >= MANY, s.m = &members_[member];
        s.tokens = s.one ? Range{0, 1} : part(tokens_, member, s.parts);
        s.rows = s.many ? s.tokens : Range{0, tokens_};
        s.t = s.one ? &s.m->own : &shared_;
        s.m->clock.start();
        begin(s);
        s.m->clock.lap(REST);
        meet(s);
        for (const Layer& layer : model_.layers) {
            read_streams(s, {layer.attn_fn.data, layer.t.attn_base, layer.t.attn_scale, layer.attn_fn.stride}, layer.t.attn_norm,
                         (int)s_.main_kind);
            attention(s, layer);
            read_streams(s, {layer.ffn_fn.data, layer.t.ffn_base, layer.t.ffn_scale, layer.ffn_fn.stride}, layer.t.ffn_norm,
                         (int)s_.expert_kind);
            experts(s, layer);
        }
        keep_streams(s);
        s.m->clock.lap(REST);
        finish(s);
        s.m->clock.lap(HEAD);
    }

    void meet(const Share& s) {
        team_.barrier();
        s.m->clock.lap(WAITING);
    }

    // Barriers after work that was split by outputs, or by tokens where somebody else goes on with all of them.
    void after_product(const Share& s, Part part) {
        s.m->clock.lap(part);
        if (!s.many) meet(s);
    }
    void after_tokens(const Share& s, Part part) {
        s.m->clock.lap(part);
        if (!s.many && !s.one) meet(s);
    }

    const float* cosine(int token, bool compressed) const { return turns_.get() + ((int64_t)token * 4 + 2 * compressed) * half_; }
    const float* sine(int token, bool compressed) const { return cosine(token, compressed) + half_; }
    void angles(int64_t position, bool compressed, float* cosines, float* sines) const {
        const float* frequencies = compressed ? model_.t.compressed_frequencies : model_.t.window_frequencies;
        for (int i = 0; i < half_; i++) {
            float angle = (float)position * frequencies[i];
            cosines[i] = std::cos(angle), sines[i] = std::sin(angle);
        }
    }

    void begin(const Share& s) {
        for (int m = s.tokens.begin; m < s.tokens.end; m++) {
            for (int kind = 0; kind < 2; kind++)
                if (!s.one || kind == s.member || s.parts == 1)
                    angles(positions_[m], kind, (float*)cosine(m, kind), (float*)sine(m, kind));
            if (!s.writes_tokens()) continue;
            float* streams = streams_.get() + m * nd_;
            const int64_t size = s_.streams * s_.hidden;
            if (streams_in_) std::memcpy(streams, streams_in_ + m * size, (size_t)size * 4);
            else for (int j = 0; j < s_.streams; j++) std::memcpy(streams + j * s_.hidden, model_.t.embed + ids_[m] * s_.hidden, s_.hidden * 4);
        }
    }

    void keep_streams(const Share& s) {
        if (!streams_out_ || !s.writes_tokens()) return;
        const int64_t size = s_.streams * s_.hidden;
        for (int m = s.tokens.begin; m < s.tokens.end; m++)
            std::memcpy(streams_out_ + m * size, streams_.get() + m * nd_, (size_t)size * 4);
    }

    // The mappings of a site, and what its sublayer reads: the collapsed streams, normalised, as floats and as operand rows.
    void read_streams(const Share& s, const Site& site, const float* norm, int kind) {
        const Mixing mix = model_.mixing();
        int outs = mix.outputs();
        dot_rows(streams_.get(), nd_, s.tokens, site.fn, site.stride, s.one ? part(outs, s.member, s.parts) : Range{0, outs}, nd_,
                 z_.get(), outs_);
        if (s.one) after_product(s, MIXING);
        Rows input = operand(s.t->input, s_.hidden);
        for (int m = s.tokens.begin; m < s.tokens.end;) {
            const int count = std::min(LANES, s.tokens.end - m);
            float square[LANES];
            for (int i = 0; i < count; i++) square[i] = sum_of_squares(streams_.get() + (m + i) * nd_, nd_) / (float)(s_.streams * s_.hidden);
            const float* z = z_.get() + m * outs_;
            if (count <= 4) mappings<vec4>(mix, site, z, square, count, outs_, s.t->mix.get() + m * outs_);
            else mappings<vec>(mix, site, z, square, count, outs_, s.t->mix.get() + m * outs_);
            for (int i = 0; i < count; i++, m++) {
                float* x = s.t->wide.get() + m * d_;
                collapse(streams_.get() + m * nd_, s.t->mix.get() + m * outs_, mix.streams, (int)s_.hidden, x);
                rms_norm(x, norm, (int)s_.hidden, mix.norm_eps, x);
                write_row(kind, input.row(m), input.low, 0, x, (int)s_.hidden);
            }
        }
        after_tokens(s, MIXING);
    }

    // Adds a sublayer's output, made by `last`, to the streams: one token's by columns, those of several by tokens, so that a
    // member finds its tokens' streams where it left them.
    void write_streams(const Share& s, const Matrix& last) {
        int begin = 0, end = (int)s_.hidden, n = (int)s_.streams;
        if (s.one) begin = s.panels(last).begin * KEYS, end = std::min(s.panels(last).end * KEYS, end);
        else if (!s.many) meet(s);
        for (int m = s.tokens.begin; m < s.tokens.end; m++) {
            const float* mix = s.t->mix.get() + m * outs_;
            distribute(streams_.get() + m * nd_, y_.get() + m * d_, mix + n, mix + 2 * n, n, (int)s_.hidden, begin, end);
        }
        s.m->clock.lap(MIXING);
        if (s.one) meet(s);
    }

    // forward_attention.h
    void attention(const Share& s, const Layer& layer);
    void read_inputs(const Share& s, const Layer& layer);
    void compress(const Share& s, const Layer& layer);
    void compress_block(const Share& s, const Layer& layer, const Segment& segment, int64_t block, bool index);
    void save_tails(const Share& s, const Layer& layer);
    void save_window(const Share& s, const Layer& layer);
    void prepare_queries(const Share& s, const Layer& layer);
    void attend(const Share& s, const Layer& layer);
    bool selects(const Layer& layer, int token) const { return layer.ratio == 4 && visible(layer, token) > s_.index_topk; }
    int64_t visible(const Layer& layer, int token) const { return layer.ratio ? (positions_[token] + 1) / layer.ratio : 0; }
    void select_entries(const Share& s, const Layer& layer, int first, int count);
    void score_block(const Share& s, const Layer& layer, int first, int count, int b, bool more);
    void score_bytes(const Share& s, const Layer& layer, int first, int count, Range blocks, int b);
    void score_sifted(const Share& s, const Layer& layer, int first, int count);
    void update_byte_keys(const Segment& segment);
    void attend_group(const Share& s, const Layer& layer, int first, int count, int in_run);
    // Some tokens of one sequence whose attention is computed together; see attend_group.
    struct Group {
        int first, count, shared;
        Range tiles;        // channels of the sums that this member makes
        int64_t begin = 0;   // position of the window's first lane
        bool split = false;  // one token whose members share the heads of its softmax
    };
    int shared_tokens(const Layer& layer, int first, int count) const;
    void window_logits(const Share& s, const Group& g);
    void attend_shared(const Share& s, const Layer& layer, const Group& g);
    void attend_own(const Share& s, const Layer& layer, const Group& g, int i, const int32_t* chosen);
    void meet_alone(const Share& s);
    void soften_token(const Share& s, const Layer& layer, const Group& g, int i, int64_t entries, int64_t all);
    void sum_entries(const Share& s, const Group& g, int i, int count);
    void window_sums(const Share& s, const Group& g);
    float* logits_of(const Share& s) const { return (s.one ? members_[0] : *s.m).logits.get(); }
    Range key_share(const Share& s, const KeyList& keys) const { return part(key_blocks(keys), s.one ? s.member : 0, s.one ? s.parts : 1); }
    MemberBuffers& weigher(const Share& s, const Group& g) { return g.split ? members_[0] : *s.m; }  // who has weights and totals
    Rows weights_of(const Share& s, const Group& g, int i) { return {weigher(s, g).weights.get() + i * s_.heads * lanes_, lanes_, 0}; }
    void list_window(const Layer& layer, int first, int last, KeyList& keys) const;
    void expect_rows(const Share& s, const Layer& layer, int token);
    void list_entries(const Share& s, const Layer& layer, const Segment& segment, int64_t count, const int32_t* chosen);
    void project_output(const Share& s, const Layer& layer);
    // Addresses of entries first .. first + count - 1 of a sequence.
    void entry_rows(const Pool& pool, const Layer& layer, const Segment& segment, int64_t first, int64_t count, const void** rows) const {
        const int64_t per_block = pools_.block_tokens / layer.ratio;
        const int64_t* block = segment.blocks + first / per_block;
        for (int64_t row = first % per_block; count > 0; row = 0, block++)
            for (const char* at = pool.at(*block, layer.ordinal, row); row < per_block && count > 0; row++, count--, at += pool.row) *rows++ = at;
    }

    // forward_experts.h
    void experts(const Share& s, const Layer& layer);
    void route(const Share& s, const Layer& layer, int token);
    void group_by_expert(const Share& s);
    void expert_up(const Share& s, const Layer& layer);
    void expert_down(const Share& s, const Layer& layer);
    void finish(const Share& s);
    void read_head(const Share& s, int row, int token);

    const Model& model_;
    const Shape s_;
    const RowType row_type_, index_type_;
    const Pools pools_;
    std::unique_ptr<ByteKeys> byte_keys_;
    int64_t csa_layers_ = 0;
    Team team_;
    std::vector<MemberBuffers> members_;
    TokenBuffers shared_;
    Buffer<float> streams_, z_, y_, proj_, q_, u_, turns_, logits_;
    Buffer<uint32_t> hidden_, attended_;
    Buffer<char> fresh_, zeros_;
    int64_t nd_, d_, outs_, projected_, queries_, rank_, inner_, lanes_ = 0;
    int half_;

    // The slice being run; written by slice() only.
    const std::vector<Segment>* segments_ = nullptr;
    int tokens_ = 0, wanted_count_ = 0;
    int64_t ids_[SLICE], positions_[SLICE];
    int segment_of_[SLICE];
    float* out_ = nullptr;
    const float* streams_in_ = nullptr;
    float* streams_out_ = nullptr;
    double seconds_ = 0;  // of all slices since parts() was asked
};

}  // namespace nautile
