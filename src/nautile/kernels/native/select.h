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
        size_t room = (size_t)std::max(2 * k, 512) + LANES;
        if (score_.size() < room) score_.resize(room), index_.resize(room), left_.resize(room);
    }

    // Scores of `index` .. `index` + 15; those at or past `end` are not there.
    void push(vec scores, int index, int end) {
        const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        ivec at = lane + index;
        push_at(scores, at, end > index ? end - index : 0);
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
        if (count_ + LANES > (int)score_.size()) cut();
    }

    // A score must be larger than this to be among the best.
    float limit() const { return limit_; }

    // The k-th best score so far; minus infinity while there are fewer.
    float kth_best() { return count_ < k_ ? -__builtin_inff() : kth(); }

    // Takes in the candidates of a stream whose indices all come after those seen here.
    void append(const Selection& later) {
        for (int i = 0; i < later.count_; i++) {
            if (later.score_[i] > limit_) score_[count_] = later.score_[i], index_[count_++] = later.index_[i];
            if (count_ + LANES > (int)score_.size()) cut();
        }
    }

    // The indices of the k best, ascending. At least k scores were pushed.
    const int32_t* finish() {
        cut();
        return index_.data();
    }

  private:
    // Keeps the k best candidates, in order of index.
    void cut() {
        if (count_ <= k_) return;
        limit_ = kth();
        int greater = 0, equal = 0, kept = 0;
        for (int i = 0; i < count_; i++) greater += score_[i] > limit_, equal += score_[i] == limit_;
        if (greater + equal == k_) {
            count_ = keep_if(count_, [this](vec v) { return v >= limit_; }, score_.data(), index_.data());
            return;
        }
        for (int i = 0, room = k_ - greater; i < count_; i++) {
            bool tied = score_[i] == limit_ && room > 0, stays = tied || score_[i] > limit_;
            score_[kept] = score_[i], index_[kept] = index_[i];  // written even when it goes: cheaper than a branch
            room -= tied, kept += stays;
        }
        count_ = kept;
    }

    // Moves the elements of two arrays for which test(element of the first) holds to their fronts; returns how many.
    template <class Test> static int keep_if(int n, Test test, float* first, int32_t* second) {
        int kept = 0, i = 0;
#if defined(__AVX512F__)
        for (; i + LANES <= n; i += LANES) {
            vec v = load(first + i);
            __mmask16 mask = _mm512_movepi32_mask((__m512i)test(v));
            __m512i other = _mm512_loadu_si512(second + i);
            _mm512_storeu_ps(first + kept, _mm512_maskz_compress_ps(mask, (__m512)v));
            _mm512_storeu_si512(second + kept, _mm512_maskz_compress_epi32(mask, other));
            kept += __builtin_popcount(mask);
        }
#endif
        for (; i < n; i++) {
            vec v = spread(first[i]);
            bool stays = test(v)[0];
            first[kept] = first[i], second[kept] = second[i];
            kept += stays;
        }
        return kept;
    }

    // The k-th largest candidate, by radix on ordered bits.
    float kth() {
        int n = count_, k = k_;
        for (int i = 0; i < n; i++) left_[i] = ordered(score_[i]);
        static constexpr int SHIFT[3] = {21, 10, 0}, BITS[3] = {11, 11, 10};
        uint32_t found = 0;
        for (int level = 0; level < 3; level++) {
            const int shift = SHIFT[level];
            const uint32_t mask = (1u << BITS[level]) - 1;
            uint32_t bin = mask;
            std::memset(bins_, 0, sizeof bins_);
            for (int i = 0; i < n; i++) bins_[i % 2][(left_[i] >> shift) & mask]++;  // two tables: equal neighbours do not wait
            for (; k > bins_[0][bin] + bins_[1][bin]; bin--) k -= bins_[0][bin] + bins_[1][bin];
            found |= bin << shift;
            if (level < 2) n = keep_bin(n, shift, mask, bin);
        }
        uint32_t bits = found & 0x80000000u ? found ^ 0x80000000u : ~found;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    int keep_bin(int n, int shift, uint32_t mask, uint32_t bin) {
        int kept = 0, i = 0;
#if defined(__AVX512F__)
        for (; i + LANES <= n; i += LANES) {
            __m512i keys = _mm512_loadu_si512(left_.data() + i);
            __m512i at = _mm512_and_si512(_mm512_srli_epi32(keys, shift), _mm512_set1_epi32((int)mask));
            __mmask16 same = _mm512_cmpeq_epi32_mask(at, _mm512_set1_epi32((int)bin));
            _mm512_storeu_si512(left_.data() + kept, _mm512_maskz_compress_epi32(same, keys));
            kept += __builtin_popcount(same);
        }
#endif
        for (; i < n; i++) {
            uint32_t key = left_[i];
            left_[kept] = key;
            kept += ((key >> shift) & mask) == bin;
        }
        return kept;
    }

    int k_ = 0, count_ = 0;
    float limit_ = 0;
    std::vector<float> score_;
    std::vector<int32_t> index_;
    std::vector<uint32_t> left_;
    int bins_[2][2048];
};

}  // namespace nautile
