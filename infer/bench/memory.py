"""What a mode holds in memory."""

from typing import Any

import jax

from convert.loading import LoadedModel
from domino_jax import cache as kv
from domino_jax.runtime.devices import own_devices


def megabytes(loaded: LoadedModel, batch: int, positions: int) -> dict[str, float]:
    """Weights and caches of one mode, from the arrays' sizes; what the device says it holds, where it does."""
    configs = loaded.configs
    capacity = kv.length_bucket(positions + configs.lookahead)
    held: dict[str, float] = {"weights_mb": _mb(loaded.params)}
    caches = [jax.eval_shape(lambda: kv.init_cache(configs.target, batch, capacity, loaded.dtype))]
    drafter = configs.drafter
    if drafter is not None:
        caches.append(jax.eval_shape(lambda: drafter.init(batch, capacity, loaded.dtype)))
    held["caches_mb"] = _mb(caches)
    stats = own_devices()[0].memory_stats()
    if stats:
        held["device_peak_mb"] = stats.get("peak_bytes_in_use", 0) / 1e6
    return held


def _mb(tree: Any) -> float:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 1e6
