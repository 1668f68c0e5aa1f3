// Routed experts in MXFP4 on the host's cores, for a few tokens: what a card without room for an expert need not wait for.
//
// An expert is one run of bytes: w1 codes [I, d / 2], s1 [I, d / 32], w3, s3 the same, w2 codes [d, I / 2], s2 [d, I / 32].
// Two codes a byte, the low nibble is the even input. Reading those bytes once is the whole cost, so a code becomes a
// bfloat16 by one table lookup and goes straight into a bfloat16 dot product; the power of two of a group of 32 inputs
// multiplies the group's sum. Threads take rows; every row is summed by one thread in one order, so the result does not
// depend on how many threads there are.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int kRowsPerTask = 16;

using Half = uint16_t;  // bfloat16

Half to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits += 0x7FFF + ((bits >> 16) & 1);
  return static_cast<Half>(bits >> 16);
}

float from_half(Half value) {
  uint32_t bits = static_cast<uint32_t>(value) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

float power(uint8_t scale) {  // e8m0: 2^(scale - 127); code 0, 2^-127, counts as zero
  uint32_t bits = static_cast<uint32_t>(scale) << 23;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

constexpr Half kTable[16] = {0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0,
                             0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0};

float dot_plain(const uint8_t* codes, const uint8_t* scales, const Half* even, const Half* odd, int64_t from, int64_t to) {
  float total = 0;
  for (int64_t group = from / 16; group < to / 16; ++group) {
    float sum = 0;
    for (int64_t at = group * 16; at < group * 16 + 16; ++at)
      sum += from_half(kTable[codes[at] & 15]) * from_half(even[at]) + from_half(kTable[codes[at] >> 4]) * from_half(odd[at]);
    total += sum * power(scales[group]);
  }
  return total;
}

// One row of ``bytes`` codes times one token, whose even and odd elements lie apart.
float dot(const uint8_t* codes, const uint8_t* scales, const Half* even, const Half* odd, int64_t bytes) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  const __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kTable)));
  const __m512i first = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t at = 0;
  for (; at + 256 <= bytes; at += 256) {
    const __m512i raw = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + at / 16)));
    const __m512 factors = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 23));
    _mm_prefetch(reinterpret_cast<const char*>(codes + at + 2048), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(codes + at + 2112), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(codes + at + 2176), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(codes + at + 2240), _MM_HINT_T0);
    for (int part = 0; part < 8; ++part) {
      const int64_t here = at + part * 32;
      const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + here)));
      const __m512i low = _mm512_permutexvar_epi16(code, table);  // bit 4 of the index does not matter: the table repeats
      const __m512i high = _mm512_permutexvar_epi16(_mm512_srli_epi16(code, 4), table);
      __m512 group = _mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)low, (__m512bh)_mm512_loadu_si512(even + here));
      group = _mm512_dpbf16_ps(group, (__m512bh)high, (__m512bh)_mm512_loadu_si512(odd + here));
      const __m512i which = _mm512_add_epi32(first, _mm512_set1_epi32(2 * part));
      sum[part & 1] = _mm512_fmadd_ps(group, _mm512_permutexvar_ps(which, factors), sum[part & 1]);
    }
  }
  float total = _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
  return at == bytes ? total : total + dot_plain(codes, scales, even, odd, at, bytes);
#else
  return dot_plain(codes, scales, even, odd, 0, bytes);
#endif
}

struct Shape {
  int64_t hidden, inner;
  double limit;
};

struct Pair {  // one expert for one token
  const uint8_t* expert;
  int64_t token;
  float weight;
};

class Team {
 public:
  Team(int threads, Shape shape, int64_t most_tokens, int64_t most_pairs)
      : shape_(shape), halves_(most_tokens * shape.hidden), middle_(most_pairs * shape.inner), working_(0) {
    for (int index = 0; index < threads; ++index) threads_.emplace_back([this] { work(); });
  }

