"""Block loops of the native floor on a GPU, one module an op; ``itm_kernels.native.<op>`` calls them."""
