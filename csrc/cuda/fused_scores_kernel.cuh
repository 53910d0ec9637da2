// Regions x words -> scores in one kernel (sm_90a, t2i, 36 regions, half precision): no product leaves the chip.
//
//   S = T V^T of a tile of 128 words x 4 images, then the score of every caption and image of it as in
//   cross_attention_scores_kernel.cuh, whose code runs here on S in shared memory.
//
// Owner: a block of threads a multiprocessor, tile after tile (fused_tile's order). One thread copies slices of 64 of D
// into a ring of stages; a warpgroup multiplies and rounds S to the inputs' type, as a library product would; eight
// warps make scores of it while the next tile is multiplied. Read: every operand slice once a tile, by bulk copies of
// one contiguous piece (fused_scores_packing.cuh). Accumulation: float32 in registers, every sum by one owner in one
// order, no atomics. The trick: epilogue and product use different units of the multiprocessor, so that the shorter of
// them costs nothing but the tensor cores' share of it.
#pragma once

#include "cross_attention_scores_kernel.cuh"
#include "fused_scores_packing.cuh"
#include "warpgroup_words.h"

namespace itm {

// Operands of a block of images x captions, packed.
template <class T>
struct FusedOperands {
  const T *words, *regions;  // [tiles, slices, kFusedWords or kFusedColumns, 64]
  const int* table;          // [word_tiles + 1] first caption of a tile
  const __half* gram;        // [4 region_tiles, 8 kFewTiles, kFusedGramColumns]
  const float* gram_scale;   // [4 region_tiles]
  int slices, word_tiles, region_tiles;
};

// Stages one after another, round and round; parity is that of the phase in which this stage's barriers are.
struct Ring {
  int stage = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage < kFusedStages) return;
    stage = 0;
    parity ^= 1;
  }
};

template <class T>
struct FusedScores {
  using Epilogue = ScoresOfTiles<T, HalfArithmetic, kFewTiles, false, kFusedRegions>;
  static_assert(Epilogue::kThreads == kFusedEpilogueThreads);
  static constexpr int kProductWarps = kFusedProductThreads / 32;

  const ScoresCall<T>& call;
  const FusedOperands<T>& operands;
  char* stages;       // [kFusedStages] words, then regions
  T* products;        // [kFusedWords, kFusedProductStride]
  char* tables;       // of the epilogue
  Mbarrier* filled;   // [kFusedStages] copies have arrived
  Mbarrier* emptied;  // [kFusedStages] it has been multiplied
  Mbarrier *products_made, *products_read;

  __device__ FusedScores(const ScoresCall<T>& the_call, const FusedOperands<T>& the_operands)
      : call(the_call), operands(the_operands) {
    const FusedBytes bytes = fused_bytes(the_call.feature.kind == NormKind::kSoftmax);
    char* memory = shared_memory();
    stages = memory + (1024 - shared_address(memory) % 1024) % 1024;
    products = reinterpret_cast<T*>(stages + bytes.stages);
    tables = stages + bytes.stages + bytes.products;
    filled = reinterpret_cast<Mbarrier*>(tables + bytes.tables);
    emptied = filled + kFusedStages;
    products_made = emptied + kFusedStages;
    products_read = products_made + 1;
  }

  __device__ int tiles() const { return operands.word_tiles * operands.region_tiles; }
  __device__ FusedTile tile(int number) const { return fused_tile(number, operands.region_tiles, operands.word_tiles); }
  __device__ char* words_of(int stage) const { return stages + stage * kFusedStageBytes; }
  __device__ char* regions_of(int stage) const { return words_of(stage) + kFusedWords * kFusedSlice * 2; }

