// Plain C++ for any processor; what the others are compared with.
#include "half.inc"
#include "vectors.inc"

namespace shoal {
namespace {

inline F8 fma8(F8 a, F8 b, F8 c) { return a * b + c; }

inline F8 broadcast8(const float* from) { return F8{} + *from; }

inline float widen1(const uint8_t* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof half);
  return widen(half);
}

inline F8 widen8(const uint8_t* from) {
  F8 value;
  for (int i = 0; i < 8; ++i) value[i] = widen1(from + 2 * i);
  return value;
}

inline void narrow8(F8 value, uint8_t* to) {
  for (int i = 0; i < 8; ++i) {
    const uint16_t half = narrow(value[i]);
    std::memcpy(to + 2 * i, &half, sizeof half);
  }
}

inline F8 widen_codes8(const uint8_t* from) {
  F8 value;
  for (int i = 0; i < 8; ++i) value[i] = static_cast<int8_t>(from[i]);
  return value;
}

inline void narrow_codes32(const I8* eights, int8_t* to) {
  for (int i = 0; i < 32; ++i) to[i] = static_cast<int8_t>(eights[i / 8][i % 8]);
}

// One for each lane of a comparison that holds.
inline unsigned bits8(I8 mask) {
  unsigned bits = 0;
  for (int i = 0; i < 8; ++i) bits |= static_cast<unsigned>(mask[i] != 0) << i;
  return bits;
}

}  // namespace
}  // namespace shoal

#include "kernels.inc"

#include "eights.inc"

namespace shoal {
namespace {

// `codes[4 * row + i]` is the weight of column `4 * part + i`.
struct Quads {
  int8_t codes[kTile * 4];
};

struct IntSums {
  int32_t of_row[kTile];
};

struct DotPlain {
  static constexpr int kParts = 8;
  using Sums = IntSums;
  using Weights = Quads;

  static void add(Sums& sums, const Weights& weights, const int8_t* x, int stride, int part) {
    for (int row = 0; row < kTile; ++row) {
      int32_t dot = 0;
      for (int i = 0; i < 4; ++i) dot += weights.codes[4 * row + i] * x[part * stride + i];
      sums.of_row[row] += dot;
    }
  }
  static F8 total(const Sums& sums, int half) {
    F8 value;
    for (int i = 0; i < 8; ++i) value[i] = static_cast<float>(sums.of_row[8 * half + i]);
    return value;
  }
};

struct Dot4 : DotPlain, Group4 {
  static Weights unpack(const uint8_t* tile, int part) {
    const uint8_t* from = tile + part % 4 * 64;
    Quads quads;
    for (int i = 0; i < 64; ++i) quads.codes[i] = part < 4 ? from[i] & 15 : from[i] >> 4;
    return quads;
  }
};

struct Dot8 : DotPlain, Group8 {
  static Weights unpack(const uint8_t* tile, int part) {
    Quads quads;
    std::memcpy(quads.codes, tile + part * 64, 64);
    return quads;
  }
};

}  // namespace

const Isa kPlain = SHOAL_ISA("plain", Eights);

}  // namespace shoal
