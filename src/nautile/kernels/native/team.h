// A team of threads that runs one job at a time: the caller is member 0. Between jobs and at barriers a member spins for some
// microseconds, because a decode step meets a hundred barriers, and then sleeps in the kernel, so an idle runner costs nothing.
#pragma once
#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace nautile {

class Team {
  public:
    explicit Team(int size) : size_(size) {
        for (int member = 1; member < size; member++) threads_.emplace_back([this, member] { serve(member); });
    }
    ~Team() {
        job_ = nullptr;
        start();
        for (auto& thread : threads_) thread.join();
    }
    int size() const { return size_; }

    // Runs job(member) on every member and returns when all are done.
    void run(const std::function<void(int)>& job) {
        job_ = &job;
        start();
        job(0);
        barrier();
    }

    void barrier() {
        if (size_ == 1) return;
        uint32_t phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            phase_.notify_all();
        } else {
            wait_while(phase_, phase);
        }
    }

  private:
    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#else
        std::this_thread::yield();
#endif
    }
    static void wait_while(std::atomic<uint32_t>& word, uint32_t old) {
        for (int spin = 0; spin < 2000; spin++) {
            if (word.load(std::memory_order_acquire) != old) return;
            pause();
        }
        word.wait(old, std::memory_order_acquire);
    }
    void start() {
        if (size_ == 1) return;
        epoch_.fetch_add(1, std::memory_order_release);
        epoch_.notify_all();
    }
    void serve(int member) {
        for (uint32_t seen = 0;;) {
            wait_while(epoch_, seen);
            seen++;
            if (!job_) return;
            (*job_)(member);
            barrier();
        }
    }

    const int size_;
    const std::function<void(int)>* job_ = nullptr;
    alignas(64) std::atomic<uint32_t> epoch_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<int> arrived_{0};
    std::vector<std::thread> threads_;
};

}  // namespace nautile
