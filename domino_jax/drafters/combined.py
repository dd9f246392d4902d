"""Two drafters in one: the n-gram's proposal where a match is long enough, else another drafter's."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from domino_jax.config import DecoderConfig
from domino_jax.drafters.base import Drafter, DraftTokens, Recalling, View
from domino_jax.drafters.ngram import NgramDrafter, NgramState
from domino_jax.errors import DominoError
from domino_jax.paged import AnyKVCache

# A match of so many tokens is believed more than a trained drafter.
LONG_MATCHES = NgramDrafter(prompt_lookup_max=8, prompt_lookup_min=4)


class CombinedState(NamedTuple):
    """Both states."""

    model: Any
    ngram: NgramState


@dataclass(frozen=True)
class CombinedDrafter:
    """Each row takes the n-gram's proposal where its last tokens match earlier ones for long enough, else the model's.

    Both are computed for all rows: a cycle costs what the model's costs, and the search.

    Args:
        model: the other drafter; the weights are its own.
        ngram: looks for matches of at least `prompt_lookup_min` tokens.
    """

    model: Drafter
    ngram: NgramDrafter = LONG_MATCHES

    def __post_init__(self) -> None:
        if isinstance(self.model, NgramDrafter | CombinedDrafter):
            raise DominoError("an n-gram drafter is combined with a drafter that has weights.")

    @property
    def name(self) -> str:
        return f"{self.model.name} and {self.ngram.name}"

    @property
    def config(self) -> DecoderConfig | None:
        return self.model.config

    @property
    def most(self) -> int:
        return self.model.most

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        return self.model.target_layer_ids

    def scratch(self, proposals: int) -> int:
        return self.model.scratch(proposals)

    def init(self, batch: int, capacity: int, dtype: Any) -> CombinedState:
        return CombinedState(self.model.init(batch, capacity, dtype), self.ngram.init(batch, capacity, dtype))

    def propose(
        self, weights: Any, state: CombinedState, view: View, proposals: int, keys: Array | None
    ) -> tuple[DraftTokens, CombinedState, AnyKVCache]:
        draft, model, cache = self.model.propose(weights, state.model, view, proposals, keys)
        found, matched = self.ngram.lookup(state.ngram, view, proposals)
        taken = (matched > 0)[:, None]
        tokens, probs = jnp.where(taken, found, draft.tokens), draft.probs
        if probs is not None:
            certain = jax.nn.one_hot(found, probs.shape[-1], dtype=probs.dtype)
            probs = jnp.where(taken[..., None], certain, probs)
        return DraftTokens(tokens, probs), CombinedState(model, state.ngram), cache

    def recall(self, state: CombinedState, tokens: Array) -> CombinedState:
        model = self.model.recall(state.model, tokens) if isinstance(self.model, Recalling) else state.model
        return CombinedState(model, self.ngram.recall(state.ngram, tokens))

    def observe(
        self, weights: Any, state: CombinedState, tokens: Array, features: Array, start: Array, proposed: bool = False
    ) -> CombinedState:
        model = self.model.observe(weights, state.model, tokens, features, start)  # they need not be its own
        return CombinedState(model, self.ngram.observe(weights, state.ngram, tokens, features, start))
