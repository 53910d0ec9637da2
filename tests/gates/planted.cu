// Kernels that the gate has to tell apart: tests/gates/test_cuda_gate.py.

#include "words.h"

namespace itm {

// An array indexed at run time lives on the stack.
__global__ void on_the_stack(const int* order, float* out) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[order[i] & 63] = out[i];
  for (int i = 0; i < 64; ++i) out[i] = values[order[i + 64] & 63];
}

template <class T>
__global__ void on_tensor_cores(const uint32_t* in, float* out) {
  __shared__ uint32_t operands[32 * 6];
  for (int i = threadIdx.x; i < 32 * 6; i += 32) operands[i] = in[i];
  __syncwarp();
  const uint32_t* mine = operands + 6 * threadIdx.x;
  float c[4] = {};
  mma<T>(c, {mine[0], mine[1], mine[2], mine[3]}, {mine[4], mine[5]});
  out[threadIdx.x] = c[0] + c[1] + c[2] + c[3];
}

template <class T>
__global__ void plain(const T* in, float* out) {
  out[threadIdx.x] = to_float(in[threadIdx.x]);
}

template __global__ void on_tensor_cores<__nv_bfloat16>(const uint32_t*, float*);
template __global__ void plain<__half>(const __half*, float*);

}  // namespace itm
