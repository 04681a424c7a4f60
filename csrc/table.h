// A table of tokens' rows in 16 bits, widened as they are looked up.
#pragma once

#include <cstdint>
#include <vector>

namespace shoal {

enum class TableType : int { kFloat16 = 0, kBFloat16 = 1 };

struct Table {
  TableType type;
  const uint16_t* rows;
  int64_t num_rows;
  int64_t width;
};

// y [tokens, width]. Throws std::out_of_range for a token that the table has not.
void look_up(const Table& table, const std::vector<int64_t>& tokens, float* y);

}  // namespace shoal
