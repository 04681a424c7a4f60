// Four products and their sum in one instruction, in vectors of 512 bits: four columns of a tile are one.
#include "x86.inc"

#include "sixteens.inc"

namespace shoal {
namespace {

inline __m512i load512(const uint8_t* from) { return _mm512_loadu_si512(from); }

struct Dot4 : Group4 {
  // Four quads of columns are in low halves of bytes, the other four in high ones.
  template <int kRows>
  static void add(const uint8_t* tile, const CodesAt& x, QuadSums<kRows>& sums) {
    const __m512i low_bits = _mm512_set1_epi8(15);
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const __m512i both = load512(tile + part * 64);
      sums.add(_mm512_and_si512(both, low_bits), x, part);
      sums.add(_mm512_and_si512(_mm512_srli_epi16(both, 4), low_bits), x, part + 4);
    }
  }
};

// The products take unsigned bytes on one side: weights are counted from -128 there, and what that adds
// is taken away before.
struct Dot8 : Group8 {
  template <int kRows>
  static void add(const uint8_t* tile, const CodesAt& x, QuadSums<kRows>& sums) {
    const __m512i sign_bits = _mm512_set1_epi8(-128);
    sums.begin_at_totals(x, -128);
#pragma GCC unroll 8
    for (int part = 0; part < 8; ++part) {
      sums.add(_mm512_xor_si512(load512(tile + part * 64), sign_bits), x, part);
    }
  }
};

}  // namespace

const Isa kAvx512Vnni = SHOAL_ISA("avx512-vnni", Sixteens);

}  // namespace shoal
