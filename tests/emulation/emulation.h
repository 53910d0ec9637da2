// CUDA on a CPU, for tests: a .cu file compiled by g++ with ITM_EMULATED runs its kernels here, thread by thread.
//
// Blocks run one after another. The threads of a block are fibers of one thread of the operating system; warp-wide words
// and __syncthreads are points where fibers meet. It shows, as an exception out of launch():
//   - lanes of a warp that meet at different words, or threads that leave while others wait for them (divergence);
//   - threads that wait for ever;
//   - writes just outside dynamic shared memory, addresses that are not aligned to what is read there, indices outside
//     arrays of known size.
// And as NaN in the results, because memory starts as NaN: shared memory read before it is written, asynchronous copies
// read before they were waited for, and most missing barriers, since odd blocks run their threads in reverse order.
// It does not show: speed, races between blocks, global memory out of bounds, registers; nor what is wrong with static
// __shared__ arrays, which start as zeros and keep what the block before left in them.
#pragma once

#include "cuda_language.h"
#include "cuda_scalars.h"
#include "runtime.h"
#include "warp_words.h"
#include "warpgroup_words.h"
