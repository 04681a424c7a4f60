// Where a step's tokens lie in the caches, and what they attend to.
#pragma once

#include <cstdint>
#include <vector>

namespace shoal {

// Sequences of `num_queries` new tokens each, from `starts` on, in `blocks`. They are stored at
// their places, or `ahead` of them: of a token that is there already only the logits are wanted.
struct Sequences {
  std::vector<int64_t> starts;
  std::vector<int64_t> ahead;
  std::vector<std::vector<int64_t>> blocks;
  int64_t num_queries;
};

// Sequences with the same number of queries, adjacent in the step.
struct Group {
  int64_t first_row;
  int64_t num_sequences;
  int64_t num_queries;
  int64_t width;
  std::vector<int64_t> slots;  // [num_sequences, width]
};

struct Step {
  int64_t block_size;
  std::vector<int64_t> positions;  // [num_tokens]
  std::vector<int64_t> slots;      // [num_tokens], where they are stored
  std::vector<Group> groups;

  int64_t num_tokens() const { return static_cast<int64_t>(positions.size()); }

  // Throws std::out_of_range for tokens that no block holds.
  void add(const Sequences& sequences);
};

}  // namespace shoal
