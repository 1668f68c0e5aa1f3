// Where the time of a step goes: every member reads a clock at the end of each piece of work (some 150 readings a step, half a
// microsecond in all), so the counters are always on.
#pragma once
#include <chrono>
#include <cstdint>

namespace nautile {

// Order of `PARTS` in library.py.
enum Part { PROJECTIONS, COMPRESSION, INDEXER, ATTENTION, MIXING, EXPERTS, HEAD, REST, WAITING, PARTS };

class Clock {
  public:
    void start() { last_ = ticks(); }
    // What was done since the last reading belongs to `part`.
    void lap(Part part) {
        int64_t now = ticks();
        spent_[part] += now - last_, last_ = now;
    }
    int64_t take(int part) {
        int64_t spent = spent_[part];
        spent_[part] = 0;
        return spent;
    }

  private:
    static int64_t ticks() {
#if defined(__x86_64__)
        return (int64_t)__builtin_ia32_rdtsc();
#else
        return std::chrono::steady_clock::now().time_since_epoch().count();
#endif
    }
    int64_t last_ = 0, spent_[PARTS] = {};
};

}  // namespace nautile
