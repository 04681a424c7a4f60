#include <algorithm>
#include <cstring>

#include "matrix.h"
#include "pool.h"
#include "room.h"

namespace shoal {

namespace {

// So many rows of codes stay in a core's cache while all tiles pass by: whole blocks.
constexpr int64_t kRowsAtOnce = 128;
// Parts per thread: enough that a thread which is held up leaves its work to the others.
constexpr int64_t kPartsPerThread = 4;

struct Scratch {
  Room<int8_t> codes;
  Room<float> scales, sums;
  Room<int32_t> totals;
};

// One row as floats, in `made` if they are not x as it is.
const float* floats(const Rows& rows, int64_t row, int64_t width, float* made) {
  const float* x = rows.x + row * rows.stride;
  if (rows.kind == Rows::Kind::kPlain) return x;
  if (rows.kind == Rows::Kind::kNormed) {
    isa().rms_norm(x, rows.norm_weight, rows.eps, width, made);
  } else {
    isa().gate(x, x + width, rows.activation, width, made);
  }
  return made;
}

Codes quantize(const Rows& rows, int64_t width, int64_t num_groups, Scratch& scratch) {
  const int64_t size = rows.num_rows * num_groups;
  const Codes codes = {{scratch.codes.of(size * kGroup), scratch.scales.of(size), scratch.sums.of(size),
                        scratch.totals.of(size)},
                       rows.num_rows,
                       num_groups};
  // A block's rows lie among each other: two threads would take its memory from each other.
  const int64_t block_rows = isa().block_rows;
  pool().run(static_cast<uint32_t>((rows.num_rows + block_rows - 1) / block_rows), [&](uint32_t block) {
    thread_local Room<float> own;
    const int64_t first = block * block_rows;
    const int count = static_cast<int>(std::min(block_rows, rows.num_rows - first));
    float* made = own.of(count * width);
    const float* each[kMostBlockRows];
    for (int i = 0; i < count; ++i) each[i] = floats(rows, first + i, width, made + i * width);
    isa().quantize(each, width, count, codes.block(first));
  });
  return codes;
}

Codes some_rows(const Codes& codes, int64_t first) {
  return {codes.block(first), std::min(kRowsAtOnce, codes.num_rows - first), codes.num_groups};
}

void tiles_of(const Matrix& matrix, const Codes& x, int64_t first_row, int64_t first, int64_t stop,
              const Product& out) {
  const auto tile_of = matrix.bits == 4 ? isa().tile4 : isa().tile8;
  for (int64_t tile = first; tile < stop; ++tile) {
    const int64_t column = tile * kTile;
    const int width = static_cast<int>(std::min<int64_t>(kTile, matrix.num_rows - column));
    const float* bias = out.bias == nullptr ? nullptr : out.bias + column;
    const float* onto =
        out.onto == nullptr ? nullptr : out.onto + first_row * out.onto_stride + column;
    tile_of(matrix.tiles + tile * matrix.tile_bytes(), x,
            {out.y + first_row * out.stride + column, out.stride, width, bias, onto,
             out.onto_stride});
  }
}

}  // namespace

void multiply(const Matrix& matrix, const Rows& rows, const Product& out) {
  thread_local Scratch scratch;
  const Codes codes = quantize(rows, matrix.num_columns, matrix.num_groups(), scratch);
  const int64_t num_tiles = matrix.num_tiles();
  const int64_t num_parts =
      std::min<int64_t>(num_tiles, pool().num_threads() * kPartsPerThread);
  const int64_t num_blocks = (rows.num_rows + kRowsAtOnce - 1) / kRowsAtOnce;
  pool().run(static_cast<uint32_t>(num_blocks * num_parts), [&](uint32_t index) {
    const int64_t first_row = index / num_parts * kRowsAtOnce, part = index % num_parts;
    tiles_of(matrix, some_rows(codes, first_row), first_row, part * num_tiles / num_parts,
             (part + 1) * num_tiles / num_parts, out);
  });
}

}  // namespace shoal
