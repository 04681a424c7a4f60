#include "ranks.h"

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

#include "pool.h"

namespace shoal {

namespace {

// Twice a line of a processor's cache, since processors fetch pairs.
constexpr int kFlagBytes = 128;
// A part of a sum: a thread's work for some microseconds.
constexpr int64_t kPartFloats = 16384;
// Sums that stay in registers and the first cache while every rank's share is added.
constexpr int64_t kBlockFloats = 256;

template <class Part>
void run_parts(int64_t count, const Part& part) {
  pool().run(static_cast<uint32_t>((count + kPartFloats - 1) / kPartFloats), [&](uint32_t index) {
    const int64_t first = index * kPartFloats;
    part(first, std::min(kPartFloats, count - first));
  });
}

}  // namespace

Ranks::Ranks(uint8_t* flags, uint8_t* slots, int rank, int num_ranks, int64_t slot_bytes,
             std::chrono::duration<double> poll, Wait wait)
    : flags_(flags),
      slots_(slots),
      rank_(rank),
      num_ranks_(num_ranks),
      slot_bytes_(slot_bytes),
      poll_(poll),
      wait_(std::move(wait)) {}

std::atomic<uint64_t>& Ranks::flag(int rank) const {
  static_assert(std::atomic<uint64_t>::is_always_lock_free);
  return *reinterpret_cast<std::atomic<uint64_t>*>(flags_ + rank * kFlagBytes);
}

// The first message is that a rank has come: message 2 is in the second of the slots, 3 in the first.
float* Ranks::slot(uint64_t sequence, int rank) const {
  const int64_t index = static_cast<int64_t>((sequence - 1) & 1) * num_ranks_ + rank;
  return reinterpret_cast<float*>(slots_ + index * slot_bytes_);
}

float* Ranks::place(int64_t count) {
  if (count * static_cast<int64_t>(sizeof(float)) > slot_bytes_) return nullptr;
  return slot(flag(rank_).load(std::memory_order_relaxed) + 1, rank_);
}

void Ranks::add(const float* part, int64_t count, const float* onto, float* out) {
  const int64_t most = slot_bytes_ / static_cast<int64_t>(sizeof(float));
  for (int64_t done = 0; done == 0 || done < count; done += most) {
    const int64_t piece = std::min(most, count - done);
    const uint64_t sequence = flag(rank_).load(std::memory_order_relaxed) + 1;
    float* own = slot(sequence, rank_);
    if (part != own) {
      run_parts(piece, [&](int64_t first, int64_t num) {
        std::memcpy(own + first, part + done + first, num * sizeof(float));
      });
    }
    exchange(sequence);
    run_parts(piece, [&](int64_t first, int64_t num) {
      add_shares(sequence, first, num, onto == nullptr ? nullptr : onto + done, out + done);
    });
    sent_bytes_.fetch_add(piece * sizeof(float) * (num_ranks_ - 1), std::memory_order_relaxed);
  }
}

void Ranks::add_shares(uint64_t sequence, int64_t first, int64_t count, const float* onto,
                       float* out) const {
  for (; count > 0; first += kBlockFloats, count -= kBlockFloats) {
    const int64_t num = std::min(kBlockFloats, count);
    float sums[kBlockFloats];
    std::memcpy(sums, slot(sequence, 0) + first, num * sizeof(float));
    for (int rank = 1; rank < num_ranks_; ++rank) {
      const float* share = slot(sequence, rank) + first;
      for (int64_t i = 0; i < num; ++i) sums[i] += share[i];
    }
    for (int64_t i = 0; i < num; ++i) {
      out[first + i] = onto == nullptr ? sums[i] : onto[first + i] + sums[i];
    }
  }
}

void Ranks::exchange(uint64_t sequence) {
  flag(rank_).store(sequence, std::memory_order_release);
  for (int peer = 0; peer < num_ranks_; ++peer) await(peer, sequence);
}

void Ranks::await(int peer, uint64_t sequence) {
  const auto has_come = [&] { return flag(peer).load(std::memory_order_acquire) >= sequence; };
  if (has_come()) return;
  const auto stop = std::chrono::steady_clock::now() + poll_;
  while (std::chrono::steady_clock::now() < stop) {
    std::this_thread::yield();
    if (has_come()) return;
  }
  wait_(peer, sequence);
  // Python has read the flag without an order: what the peer wrote must be seen after it.
  has_come();
}

}  // namespace shoal
