// Dropout by counters: Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), and the
// place of an element in it. itm_kernels/ops/dropout.py says the same in Python and why; tests hold the two together.
#pragma once

#include <cmath>
#include <cstdint>

namespace itm {

struct PhiloxWords {
  uint32_t a, b, c, d;
};

constexpr PhiloxWords philox(PhiloxWords x, uint64_t seed) {
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53u} * x.a, second = uint64_t{0xCD9E8D57u} * x.c;
    x = {static_cast<uint32_t>(second >> 32) ^ x.b ^ low, static_cast<uint32_t>(second),
         static_cast<uint32_t>(first >> 32) ^ x.d ^ high, static_cast<uint32_t>(first)};
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  return x;
}

enum class DropoutBranch : uint32_t { kKeys, kPooled };

// Of channels 4 n .. 4 n + 3; image and caption are numbers in the whole batch.
constexpr PhiloxWords dropout_counter(int64_t image, int64_t caption, int64_t query, int64_t step, DropoutBranch branch,
                                      int64_t n) {
  const int64_t place = step * (int64_t{1} << 24) + static_cast<int64_t>(branch) * (int64_t{1} << 23) + n;
  return {static_cast<uint32_t>(image), static_cast<uint32_t>(caption), static_cast<uint32_t>(query),
          static_cast<uint32_t>(place)};
}

// A word is kept when its upper 24 bits are at least this: whole numbers, so that every floor decides alike.
inline uint32_t dropout_threshold(double dropout) { return static_cast<uint32_t>(std::ceil(dropout * 16777216.0)); }

}  // namespace itm
