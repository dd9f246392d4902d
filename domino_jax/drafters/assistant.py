"""A smaller Qwen3 as drafter: speculative decoding as in Leviathan et al. 2023, the assistant in the same program."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from domino_jax import target
from domino_jax.cache import init_cache
from domino_jax.config import TargetConfig
from domino_jax.drafters.base import DraftTokens, View
from domino_jax.errors import DominoError
from domino_jax.paged import AnyKVCache
from domino_jax.sampling import probabilities, sample
from domino_jax.weights import Target


class AssistantState(NamedTuple):
    """The assistant's own keys and values of each row's text."""

    cache: AnyKVCache


@dataclass(frozen=True)
class AssistantDrafter:
    """An ordinary language model with the target's tokenizer proposes one token after another.

    Its weights are a `weights.Target`. Each cycle is J + 1 of its steps: the last one runs the last draft, so that its
    cache holds all that can be accepted.

    Args:
        config: the assistant's.
        most: tokens that it proposes a cycle.

    Raises:
        DominoError: `most` is below 1.
    """

    config: TargetConfig
    most: int = 5

    def __post_init__(self) -> None:
        if self.most < 1:
            raise DominoError(f"an assistant proposes at least 1 token, found {self.most}.")

    @property
    def name(self) -> str:
        return "an assistant model"

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        return ()

    def scratch(self, proposals: int) -> int:
        return proposals + 2  # a single position may be written with the one behind it

    def init(self, batch: int, capacity: int, dtype: Any) -> AssistantState:
        return AssistantState(init_cache(self.config, batch, capacity, dtype))

    def propose(
        self, weights: Target, state: AssistantState, view: View, proposals: int, keys: Array | None
    ) -> tuple[DraftTokens, AssistantState, AnyKVCache]:
        if keys is not None:
            keys = jnp.concatenate([keys, keys[:, -1:]], axis=1).T  # [J + 1, B]; the last step's draw is not used

        def step(carry: tuple[AnyKVCache, Array, Array], key: Array | None) -> Any:
            cache, token, place = carry
            hidden, _, written = target.forward(
                weights, self.config, token[:, None], place, cache, attention=view.attention
            )
            assert written is not None
            logits = target.logits(weights, self.config, hidden)
            if key is None:
                following, probs = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32), None
            else:
                probs = probabilities(logits, view.sampling)[:, 0]
                following = sample(key, probs)
            return (written, following, place + 1), (following, probs)

        with jax.named_scope("draft"):
            begin = (state.cache, view.token, view.length)
            (cache, *_), (tokens, probs) = jax.lax.scan(step, begin, keys, length=proposals + 1)
        tokens = jnp.moveaxis(tokens, 0, 1)[:, :proposals]
        probs = None if probs is None else jnp.moveaxis(probs, 0, 1)[:, :proposals]
        return DraftTokens(tokens, probs), AssistantState(cache), view.cache

    def observe(
        self,
        weights: Target,
        state: AssistantState,
        tokens: Array,
        features: Array,
        start: Array,
        proposed: bool = False,
    ) -> AssistantState:
        if proposed:  # it has run them itself
            return state
        with jax.named_scope("context"):
            _, _, cache = target.forward(weights, self.config, tokens, start, state.cache)
            assert cache is not None
            return AssistantState(cache)
