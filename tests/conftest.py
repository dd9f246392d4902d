"""Settings of the whole suite: strict dtype promotion, and one thread for torch, which shares the cores with XLA."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # parity is stated in float32 as a CPU computes it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
