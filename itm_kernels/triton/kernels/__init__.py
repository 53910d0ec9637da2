"""The kernels themselves, one module a concept; ``words`` holds what they share."""
