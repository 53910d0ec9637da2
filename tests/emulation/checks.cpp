// What g++ checks for us (-fsanitize=alignment,bounds), reported as any other mistake of a kernel. A GPU faults at an
// address that is not aligned to the type read there; this processor would not notice.
//
// libubsan is left out: it prints and goes on, and these two calls are all that the two checks make.

#include <cstdint>
#include <string>

#include "runtime.h"

namespace {

// The head of what the compiler passes (libubsan's ubsan_handlers.h).
struct Place {
  const char* file;
  uint32_t line, column;
};

void report(const char* mistake, const Place* place) {
  if (!itm::emulation::inside_kernel()) return;
  itm::emulation::fail(std::string(mistake) + " at " + place->file + ":" + std::to_string(place->line));
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_type_mismatch_v1(const Place* place, uintptr_t) {
  report("an address that is not aligned to its type", place);
}

extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_out_of_bounds(const Place* place, uintptr_t) {
  report("an index outside its array", place);
}
