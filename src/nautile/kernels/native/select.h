// The k largest of n scores with a defined answer: ties go to the lowest index. Threshold by radix on the scores' bits; long
// lists are first thinned with a guess from every sixteenth score, which costs one pass and never changes the answer.
#pragma once
#include <vector>

#include "vec.h"

namespace nautile {

// Bits that order like the float. Scores carry no negative zero (see the indexer), so equal floats have equal bits.
static inline uint32_t ordered(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

class Selector {
  public:
    // Writes the indices of the k largest of scores[0 .. n), ascending, to out. 0 < k < n.
    void select(const float* scores, int n, int k, int32_t* out) {
        if (n >= 8 * k && n >= 4096 && thin(scores, n, k)) {
            choose(kept_.data(), where_.data(), (int)kept_.size(), k, out);
        } else {
            choose(scores, nullptr, n, k, out);
        }
    }

  private:
    static constexpr int STRIDE = 16;

    // Keeps the scores above a guess of rank a little beyond k. False when fewer than k are above it.
    bool thin(const float* scores, int n, int k) {
        int samples = n / STRIDE;
        sample_.resize(samples);
        for (int i = 0; i < samples; i++) sample_[i] = scores[i * STRIDE];
        int rank = k / STRIDE + k / (4 * STRIDE) + 16;
        if (rank >= samples) return false;
        float guess = kth(sample_.data(), samples, rank);
        kept_.resize(n + LANES), where_.resize(n + LANES);
        int count = above(scores, n, guess);
        kept_.resize(count), where_.resize(count);
        return count > k;
    }

    int above(const float* scores, int n, float guess) {
        int count = 0, i = 0;
#if defined(__AVX512F__)
        __m512 limit = _mm512_set1_ps(guess);
        __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (; i + LANES <= n; i += LANES) {
            __m512 v = _mm512_loadu_ps(scores + i);
            __mmask16 mask = _mm512_cmp_ps_mask(v, limit, _CMP_GT_OQ);
            if (!mask) continue;
            _mm512_storeu_ps(kept_.data() + count, _mm512_maskz_compress_ps(mask, v));
            __m512i at = _mm512_add_epi32(index, _mm512_set1_epi32(i));
            _mm512_storeu_si512(where_.data() + count, _mm512_maskz_compress_epi32(mask, at));
            count += __builtin_popcount(mask);
        }
#endif
        for (; i < n; i++)
            if (scores[i] > guess) kept_[count] = scores[i], where_[count++] = i;
        return count;
    }

    // The k-th largest of n scores, as a float.
    float kth(const float* scores, int n, int k) {
        left_.resize(n);
        for (int i = 0; i < n; i++) left_[i] = ordered(scores[i]);
        static constexpr int SHIFT[3] = {21, 10, 0}, BITS[3] = {11, 11, 10};
        uint32_t found = 0;
        for (int level = 0; level < 3; level++) {
            uint32_t mask = (1u << BITS[level]) - 1;
            std::memset(bins_, 0, sizeof(int) * (mask + 1));
            for (uint32_t key : left_) bins_[(key >> SHIFT[level]) & mask]++;
            uint32_t bin = mask;
            for (; k > bins_[bin]; bin--) k -= bins_[bin];
            found |= bin << SHIFT[level];
            size_t kept = 0;
            for (uint32_t key : left_) {
                left_[kept] = key;
                kept += ((key >> SHIFT[level]) & mask) == bin;
            }
            left_.resize(kept);
        }
        uint32_t bits = found & 0x80000000u ? found ^ 0x80000000u : ~found;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }

    void choose(const float* scores, const int32_t* where, int n, int k, int32_t* out) {
        float threshold = kth(scores, n, k);
        int greater = 0;
        for (int i = 0; i < n; i++) greater += scores[i] > threshold;
        int room = k - greater, count = 0;
        for (int i = 0; i < n && count < k; i++) {
            bool tied = scores[i] == threshold && room > 0;
            out[count] = where ? where[i] : i;  // written even when not taken: cheaper than a branch
            room -= tied;
            count += tied || scores[i] > threshold;
        }
    }

    std::vector<float> sample_, kept_;
    std::vector<int32_t> where_;
    std::vector<uint32_t> left_;
    int bins_[2048];
};

}  // namespace nautile
