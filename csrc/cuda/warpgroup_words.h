// Device words of sm_90a: warpgroup products, mbarriers, bulk copies, barriers of some of a block's warps.
//
// A kernel that uses them compiles for sm_90a alone; the emulator of the tests has twins (tests/emulation).
//
// Operands of wgmma_144 stand in shared memory as rows of 64 elements (128 bytes) along k, 8 rows after another 1,024
// bytes, aligned to 1,024, with the 128-byte swizzle: the 16 bytes c of row r stand at place c ^ (r % 8). Accumulators
// of lane 4 g + t of warp w (of four): sums[4 j], [4 j + 1] (16 w + g, 8 j + 2 t, + 1), [4 j + 2], [4 j + 3] row + 8.
#pragma once

#include "words.h"

#ifndef ITM_EMULATED

namespace itm {

// Counts arrivals and bytes that are on their way; a phase ends when none is missing, and the next begins.
using Mbarrier = uint64_t;

__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// After the last mbarrier_init and before the block's barrier: copies see the barriers too.
__device__ __forceinline__ void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and makes the phase wait for `bytes` more of copies.
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Until the phase of that parity has ended; the one before the first has parity 1.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, int parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (ended == 0);
}

// A multiple of 16 bytes of global memory to shared memory, both aligned to 16; the barrier counts them as they arrive.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes, Mbarrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// __syncthreads of some warps: those that come to barrier `kId` (1 to 15), `threads` in all.
template <int kId>
__device__ __forceinline__ void sync_warps(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "r"(threads) : "memory");
}

// Registers a thread of this warpgroup has from here on, a multiple of 8. `take` waits until others have given.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Before the first product, and after anything else has touched accumulators.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the last N groups of products that were committed are under way.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// The compiler does not know that products write accumulators later: nothing of them moves across this.
__device__ __forceinline__ void settle(float (&sums)[72]) {
#pragma unroll
  for (float& sum : sums) asm volatile("" : "+f"(sum)::"memory");
}

#define ITM_SUMS_8(i)                                                                                           \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
      "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define ITM_WGMMA_144(type)                                                                                           \
  asm volatile(                                                                                                       \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %74, 0;\n\twgmma.mma_async.sync.aligned.m64n144k16.f32." type "." type    \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"  \
      "%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,"  \
      "%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71}, %72, %73, p, 1, 1, 0, 0;\n\t}"               \
      : ITM_SUMS_8(0), ITM_SUMS_8(8), ITM_SUMS_8(16), ITM_SUMS_8(24), ITM_SUMS_8(32), ITM_SUMS_8(40), ITM_SUMS_8(48), \
        ITM_SUMS_8(56), ITM_SUMS_8(64)                                                                                \
      : "l"(left), "l"(right), "r"(static_cast<int>(add)))

// m64 n144 k16 of two operands by their descriptors: sums += left right^T, or = where not `add`. A warpgroup together.
template <class T>
__device__ __forceinline__ void wgmma_144(float (&sums)[72], uint64_t left, uint64_t right, bool add) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (std::is_same_v<T, __half>) {
    ITM_WGMMA_144("f16");
  } else {
    ITM_WGMMA_144("bf16");
  }
}

#undef ITM_WGMMA_144
#undef ITM_SUMS_8

}  // namespace itm
#endif

namespace itm {

// Descriptor of an operand as above whose first row stands at `shared`; 16 elements further along k it is 2 more.
__device__ __forceinline__ uint64_t operand_of(const void* shared) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 / 16} << 32,
                     kUnused = uint64_t{1} << 16;
  return kSwizzle128 | kEightRows | kUnused | (shared_address(shared) & 0x3ffff) / 16;
}

}  // namespace itm
