// A fixed team of threads: work is cut into parts, and whoever is free takes the next one.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace shoal {

class Pool {
 public:
  ~Pool();

  int num_threads() const { return num_threads_.load(std::memory_order_relaxed); }

  // The caller is one of them. Waits for work that runs.
  void resize(int num_threads);

  // `part(index)` for each index below `num_parts`, in any order; returns when all are done. Not
  // from within a part. Whoever finds the team at work for another caller does its parts alone.
  template <class Part>
  void run(uint32_t num_parts, const Part& part) {
    const std::unique_lock<std::mutex> team(busy_, std::try_to_lock);
    if (num_parts <= 1 || !team.owns_lock() || threads_.empty()) {
      for (uint32_t index = 0; index < num_parts; ++index) part(index);
      return;
    }
    run_all(num_parts, &part, [](const void* context, uint32_t index) {
      (*static_cast<const Part*>(context))(index);
    });
  }

 private:
  using Call = void (*)(const void* context, uint32_t index);

  void run_all(uint32_t num_parts, const void* context, Call call);
  void work(uint32_t seen);
  void help(uint32_t job);
  void close();

  std::mutex busy_;
  std::atomic<int> num_threads_{1};
  std::vector<std::thread> threads_;
  std::atomic<bool> closed_{false};

  // The number of the job in the upper half, its next part in the lower: a thread that comes late
  // to a job can take no part of another.
  std::atomic<uint64_t> next_{kNoPart};
  std::atomic<uint32_t> job_{0};
  std::atomic<uint32_t> num_left_{0};
  std::atomic<uint32_t> num_parts_{0};
  std::atomic<const void*> context_{nullptr};
  std::atomic<Call> call_{nullptr};

  static constexpr uint64_t kNoPart = 0xffffffffu;
};

// That of this process; a forked child begins with one thread.
Pool& pool();

}  // namespace shoal
