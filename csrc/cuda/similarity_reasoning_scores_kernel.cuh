// Squared differences of whole images v_i and whole captions t_c, and back, around a library product.
//
//   s_ic = (v_i - t_c)^2        dv_i += 2 sum_c (v_i - t_c) ds_ic        dt_c -= 2 sum_i (v_i - t_c) ds_ic
//
// Owner: a block of threads a row of squares; in the backward a block 256 columns of a row of v or t, whose partners its
// warps share; their sums are added in the order of the warps. No atomics; same bits every run. Read: each row of
// squares once, in the backward twice. Never in memory: the differences. Accumulation: float32.
// The trick: none; one row a pair, where its words have a dozen.
#pragma once

#include "octets.cuh"

namespace itm {

constexpr int kWholeThreads = 256;

// Every image of a block with every caption of it.
template <class T>
struct WholeCall {
  int64_t images, captions;
  int width;
  bool wide;
  const T* of_images;    // [images, width]
  const T* of_captions;  // [captions, width]
  T* squares;            // [images * captions, width]; backward: their gradient, read only
  float* grad_images;    // [images, width], added to
  float* grad_captions;  // [captions, width], added to
};

template <class T>
__global__ void __launch_bounds__(kWholeThreads) whole_squares_kernel(const WholeCall<T> call) {
  const int64_t pair = blockIdx.x;
  const T* v = call.of_images + pair / call.captions * call.width;
  const T* t = call.of_captions + pair % call.captions * call.width;
  for (int c = kOctet * threadIdx.x; c < call.width; c += kOctet * kWholeThreads) {
    const Octet<T> image = load_octet(v, c, call.width, call.wide), caption = load_octet(t, c, call.width, call.wide);
    float squares[kOctet];
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const float difference = image[i] - caption[i];
      squares[i] = difference * difference;
    }
    store_octet(call.squares + pair * call.width, c, call.width, call.wide, squares);
  }
}

template <class T>
__global__ void __launch_bounds__(kWholeThreads) whole_squares_backward_kernel(const WholeCall<T> call) {
  constexpr int kWarps = kWholeThreads / 32;
  const bool of_image = blockIdx.x < call.images;
  const int64_t own = of_image ? blockIdx.x : blockIdx.x - call.images;
  const int64_t partners = of_image ? call.captions : call.images;
  const T* mine = (of_image ? call.of_images : call.of_captions) + own * call.width;
  const T* others = of_image ? call.of_captions : call.of_images;
  const int first = blockIdx.y * kWarpColumns, c = first + kOctet * (threadIdx.x % 32);
  const Octet<T> x = load_octet(mine, c, call.width, call.wide);
  float sums[kOctet] = {};
  for (int64_t p = threadIdx.x / 32; p < partners; p += kWarps) {
    const int64_t pair = of_image ? own * call.captions + p : p * call.captions + own;
    const Octet<T> y = load_octet(others + p * call.width, c, call.width, call.wide);
    const Octet<T> grad = load_octet(call.squares + pair * call.width, c, call.width, call.wide);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) sums[i] += 2.0f * (x[i] - y[i]) * grad[i];
  }
  const float total = sum_of_warps<kWarps>(sums);
  const int column = first + static_cast<int>(threadIdx.x);
  if (column < call.width) (of_image ? call.grad_images : call.grad_captions)[own * call.width + column] += total;
}

}  // namespace itm
