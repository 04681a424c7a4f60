// Sums between processes of one host that have mapped the same memory. How it lies there, and why two
// slots a rank are enough, says parallel/shared_memory.py, whose ranks may be among these.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>

namespace shoal {

class Ranks {
 public:
  // Returns once `peer` has written message `sequence`, or throws.
  using Wait = std::function<void(int peer, uint64_t sequence)>;

  // `poll` is how long a rank looks for the others' messages, yielding its core, before it calls `wait`.
  Ranks(uint8_t* flags, uint8_t* slots, int rank, int num_ranks, int64_t slot_bytes,
        std::chrono::duration<double> poll, Wait wait);

  // Where `count` floats may be made that are added next: memory of theirs, or null if they are too many.
  float* place(int64_t count);

  // onto + the sum of every rank's `part` in the order of ranks, to out, all [count]. `onto` may be null;
  // out may be either.
  void add(const float* part, int64_t count, const float* onto, float* out);

  // To each of the others, of sums alone.
  int64_t sent_bytes() const { return sent_bytes_.load(std::memory_order_relaxed); }

 private:
  std::atomic<uint64_t>& flag(int rank) const;
  float* slot(uint64_t sequence, int rank) const;
  void exchange(uint64_t sequence);
  void add_shares(uint64_t sequence, int64_t first, int64_t count, const float* onto, float* out) const;
  void await(int peer, uint64_t sequence);

  uint8_t* const flags_;
  uint8_t* const slots_;
  const int rank_, num_ranks_;
  const int64_t slot_bytes_;
  const std::chrono::duration<double> poll_;
  const Wait wait_;
  std::atomic<int64_t> sent_bytes_{0};
};

}  // namespace shoal
