// Which instruction set the CPU kernels run with: the best the processor has, or what ITM_CPU_CAPABILITY names.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace itm {

enum class CpuCapability { kPortable, kAvx2, kAvx512 };

inline const char* name_of(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::kAvx512: return "avx512";
    case CpuCapability::kAvx2: return "avx2";
    default: return "default";
  }
}

inline CpuCapability best_cpu_capability() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return CpuCapability::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuCapability::kAvx2;
#endif
  return CpuCapability::kPortable;
}

// The variable may only lower what the processor has: running instructions it lacks would kill the process.
inline CpuCapability cpu_capability() {
  static const CpuCapability chosen = [] {
    const CpuCapability best = best_cpu_capability();
    const char* wish = std::getenv("ITM_CPU_CAPABILITY");
    if (wish == nullptr || *wish == '\0') return best;
    for (CpuCapability candidate : {CpuCapability::kPortable, CpuCapability::kAvx2, CpuCapability::kAvx512}) {
      if (std::string(wish) != name_of(candidate)) continue;
      if (candidate <= best) return candidate;
      throw std::runtime_error(std::string("ITM_CPU_CAPABILITY=") + wish + ": this processor only has " +
                               name_of(best));
    }
    throw std::runtime_error(std::string("ITM_CPU_CAPABILITY must be avx512, avx2 or default, got ") + wish);
  }();
  return chosen;
}

}  // namespace itm
