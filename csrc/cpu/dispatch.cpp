// Picks the CPU kernels of this machine.

#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace lpa::cpu {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(__x86_64__)
    const char* cap = std::getenv("ATEN_CPU_CAPABILITY");
    const bool any = cap == nullptr || std::strcmp(cap, "avx512") == 0;
    __builtin_cpu_init();
    if (any && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return kernels_avx512;
    }
    if ((any || std::strcmp(cap, "avx2") == 0) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      return kernels_avx2;
    }
#endif
    return kernels_baseline;
  }();
  return chosen;
}

}  // namespace lpa::cpu
