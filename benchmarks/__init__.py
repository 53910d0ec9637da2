"""How fast and how lean the ops are: ``python -m benchmarks.run``."""
