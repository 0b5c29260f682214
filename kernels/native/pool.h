// Threads for the ops' loops, which nobody waits for who has not begun.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tucka {

// OpenMP's barrier waits for every thread, also for one that sleeps or whose core the scheduler has given to somebody
// else, which on a server with few cores is the process that answers its clients. Here items are taken one by one by who
// is there, the caller first of all, and it waits for those alone who are at one.
class Pool {
 public:
  // The process's own, which is never taken down: its threads end with the process.
  static Pool& own() { return *own_; }

  // f(i) for i < items, on the caller's thread and up to `threads` - 1 more. Loops that others begin meanwhile, in
  // another thread or within f, run on their own thread alone. Throws what the first f threw that did.
  template <class F>
  void run(int64_t items, int64_t threads, const F& f) {
    if (taken_.exchange(true, std::memory_order_acquire)) {
      for (int64_t i = 0; i < items; i++) f(i);
      return;
    }
    try {
      for (; count_ < threads - 1; count_++) std::thread(&Pool::work, this, count_).detach();
    } catch (const std::system_error&) {  // no more threads are to be had: those who are there take all items
    }
    loop_ = [](const void* own, int64_t i) { (*static_cast<const F*>(own))(i); };
    f_ = &f;
    items_ = items;
    failing_ = false;
    helpers_ = threads - 1;
    next_.store(0, std::memory_order_relaxed);
    const uint32_t open = turn_.fetch_add(1) + 1;
    turn_.notify_all();
    take();
    // From here on nobody joins; whoever saw the turn before has counted himself in.
    turn_.store(open + 1);
    for (uint32_t inside, spins = 0; (inside = inside_.load()) != 0;)
      if (++spins < kPatience) pause();
      else inside_.wait(inside);
    std::exception_ptr failure;
    std::swap(failure, failure_);
    taken_.store(false, std::memory_order_release);
    if (failure) std::rethrow_exception(failure);
  }

 private:
  // Looks at the turn before a thread gives way to others on its core, and times that it does so before it sleeps: about
  // a millisecond, which is longer than a step's Python. With 50 times the engine alone makes 1,290 tokens per second
  // in place of 1,350 (8 layers of 512, eight streams, two cores with AVX512-BF16), and over HTTP as many.
  static constexpr int kLooks = 32, kYields = 1000;
  // Looks at who is still inside before the caller sleeps, which frees its core for a thread that has none. With 30 looks
  // it is 990 tokens per second over HTTP in place of 1,050.
  static constexpr uint32_t kPatience = 1000;

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  void take() {
    try {
      for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < items_;) loop_(f_, i);
    } catch (...) {
      if (!failing_.exchange(true)) failure_ = std::current_exception();
      next_.store(items_, std::memory_order_relaxed);
    }
  }

  // The turn after `seen`: soon, or some time after it was slept for.
  uint32_t next_turn(uint32_t seen) {
    for (int yields = 0; yields < kYields; yields++) {
      for (int looks = 0; looks < kLooks; looks++) {
        const uint32_t turn = turn_.load(std::memory_order_acquire);
        if (turn != seen) return turn;
        pause();
      }
      sched_yield();
    }
    turn_.wait(seen, std::memory_order_acquire);
    return turn_.load(std::memory_order_acquire);
  }

  void work(int64_t number) {
    for (uint32_t turn = 0;;) {
      turn = next_turn(turn);
      if (turn % 2 == 0) continue;
      inside_.fetch_add(1);
      if (turn_.load() == turn && number < helpers_) take();
      if (inside_.fetch_sub(1) == 1) inside_.notify_one();
    }
  }

  static Pool* own_;
  static const int forked_;

  // Odd while a loop is open to join.
  alignas(64) std::atomic<uint32_t> turn_{0};
  alignas(64) std::atomic<uint32_t> inside_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<bool> taken_{false};
  std::atomic<bool> failing_{false};
  std::exception_ptr failure_;
  void (*loop_)(const void*, int64_t) = nullptr;
  const void* f_ = nullptr;
  int64_t items_ = 0, helpers_ = 0, count_ = 0;
};

inline Pool* Pool::own_ = new Pool;
// A forked process has none of the threads.
inline const int Pool::forked_ = pthread_atfork(nullptr, nullptr, [] { own_ = new Pool; });

}  // namespace tucka
