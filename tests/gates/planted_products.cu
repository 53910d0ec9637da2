// Products of a warpgroup that read a sum before they have waited for it: ptxas runs them one after another and says so.

#include "warpgroup_words.h"

namespace itm {

__global__ void __launch_bounds__(128, 1) reads_too_early(float* out) {
  const uint64_t operand = operand_of(shared_memory());
  float sums[72];
  wgmma_fence();
  wgmma_144<__half>(sums, operand, operand, false);
  out[threadIdx.x + blockDim.x] = sums[0];
  wgmma_144<__half>(sums, operand, operand, true);
  wgmma_commit();
  wgmma_wait<0>();
  settle(sums);
  for (const float sum : sums) out[threadIdx.x] += sum;
}

}  // namespace itm
