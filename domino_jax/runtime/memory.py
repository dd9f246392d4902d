"""Device memory: the mesh that a model needs, and what to say when memory is exhausted."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from domino_jax.config import DecoderConfig
from domino_jax.errors import DominoError
from domino_jax.sharding import fit_to_mesh
from domino_jax.weights import weight_shapes

SHARE = 0.85  # of a device's memory, for weights and one row's caches; the rest is for activations and larger batches
POSITIONS = 4096  # of that row


@contextmanager
def explain_out_of_memory(otherwise: str) -> Iterator[None]:
    """Turn the device's error about exhausted memory into a DominoError that says `otherwise`; others pass."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DominoError(otherwise) from None


def default_mesh_sizes(configs: Sequence[DecoderConfig], dtype: Any) -> tuple[int, int]:
    """The mesh (data, model) without --mesh: one device where the models fit, else as many as they can be divided over.

    A mesh that is not needed for memory costs more in communication than it saves for small models. Several processes
    always share one mesh, as each must have a part.

    Args:
        configs: of the models that will run together.
        dtype: of weights and caches.
    """

    def divides(model: int) -> bool:
        try:
            return all(fit_to_mesh(config, model) for config in configs)
        except DominoError:
            return False

    if jax.process_count() == 1 and _fits_one_device(configs, dtype):
        return 1, 1
    return 1, max(filter(divides, range(1, len(jax.devices()) + 1)))


def _fits_one_device(configs: Sequence[DecoderConfig], dtype: Any) -> bool:
    """Whether one device has the memory for these models; True on a CPU, whose devices share one memory."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return True
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit is None or sum(_needed_bytes(config, dtype) for config in configs) <= SHARE * limit


def _needed_bytes(config: DecoderConfig, dtype: Any) -> int:
    """The bytes of a model's weights and of its cache for one row of POSITIONS."""
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weight_shapes(config)))
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * POSITIONS
    return (weights + cache) * jnp.dtype(dtype).itemsize
