"""Which form of attention a device runs soonest: measured where there is a choice."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from convert.hosts import agree
from convert.tokenizer import first_line
from domino_jax.attention import Form, attend
from domino_jax.cache import bucket
from domino_jax.config import DecoderConfig

POSITIONS = 4096  # of the cache, where the model has so many: in short ones attention costs little in any form
REPEATS, ROUNDS = 16, 5  # runs in one program; timings of each program, in turn, of which the shortest counts
ROUNDING = 2e-2  # of the largest value: how far two forms may lie apart in bfloat16


class Fastest(NamedTuple):
    """The form to run, and a sentence for each that was left out for another reason than its speed."""

    form: Form
    notes: tuple[str, ...] = ()


def fastest(forms: Sequence[Form], config: DecoderConfig, dtype: Any, tokens: int) -> Fastest:
    """The fastest form of attention, over one row's cache that is three quarters full.

    A form that fails here, or says something else than the first does, is left out.

    Args:
        forms: those that may run, `xla` first (see `attention.choices`). Nothing is measured where there is one.
        config: a model's, with the heads that one device has.
        dtype: of queries and caches.
        tokens: T, the queries of a verification pass.
    """
    if len(forms) == 1:
        return Fastest(forms[0])
    capacity = min(POSITIONS, bucket(config.positions))
    cache = 1, config.num_key_value_heads, capacity, config.head_dim
    shapes = (1, tokens, config.num_attention_heads, config.head_dim), cache, cache
    keys = jax.random.split(jax.random.key(0), len(shapes))
    q, k, v = (jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True))
    inputs = q, k, v, jnp.full(1, capacity * 3 // 4, jnp.int32)
    programs: dict[Form, Callable[..., Array]] = {}
    notes, expected = [], None
    for form in forms:
        try:
            once, programs[form] = _repeated(form, 1), _repeated(form, REPEATS)
            said = np.asarray(once(*inputs), np.float32)
            programs[form](*inputs).block_until_ready()
        except Exception as error:  # whatever a kernel that does not compile or run here raises
            del programs[form]
            notes.append(f"attention by {form} is left out, since it fails here: {first_line(error)}.")
            continue
        expected = said if expected is None else expected
        if not np.abs(said - expected).max() <= ROUNDING * np.abs(expected).max():
            del programs[form]
            notes.append(f"attention by {form} is left out, since it says something else here than {forms[0]}.")
    seconds = dict.fromkeys(forms, float("inf"))
    for _ in range(ROUNDS):
        for form, run in programs.items():
            began = time.perf_counter()
            run(*inputs).block_until_ready()
            seconds[form] = min(seconds[form], time.perf_counter() - began)
    agreed = agree([seconds[form] for form in forms])
    return Fastest(forms[int(np.argmin(agreed))], tuple(notes))


def _repeated(form: Form, times: int) -> Callable[..., Array]:
    """A program that attends so many times, each with what the last one gave as its queries."""

    @jax.jit
    def run(q: Array, k: Array, v: Array, start: Array) -> Array:
        return jax.lax.fori_loop(0, times, lambda _, q: attend(q, k, v, start, form=form), q)

    return run
