// Plain C++ for any processor; what the others are compared with.
#include "half.inc"
#include "vectors.inc"

namespace shoal {
namespace {

inline F8 fma8(F8 a, F8 b, F8 c) { return a * b + c; }

inline F8 broadcast8(const float* from) { return F8{} + *from; }

}  // namespace
}  // namespace shoal

#include "kernels.inc"

namespace shoal {
namespace {

inline F8 widen8(const uint8_t* from) {
  F8 value;
  for (int i = 0; i < kTile; ++i) {
    uint16_t half;
    std::memcpy(&half, from + 2 * i, sizeof half);
    value[i] = widen(half);
  }
  return value;
}

// `codes[4 * row + i]` is the weight of column `4 * part + i`.
struct Quads {
  int8_t codes[kTile * 4];
};

inline void add_quads(I8& sums, const Quads& weights, const int8_t* x) {
  for (int row = 0; row < kTile; ++row) {
    int32_t dot = 0;
    for (int i = 0; i < 4; ++i) dot += weights.codes[4 * row + i] * x[i];
    sums[row] += dot;
  }
}

struct Dot4 {
  static constexpr int kBytes = kTile4Bytes;
  static constexpr int kParts = 8;
  static constexpr bool kHasMinimums = true;
  using Sums = I8;
  using Weights = Quads;

  static Weights unpack(const uint8_t* tile, int part) {
    const uint8_t* from = tile + part % 4 * 32;
    Quads quads;
    for (int i = 0; i < 32; ++i) quads.codes[i] = part < 4 ? from[i] & 15 : from[i] >> 4;
    return quads;
  }
  static void add(Sums& sums, const Weights& weights, const int8_t* x, int stride, int part) {
    add_quads(sums, weights, x + part * stride);
  }
  static F8 total(const Sums& sums) { return __builtin_convertvector(sums, F8); }
  static F8 scales(const uint8_t* tile) { return widen8(tile + 128); }
  static F8 minimums(const uint8_t* tile) { return widen8(tile + 144); }
};

struct Dot8 {
  static constexpr int kBytes = kTile8Bytes;
  static constexpr int kParts = 8;
  static constexpr bool kHasMinimums = false;
  using Sums = I8;
  using Weights = Quads;

  static Weights unpack(const uint8_t* tile, int part) {
    Quads quads;
    std::memcpy(quads.codes, tile + part * 32, 32);
    return quads;
  }
  static void add(Sums& sums, const Weights& weights, const int8_t* x, int stride, int part) {
    add_quads(sums, weights, x + part * stride);
  }
  static F8 total(const Sums& sums) { return __builtin_convertvector(sums, F8); }
  static F8 scales(const uint8_t* tile) { return widen8(tile + 256); }
  static F8 minimums(const uint8_t*) { return F8{}; }
};

}  // namespace

const Isa kPlain = SHOAL_ISA("plain");

}  // namespace shoal
