#include "x86.inc"

#include "eights.inc"

namespace shoal {
namespace {

inline __m256i load256(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

inline __m256i quad(const int8_t* x) { return _mm256_set1_epi32(four_codes(x)); }

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

// Of a tile's first and second half.
struct Halves {
  __m256i first, second;

  F8 floats(int half) const {
    return reinterpret_cast<F8>(_mm256_cvtepi32_ps(half == 0 ? first : second));
  }
};

inline Halves load_halves(const uint8_t* from) { return {load256(from), load256(from + 32)}; }

// Four quads of columns of a tile are in low halves of bytes, the other four in high ones.
struct Dot4 : Group4 {
  static constexpr int kParts = 4;
  using Sums = Halves;
  struct Weights {
    Halves low, high;
  };

  static __m256i low(__m256i both) { return _mm256_and_si256(both, _mm256_set1_epi8(15)); }
  static Weights unpack(const uint8_t* tile, int part) {
    const Halves both = load_halves(tile + part * 64);
    return {{low(both.first), low(both.second)},
            {low(_mm256_srli_epi16(both.first, 4)), low(_mm256_srli_epi16(both.second, 4))}};
  }
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

// The products take unsigned bytes on one side: |w| there, and x with the sign of w on the other.
struct Dot8 : Group8 {
  static constexpr int kParts = 8;
  using Sums = Halves;
  struct Weights {
    Halves sizes, signs;
  };

  static Weights unpack(const uint8_t* tile, int part) {
    const Halves codes = load_halves(tile + part * 64);
    return {{_mm256_abs_epi8(codes.first), _mm256_abs_epi8(codes.second)}, codes};
  }
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

const Isa kAvx2 = SHOAL_ISA("avx2", Eights);

}  // namespace shoal
