// Tokens drawn from rows of logits by an exponential race, and rows' log-probabilities.
#pragma once

#include <cstdint>
#include <vector>

namespace shoal {

struct Logits {
  const float* values;
  int64_t stride;
  int64_t width;

  const float* row(int64_t index) const { return values + index * stride; }
};

// How a row is drawn from: at temperature 0 the first of its best; top_k 0 and top_p 1 are none.
struct Draw {
  int64_t row;
  uint64_t key;
  float temperature;
  int64_t top_k;
  double top_p;
  double min_p;
};

// A token for each. Of rows without top-k and top-p, tokens less probable than `likely` race as
// one, and among themselves only if that one wins. Token 0 of a row that is no distribution.
std::vector<int64_t> draw(const Logits& logits, const std::vector<Draw>& draws, double likely);

// What is asked of a row: its target's log-probability, and its best tokens.
struct Wanted {
  int64_t row;
  int64_t target;
  int64_t num_best;
};

struct Scores {
  float target;
  std::vector<int64_t> best_ids;
  std::vector<float> best;
};

// Equal ones in the order of their ids. Throws std::out_of_range for a target that
// no row has.
std::vector<Scores> score(const Logits& logits, const std::vector<Wanted>& wanted);

}  // namespace shoal
