"""How fast and how lean the ops are: ``python -m benchmarks.run``."""

import os

# Before torch loads its OpenMP. Threads that spin between parallel regions take the cores from the other threads of a
# machine that has anything else to do; the loop over captions, which has thousands of regions, then looks ten times
# slower than it is. Waiting asleep costs a method microseconds a region.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
