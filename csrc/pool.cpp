#include "pool.h"

#include <pthread.h>

namespace shoal {

namespace {

// Between two kernels of a step lie a few microseconds of Python: to sleep then would cost more
// than the kernels do. After this many turns, some 50 µs, a thread sleeps and harms nobody.
constexpr int kTurnsBeforeSleep = 1500;

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

Pool* the_pool = nullptr;

}  // namespace

Pool& pool() {
  static const bool registered = [] {
    // The threads stay behind with the parent, and what is left of them cannot be joined.
    pthread_atfork(nullptr, nullptr, [] { the_pool = nullptr; });
    return true;
  }();
  (void)registered;
  if (the_pool == nullptr) the_pool = new Pool;
  return *the_pool;
}

Pool::~Pool() { close(); }

void Pool::resize(int num_threads) {
  const std::lock_guard<std::mutex> team(busy_);
  if (num_threads == this->num_threads()) return;
  close();
  closed_.store(false);
  // A thread that is late to start must not miss the job that was given meanwhile.
  const uint32_t seen = job_.load();
  for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this, seen] { work(seen); });
  num_threads_.store(num_threads);
}

void Pool::close() {
  closed_.store(true);
  job_.fetch_add(1);
  job_.notify_all();
  for (auto& thread : threads_) thread.join();
  threads_.clear();
}

void Pool::run_all(uint32_t num_parts, const void* context, Call call) {
  const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
  // Nobody takes a part of this job before all of it is written.
  next_.store(uint64_t{job} << 32 | kNoPart, std::memory_order_seq_cst);
  num_parts_.store(num_parts, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  call_.store(call, std::memory_order_relaxed);
  num_left_.store(num_parts, std::memory_order_relaxed);
  next_.store(uint64_t{job} << 32, std::memory_order_seq_cst);
  job_.store(job, std::memory_order_seq_cst);
  job_.notify_all();
  help(job);
  for (int turn = 0; num_left_.load(std::memory_order_acquire) != 0; ++turn) {
    turn < kTurnsBeforeSleep ? pause_briefly() : std::this_thread::yield();
  }
}

void Pool::work(uint32_t seen) {
  while (true) {
    uint32_t now = job_.load(std::memory_order_acquire);
    for (int turn = 0; now == seen && turn < kTurnsBeforeSleep; ++turn) {
      pause_briefly();
      now = job_.load(std::memory_order_acquire);
    }
    if (now == seen) {
      job_.wait(seen, std::memory_order_acquire);
      continue;
    }
    seen = now;
    if (closed_.load()) return;
    help(now);
  }
}

void Pool::help(uint32_t job) {
  uint64_t next = next_.load(std::memory_order_acquire);
  const uint32_t num_parts = num_parts_.load(std::memory_order_relaxed);
  const void* context = context_.load(std::memory_order_relaxed);
  const Call call = call_.load(std::memory_order_relaxed);
  while (next >> 32 == job && static_cast<uint32_t>(next) < num_parts) {
    if (next_.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel)) {
      call(context, static_cast<uint32_t>(next));
      num_left_.fetch_sub(1, std::memory_order_release);
      next = next_.load(std::memory_order_acquire);
    }
  }
}

}  // namespace shoal