  __device__ void init_barriers() const {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kFusedStages; ++stage) {
        mbarrier_init(filled + stage, 1);
        mbarrier_init(emptied + stage, kProductWarps);
      }
      mbarrier_init(products_made, kFusedProductThreads);
      mbarrier_init(products_read, 1);
      mbarrier_fence_init();
    }
    __syncthreads();
  }

  // One thread.
  __device__ void copy() const {
    Ring ring;
    for (int number = blockIdx.x; number < tiles(); number += gridDim.x) {
      const FusedTile at = tile(number);
      const T* words = operands.words + static_cast<int64_t>(at.words) * operands.slices * kFusedWords * kFusedSlice;
      const T* regions =
          operands.regions + static_cast<int64_t>(at.images) * operands.slices * kFusedColumns * kFusedSlice;
      for (int slice = 0; slice < operands.slices; ++slice, ring.advance()) {
        Mbarrier* barrier = filled + ring.stage;
        mbarrier_wait(emptied + ring.stage, ring.parity ^ 1);
        mbarrier_arrive_expect(barrier, kFusedStageBytes);
        copy_bulk(words_of(ring.stage), words, kFusedWords * kFusedSlice * 2, barrier);
        copy_bulk(regions_of(ring.stage), regions, kFusedColumns * kFusedSlice * 2, barrier);
        words += kFusedWords * kFusedSlice;
        regions += kFusedColumns * kFusedSlice;
      }
    }
  }

  // Every warp for itself: its own products are done when it has waited, those of its neighbours may not be.
  __device__ void empty(int stage) const {
    if (threadIdx.x % 32 == 0) mbarrier_arrive(emptied + stage);
  }

  // A warpgroup: both halves of the words against the same regions.
  __device__ void multiply() const {
    Ring ring;
    int parity = 0;  // of products_read
    for (int number = blockIdx.x; number < tiles(); number += gridDim.x, parity ^= 1) {
      float low[72], high[72];
      int before = 0;
      for (int slice = 0; slice < operands.slices; ++slice, ring.advance()) {
        mbarrier_wait(filled + ring.stage, ring.parity);
        const uint64_t words = operand_of(words_of(ring.stage)), regions = operand_of(regions_of(ring.stage));
        const uint64_t more_words = operand_of(words_of(ring.stage) + kFusedWords / 2 * kFusedSlice * 2);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kFusedSlice / 16; ++k) {
          wgmma_144<T>(low, words + 2 * k, regions + 2 * k, slice + k > 0);
          wgmma_144<T>(high, more_words + 2 * k, regions + 2 * k, slice + k > 0);
        }
        wgmma_commit();
        wgmma_wait<1>();  // the slice before has been multiplied, this one goes on
        if (slice > 0) empty(before);
        before = ring.stage;
      }
      wgmma_wait<0>();
      settle(low);
      settle(high);
      empty(before);
      mbarrier_wait(products_read, parity ^ 1);
      store(low, 0);
      store(high, kFusedWords / 2);
      mbarrier_arrive(products_made);
    }
  }

  __device__ void store(const float (&sums)[72], int row) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    T* out = products + (row + 16 * warp + lane / 4) * kFusedProductStride + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < 18; ++j) {
      *reinterpret_cast<uint32_t*>(out + 8 * j) = pack<T>(sums[4 * j], sums[4 * j + 1]);
      *reinterpret_cast<uint32_t*>(out + 8 * kFusedProductStride + 8 * j) = pack<T>(sums[4 * j + 2], sums[4 * j + 3]);
    }
  }

  static __device__ __forceinline__ void sync_epilogue() { sync_warps<1>(kFusedEpilogueThreads); }

  __device__ void load_gram(const Epilogue& epilogue, int images) const {
    constexpr int kPieces = kFusedImages * kFusedGramElements * 2 / 16;
    const auto* from = reinterpret_cast<const int4*>(operands.gram) + static_cast<int64_t>(images) * kPieces;
    auto* to = reinterpret_cast<int4*>(epilogue.tile.gram);
    for (int i = threadIdx.x; i < kPieces; i += kFusedEpilogueThreads) to[i] = from[i];
    if (threadIdx.x < kFusedImages) {
      epilogue.tile.gram_scale[threadIdx.x] = operands.gram_scale[images * kFusedImages + threadIdx.x];
    }
  }

  // Eight warps. What a tile writes into tables before the first barrier was read before the last one of the tile
  // before.
  __device__ void score() const {
    const Matrix<const T> of_tile{products, kFusedProductStride, 1, true};
    Epilogue epilogue(call, of_tile, tables);
    int parity = 0;  // of products_made
    for (int number = blockIdx.x; number < tiles(); number += gridDim.x, parity ^= 1) {
      const FusedTile at = tile(number);
      const int first = operands.table[at.words];
      epilogue.take_groups(at.images * kFusedImages);
      epilogue.take(first, operands.table[at.words + 1] - first);
      load_gram(epilogue, at.images);
      mbarrier_wait(products_made, parity);
      epilogue.scale_columns();
      sync_epilogue();
      epilogue.cosines();
      sync_epilogue();
      if (threadIdx.x == 0) mbarrier_arrive(products_read);
      epilogue.write_scores();
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kFusedThreads, 1)
    fused_scores(const __grid_constant__ ScoresCall<T> call, const __grid_constant__ FusedOperands<T> operands) {
  const FusedScores<T> scores(call, operands);
  scores.init_barriers();
  if (threadIdx.x < kFusedEpilogueThreads) {
    take_registers<kFusedEpilogueRegisters>();
    scores.score();
  } else if (threadIdx.x < kFusedEpilogueThreads + kFusedProductThreads) {
    take_registers<kFusedProductRegisters>();
    scores.multiply();
  } else {
    give_registers<kFusedCopyRegisters>();
    if (threadIdx.x == kFusedEpilogueThreads + kFusedProductThreads) scores.copy();
  }
}

}  // namespace itm
