"""Device memory: the mesh that a model needs, and what to say when memory is exhausted."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from typing import Any

import jax
import jax.numpy as jnp

from domino_jax.config import DecoderConfig, TargetConfig
from domino_jax.errors import DominoError
from domino_jax.prepare import quantize_target
from domino_jax.runtime.weight_forms import WeightForm
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


def default_mesh_sizes(
    configs: Sequence[DecoderConfig], dtype: Any, devices: Sequence[Any], weights: WeightForm = "exact"
) -> tuple[int, int]:
    """The mesh (data, model) without --mesh: one device where the models fit, else as many as they can be divided over.

    A mesh that is not needed for memory costs more in communication than it saves for small models. Several processes
    always share one mesh, as each must have a part.

    Args:
        configs: of the models that will run together.
        dtype: of weights and caches.
        devices: that there are, of all processes.
        weights: the form of the first model's.
    """
    several = jax.process_count() > 1
    return smallest_mesh(configs, dtype, len(devices), 0 if several else _memory_limit(devices[0]), weights)


def smallest_mesh(
    configs: Sequence[DecoderConfig], dtype: Any, devices: int, limit: float | None, weights: WeightForm = "exact"
) -> tuple[int, int]:
    """The mesh (data, model) of the fewest devices: one where the models fit, else all that they can be divided over.

    Args:
        devices: that there are.
        limit: bytes that one of them has for us; None where it does not count.
        weights: the form of the first model's.
    """
    forms: list[WeightForm] = [weights, *repeat("exact", len(configs) - 1)]
    if limit is None or sum(map(_needed_bytes, configs, repeat(dtype), forms)) <= SHARE * limit:
        return 1, 1
    return 1, max(model for model in range(1, devices + 1) if divides(configs, model))


def divides(configs: Sequence[DecoderConfig], model: int) -> bool:
    """Whether models can be divided over so many devices."""
    try:
        return all(fit_to_mesh(config, model) for config in configs)
    except DominoError:
        return False


def _memory_limit(device: Any) -> int | None:
    """Bytes that a device gives us; None on a CPU, whose devices share one memory, and where it does not say."""
    return None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")


def free_bytes() -> int | None:
    """Memory of a device that caches may have, about: most of what is free there, on a CPU half; None if not known."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        except (ValueError, OSError, AttributeError):
            return None
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return max(0, int(0.9 * stats["bytes_limit"]) - stats.get("bytes_in_use", 0))


def _needed_bytes(config: DecoderConfig, dtype: Any, form: WeightForm) -> int:
    """The bytes of a model's weights and of its cache for one row of POSITIONS."""
    held = weight_shapes(config, dtype)
    if form != "exact":
        assert isinstance(config, TargetConfig)
        held = jax.eval_shape(partial(quantize_target, config=config, kind=form), held)
    weights = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(held))
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * POSITIONS
    return weights + cache * jnp.dtype(dtype).itemsize
