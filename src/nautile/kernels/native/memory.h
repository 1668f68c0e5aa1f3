// Memory of the kernels: whole cache lines, and large pages for whatever is large. A weight stream that meets the end of a page
// every 4 KB loses a fifth of its speed, and rows picked from a long context miss the translation buffer one by one.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nautile {

constexpr int64_t LARGE_PAGE = 2 << 20;

// Asks for large pages where the system gives them on request; only pages that nobody has touched yet become large at once.
static inline void ask_for_large_pages(void* begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const int64_t first = ((int64_t)begin + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
    const int64_t end = ((int64_t)begin + bytes) / LARGE_PAGE * LARGE_PAGE;
    if (end > first) madvise((void*)first, (size_t)(end - first), MADV_HUGEPAGE);  // a refusal changes the speed only
#else
    (void)begin, (void)bytes;
#endif
}

template <class T> struct Free { void operator()(T* p) const { std::free(p); } };
template <class T> using Buffer = std::unique_ptr<T[], Free<T>>;
// `count` zeros and room for a vector behind them. Throws std::bad_alloc.
template <class T> static Buffer<T> allocate(int64_t count) {
    int64_t bytes = (count + 64) * (int64_t)sizeof(T), unit = bytes >= LARGE_PAGE ? LARGE_PAGE : 64;
    bytes = (bytes + unit - 1) / unit * unit;
    void* p = std::aligned_alloc(unit, bytes);
    if (!p) throw std::bad_alloc();
    ask_for_large_pages(p, bytes);
    std::memset(p, 0, bytes);
    return Buffer<T>((T*)p);
}

// Many arrays that live as long as their owner, one after another in large pages.
class Slab {
  public:
    template <class T> T* take(int64_t count) {
        const int64_t bytes = (count * (int64_t)sizeof(T) + 64 + 63) / 64 * 64;
        if (bytes > left_) chunks_.push_back(allocate<char>(left_ = bytes > CHUNK ? bytes : CHUNK)), next_ = chunks_.back().get();
        T* taken = (T*)next_;
        next_ += bytes, left_ -= bytes, taken_ += bytes;
        return taken;
    }
    int64_t taken() const { return taken_; }  // bytes

  private:
    static constexpr int64_t CHUNK = 8 * LARGE_PAGE - 64;
    std::vector<Buffer<char>> chunks_;
    char* next_ = nullptr;
    int64_t left_ = 0, taken_ = 0;
};

}  // namespace nautile
