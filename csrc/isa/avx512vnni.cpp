// Four products and their sum in one instruction, in vectors of 256 bits.
#include "x86.inc"

namespace shoal {
namespace {

inline void add_products(Halves& sums, const Halves& weights, __m256i x) {
  sums.first = _mm256_dpbusd_epi32(sums.first, weights.first, x);
  sums.second = _mm256_dpbusd_epi32(sums.second, weights.second, x);
}

struct Dot4 : Unpack4 {
  static void add(Sums& sums, const Weights& weights, const int8_t* x, int stride, int part) {
    add_products(sums, weights.low, quad(x + part * stride));
    add_products(sums, weights.high, quad(x + (part + 4) * stride));
  }
  static F8 total(const Sums& sums, int half) { return sums.floats(half); }
};

struct Dot8 : Unpack8 {
  static void add(Sums& sums, const Weights& weights, const int8_t* x, int stride, int part) {
    const __m256i a = quad(x + part * stride);
    const __m256i first = _mm256_sign_epi8(a, weights.signs.first);
    const __m256i second = _mm256_sign_epi8(a, weights.signs.second);
    sums.first = _mm256_dpbusd_epi32(sums.first, weights.sizes.first, first);
    sums.second = _mm256_dpbusd_epi32(sums.second, weights.sizes.second, second);
  }
  static F8 total(const Sums& sums, int half) { return sums.floats(half); }
};

}  // namespace

const Isa kAvx512Vnni = SHOAL_ISA("avx512-vnni");

}  // namespace shoal
