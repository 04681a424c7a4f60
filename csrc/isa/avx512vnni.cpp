// Four products and their sum in one instruction, in vectors of 256 bits.
#include "x86.inc"

namespace shoal {
namespace {

struct Sums256 {
  __m256i value;
};

struct Dot4 : Unpack4 {
  using Sums = Sums256;

  static void add(Sums& sums, const Weights& weights, const int8_t* x, int stride, int part) {
    sums.value = _mm256_dpbusd_epi32(sums.value, weights.low, quad(x + part * stride));
    sums.value = _mm256_dpbusd_epi32(sums.value, weights.high, quad(x + (part + 4) * stride));
  }
  static F8 total(const Sums& sums) { return to_floats(sums.value); }
};

struct Dot8 : Unpack8 {
  using Sums = Sums256;

  static void add(Sums& sums, const Weights& weights, const int8_t* x, int stride, int part) {
    const __m256i signed_x = _mm256_sign_epi8(quad(x + part * stride), weights.signs);
    sums.value = _mm256_dpbusd_epi32(sums.value, weights.sizes, signed_x);
  }
  static F8 total(const Sums& sums) { return to_floats(sums.value); }
};

}  // namespace

const Isa kAvx512Vnni = SHOAL_ISA("avx512-vnni");

}  // namespace shoal
