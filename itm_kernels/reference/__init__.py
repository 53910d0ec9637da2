"""The definition of every op: the literal formula in plain PyTorch, slow, any dtype."""
