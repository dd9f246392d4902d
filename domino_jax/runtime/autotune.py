"""Picks the fastest attention backend by timing, among those that agree with xla."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from domino_jax.attention import Backend, attend
from domino_jax.cache import length_bucket
from domino_jax.config import DecoderConfig
from domino_jax.decode import LARGEST_CHUNK
from domino_jax.errors import first_line
from domino_jax.runtime.processes import max_over_processes

POSITIONS = 4096  # of the cache, where the model has so many: over short caches every backend is fast
REPEATS, ROUNDS = 16, 5  # runs in one program; timings of each program, in turn, of which the shortest counts
MARGIN = 0.9  # another backend must take less than this share of the first one's time: near it, noise would decide
ROUNDING = 2e-2  # of the largest value: how far two backends may lie apart in bfloat16
WINDOW = 64  # of the comparison
ROWS = 3  # of the comparison, which start at the beginning, in the middle and at the end of the cache


class FastestBackend(NamedTuple):
    """The backend to run, and a sentence for each that failed or disagreed."""

    backend: Backend
    notes: tuple[str, ...] = ()


def fastest_backend(backends: Sequence[Backend], config: DecoderConfig, dtype: Any, tokens: int) -> FastestBackend:
    """The fastest attention backend for a verification pass of one row whose cache is three quarters full.

    A backend is left out that fails in one of the ways in which a model calls it, or disagrees with the first one, over
    rows of different lengths.

    Args:
        backends: those that may run, `xla` first (see `attention.available_backends`). One alone is not measured.
        config: a model's, with the heads that one device has.
        dtype: of queries and caches.
        tokens: T, the queries of a verification pass.
    """
    if len(backends) == 1:
        return FastestBackend(backends[0])
    capacity = min(POSITIONS, length_bucket(config.positions))
    cache = ROWS, config.num_key_value_heads, capacity, config.head_dim
    keys = jax.random.split(jax.random.key(0), 3)
    k, v = (jax.random.normal(key, cache).astype(dtype) for key in keys[:2])

    def queries(count: int) -> Array:
        shape = ROWS, count, config.num_attention_heads, config.head_dim
        return jax.random.normal(keys[2], shape).astype(dtype)

    def output(backend: Backend, count: int, causal: bool, window: int | None) -> np.ndarray:
        """For rows at the beginning, in the middle and at the end of the cache."""
        starts = jnp.array([0, capacity // 2, capacity - count], jnp.int32)
        run = jax.jit(partial(attend, causal=causal, window=window, backend=backend))
        return np.asarray(run(queries(count), k, v, starts))

    # How a model calls attention: a verification, a plain step, a drafter's block, a part of a prompt, a block of
    # either kind of layer with a window.
    part = min(LARGEST_CHUNK, capacity // 4)
    calls = [(tokens, True, None), (1, True, None), (tokens, False, None), (part, True, None)]
    calls += [(tokens, True, WINDOW), (tokens, False, WINDOW)]
    timed = queries(tokens)[:1], k[:1], v[:1], jnp.full(1, capacity * 3 // 4, jnp.int32)
    programs: dict[Backend, Callable[..., Array]] = {}
    notes, expected = [], []
    for backend in backends:
        try:
            outputs = [output(backend, *call) for call in calls]
            programs[backend] = _repeated(backend)
            programs[backend](*timed).block_until_ready()
        except Exception as error:  # whatever a kernel that does not compile or run here raises
            programs.pop(backend, None)
            notes.append(f"attention by {backend} is left out, since it fails here: {first_line(error)}.")
            continue
        expected = expected or outputs
        if not all(_close(ours, theirs) for ours, theirs in zip(outputs, expected, strict=True)):
            del programs[backend]
            notes.append(
                f"attention by {backend} is left out, since its output differs from that of {backends[0]} here."
            )
    seconds = dict.fromkeys(backends, float("inf"))
    for _ in range(ROUNDS):
        for backend, run in programs.items():
            began = time.perf_counter()
            run(*timed).block_until_ready()
            seconds[backend] = min(seconds[backend], time.perf_counter() - began)
    # One process where a backend is left out is enough for all to leave it out.
    slowest = np.array(max_over_processes([seconds[backend] for backend in backends]))
    slowest[0] *= MARGIN
    return FastestBackend(backends[int(np.argmin(slowest))], tuple(notes))


def _close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether two outputs are equal up to rounding; NaN is not."""
    ours, theirs = ours.astype(np.float32), theirs.astype(np.float32)
    return bool(np.abs(ours - theirs).max() <= ROUNDING * np.abs(theirs).max())


def _repeated(backend: Backend) -> Callable[..., Array]:
    """A program that attends REPEATS times, each with the last output as its queries."""

    @jax.jit
    def run(q: Array, k: Array, v: Array, start: Array) -> Array:
        return jax.lax.fori_loop(0, REPEATS, lambda _, q: attend(q, k, v, start, backend=backend), q)

    return run
