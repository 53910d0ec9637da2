// Compiles ITM_KERNEL_FILE once per instruction set, each in a namespace of its own, and picks one at run time.
// No include guard: a source file defines ITM_KERNEL_FILE and includes this once.
//
// Why not function multiversioning by attribute: it does not reach templates and inlined helpers on both compilers.

#if defined(__x86_64__)
// clang-format off
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define ITM_LANES 16
namespace itm::avx512 {
#include "simd.h"
#include ITM_KERNEL_FILE
}  // namespace itm::avx512
#undef ITM_LANES
#undef ITM_INLINE
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define ITM_LANES 8
namespace itm::avx2 {
#include "simd.h"
#include ITM_KERNEL_FILE
}  // namespace itm::avx2
#undef ITM_LANES
#undef ITM_INLINE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
// clang-format on
#endif  // __x86_64__

#define ITM_LANES 4
namespace itm::portable {
#include "simd.h"
#include ITM_KERNEL_FILE
}  // namespace itm::portable
#undef ITM_LANES
#undef ITM_INLINE

// Calls FUNCTION of the namespace that this processor runs.
#if defined(__x86_64__)
#define ITM_DISPATCH(FUNCTION, ...)                                              \
  switch (itm::cpu_capability()) {                                               \
    case itm::CpuCapability::kAvx512: itm::avx512::FUNCTION(__VA_ARGS__); break; \
    case itm::CpuCapability::kAvx2: itm::avx2::FUNCTION(__VA_ARGS__); break;     \
    default: itm::portable::FUNCTION(__VA_ARGS__);                               \
  }
#else
#define ITM_DISPATCH(FUNCTION, ...) itm::portable::FUNCTION(__VA_ARGS__)
#endif
