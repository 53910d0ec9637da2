// Where ops are registered: the product under its own name, the CPU emulation of the CUDA kernels (tests) beside it.
#pragma once

#include <torch/csrc/stable/library.h>

#ifdef ITM_EMULATED
#define ITM_NAMESPACE itm_kernels_emulated
#define ITM_KEY CPU
#else
#define ITM_NAMESPACE itm_kernels_native
#define ITM_KEY CUDA
#endif

// STABLE_TORCH_LIBRARY pastes its argument; this expands it first, as STABLE_TORCH_LIBRARY_IMPL does by itself.
#define ITM_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
