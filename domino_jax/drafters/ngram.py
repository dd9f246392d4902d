"""N-gram drafting (prompt lookup): what followed the last tokens where they stood before in the row's own text.

The idea is that of Saxena's prompt lookup decoding (2023), and the names of its settings are vLLM's.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from domino_jax.drafters.base import DraftTokens, View
from domino_jax.errors import DominoError
from domino_jax.paged import AnyKVCache
from domino_jax.sharding import constrain, zeros


class NgramState(NamedTuple):
    """The text of each row."""

    tokens: Array  # [B, S] int32, of positions 0 ... length - 1


@dataclass(frozen=True)
class NgramDrafter:
    """Proposes what followed the longest, and of these the latest, earlier match of a row's last tokens.

    It has no weights. Text before it, the prompt included, is searched inside the program. Where a match reaches up to
    the end, the text is repeating itself, and the proposal goes on repeating it. Without a match it proposes the last
    token again, which costs a verification and is seldom right.

    Args:
        most: tokens that it proposes a cycle.
        prompt_lookup_max: tokens of the longest match that is looked for.
        prompt_lookup_min: tokens of the shortest one that counts.

    Raises:
        DominoError: a value is below 1, or the shortest match is longer than the longest.
    """

    most: int = 7
    prompt_lookup_max: int = 5
    prompt_lookup_min: int = 2

    def __post_init__(self) -> None:
        if self.most < 1:
            raise DominoError(f"an n-gram drafter proposes at least 1 token, found {self.most}.")
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max:
            raise DominoError(
                f"prompt_lookup_min must be from 1 to prompt_lookup_max, found {self.prompt_lookup_min} and "
                f"{self.prompt_lookup_max}."
            )

    @property
    def name(self) -> str:
        return "n-grams"

    @property
    def config(self) -> None:
        return None

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        return ()

    def scratch(self, proposals: int) -> int:
        return 0

    def init(self, batch: int, capacity: int, dtype: Any) -> NgramState:
        return NgramState(zeros((batch, capacity), jnp.int32, "B S"))

    def propose(
        self, weights: Any, state: NgramState, view: View, proposals: int, keys: Array | None
    ) -> tuple[DraftTokens, NgramState, AnyKVCache]:
        tokens, _ = self.lookup(state, view, proposals)
        probs = None if keys is None else jax.nn.one_hot(tokens, view.config.vocab_size, dtype=jnp.float32)
        return DraftTokens(tokens, probs), state, view.cache

    def lookup(self, state: NgramState, view: View, proposals: int) -> tuple[Array, Array]:
        """What followed the best match [B, J], and how many tokens matched [B]; 0 for no match."""
        rows, capacity = state.tokens.shape
        with jax.named_scope("lookup"):
            place, last = jnp.arange(capacity, dtype=jnp.int32), view.length[:, None]  # [S], [B, 1]
            text = jnp.where(place == last, view.token[:, None], state.tokens)
            matched = jnp.zeros((rows, capacity), jnp.int32)  # tokens up to each place that equal the last ones
            going = place < last
            for back in range(self.prompt_lookup_max):
                wanted = jnp.take_along_axis(text, jnp.maximum(last - back, 0), axis=1)
                # What is rolled in from the end stands before the text's begin.
                here = jnp.roll(text, back, axis=1)
                going &= (here == wanted) & (place >= back)
                matched += going.astype(jnp.int32)
            counts = jnp.where(matched >= self.prompt_lookup_min, matched, 0)
            # The longest, then the latest: positions are fewer than capacity.
            best = jnp.argmax(jnp.where(counts > 0, counts * capacity + place, -1), axis=1)[:, None]  # [B, 1]
            found = jnp.take_along_axis(counts, best, axis=1)
            best = jnp.where(found > 0, best, last - 1)
            ahead = jnp.arange(proposals, dtype=jnp.int32) % jnp.maximum(last - best, 1)
            tokens = jnp.take_along_axis(text, best + 1 + ahead, axis=1)
        return constrain(tokens, "B J"), found[:, 0]

    def recall(self, state: NgramState, tokens: Array) -> NgramState:
        return NgramState(jax.lax.dynamic_update_slice(state.tokens, tokens, (0, 0)))

    def observe(
        self, weights: Any, state: NgramState, tokens: Array, features: Array, start: Array, proposed: bool = False
    ) -> NgramState:
        def row(text: Array, new: Array, start: Array) -> Array:
            return jax.lax.dynamic_update_slice(text, new, (start,))

        return NgramState(constrain(jax.vmap(row)(state.tokens, tokens, start), "B S"))
