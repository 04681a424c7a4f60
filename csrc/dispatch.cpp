#include <cstring>
#include <vector>

#include "matrix.h"

namespace shoal {

namespace {

// The best one last.
const std::vector<const Isa*>& usable() {
  static const std::vector<const Isa*> found = [] {
    std::vector<const Isa*> isas = {&kPlain};
#ifdef SHOAL_X86
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    if (has_avx2) isas.push_back(&kAvx2);
    if (has_avx2 && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vnni")) {
      isas.push_back(&kAvx512Vnni);
    }
#endif
    return isas;
  }();
  return found;
}

const Isa* chosen = usable().back();

}  // namespace

const Isa& isa() { return *chosen; }

bool choose_isa(const char* name) {
  for (const Isa* each : usable()) {
    if (std::strcmp(each->name, name) == 0) {
      chosen = each;
      return true;
    }
  }
  return false;
}

int num_isas() { return static_cast<int>(usable().size()); }

const Isa& isa_at(int index) { return *usable()[index]; }

}  // namespace shoal
