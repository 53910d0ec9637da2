"""Block loops of the native floor on the CPU, one module an op; ``itm_kernels.native.<op>`` calls them."""
