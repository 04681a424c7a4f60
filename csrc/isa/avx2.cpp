#include "x86.inc"

namespace shoal {
namespace {

// GCC would add unrolled products to each other first, and run out of registers for them.
inline __m256i add16(__m256i sums, __m256i products) {
  asm("vpaddw %1, %0, %0" : "+x"(sums) : "x"(products));
  return sums;
}

inline __m256i add32(__m256i sums, __m256i products) {
  asm("vpaddd %1, %0, %0" : "+x"(sums) : "x"(products));
  return sums;
}

// Sums of two 16-bit numbers that lie beside each other.
inline __m256i quads(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

struct Dot4 : Unpack4 {
  // Of 16 bits: a group's 16 products of at most 15 * 127 add up to less than 2^15.
  static void add(Sums& sums, const Weights& weights, const int8_t* x, int stride, int part) {
    const __m256i a = quad(x + part * stride), b = quad(x + (part + 4) * stride);
    sums.first = add16(sums.first, _mm256_maddubs_epi16(weights.low.first, a));
    sums.second = add16(sums.second, _mm256_maddubs_epi16(weights.low.second, a));
    sums.first = add16(sums.first, _mm256_maddubs_epi16(weights.high.first, b));
    sums.second = add16(sums.second, _mm256_maddubs_epi16(weights.high.second, b));
  }
  static F8 total(const Sums& sums, int half) {
    return Halves{quads(sums.first), quads(sums.second)}.floats(half);
  }
};

struct Dot8 : Unpack8 {
  // Two products of at most 127 * 127 fit in 16 bits, four do not.
  static __m256i products(__m256i sizes, __m256i signs, __m256i x) {
    return quads(_mm256_maddubs_epi16(sizes, _mm256_sign_epi8(x, signs)));
  }
  static void add(Sums& sums, const Weights& weights, const int8_t* x, int stride, int part) {
    const __m256i a = quad(x + part * stride);
    sums.first = add32(sums.first, products(weights.sizes.first, weights.signs.first, a));
    sums.second = add32(sums.second, products(weights.sizes.second, weights.signs.second, a));
  }
  static F8 total(const Sums& sums, int half) { return sums.floats(half); }
};

}  // namespace

const Isa kAvx2 = SHOAL_ISA("avx2");

}  // namespace shoal
