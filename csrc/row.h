// A row of logits, its tokens' weights, and the best of them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "room.h"

namespace shoal {

struct Candidate {
  float logit;
  float weight;
  int32_t id;
};

inline bool is_better(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

// Of one thread, which looks at a row at a time: memory stays for the next one, and what is
// returned is there until the same is asked again.
class Row {
 public:
  Row(const float* logits, int64_t width);

  int64_t width() const { return width_; }
  float peak() const { return peak_; }
  // Not with a logit that is no number, nor if the best one is infinite.
  bool is_distribution() const;

  // The first of equals; 0 if a logit is no number.
  int64_t first_best() const;

  // Every token: probabilities in proportion, the best one's is 1. Returns their sum.
  double weigh(float temperature);
  float weight(int64_t id) const { return weights_[id]; }
  double sum_of_weights(float least, float below) const;
  // Ids in order.
  std::span<const int32_t> of_weight(float least);
  Candidate candidate(int32_t id) const { return {logits_[id], weights_[id], id}; }

  // So many, or all there are, in any order and not weighed.
  std::span<Candidate> best(int64_t count);
  // Returns their sum.
  double weigh(std::span<Candidate> candidates, float temperature);

 private:
  struct Memory {
    Room<float> peaks, weights, some;
    Room<int32_t> ids;
    std::vector<Candidate> best;
  };

  std::span<const int32_t> find(const float* x, float least);
  float least_of_best(int64_t count);

  static Memory& memory_of_thread();

  // Asked for once: what a thread has of its own is dear to find.
  Memory& memory_;
  const float* logits_;
  float* peaks_;
  const float* weights_ = nullptr;
  int64_t width_;
  float peak_;
};

}  // namespace shoal
