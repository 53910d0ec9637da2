// Small kernels that tests/test_emulation.py runs: every word on known input, and planted mistakes.

#include "cuda/launch.h"
#include "cuda/words.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace itm {
namespace {

using torch::stable::Tensor;

// One warp: 4 + 2 + 4 registers a lane in, 4 out.
template <class Multiply>
__device__ void multiply_lane(const int* in, float* out, Multiply multiply) {
  const int* mine = in + threadIdx.x * 10;
  uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; ++i) a[i] = mine[i];
  for (int i = 0; i < 2; ++i) b[i] = mine[4 + i];
  for (int i = 0; i < 4; ++i) c[i] = __int_as_float(mine[6 + i]);
  multiply(c, a, b);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = c[i];
}

__global__ void run_mma(const int* in, float* out, int kind) {
  multiply_lane(in, out, [kind](auto& c, auto& a, auto& b) {
    if (kind == 0) mma<__half>(c, a, b);
    if (kind == 1) mma<__nv_bfloat16>(c, a, b);
    if (kind == 2) mma_tf32(c, a, b);
  });
}

// Four 8 x 8 matrices of 2 bytes through shared memory; 4 + 4 + 2 + 1 registers a lane out.
__global__ void run_matrices(const int* in, int* out) {
  auto* shared = reinterpret_cast<int*>(shared_memory());
  for (int i = threadIdx.x; i < 128; i += 32) shared[i] = in[i];
  __syncwarp();
  uint32_t plain[4], turned[4], two[2];
  ldmatrix_x4(plain, shared + threadIdx.x * 4);
  ldmatrix_x4_trans(turned, shared + threadIdx.x * 4);
  // Lanes from 16 on point at nothing.
  ldmatrix_x2_trans(two, threadIdx.x < 16 ? shared + threadIdx.x * 4 : nullptr);
  int* mine = out + threadIdx.x * 11;
  for (int i = 0; i < 4; ++i) mine[i] = plain[i];
  for (int i = 0; i < 4; ++i) mine[4 + i] = turned[i];
  for (int i = 0; i < 2; ++i) mine[8 + i] = two[i];
  mine[10] = movmatrix_trans(plain[3]);
}

__global__ void run_shuffles(const int* in, int* out) {
  const int value = in[threadIdx.x];
  int* mine = out + threadIdx.x * 12;
  mine[0] = __shfl_sync(kWholeWarp, value, 5);
  mine[1] = __shfl_sync(kWholeWarp, value, 9, 8);
  mine[2] = __shfl_xor_sync(kWholeWarp, value, 3);
  mine[3] = __shfl_xor_sync(kWholeWarp, value, 8, 8);
  mine[4] = __shfl_up_sync(kWholeWarp, value, 2);
  mine[5] = __shfl_down_sync(kWholeWarp, value, 3, 16);
  mine[6] = __ballot_sync(kWholeWarp, value % 3 == 0);
  mine[7] = __any_sync(kWholeWarp, value == in[7]);
  mine[8] = static_cast<int>(quad_sum(value));
  mine[9] = static_cast<int>(quad_max(value));
  mine[10] = static_cast<int>(warp_sum(value));
  mine[11] = static_cast<int>(warp_max(value));
}

// Bits of in as half, bfloat16, tf32, and pack with the next element.
__global__ void run_conversions(const float* in, int* out, int64_t count) {
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    const float next = in[i + 1 < count ? i + 1 : 0];
    out[5 * i] = __half_as_ushort(from_float<__half>(in[i]));
    out[5 * i + 1] = __bfloat16_as_ushort(from_float<__nv_bfloat16>(in[i]));
    out[5 * i + 2] = to_tf32(in[i]);
    out[5 * i + 3] = pack<__half>(in[i], next);
    out[5 * i + 4] = pack<__nv_bfloat16>(in[i], next);
  }
}

__global__ void run_widening(const int* bits, float* out, int64_t count) {
  const int64_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  out[2 * i] = to_float(__ushort_as_half(bits[i]));
  out[2 * i + 1] = to_float(__ushort_as_bfloat16(bits[i]));
}

// Row sums, a block per row; the second row forgets the barrier when asked to.
__global__ void run_row_sums(const float* in, float* out, int width, bool with_barrier) {
  auto* partial = reinterpret_cast<float*>(shared_memory());
  float sum = 0.0f;
  for (int i = threadIdx.x; i < width; i += blockDim.x) sum += in[blockIdx.x * width + i];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  if (with_barrier) __syncthreads();
  if (threadIdx.x < 32) {
    const int warps = blockDim.x / 32;
    sum = warp_sum(static_cast<int>(threadIdx.x) < warps ? partial[threadIdx.x] : 0.0f);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
  }
}

