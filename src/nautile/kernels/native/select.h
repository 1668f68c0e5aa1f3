// The k largest of a stream of scores with a defined answer: ties go to the lowest index. Scores come in ascending order of
// index; a buffer of candidates is cut back to the best k whenever it is full, and from then on only scores above the k-th pass.
// Equal ones come later and lose. A long stream costs little more than one comparison a score.
#pragma once
#include <algorithm>
#include <vector>

#include "vec.h"

namespace nautile {

// Bits that order like the float. Scores carry no negative zero (see the indexer), so equal floats have equal bits.
static inline uint32_t ordered(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

class Selection {
  public:
    void begin(int k) {
        k_ = k, count_ = 0, limit_ = -__builtin_inff();
        size_t room = (size_t)std::max(2 * k, 512) + ROOM;
        if (score_.size() >= room) return;
        for (auto* scores : {&score_, &other_score_}) scores->resize(room);
        for (auto* indices : {&index_, &other_index_}) indices->resize(room);
        for (auto* keys : {&left_, &other_left_}) keys->resize(room);
    }

    // Scores of `index` .. `index` + 15; those at or past `end` are not there.
    void push(vec scores, int index, int end) {
        const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        ivec at = lane + index;
        push_at(scores, at, end > index ? end - index : 0);
    }
    // The same for `tiles` (at most 4) times sixteen.
    void push_tiles(const vec* scores, int tiles, int index, int end) {
#if defined(__AVX512F__)
        const __m512 limit = _mm512_set1_ps(limit_);
        uint64_t mask = 0;
        for (int t = 0; t < tiles; t++) mask |= (uint64_t)_mm512_cmp_ps_mask((__m512)scores[t], limit, _CMP_GT_OQ) << (16 * t);
        if (end - index < 64) mask &= end > index ? (1ull << (end - index)) - 1 : 0;
        if (!mask) return;
        const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        float* to = score_.data() + count_;
        int32_t* at = index_.data() + count_;
        for (int t = 0; t < tiles; t++) {  // without a branch for each: they would be guessed wrong
            const __mmask16 some = (__mmask16)(mask >> (16 * t));
            _mm512_storeu_ps(to, _mm512_maskz_compress_ps(some, (__m512)scores[t]));
            _mm512_storeu_si512(at, _mm512_maskz_compress_epi32(some, (__m512i)(lane + (index + t * LANES))));
            to += __builtin_popcount(some), at += __builtin_popcount(some);
        }
        count_ = (int)(to - score_.data());
        if (count_ + ROOM > (int)score_.size()) trim();
#else
        for (int t = 0; t < tiles; t++) push(scores[t], index + t * LANES, end);
#endif
    }
    // The first `count` scores, those of the indices `at`, which ascend.
    void push_at(vec scores, ivec at, int count) {
#if defined(__AVX512F__)
        __mmask16 mask = _mm512_cmp_ps_mask((__m512)scores, _mm512_set1_ps(limit_), _CMP_GT_OQ);
        if (count < LANES) mask &= (1u << count) - 1;
        if (!mask) return;
        _mm512_storeu_ps(score_.data() + count_, _mm512_maskz_compress_ps(mask, (__m512)scores));
        _mm512_storeu_si512(index_.data() + count_, _mm512_maskz_compress_epi32(mask, (__m512i)at));
        count_ += __builtin_popcount(mask);
#else
        for (int i = 0; i < LANES && i < count; i++)
            if (scores[i] > limit_) score_[count_] = scores[i], index_[count_++] = at[i];
#endif
        if (count_ + ROOM > (int)score_.size()) trim();
    }

    // A score must be larger than this to be among the best.
    float limit() const { return limit_; }

    // The k-th best score so far; minus infinity while there are fewer.
    float kth_best() { return count_ < k_ ? -__builtin_inff() : kth(0); }

    // Scores under `least` are not among the best: k others reach it.
    void leave_out_under(float least) { limit_ = std::max(limit_, std::nextafter(least, -__builtin_inff())); }

    // Takes in the candidates of a stream whose indices all come after those seen here.
    void append(const Selection& later) {
        for (int i = 0; i < later.count_; i += LANES) {
            ivec at;
            std::memcpy(&at, later.index_.data() + i, sizeof at);
            push_at(load(later.score_.data() + i), at, later.count_ - i);
        }
    }

    // The indices of the k best, ascending. At least k scores were pushed.
    const int32_t* finish() {
        cut();
        return index_.data();
    }

  private:
    static constexpr int ROOM = 5 * LANES;   // behind the candidates: four tiles more, and sixteen that are written but not counted
    static constexpr int CLOSE = 4 * LANES;  // how many candidates too many are not worth another look

    // Keeps the k best candidates, in order of index.
    void cut() {
        if (count_ <= k_) return;
        limit_ = kth(0);
        int greater = 0, equal = 0, kept = 0;
        for (int i = 0; i < count_; i++) greater += score_[i] > limit_, equal += score_[i] == limit_;
        if (greater + equal == k_) return keep_from_limit();
        for (int i = 0, room = k_ - greater; i < count_; i++) {
            bool tied = score_[i] == limit_ && room > 0, stays = tied || score_[i] > limit_;
            score_[kept] = score_[i], index_[kept] = index_[i];  // written even when it goes: cheaper than a branch
            room -= tied, kept += stays;
        }
        count_ = kept;
    }
    // Keeps the k best candidates and at most a few others; the k best in full where so many are alike.
    void trim() {
        limit_ = kth(CLOSE);
        const int before = count_;
        keep_from_limit();
        if (count_ + ROOM + before / 4 > (int)score_.size()) cut();
    }
    // Keeps the candidates from the limit on. They go to other arrays: a load from what was just stored nearby would wait.
    void keep_from_limit() {
        const float* from = score_.data();
        const int32_t* at = index_.data();
        float* to = other_score_.data();
        int32_t* to_at = other_index_.data();
        int i = 0;
#if defined(__AVX512F__)
        const __m512 limit = _mm512_set1_ps(limit_);
        for (; i + LANES <= count_; i += LANES) {
            const __m512 v = _mm512_loadu_ps(from + i);
            const __mmask16 stays = _mm512_cmp_ps_mask(v, limit, _CMP_GE_OQ);
            _mm512_storeu_ps(to, _mm512_maskz_compress_ps(stays, v));
            _mm512_storeu_si512(to_at, _mm512_maskz_compress_epi32(stays, _mm512_loadu_si512(at + i)));
            to += __builtin_popcount(stays), to_at += __builtin_popcount(stays);
        }
#endif
        for (; i < count_; i++) {
            *to = from[i], *to_at = at[i];
            to += from[i] >= limit_, to_at += from[i] >= limit_;
        }
        count_ = (int)(to - other_score_.data());
        score_.swap(other_score_), index_.swap(other_index_);
    }

    // The k-th largest candidate, or a lower value that at most k + `close` candidates reach. Limits are guessed between two
    // that are known, as if candidates lay evenly between them; what they leave is searched bit by bit.
    float kth(int close) {
        for (int i = count_; i < count_ + LANES; i++) score_[i] = score_[0];  // the last vector in full
        vec low = load(score_.data()), high = low;
        for (int i = LANES; i < count_; i += LANES) low = smaller(load(score_.data() + i), low), high = larger(load(score_.data() + i), high);
        float from = -maximum(-low), to = maximum(high);
        int reach = count_, past = 0;  // how many reach `from`; how many lie at or past `to` (of the first, none past it)
        for (int round = 0; round < 8 && reach > k_ + close && reach - past > CLOSE; round++) {
            const float middle = from + (to - from) * (((float)(reach - k_) - 0.5f * (float)close) / (float)(reach - past));
            if (!(middle > from && middle < to)) break;
            const int count = count_from(middle);
            if (count >= k_) from = middle, reach = count;
            else to = middle, past = count;
        }
        if (reach <= k_ + close) return from;
        return kth_by_bits(keep_between(from, past ? to : __builtin_inff()), k_ - past);
    }
    int count_from(float limit) const {
        ivec count = {};
        for (int i = 0; i + LANES <= count_; i += LANES) count -= load(score_.data() + i) >= limit;
        int total = 0;
        for (int i = 0; i < LANES; i++) total += count[i];
        for (int i = count_ / LANES * LANES; i < count_; i++) total += score_[i] >= limit;
        return total;
    }
    // Ordered bits of the candidates from `low` on and under `high` (from infinity on, if that is it) go to left_.
    int keep_between(float low, float high) {
        const bool open = high == __builtin_inff();
        uint32_t* to = left_.data();
        int i = 0;
#if defined(__AVX512F__)
        for (; i + LANES <= count_; i += LANES) {
            const vec v = load(score_.data() + i);
            const uvec key = (uvec)v ^ ((uvec)((ivec)v >> 31) | 0x80000000u);
            __mmask16 stays = _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(low), _CMP_GE_OQ);
            if (!open) stays &= _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(high), _CMP_LT_OQ);
            _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(stays, (__m512i)key));
            to += __builtin_popcount(stays);
        }
#endif
        for (; i < count_; i++) {
            *to = ordered(score_[i]);
            to += score_[i] >= low && (open || score_[i] < high);
        }
        return (int)(to - left_.data());
    }
    // The k-th largest of the first n of left_, from the highest bit in which they differ down.
    float kth_by_bits(int n, int k) {
        uint32_t all = left_[0], any = left_[0];
        for (int i = 1; i < n; i++) all &= left_[i], any |= left_[i];
        for (uint32_t bit = 1u << 31; bit && n > 1; bit >>= 1) {
            if (!((all ^ any) & bit)) continue;
            const int ones = count_ones(n, bit);
            const bool one = k <= ones;
            n = keep_bit(n, bit, one);
            if (!one) k -= ones;
        }
        const uint32_t found = left_[0], bits = found & 0x80000000u ? found ^ 0x80000000u : ~found;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    int count_ones(int n, uint32_t bit) const {
        int ones = 0, i = 0;
#if defined(__AVX512F__)
        const __m512i test = _mm512_set1_epi32((int)bit);
        for (; i + LANES <= n; i += LANES) ones += __builtin_popcount(_mm512_test_epi32_mask(_mm512_loadu_si512(left_.data() + i), test));
#endif
        for (; i < n; i++) ones += (left_[i] & bit) != 0;
        return ones;
    }
    // Keeps those of left_ whose `bit` is as asked for.
    int keep_bit(int n, uint32_t bit, bool one) {
        const uint32_t* from = left_.data();
        uint32_t* to = other_left_.data();
        int i = 0;
#if defined(__AVX512F__)
        const __m512i test = _mm512_set1_epi32((int)bit);
        const __mmask16 flip = one ? 0 : 0xFFFF;
        for (; i + LANES <= n; i += LANES) {
            const __m512i keys = _mm512_loadu_si512(from + i);
            const __mmask16 stays = _mm512_test_epi32_mask(keys, test) ^ flip;
            _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(stays, keys));
            to += __builtin_popcount(stays);
        }
#endif
        for (; i < n; i++) {
            *to = from[i];
            to += ((from[i] & bit) != 0) == one;
        }
        n = (int)(to - other_left_.data());
        left_.swap(other_left_);
        return n;
    }

    int k_ = 0, count_ = 0;
    float limit_ = 0;
    std::vector<float> score_, other_score_;
    std::vector<int32_t> index_, other_index_;
    std::vector<uint32_t> left_, other_left_;
};

}  // namespace nautile
