#include "x86.inc"

namespace shoal {
namespace {

struct Sums256 {
  __m256i value;
};

// GCC would add unrolled products to each other first, and run out of registers for them.
inline __m256i add16(__m256i sums, __m256i products) {
  asm("vpaddw %1, %0, %0" : "+x"(sums) : "x"(products));
  return sums;
}

inline __m256i add32(__m256i sums, __m256i products) {
  asm("vpaddd %1, %0, %0" : "+x"(sums) : "x"(products));
  return sums;
}

struct Dot4 : Unpack4 {
  using Sums = Sums256;

  // Of 16 bits: a group's 16 products of at most 15 * 127 add up to less than 2^15.
  static void add(Sums& sums, const Weights& weights, const int8_t* x, int stride, int part) {
    const __m256i low = _mm256_maddubs_epi16(weights.low, quad(x + part * stride));
    const __m256i high = _mm256_maddubs_epi16(weights.high, quad(x + (part + 4) * stride));
    sums.value = add16(add16(sums.value, low), high);
  }
  static F8 total(const Sums& sums) {
    return to_floats(_mm256_madd_epi16(sums.value, _mm256_set1_epi16(1)));
  }
};

struct Dot8 : Unpack8 {
  using Sums = Sums256;

  // Two products of at most 127 * 127 fit in 16 bits, four do not.
  static void add(Sums& sums, const Weights& weights, const int8_t* x, int stride, int part) {
    const __m256i signed_x = _mm256_sign_epi8(quad(x + part * stride), weights.signs);
    const __m256i pairs = _mm256_maddubs_epi16(weights.sizes, signed_x);
    sums.value = add32(sums.value, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static F8 total(const Sums& sums) { return to_floats(sums.value); }
};

}  // namespace

const Isa kAvx2 = SHOAL_ISA("avx2");

}  // namespace shoal
