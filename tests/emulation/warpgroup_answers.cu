// Small kernels that tests/test_emulation_warpgroup.py runs: the words of cuda/warpgroup_words.h, and planted mistakes.

#include "cuda/launch.h"
#include "cuda/warpgroup_words.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace itm {
namespace {

using torch::stable::Tensor;

constexpr int kLeftBytes = 64 * 128, kRightBytes = 144 * 128;
constexpr int kProductShared = 1024 + kLeftBytes + kRightBytes + 16;

// 64 x 64 times (144 x 64)^T of operands in memory order: 72 sums a thread, read before the last wait where asked to.
template <class T>
__global__ void run_product(const char* left, const char* right, float* out, bool waits, int64_t* descriptors) {
  char* shared = shared_memory() + (1024 - shared_address(shared_memory()) % 1024) % 1024;
  auto* arrived = reinterpret_cast<Mbarrier*>(shared + kLeftBytes + kRightBytes);
  if (threadIdx.x == 0) {
    mbarrier_init(arrived, 1);
    mbarrier_fence_init();
    mbarrier_arrive_expect(arrived, kLeftBytes + kRightBytes);
    copy_bulk(shared, left, kLeftBytes, arrived);
    copy_bulk(shared + kLeftBytes, right, kRightBytes, arrived);
  }
  __syncthreads();
  mbarrier_wait(arrived, 0);
  const uint64_t of_left = operand_of(shared), of_right = operand_of(shared + kLeftBytes);
  float sums[72];
  wgmma_fence();
  for (int k = 0; k < 4; ++k) wgmma_144<T>(sums, of_left + 2 * k, of_right + 2 * k, k > 0);
  wgmma_commit();
  if (waits) wgmma_wait<0>();
  if (!waits) wgmma_wait<1>();
  settle(sums);
  for (int i = 0; i < 72; ++i) out[threadIdx.x * 72 + i] = sums[i];
  if (threadIdx.x == 0) {
    const int64_t found[4] = {shared_address(shared), static_cast<int64_t>(of_left),
                              shared_address(shared + kLeftBytes), static_cast<int64_t>(of_right)};
    for (int i = 0; i < 4; ++i) descriptors[i] = found[i];
  }
}

// Warp 1 copies slices of 128 bytes through two stages, warp 0 adds them up: a lane's column of 4 bytes.
__global__ void run_ring(const int* in, int* out, int slices) {
  int* stages = reinterpret_cast<int*>(shared_memory());
  auto* filled = reinterpret_cast<Mbarrier*>(stages + 64);
  Mbarrier* emptied = filled + 2;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(filled + i, 1);
      mbarrier_init(emptied + i, 32);
    }
    mbarrier_fence_init();
  }
  __syncthreads();
  int total = 0;
  for (int slice = 0; slice < slices; ++slice) {
    const int stage = slice % 2, parity = slice / 2 % 2;
    if (threadIdx.x < 32) {
      mbarrier_wait(filled + stage, parity);
      total = total * 3 + stages[32 * stage + threadIdx.x];
      mbarrier_arrive(emptied + stage);
    } else if (threadIdx.x == 32) {
      mbarrier_wait(emptied + stage, parity ^ 1);
      mbarrier_arrive_expect(filled + stage, 128);
      copy_bulk(stages + 32 * stage, in + 32 * slice, 128, filled + stage);
    }
  }
  if (threadIdx.x < 32) out[blockIdx.x * 32 + threadIdx.x] = total;
}

// Two of three warps exchange values; the third does not come.
__global__ void run_some(const int* in, int* out, bool with_barrier) {
  auto* values = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x >= 64) return;
  values[threadIdx.x] = static_cast<float>(in[threadIdx.x]);
  if (with_barrier) sync_warps<3>(64);
  const float other = values[threadIdx.x ^ 32];
  out[blockIdx.x * 64 + threadIdx.x] = other == other ? static_cast<int>(other) : -1;
}

__global__ void run_mistake(int kind) {
  auto* barrier = reinterpret_cast<Mbarrier*>(shared_memory());
  if (kind > 0 && threadIdx.x == 0) mbarrier_init(barrier, 1);
  __syncwarp();
  if (kind == 0) mbarrier_arrive(barrier);
  if (kind == 1) mbarrier_wait(barrier, 0);
  if (kind == 2 && threadIdx.x == 0) mbarrier_arrive_expect(barrier, 16);
  if (kind == 2 && threadIdx.x == 1) mbarrier_arrive(barrier);
  if (kind == 3) copy_bulk(shared_memory() + 24, shared_memory() + 32, 16, barrier);
  if (kind == 4) sync_warps<1>(64);
  if (kind == 5) {
    float sums[72];
    wgmma_144<__half>(sums, operand_of(shared_memory()) >> 2, 0, false);
  }
}

template <class T>
void product_of(const Tensor& left, const Tensor& right, bool waits, const Tensor& out, const Tensor& descriptors) {
  launch(run_product<T>, 1, 128, kProductShared, current_stream(0), static_cast<const char*>(left.const_data_ptr()),
         static_cast<const char*>(right.const_data_ptr()), static_cast<float*>(out.data_ptr()), waits,
         static_cast<int64_t*>(descriptors.data_ptr()));
}

void product(Tensor left, Tensor right, bool half, bool waits, Tensor out, Tensor descriptors) {
  if (half) return product_of<__half>(left, right, waits, out, descriptors);
  product_of<__nv_bfloat16>(left, right, waits, out, descriptors);
}

void ring(Tensor in, Tensor out) {
  launch(run_ring, 2, 64, 512, current_stream(0), static_cast<const int*>(in.const_data_ptr()),
         static_cast<int*>(out.data_ptr()), in.size(0));
}

void some(Tensor in, bool with_barrier, Tensor out) {
  launch(run_some, 2, 96, 256, current_stream(0), static_cast<const int*>(in.const_data_ptr()),
         static_cast<int*>(out.data_ptr()), with_barrier);
}

void mistake(int64_t kind) { launch(run_mistake, 1, 32, 256, current_stream(0), kind); }

}  // namespace
}  // namespace itm

STABLE_TORCH_LIBRARY(itm_warpgroup_test, m) {
  m.def("product(Tensor left, Tensor right, bool half, bool waits, Tensor(a!) out, Tensor(b!) descriptors) -> ()");
  m.def("ring(Tensor values, Tensor(a!) out) -> ()");
  m.def("some(Tensor values, bool with_barrier, Tensor(a!) out) -> ()");
  m.def("mistake(int kind) -> ()");
}

// Some take no tensor: for any key.
STABLE_TORCH_LIBRARY_IMPL(itm_warpgroup_test, CompositeExplicitAutograd, m) {
  m.impl("product", TORCH_BOX(&itm::product));
  m.impl("ring", TORCH_BOX(&itm::ring));
  m.impl("some", TORCH_BOX(&itm::some));
  m.impl("mistake", TORCH_BOX(&itm::mistake));
}