  ~Team() {
    stop_ = true;
    round_.fetch_add(1);
    round_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  // Pairs sorted by expert; out [tokens, d] receives the sums. Returns at once; ``wait`` waits.
  void start(const Pair* pairs, int64_t count, const Half* x, int64_t tokens, float* out) {
    pairs_.assign(pairs, pairs + count);
    tokens_ = tokens;
    out_ = out;
    const int64_t half = shape_.hidden / 2;
    for (int64_t token = 0; token < tokens; ++token)
      for (int64_t at = 0; at < half; ++at) {
        halves_[token * shape_.hidden + at] = x[token * shape_.hidden + 2 * at];
        halves_[token * shape_.hidden + half + at] = x[token * shape_.hidden + 2 * at + 1];
      }
    groups_.clear();
    for (int64_t pair = 0; pair < count; ++pair)
      if (pair == 0 || pairs[pair].expert != pairs[pair - 1].expert) groups_.push_back(pair);
    groups_.push_back(count);
    up_next_ = 0;
    up_done_ = 0;
    down_next_ = 0;
    working_.store(static_cast<int>(threads_.size()), std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
  }

  void wait() {
    while (working_.load(std::memory_order_acquire)) pause();
  }

 private:
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }

  // While tokens are decoded the next round comes within a millisecond or two, and waking sixteen sleeping threads of a virtual
  // machine takes a tenth of one: so they sleep only when nothing has come for longer than that.
  void spin(uint64_t seen) const {
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(4);
    while (round_.load(std::memory_order_acquire) == seen) {
      for (int again = 0; again < 64 && round_.load(std::memory_order_relaxed) == seen; ++again) pause();
      if (std::chrono::steady_clock::now() > end) return;
      std::this_thread::yield();  // whoever else wants this core
    }
  }

  void work() {
    uint64_t seen = 0;
    for (;;) {
      spin(seen);
      round_.wait(seen, std::memory_order_acquire);
      seen = round_.load(std::memory_order_acquire);
      if (stop_) return;
      gate_up();
      down();
      working_.fetch_sub(1, std::memory_order_release);
    }
  }

  int64_t tasks(int64_t rows) const { return (rows + kRowsPerTask - 1) / kRowsPerTask; }

  void gate_up() {
    const int64_t per = tasks(shape_.inner), all = per * (static_cast<int64_t>(groups_.size()) - 1);
    const int64_t bytes = shape_.hidden / 2, matrix = shape_.inner * (bytes + bytes / 16);
    for (int64_t task; (task = up_next_.fetch_add(1, std::memory_order_relaxed)) < all;) {
      const int64_t begin = groups_[task / per], end = groups_[task / per + 1];
      const uint8_t* w1 = pairs_[begin].expert;
      const uint8_t* s1 = w1 + shape_.inner * bytes;
      const int64_t last = std::min((task % per + 1) * kRowsPerTask, shape_.inner);
      for (int64_t row = task % per * kRowsPerTask; row < last; ++row)
        for (int64_t pair = begin; pair < end; ++pair) {
          const Half* even = &halves_[pairs_[pair].token * shape_.hidden];
          const Half* odd = even + bytes;
          float gate = dot(w1 + row * bytes, s1 + row * (bytes / 16), even, odd, bytes);
          float up = dot(w1 + matrix + row * bytes, s1 + matrix + row * (bytes / 16), even, odd, bytes);
          const float limit = static_cast<float>(shape_.limit);
          gate = std::min(gate, limit);
          up = std::max(-limit, std::min(up, limit));
          const float value = pairs_[pair].weight * up * gate / (1.0f + std::exp(-gate));
          middle_[pair * shape_.inner + (row % 2) * (shape_.inner / 2) + row / 2] = to_half(value);
        }
      up_done_.fetch_add(1, std::memory_order_release);
    }
    while (up_done_.load(std::memory_order_acquire) < all) pause();
  }

  void down() {
    const int64_t all = tasks(shape_.hidden), bytes = shape_.inner / 2;
    const int64_t before = 2 * shape_.inner * (shape_.hidden / 2 + shape_.hidden / 32);
    const int64_t count = static_cast<int64_t>(pairs_.size());
    for (int64_t task; (task = down_next_.fetch_add(1, std::memory_order_relaxed)) < all;) {
      const int64_t first = task * kRowsPerTask, last = std::min(first + kRowsPerTask, shape_.hidden);
      for (int64_t token = 0; token < tokens_; ++token)
        for (int64_t row = first; row < last; ++row) out_[token * shape_.hidden + row] = 0;
      for (int64_t begin = 0; begin < count;) {
        int64_t end = begin + 1;
        while (end < count && pairs_[end].expert == pairs_[begin].expert) ++end;
        const uint8_t* w2 = pairs_[begin].expert + before;
        const uint8_t* s2 = w2 + shape_.hidden * bytes;
        for (int64_t row = first; row < last; ++row)
          for (int64_t pair = begin; pair < end; ++pair) {
            const Half* even = &middle_[pair * shape_.inner];
            const float value = dot(w2 + row * bytes, s2 + row * (bytes / 16), even, even + bytes, bytes);
            out_[pairs_[pair].token * shape_.hidden + row] += value;
          }
        begin = end;
      }
    }
  }

  Shape shape_;
  std::vector<std::thread> threads_;
  std::vector<Pair> pairs_;
  std::vector<int64_t> groups_;
  std::vector<Half> halves_, middle_;
  int64_t tokens_ = 0;
  float* out_ = nullptr;
  std::atomic<uint64_t> round_{0};
  std::atomic<int64_t> up_next_{0}, up_done_{0}, down_next_{0};
  std::atomic<int> working_;
  std::atomic<bool> stop_{false};
};

}  // namespace

