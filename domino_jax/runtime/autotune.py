"""Which form of attention a device runs soonest: measured where there is a choice."""

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

POSITIONS = 4096  # of the cache, where the model has so many: in short ones attention costs little in any form
REPEATS, ROUNDS = 16, 5  # runs in one program; timings of each program, in turn, of which the shortest counts
MARGIN = 0.9  # of the time of the first form, which another must stay below: near it, noise would decide
ROUNDING = 2e-2  # of the largest value: how far two forms may lie apart in bfloat16
WINDOW = 64  # of the checks


class BackendTimes(NamedTuple):
    """The form to run, and a sentence for each that was left out for another reason than its speed."""

    form: Backend
    notes: tuple[str, ...] = ()


def fastest_backend(forms: Sequence[Backend], config: DecoderConfig, dtype: Any, tokens: int) -> BackendTimes:
    """The fastest form of attention, over one row's cache that is three quarters full.

    A form that fails here in any of the ways a model uses it, or says something else than the first does, is left out.

    Args:
        forms: those that may run, `xla` first (see `attention.available_backends`). One alone is not measured.
        config: a model's, with the heads that one device has.
        dtype: of queries and caches.
        tokens: T, the queries of a verification pass, of which the time counts.
    """
    if len(forms) == 1:
        return BackendTimes(forms[0])
    capacity = min(POSITIONS, length_bucket(config.positions))
    start = jnp.full(1, capacity * 3 // 4, jnp.int32)
    cache = 1, config.num_key_value_heads, capacity, config.head_dim
    keys = jax.random.split(jax.random.key(0), 3)
    k, v = (jax.random.normal(key, cache).astype(dtype) for key in keys[:2])

    def queries(count: int) -> Array:
        shape = 1, count, config.num_attention_heads, config.head_dim
        return jax.random.normal(keys[2], shape).astype(dtype)

    # What a model asks for: a verification, a plain step, a drafter's block of either kind of layer, part of a prompt.
    part = min(LARGEST_CHUNK, capacity // 4)
    asked = [(tokens, True, None), (1, True, None), (tokens, False, None), (tokens, False, WINDOW), (part, True, None)]
    verified = queries(tokens)
    programs: dict[Backend, Callable[..., Array]] = {}
    notes, expected = [], []
    for form in forms:
        try:
            said = [
                np.asarray(jax.jit(partial(attend, causal=causal, window=window, form=form))(queries(t), k, v, start))
                for t, causal, window in asked
            ]
            programs[form] = _repeated(form)
            programs[form](verified, k, v, start).block_until_ready()
        except Exception as error:  # whatever a kernel that does not compile or run here raises
            programs.pop(form, None)
            notes.append(f"attention by {form} is left out, since it fails here: {first_line(error)}.")
            continue
        expected = expected or said
        if not all(_close(ours, theirs) for ours, theirs in zip(said, expected, strict=True)):
            del programs[form]
            notes.append(f"attention by {form} is left out, since it says something else here than {forms[0]}.")
    seconds = dict.fromkeys(forms, float("inf"))
    for _ in range(ROUNDS):
        for form, run in programs.items():
            began = time.perf_counter()
            run(verified, k, v, start).block_until_ready()
            seconds[form] = min(seconds[form], time.perf_counter() - began)
    slowest = np.array(
        max_over_processes([seconds[form] for form in forms])
    )  # a form that is left out anywhere is so everywhere
    slowest[0] *= MARGIN
    return BackendTimes(forms[int(np.argmin(slowest))], tuple(notes))


def _close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether two forms said the same, up to rounding; what is not a number is not."""
    ours, theirs = ours.astype(np.float32), theirs.astype(np.float32)
    return bool(np.abs(ours - theirs).max() <= ROUNDING * np.abs(theirs).max())


def _repeated(form: Backend) -> Callable[..., Array]:
    """A program that attends REPEATS times, each with what the last one gave as its queries."""

    @jax.jit
    def run(q: Array, k: Array, v: Array, start: Array) -> Array:
        return jax.lax.fori_loop(0, REPEATS, lambda _, q: attend(q, k, v, start, form=form), q)

    return run
