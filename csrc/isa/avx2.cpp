#include "x86.inc"

namespace shoal {
namespace {

struct Sums256 {
  __m256i value;
};

struct Dot4 : Unpack4 {
  using Sums = Sums256;

  // Of 16 bits: a group's 16 products of at most 15 * 127 add up to less than 2^15.
  static void add(Sums& sums, const Weights& weights, const int8_t* x, int part) {
    sums.value = _mm256_add_epi16(sums.value, _mm256_maddubs_epi16(weights.low, quad(x, part)));
    sums.value = _mm256_add_epi16(sums.value, _mm256_maddubs_epi16(weights.high, quad(x, part + 4)));
  }
  static F8 total(const Sums& sums) {
    return to_floats(_mm256_madd_epi16(sums.value, _mm256_set1_epi16(1)));
  }
};

struct Dot8 : Unpack8 {
  using Sums = Sums256;

  // Two products of at most 127 * 127 fit in 16 bits, four do not.
  static void add(Sums& sums, const Weights& weights, const int8_t* x, int part) {
    const __m256i signed_x = _mm256_sign_epi8(quad(x, part), weights.signs);
    const __m256i pairs = _mm256_maddubs_epi16(weights.sizes, signed_x);
    const __m256i quads = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    sums.value = _mm256_add_epi32(sums.value, quads);
  }
  static F8 total(const Sums& sums) { return to_floats(sums.value); }
};

}  // namespace

const Isa kAvx2 = SHOAL_ISA("avx2");

}  // namespace shoal
