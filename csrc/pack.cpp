#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa/half.inc"
#include "matrix.h"
#include "pool.h"

namespace shoal {

namespace {

// Where the code of a row and column of a group lies in its tile, counted in bytes of 8-bit codes.
int place(int row, int column) { return column / 4 * 4 * kTile + row * 4 + column % 4; }

void put(uint8_t* to, float value) {
  const uint16_t half = narrow(value);
  std::memcpy(to, &half, sizeof half);
}

// `pack_row(tile, row of the matrix, row of the tile)` for all rows. Tiles are empty to begin with
// where not every byte of them will be written.
template <class PackRow>
void pack(const Matrix& matrix, uint8_t* tiles, const PackRow& pack_row) {
  const bool has_whole_groups = matrix.num_columns % kGroup == 0;
  pool().run(static_cast<uint32_t>(matrix.num_tiles()), [&](uint32_t index) {
    uint8_t* tile = tiles + index * matrix.tile_bytes();
    const int64_t first = int64_t{index} * kTile;
    if (!has_whole_groups || first + kTile > matrix.num_rows) {
      std::memset(tile, 0, matrix.tile_bytes());
    }
    for (int row = 0; row < kTile && first + row < matrix.num_rows; ++row) {
      pack_row(tile, first + row, row);
    }
  });
}

}  // namespace

void pack4(const uint8_t* codes, const float* scales, const float* minimums, const Matrix& matrix,
           uint8_t* tiles) {
  const int64_t num_columns = matrix.num_columns, num_groups = matrix.num_groups();
  pack(matrix, tiles, [&](uint8_t* tile, int64_t row, int tile_row) {
    for (int64_t group = 0; group < num_groups; ++group, tile += Group4::kBytes) {
      const uint8_t* from = codes + row * num_columns + group * kGroup;
      const int count = static_cast<int>(std::min<int64_t>(kGroup, num_columns - group * kGroup));
      uint8_t whole[kGroup] = {};
      std::memcpy(whole, from, count);
      // The second half of a group shares its bytes with the first, in their upper four bits.
      for (int column = 0; column < kGroup / 2; column += 4) {
        uint32_t low, high;
        std::memcpy(&low, whole + column, sizeof low);
        std::memcpy(&high, whole + kGroup / 2 + column, sizeof high);
        low |= high << 4;
        std::memcpy(tile + place(tile_row, column), &low, sizeof low);
      }
      put(tile + Group4::kScalesAt + 2 * tile_row, scales[row * num_groups + group]);
      put(tile + Group4::kMinimumsAt + 2 * tile_row, minimums[row * num_groups + group]);
    }
  });
}

void pack8(const float* weights, const Matrix& matrix, uint8_t* tiles) {
  const int64_t num_columns = matrix.num_columns, num_groups = matrix.num_groups();
  pack(matrix, tiles, [&](uint8_t* tile, int64_t row, int tile_row) {
    for (int64_t group = 0; group < num_groups; ++group, tile += Group8::kBytes) {
      const float* from = weights + row * num_columns + group * kGroup;
      const int count = static_cast<int>(std::min<int64_t>(kGroup, num_columns - group * kGroup));
      float peak = 0.0f;
      for (int column = 0; column < count; ++column) {
        peak = std::max(peak, std::abs(from[column]));
      }
      const uint16_t scale = narrow(peak / 127.0f);
      const float step = widen(scale);
      for (int column = 0; column < count; ++column) {
        const float code = step > 0.0f ? std::nearbyint(from[column] / step) : 0.0f;
        tile[place(tile_row, column)] =
            static_cast<uint8_t>(static_cast<int8_t>(std::clamp(code, -127.0f, 127.0f)));
      }
      std::memcpy(tile + Group8::kScalesAt + 2 * tile_row, &scale, sizeof scale);
    }
  });
}

}  // namespace shoal
