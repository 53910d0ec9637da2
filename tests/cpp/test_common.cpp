// Invariants of csrc/common: block plans and tile sizes. Plain C++, no torch.

#include <cstdio>
#include <cstdlib>
#include <random>

#include "common/scores_plan.h"
#include "common/tile_choice.h"

namespace {

int failures = 0;

void expect(bool holds, const char* what, int64_t a = 0, int64_t b = 0) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s (%lld, %lld)\n", what, static_cast<long long>(a), static_cast<long long>(b));
}

itm::ScoresShape random_shape(std::mt19937& random, int64_t images, int64_t captions) {
  itm::ScoresShape shape{};
  shape.region_offsets = {0};
  for (int64_t i = 0; i < images; ++i) shape.region_offsets.push_back(shape.region_offsets.back() + 36);
  shape.word_offsets = {0};
  std::uniform_int_distribution<int64_t> words(2, 77);
  for (int64_t c = 0; c < captions; ++c) shape.word_offsets.push_back(shape.word_offsets.back() + words(random));
  shape.width = 1024;
  shape.element_bytes = random() % 2 ? 4 : 2;
  shape.t2i = random() % 3 != 0;
  shape.i2t = !shape.t2i || random() % 2;
  shape.backward = random() % 2;
  shape.copies_regions = random() % 2;
  shape.threads = 1 + static_cast<int64_t>(random() % 64);
  return shape;
}

void covers(const std::vector<int64_t>& bounds, int64_t groups) {
  expect(!bounds.empty() && bounds.front() == 0 && bounds.back() == groups, "bounds cover all groups", groups);
  for (size_t b = 1; b < bounds.size(); ++b) expect(bounds[b] > bounds[b - 1], "bounds increase");
}

void plans_cover_and_stay_within_the_bound() {
  std::mt19937 random(0);
  for (int64_t images : {0, 1, 3, 128, 1000}) {
    for (int64_t captions : {0, 1, 5, 128, 3000}) {
      for (int64_t bound : {int64_t{32} << 20, int64_t{256} << 20}) {
        const auto shape = random_shape(random, images, captions);
        const auto plan = itm::plan_scores(shape, bound);
        covers(plan.image_bounds, images);
        covers(plan.caption_bounds, captions);
        expect(plan.workspace_bytes <= bound, "workspace within the bound", plan.workspace_bytes, bound);
        const int64_t passes = shape.backward ? 3 : 1;
        expect(plan.flops == 2 * passes * shape.region_offsets.back() * shape.word_offsets.back() * 1024, "flops");
      }
    }
  }
}

void a_bound_too_small_for_any_pair_gives_the_smallest_blocks() {
  std::mt19937 random(1);
  const auto plan = itm::plan_scores(random_shape(random, 4, 3), 1);
  expect(plan.image_bounds.size() == 5, "one image a block", static_cast<int64_t>(plan.image_bounds.size()));
}

void groups_are_never_split() {
  const auto bounds = itm::cut({0, 10, 30, 31, 99, 100}, 32);
  expect(bounds == std::vector<int64_t>({0, 3, 4, 5}), "a group longer than the block stands alone");
}

void tiles_are_whole_vectors() {
  for (int64_t keys : {1, 7, 36, 100, 576, 5000}) {
    const auto bounds = itm::tile_bounds(keys);
    expect(bounds.width % 16 == 0 && bounds.width >= 32 && bounds.width <= 256, "tile width", keys, bounds.width);
  }
}

}  // namespace

int main() {
  plans_cover_and_stay_within_the_bound();
  a_bound_too_small_for_any_pair_gives_the_smallest_blocks();
  groups_are_never_split();
  tiles_are_whole_vectors();
  std::printf("%s\n", failures ? "failed" : "passed");
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
