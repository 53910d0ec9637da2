"""Scorers that learn, on a GPU, block of pairs by block: what its floors share.

A floor brings its kernels as :class:`itm_kernels.pair_blocks.steps.Steps`; order, products, memory and what a backward
keeps are the same on all of them and stand here.
"""
