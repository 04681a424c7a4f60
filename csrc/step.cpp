#include "step.h"

#include <algorithm>
#include <stdexcept>

namespace shoal {

namespace {

using Blocks = std::vector<int64_t>;

int64_t slot_of(const Blocks& blocks, int64_t block_size, int64_t position) {
  return blocks[position / block_size] * block_size + position % block_size;
}

void put_slots(const Blocks& blocks, int64_t block_size, int64_t length, int64_t* slots) {
  for (int64_t first = 0; first < length; first += block_size) {
    const int64_t slot = blocks[first / block_size] * block_size;
    const int64_t count = std::min(block_size, length - first);
    for (int64_t i = 0; i < count; ++i) slots[first + i] = slot + i;
  }
}

}  // namespace

void Step::add(const Sequences& sequences) {
  const int64_t num_queries = sequences.num_queries;
  const int64_t longest = *std::max_element(sequences.starts.begin(), sequences.starts.end());
  const int64_t number = static_cast<int64_t>(sequences.starts.size());
  Group group = {num_tokens(), number, num_queries, longest + num_queries, {}};
  group.slots.resize(number * group.width);
  for (int64_t i = 0; i < number; ++i) {
    const Blocks& blocks = sequences.blocks.at(i);
    const int64_t start = sequences.starts[i], length = start + num_queries;
    const int64_t ahead = sequences.ahead.at(i);
    if (start < 0 || ahead < 0 || length + ahead > static_cast<int64_t>(blocks.size()) * block_size) {
      throw std::out_of_range("tokens that no block of their sequence holds");
    }
    int64_t* own = group.slots.data() + i * group.width;
    put_slots(blocks, block_size, length, own);
    for (int64_t position = start; position < length; ++position) {
      positions.push_back(position);
      slots.push_back(slot_of(blocks, block_size, position + ahead));
    }
  }
  groups.push_back(std::move(group));
}

}  // namespace shoal
