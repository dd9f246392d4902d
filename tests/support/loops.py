"""Decoding loops as tests run them: begin, to the end, with parts replaced; and transformers' own, to compare with."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.monitoring
import jax.numpy as jnp
import pytest
from jax import Array

from domino_jax import decode
from domino_jax.decode import DecodeConfig, DecodeState, Emitted
from domino_jax.drafters.base import DraftTokens, View
from domino_jax.paged import AnyKVCache
from domino_jax.sampling import Sampling, settings
from domino_jax.weights import Params

NO_STOP = jnp.full(1, -1, jnp.int32)


def begin(
    params: Params,
    configs: DecodeConfig,
    prompts: Sequence[Sequence[int]],
    limits: int | Sequence[int],
    stop: Array = NO_STOP,
    sampling: Sampling | None = None,
    keys: Array | None = None,
    coupled: Sequence[bool] | None = None,
) -> DecodeState:
    """`decode.prefill_batch` with what most tests want: greedy, one limit, caches of the weights' dtype."""
    batch = len(prompts)
    return decode.prefill_batch(
        params,
        configs,
        prompts,
        decode.new_rows(
            jax.random.split(jax.random.key(7), batch) if keys is None else keys,
            [limits] * batch if isinstance(limits, int) else list(limits),
            stop,
            settings(batch) if sampling is None else sampling,
            coupled,
        ),
        params.target.norm.dtype,
    )


class Output(NamedTuple):
    """What a row generated: its tokens, and the drafts accepted in each of its cycles."""

    tokens: list[int]
    accepted: list[int]


Dispatch = Callable[[DecodeState], tuple[DecodeState, Emitted]]


def finish(configs: DecodeConfig, state: DecodeState, dispatch: Dispatch) -> list[Output]:
    """Dispatch until all rows are done, growing the length bucket where it is full, as an engine does."""
    rows = [Output([int(t)], []) for t in jax.device_get(state.token)]
    done, dispatches = jax.device_get(state.done), 0
    while not done.all():
        dispatches += 1
        assert dispatches < 100, "rows that never end"
        if int(jax.device_get(state.length)[~done].max()) + configs.lookahead > state.cache.capacity:
            state = decode.grow_caches(configs, state, 2 * state.cache.capacity)
        state, emitted = dispatch(state)
        emitted = jax.device_get(emitted)
        assert emitted.cycles > 0, "a dispatch with work and room did nothing"
        for i in range(int(emitted.cycles)):
            for row, output in enumerate(rows):
                count = int(emitted.counts[i, row])
                output.tokens.extend(int(t) for t in emitted.tokens[i, row, :count])
                if count:
                    output.accepted.append(int(emitted.accepted[i, row]))
        done = jax.device_get(state.done)
    return rows


def speculate(
    params: Params,
    configs: DecodeConfig,
    state: DecodeState,
    cycles: int = 8,
    greedy: bool = True,
) -> list[Output]:
    """All rows to their ends by Domino cycles."""
    return finish(configs, state, lambda s: decode.speculate(params, configs, s, cycles, greedy))


def autoregress(
    params: Params,
    configs: DecodeConfig,
    state: DecodeState,
    cycles: int = 8,
    greedy: bool = True,
) -> list[Output]:
    """All rows to their ends by the autoregressive loop."""
    return finish(configs, state, lambda s: decode.autoregress(params, configs, s, cycles, greedy))


Loop = Callable[..., tuple[DecodeState, Emitted]]


def retraced(**replacements: Any) -> Loop:
    """`decode.speculate` traced anew with functions of decode or its modules replaced ("verify.greedy": ...)."""
    plain = decode.speculate.__wrapped__  # type: ignore[attr-defined]

    @partial(jax.jit, static_argnums=(1, 3, 4), donate_argnums=2)
    def run(*arguments: Any) -> tuple[DecodeState, Emitted]:
        with pytest.MonkeyPatch.context() as patch:
            for name, function in replacements.items():
                patch.setattr(f"domino_jax.{name.replace('__', '.')}", function)
            return plain(*arguments)

    return run


@dataclass(frozen=True)
class TableDrafter:
    """A drafter whose weights are a table [B, positions] of the tokens that it proposes, and which has no state.

    Row b with its last token at position a proposes table[b, a + 1 : a + 1 + J]: any accepted length can be had by
    writing the truth there and a wrong token where the run shall end.
    """

    most: int
    name: str = "a table"
    config: None = None
    target_layer_ids: tuple[int, ...] = ()

    def scratch(self, proposals: int) -> int:
        return 0

    def init(self, batch: int, capacity: int, dtype: Any) -> tuple[()]:
        return ()

    def propose(
        self, weights: Array, state: tuple[()], view: View, proposals: int, keys: Array | None
    ) -> tuple[DraftTokens, tuple[()], AnyKVCache]:
        places = view.length[:, None] + 1 + jnp.arange(proposals, dtype=jnp.int32)
        tokens = jnp.take_along_axis(weights, places, axis=1)
        probs = None if keys is None else jax.nn.one_hot(tokens, view.config.vocab_size)
        return DraftTokens(tokens, probs), state, view.cache

    def observe(
        self, weights: Array, state: tuple[()], tokens: Array, features: Array, start: Array, proposed: bool = False
    ) -> tuple[()]:
        return state


def hf_greedy(model: Any, prompt: Sequence[int], count: int, stop: Sequence[int] = ()) -> list[int]:
    """transformers' own greedy continuation of one prompt, the new ids only, a stop token kept."""
    import torch

    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=list(stop) or None,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects what JAX traces, lowers or compiles meanwhile."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.startswith("/jax/core/compile"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
