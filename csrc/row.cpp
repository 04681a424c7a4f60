#include "row.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "matrix.h"

namespace shoal {

Row::Memory& Row::memory_of_thread() {
  thread_local Memory memory;
  return memory;
}

Row::Row(const float* logits, int64_t width)
    : memory_(memory_of_thread()),
      logits_(logits),
      peaks_(memory_.peaks.of(num_peaks(width))),
      width_(width) {
  peak_ = isa().find_peaks(logits, width, peaks_);
}

bool Row::is_distribution() const { return std::isfinite(peak_); }

int64_t Row::first_best() const {
  if (std::isnan(peak_)) return 0;
  const int64_t group = (std::find(peaks_, peaks_ + num_peaks(width_), peak_) - peaks_) / 8;
  return std::find(logits_ + group * kPeakGroup, logits_ + width_, peak_) - logits_;
}

double Row::weigh(float temperature) {
  float* weights = memory_.weights.of(width_);
  weights_ = weights;
  return isa().weigh(logits_, width_, peak_, temperature, weights);
}

double Row::sum_of_weights(float least, float below) const {
  return isa().sum_between(weights_, width_, least, below);
}

std::span<const int32_t> Row::of_weight(float least) { return find(weights_, least); }

std::span<Candidate> Row::best(int64_t count) {
  std::vector<Candidate>& found = memory_.best;
  found.clear();
  for (const int32_t id : find(logits_, least_of_best(count))) {
    found.push_back({logits_[id], 0.0f, id});
  }
  if (count < static_cast<int64_t>(found.size())) {
    std::nth_element(found.begin(), found.begin() + count, found.end(), is_better);
    found.resize(count);
  }
  return found;
}

double Row::weigh(std::span<Candidate> candidates, float temperature) {
  const int64_t number = candidates.size();
  float* some = memory_.some.of(number);
  for (int64_t i = 0; i < number; ++i) some[i] = candidates[i].logit;
  const double total = isa().weigh(some, number, peak_, temperature, some);
  for (int64_t i = 0; i < number; ++i) candidates[i].weight = some[i];
  return total;
}

std::span<const int32_t> Row::find(const float* x, float least) {
  int32_t* ids = memory_.ids.of(width_);
  return {ids, static_cast<size_t>(isa().find(x, width_, least, ids))};
}

// Each peak is a token: so many tokens are at least as good as the last of so many peaks.
float Row::least_of_best(int64_t count) {
  const int64_t number = num_peaks(width_);
  if (count > number) return -std::numeric_limits<float>::infinity();
  std::nth_element(peaks_, peaks_ + count - 1, peaks_ + number, std::greater<float>());
  return peaks_[count - 1];
}

}  // namespace shoal
