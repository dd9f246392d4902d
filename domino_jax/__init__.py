"""Domino in JAX: lossless speculative decoding with a parallel drafter and a causal head.

Pure functions over arrays: no files, no arguments, no printing. Read in this order: `config` (the
axis legend), `weights`, `layers`, `target`, `draft`, `head`, `verify`, `decode`.
"""