extern "C" {

void* team_new(int64_t threads, int64_t hidden, int64_t inner, double limit, int64_t most_tokens, int64_t most_pairs) {
  return new Team(static_cast<int>(threads), {hidden, inner, limit}, most_tokens, most_pairs);
}

void team_free(void* team) { delete static_cast<Team*>(team); }

void team_start(void* team, const Pair* pairs, int64_t count, const Half* x, int64_t tokens, float* out) {
  static_cast<Team*>(team)->start(pairs, count, x, tokens, out);
}

void team_wait(void* team) { static_cast<Team*>(team)->wait(); }

// Copy experts from host memory into slots on a card: ``blobs`` [count] into slots first, first + 1, ... of six arenas with
// ``sizes`` bytes a slot, by ``copy`` (cuMemcpyHtoDAsync's signature; null: memcpy). Returns the first error, 0 for none.
using Copy = int (*)(uint64_t target, const void* source, size_t bytes, void* stream);

int stream_experts(Copy copy, const uint64_t* arenas, const int64_t* sizes, int64_t first, const uint8_t* const* blobs,
                   int64_t count, void* stream) {
  for (int64_t index = 0; index < count; ++index) {
    const uint8_t* source = blobs[index];
    for (int part = 0; part < 6; ++part) {
      const uint64_t target = arenas[part] + static_cast<uint64_t>((first + index) * sizes[part]);
      const size_t bytes = static_cast<size_t>(sizes[part]);
      if (copy == nullptr) {
        std::memcpy(reinterpret_cast<void*>(target), source, bytes);
      } else if (const int error = copy(target, source, bytes, stream)) {
        return error;
      }
      source += sizes[part];
    }
  }
  return 0;
}

// Sum of 64-bit words, so that reading cannot be left out: the host's read rate with ``threads`` threads.
uint64_t read_words(const uint64_t* data, int64_t words, int64_t threads) {
  std::vector<uint64_t> sums(threads * 8, 0);
  std::vector<std::thread> team;
  for (int64_t index = 0; index < threads; ++index)
    team.emplace_back([=, &sums] {
      uint64_t a = 0, b = 0, c = 0, d = 0;
      const int64_t from = words / threads * index, to = from + words / threads / 4 * 4;
      for (int64_t at = from; at < to; at += 4) a += data[at], b += data[at + 1], c += data[at + 2], d += data[at + 3];
      sums[index * 8] = a ^ b ^ c ^ d;
    });
  for (auto& thread : team) thread.join();
  uint64_t total = 0;
  for (uint64_t sum : sums) total ^= sum;
  return total;
}

// 1: bfloat16 products of AVX-512; 0: plain loops.
int64_t fast_path() {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  return 1;
#else
  return 0;
#endif
}
}
