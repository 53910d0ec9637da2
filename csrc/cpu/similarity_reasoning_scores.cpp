// similarity_reasoning_scores on the CPU: the alignment of whole images with whole captions. The stages stand in
// alignment_vectors.cpp, attention_filtration.cpp and similarity_graph.cpp, the loop over chunks in
// itm_kernels/native/cpu/similarity_reasoning_scores.py.

#include <cmath>
#include <cstdint>

#include <torch/csrc/stable/library.h>

#include "../common/capability.h"
#include "../common/options.h"
#include "row_arguments.h"

namespace itm {
namespace {

// Every image of a chunk with every caption of it.
template <class Scalar>
struct WholeCall {
  int64_t images, captions, width;
  const Scalar* of_images;    // [images, width]
  const Scalar* of_captions;  // [captions, width]
  Scalar* squares;            // [images * captions, width]; backward: their gradient
  float* grad_images;         // [images, width]
  float* grad_captions;       // [captions, width], added to
};

}  // namespace
}  // namespace itm

#define ITM_KERNEL_FILE "similarity_reasoning_scores_kernel.h"
#include "isa.h"

namespace itm {
namespace {

template <class Scalar>
WholeCall<Scalar> whole_call(const Tensor& of_images, const Tensor& of_captions, const Tensor& squares) {
  WholeCall<Scalar> call{};
  call.images = of_images.size(0);
  call.captions = of_captions.size(0);
  call.width = width_of(of_images);
  call.of_images = elements<Scalar>(of_images, call.images * call.width, "whole_squares: images");
  call.of_captions = elements<Scalar>(of_captions, call.captions * call.width, "whole_squares: captions");
  call.squares = elements<Scalar>(squares, call.images * call.captions * call.width, "whole_squares: squares");
  return call;
}

}  // namespace

void whole_squares(Tensor of_images, Tensor of_captions, Tensor squares) {
  for_storage_of(squares, [&](auto kind) {
    const auto call = whole_call<decltype(kind)>(of_images, of_captions, squares);
    ITM_DISPATCH(run_whole, call);
  });
}

void whole_squares_backward(Tensor of_images, Tensor of_captions, Tensor grad_squares, Tensor grad_images,
                            Tensor grad_captions) {
  for_storage_of(grad_squares, [&](auto kind) {
    auto call = whole_call<decltype(kind)>(of_images, of_captions, grad_squares);
    call.grad_images = elements<float>(grad_images, call.images * call.width, "whole_squares: grad_images");
    call.grad_captions = elements<float>(grad_captions, call.captions * call.width, "whole_squares: grad_captions");
    ITM_DISPATCH(run_whole_backward, call);
  });
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(itm_kernels_native, CPU, m) {
  m.impl("whole_squares", TORCH_BOX(&itm::whole_squares));
  m.impl("whole_squares_backward", TORCH_BOX(&itm::whole_squares_backward));
}