// Two groups of copies, the second not valid for odd threads; waits for the groups but the last `left`.
template <int kLeft>
__global__ void run_copies(const float4* in, float4* out) {
  auto* shared = reinterpret_cast<float4*>(shared_memory());
  const int i = threadIdx.x, n = blockDim.x;
  copy_async_16(shared + i, in + i, true);
  copy_async_commit();
  copy_async_16(shared + n + i, i % 2 ? nullptr : in + n + i, i % 2 == 0);
  copy_async_commit();
  copy_async_wait<kLeft>();
  out[i] = shared[i];
  out[n + i] = shared[n + i];
}

__global__ void run_mistake(float* out, int kind) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const int lane = threadIdx.x % 32;
  float x = 1.0f;
  if (kind == 0 && lane < 16) x = __shfl_xor_sync(kWholeWarp, x, 1);
  if (kind == 0 && lane >= 16) x = __shfl_xor_sync(kWholeWarp, x, 2);
  if (kind == 1 && lane < 7) __syncthreads();
  if (kind == 1) x = warp_sum(x);
  if (kind == 2 && lane == 3) return;
  if (kind == 2) x = warp_sum(x);
  if (kind == 3 && threadIdx.x == 40) return;
  if (kind == 3) __syncthreads();
  if (kind == 4) shared[64] = x;
  if (kind == 5) shared[-1] = x;
  if (kind == 6) x = __shfl_xor_sync(0xffffu, x, 1);
  if (kind == 7) copy_async_16(shared + 1, out, false);
  if (kind == 8) x = shared[threadIdx.x];
  if (kind == 10) x = reinterpret_cast<const float4*>(out + 1)->y;
  if (kind == 11) {
    const float few[4] = {x, x, x, x};
    x = few[threadIdx.x];
  }
  out[threadIdx.x] = x;
}

template <class T>
const T* input(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

void mma_words(Tensor in, int64_t kind, Tensor out) {
  launch(run_mma, 1, 32, 0, current_stream(0), input<int>(in), output<float>(out), kind);
}

void matrix_words(Tensor in, Tensor out) {
  launch(run_matrices, 1, 32, 512, current_stream(0), input<int>(in), output<int>(out));
}

void shuffle_words(Tensor in, Tensor out) {
  launch(run_shuffles, 1, 32, 0, current_stream(0), input<int>(in), output<int>(out));
}

void conversions(Tensor in, Tensor out) {
  launch(run_conversions, 3, 64, 0, current_stream(0), input<float>(in), output<int>(out), in.numel());
}

void widening(Tensor bits, Tensor out) {
  const auto blocks = static_cast<unsigned>((bits.numel() + 63) / 64);
  launch(run_widening, blocks, 64, 0, current_stream(0), input<int>(bits), output<float>(out), bits.numel());
}

void row_sums(Tensor in, bool with_barrier, Tensor out) {
  launch(run_row_sums, static_cast<unsigned>(in.size(0)), 128, 16, current_stream(0), input<float>(in),
         output<float>(out), in.size(1), with_barrier);
}

void copies(Tensor in, int64_t left, Tensor out) {
  auto* kernel = left == 0 ? run_copies<0> : run_copies<1>;
  launch(kernel, 1, 32, 1024, current_stream(0), input<float4>(in), output<float4>(out));
}

void mistake(int64_t kind, Tensor out) { launch(run_mistake, 1, 64, 256, current_stream(0), output<float>(out), kind); }

}  // namespace
}  // namespace itm

STABLE_TORCH_LIBRARY(itm_emulation_test, m) {
  m.def("mma(Tensor registers, int kind, Tensor(a!) out) -> ()");
  m.def("matrices(Tensor matrices, Tensor(a!) out) -> ()");
  m.def("shuffles(Tensor values, Tensor(a!) out) -> ()");
  m.def("conversions(Tensor values, Tensor(a!) out) -> ()");
  m.def("widening(Tensor bits, Tensor(a!) out) -> ()");
  m.def("row_sums(Tensor rows, bool with_barrier, Tensor(a!) out) -> ()");
  m.def("copies(Tensor values, int left, Tensor(a!) out) -> ()");
  m.def("mistake(int kind, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(itm_emulation_test, CPU, m) {
  m.impl("mma", TORCH_BOX(&itm::mma_words));
  m.impl("matrices", TORCH_BOX(&itm::matrix_words));
  m.impl("shuffles", TORCH_BOX(&itm::shuffle_words));
  m.impl("conversions", TORCH_BOX(&itm::conversions));
  m.impl("widening", TORCH_BOX(&itm::widening));
  m.impl("row_sums", TORCH_BOX(&itm::row_sums));
  m.impl("copies", TORCH_BOX(&itm::copies));
  m.impl("mistake", TORCH_BOX(&itm::mistake));
}
