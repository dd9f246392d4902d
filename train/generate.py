"""Decoding many prompts, for rewriting training data and for validation.

Batches have one number of rows and sorted lengths, so few programs are compiled and little is padded. What a prompt is
answered depends on the seed and the prompt's own numbers, never on when or beside what it was run.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax import Array

from convert.not_finite import NOT_FINITE_DRAFTS, not_finite_error
from domino_jax import cache, decode, sampling
from domino_jax.decode import DecodeConfig
from domino_jax.finite import drafter_is_finite, drafts_look_broken
from domino_jax.runtime.memory import explain_out_of_memory
from domino_jax.sampling import SamplingParams
from domino_jax.sharding import MODEL, fetch, shard_copy
from domino_jax.weights import Params

CYCLES = 8  # a dispatch; plain steps give one token each, so there are more of them
STEPS = 32


class Request(NamedTuple):
    """What to answer. `row` and `turn` (from 0, below 2^32) number it: with the seed they give its random key."""

    row: int
    turn: int
    ids: Sequence[int]  # at least one
    limit: int  # tokens to generate at most


class DecodedPrompt(NamedTuple):
    """What the target says to a prompt."""

    prompt: Request
    tokens: list[int]  # a stop token is kept, at the end
    accepted: list[int]  # drafts accepted, cycle by cycle, counted whole; empty without a drafter
    finish_reason: Literal["stop", "length"]


# Called after each dispatch with the tokens that it gave and the drafts accepted in its cycles.
Update = Callable[[int, list[int]], None]


def batched_requests(prompts: Sequence[Request], size: int) -> list[list[Request]]:
    """The prompts in batches of `size` (the last may be smaller), by length.

    The longest come first: if memory does not suffice, that is known at once.
    """
    ordered = sorted(prompts, key=lambda p: (-len(p.ids), p.row, p.turn))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def generate(
    params: Params,
    configs: DecodeConfig,
    prompts: Sequence[Request],
    stop_ids: Sequence[int],
    dtype: Any,
    *,
    batch: int,
    choice: SamplingParams | None = None,
    seed: int = 0,
    wanted: Callable[[Request], bool] | None = None,
    update: Update | None = None,
    stopping: Callable[[], bool] | None = None,
) -> Iterator[DecodedPrompt]:
    """Answer the prompts, batch after batch, with drafts if `configs` has a drafter.

    Greedy answers are the same with and without a drafter (to rounding: in float32, token for token); samples have the
    same distribution. On a mesh this runs in its context, and so must every step of the iterator.

    Args:
        stop_ids: end an answer.
        dtype: of the caches.
        batch: rows to run together; made a multiple of what the mesh divides them into.
        choice: greedy when None.
        wanted: a batch with none of these is not run, and of the others only these are given. Leaving prompts out so
            changes no answer by even a rounding, since every batch that runs is composed as ever.
        stopping: asked before each dispatch; when true, what of the batch has ended is given, and nothing more is run.

    Raises:
        DominoError: the device's memory is exhausted, or the target's logits are not finite.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:  # rows are divided over every axis but `model`
        parts = math.prod(size for name, size in mesh.shape.items() if name != MODEL)
        batch = -(-batch // parts) * parts
    run = _Run(
        params, configs, shard_copy(np.array(stop_ids, np.int32), "-"), dtype, batch, choice or SamplingParams(), seed
    )
    for group in batched_requests(prompts, batch):
        if wanted and not any(map(wanted, group)):
            continue
        if stopping and stopping():
            return
        for answer in run.answers(group, tuple(stop_ids), update, stopping):
            if wanted is None or wanted(answer.prompt):
                yield answer


@dataclass
class _Run:
    """What all batches have in common; the arguments of `generate`."""

    params: Params
    configs: DecodeConfig
    stop: Array
    dtype: Any
    batch: int
    choice: SamplingParams
    seed: int
    drafter_checked: bool = False

    def answers(
        self,
        group: list[Request],
        stop_ids: tuple[int, ...],
        update: Update | None,
        stopping: Callable[[], bool] | None,
    ) -> list[DecodedPrompt]:
        """One batch, to its end or until `stopping`."""
        with explain_out_of_memory(
            f"the device has too little memory for {self.batch} sequences of this length: lower the batch size or the "
            "number of new tokens."
        ):
            return self._answers(group, stop_ids, update, stopping)

    def _answers(
        self,
        group: list[Request],
        stop_ids: tuple[int, ...],
        update: Update | None,
        stopping: Callable[[], bool] | None,
    ) -> list[DecodedPrompt]:
        configs, greedy, rows = self.configs, self.choice.temperature == 0, len(group)
        # Rows that only fill the batch are over after their first token.
        padded = group + [Request(0, 0, group[0].ids[:1], 1)] * (self.batch - rows)
        state = decode.prefill_batch(
            self.params,
            configs,
            [list(p.ids) for p in padded],
            keys(self.seed, [p.row for p in padded], [p.turn for p in padded]),
            [p.limit for p in padded],
            sampling.settings(self.batch, *self._choice()),
            self.stop,
            self.dtype,
        )
        first, done, length, finite = fetch((state.token, state.done, state.length, state.finite))
        self._check_finite(finite, [list(p.ids) for p in group])
        tokens = [[int(t)] for t in first[:rows]]
        accepted: list[list[int]] = [[] for _ in group]
        if update:
            update(rows, [])
        loop, cycles = (decode.speculate, CYCLES) if configs.drafter else (decode.autoregress, STEPS)
        while not done.all() and not (stopping and stopping()):
            needed = int(length[~done].max()) + configs.lookahead
            if needed > state.cache.capacity:
                state = decode.grow_caches(configs, state, cache.length_bucket(needed))
            state, emitted = loop(self.params, configs, state, self.stop, cycles, greedy)
            emitted, done, length, finite = fetch((emitted, state.done, state.length, state.finite))
            counts = emitted.counts[: int(emitted.cycles), :rows]
            for c, b in np.argwhere(counts):
                tokens[b] += emitted.tokens[c, b, : counts[c, b]].tolist()
                if configs.drafter:
                    accepted[b].append(int(emitted.accepted[c, b]))
            self._check_finite(finite, [[*p.ids, *new] for p, new in zip(group, tokens, strict=True)])
            if configs.drafter and not self.drafter_checked and drafts_look_broken(emitted):
                self.drafter_checked = True
                if not drafter_is_finite(self.params, configs, state):
                    print(f"warning: {NOT_FINITE_DRAFTS}", file=sys.stderr)
            if update:
                update(int(counts.sum()), emitted.accepted[: len(counts), :rows][counts > 0].tolist())
        return [
            DecodedPrompt(prompt, tokens[b], accepted[b], "stop" if tokens[b][-1] in stop_ids else "length")
            for b, prompt in enumerate(group)
            if done[b]
        ]

    def _check_finite(self, finite: np.ndarray, texts: list[list[int]]) -> None:
        """Refuse to go on where the logits after one of these texts were not finite."""
        for good, ids in zip(finite, texts, strict=False):
            if not good:
                raise not_finite_error(self.params.target, self.configs.target, ids, self.dtype)

    def _choice(self) -> tuple[float, int, float, float]:
        c = self.choice
        return c.temperature, c.top_k, c.top_p, c.min_p


def keys(seed: int, rows: Sequence[int], turns: Sequence[int]) -> Array:
    """A random key for each prompt [B], from the seed and the prompt's numbers alone."""
    fold = jax.vmap(jax.random.fold_in)
    first = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.array(rows, np.uint32))
    return fold(first, np.array(turns, np.uint32))
