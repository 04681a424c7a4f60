// Matrices of 4- and 8-bit weights, and their products with rows of floats.
#pragma once

#include <cstdint>

#include "isa.h"

namespace shoal {

// Columns are filled up with zeros to whole groups, rows to whole tiles.
struct Matrix {
  int bits;
  const uint8_t* tiles;
  int64_t num_rows;
  int64_t num_columns;

  int64_t num_groups() const { return (num_columns + kGroup - 1) / kGroup; }
  int64_t num_tiles() const { return (num_rows + kTile - 1) / kTile; }
  int64_t tile_bytes() const { return num_groups() * (bits == 4 ? Group4::kBytes : Group8::kBytes); }
};

// codes [n, k] of 0…15; scales, minimums [n, groups].
void pack4(const uint8_t* codes, const float* scales, const float* minimums, const Matrix& matrix,
           uint8_t* tiles);

// weights [n, k], rounded to 255 steps between a group's largest size and its negative.
void pack8(const float* weights, const Matrix& matrix, uint8_t* tiles);

// What a matrix is multiplied by: rows of x, their RMS norms, or act(gate) * up of rows that hold
// gate, then up.
struct Rows {
  enum class Kind { kPlain, kNormed, kGated };
  Kind kind;
  const float* x;
  int64_t stride;
  int64_t num_rows;
  const float* norm_weight;
  float eps;
  Activation activation;
};

// On top of `bias` and of rows `onto`, `onto_stride` floats apart; either may be null.
struct Product {
  float* y;
  int64_t stride;
  const float* bias;
  const float* onto = nullptr;
  int64_t onto_stride = 0;
};

void multiply(const Matrix& matrix, const Rows& rows, const Product& out);

// The best that this processor has, until another is chosen by name; false if it has none such.
const Isa& isa();
bool choose_isa(const char* name);
int num_isas();
const Isa& isa_at(int index);

}  // namespace shoal
