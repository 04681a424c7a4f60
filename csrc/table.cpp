#include "table.h"

#include <bit>
#include <stdexcept>

#include "isa/half.inc"

namespace shoal {

namespace {

float widen_bfloat16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

template <class Widen>
void widen_row(const uint16_t* row, int64_t width, float* y, const Widen& widen_one) {
  for (int64_t i = 0; i < width; ++i) y[i] = widen_one(row[i]);
}

}  // namespace

void look_up(const Table& table, const std::vector<int64_t>& tokens, float* y) {
  for (const int64_t token : tokens) {
    if (token < 0 || token >= table.num_rows) {
      throw std::out_of_range("a token that the vocabulary does not have");
    }
    const uint16_t* row = table.rows + token * table.width;
    if (table.type == TableType::kFloat16) {
      widen_row(row, table.width, y, [](uint16_t bits) { return widen(bits); });
    } else {
      widen_row(row, table.width, y, widen_bfloat16);
    }
    y += table.width;
  }
}

}  // namespace shoal
