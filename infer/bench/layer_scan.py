"""Layers unrolled, as decoding runs them, against one scan over stacked weights: time of a pass, and of compiling it.

Unrolled programs compile longer; a scan may copy each layer's slice of the stacked weights (docs/algorithm.md,
section 8). Which is faster is a question for each device.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from rich.console import Console
from rich.table import Table

from convert.shapes import find_shape, random_weights
from domino_jax import cache as kv
from domino_jax import layers, target
from domino_jax.attention import attend
from domino_jax.config import TargetConfig
from domino_jax.moe import resolve_moe_backend
from domino_jax.paged import AnyKVCache
from domino_jax.runtime.command import UsageError
from domino_jax.runtime.devices import own_devices
from domino_jax.runtime.memory import explain_out_of_memory
from domino_jax.runtime.precision import matmul_precision, resolve_dtype
from domino_jax.weights import Target
from infer.bench.scanned import Scan

REPEATS, TRIES = 4, 5


def scanned(params: Target, config: TargetConfig, stacked: Any, tokens: Array, start: Array, k: Array, v: Array) -> Any:
    """`target.forward` with its layers in a scan.

    Args:
        stacked: a Layer whose leaves have a leading axis of layers.
        k, v: [layers, B, K, S, H].

    Returns:
        Hidden states [B, T, D], and the caches.
    """
    positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    angles, eps = layers.rotary(positions, config), config.rms_norm_eps

    def step(x: Array, one: Any) -> tuple[Array, tuple[Array, Array]]:
        layer, k, v = one
        y = layers.rms_norm(x, layer.input_norm, eps)
        q, (new_k, new_v) = layers.queries(layer, y, angles, eps), layers.keys_values(layer, y, angles, eps)
        k, v = kv.write(k, new_k, start), kv.write(v, new_v, start)
        return layers.residual(layer, x, attend(q, k, v, start), eps, config.moe), (k, v)

    x, (k, v) = jax.lax.scan(step, layers.embed(params.embed, tokens), (stacked, k, v))
    return layers.rms_norm(x, params.norm, eps), k, v


def time_program(
    make: Callable[[], Any], weights: Any, run: Callable[[Any, Any], tuple[Array, Any]]
) -> tuple[float, float]:
    """Seconds to compile `run`, and milliseconds of a call.

    Args:
        make: the first caches, which the program may overwrite.
        weights: an argument too: closed over, they would be constants of the program.
        run: from caches and weights to an output and the caches to go on with.
    """
    began = time.perf_counter()
    program = jax.jit(run, donate_argnums=0).lower(make(), weights).compile()
    compiled = time.perf_counter() - began
    caches, times = make(), []
    for _ in range(TRIES):
        began = time.perf_counter()
        for _ in range(REPEATS):
            out, caches = program(caches, weights)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - began) / REPEATS)
    return compiled, statistics.median(times) * 1e3


def measure_scanned(options: Scan, config: TargetConfig) -> list[tuple[int, str, float, float]]:
    """(tokens, kind, ms of a pass, seconds to compile) of each."""
    dtype = resolve_dtype(options.dtype, own_devices()[0].platform)
    params = random_weights(config, dtype)
    start = jnp.full(1, options.positions // 2, jnp.int32)
    rows = []

    def caches(leading: tuple[int, ...]) -> Any:
        shape = (*leading, 1, config.num_key_value_heads, options.positions, config.head_dim)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    for count in options.tokens:
        tokens = jnp.arange(count, dtype=jnp.int32)[None]

        def unrolled(cache: AnyKVCache, params: Target, tokens: Array = tokens) -> tuple[Array, AnyKVCache]:
            hidden, _, after = target.forward(params, config, tokens, start, cache)
            assert after is not None
            return hidden, after

        rows.append(
            (
                count,
                "unrolled",
                *time_program(lambda: kv.init_cache(config, 1, options.positions, dtype), params, unrolled),
            )
        )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params.layers)
    for count in options.tokens:
        tokens = jnp.arange(count, dtype=jnp.int32)[None]

        def over_layers(pair: Any, weights: tuple[Target, Any], tokens: Array = tokens) -> tuple[Array, Any]:
            hidden, *after = scanned(weights[0], config, weights[1], tokens, start, *pair)
            return hidden, tuple(after)

        whole = time_program(lambda: caches((config.num_hidden_layers,)), (params, stacked), over_layers)
        rows.append((count, "scanned", *whole))
    return [(count, kind, ms, seconds) for count, kind, seconds, ms in sorted(rows, key=lambda row: row[0])]


def run_scan(options: Scan) -> None:
    """Measure, and print a table.

    Raises:
        UsageError: an option does not fit the shape.
        DominoError: the shape is unknown, or memory is exhausted.
    """
    platform = own_devices()[0].platform
    config = resolve_moe_backend(find_shape(options.shapes).target, platform)
    count = config.num_hidden_layers if options.layers is None else options.layers
    if not 1 <= count <= config.num_hidden_layers:
        raise UsageError(f"--layers must be from 1 to {config.num_hidden_layers}, found {options.layers}.")
    config = dataclasses.replace(config, num_hidden_layers=count)
    table = Table("tokens", "layers", "ms a pass", "compile s", title=f"{options.shapes}, one row, no LM head")
    precision = matmul_precision(resolve_dtype(options.dtype, platform))
    memory = "the device has too little memory for both kinds of layers: fewer --layers."
    with explain_out_of_memory(memory), precision:
        for tokens, kind, ms, seconds in measure_scanned(options, config):
            table.add_row(str(tokens), kind, f"{ms:.2f}", f"{seconds:.1f}")
    Console().print(table)
