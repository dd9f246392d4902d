"""DFlash 2's path selector: the token before each proposal chooses among the likeliest of its base logits."""

from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jax import Array

from domino_jax.drafters.base import DraftTokens, Product, View
from domino_jax.drafters.heads.base import Correction
from domino_jax.drafters.heads.choosing import chosen_along, corrected_few, largest
from domino_jax.errors import DominoError
from domino_jax.fields import Fields, integer
from domino_jax.matrix import AnyMatrix, dot, take
from domino_jax.sharding import constrain
from domino_jax.weights import Leaf, TensorRow

FIELDS = "selector_rank", "selector_top_k"


class SelectorWeights(nnx.Module):
    """Two tables of tokens, as the one before and as the one chosen, and a projection of the block's states."""

    def __init__(self, leaf: Leaf):
        self.hidden_projection: Array = leaf("R D")
        self.predecessor_codebook: Array = leaf("V R")
        self.successor_codebook: Array = leaf("V R")


@dataclass(frozen=True)
class SelectorHead:
    """DFlash 2's path selector: a `heads.base.Head`. The field names are z-lab's.

    With p the token before a proposal, z the block's state at its place and C the k likeliest of its base logits,

        logits(b) = base(b) + (predecessor[p] ∘ H z) · successor[b],   b in C; no other token is proposed

    Args:
        selector_rank: R.
        selector_top_k: k.
    """

    name: ClassVar[str] = "DFlash 2"
    projector_type: ClassVar[str] = "dflash2"
    architecture: ClassVar[str] = "DFlash2DraftModel"
    tensors: ClassVar[tuple[TensorRow, ...]] = (
        ("hidden_projection", "R D", ("candidate_selector.hidden_projection.weight",)),
        ("predecessor_codebook", "V R", ("candidate_selector.predecessor_codebook",)),
        ("successor_codebook", "V R", ("candidate_selector.successor_codebook",)),
    )
    # Of the tables a few rows are read, and the projection is small: nothing is saved.
    unquantized: ClassVar[tuple[str, ...]] = ("hidden_projection", "predecessor_codebook", "successor_codebook")
    looped: ClassVar[tuple[str, ...]] = ("successor_codebook",)
    zero_at_first: ClassVar[tuple[str, ...]] = ("successor_codebook",)

    selector_rank: int
    selector_top_k: int

    @property
    def sizes(self) -> dict[str, int]:
        return {"R": self.selector_rank}

    @classmethod
    def read(cls, fields: Fields, warnings: list[str]) -> "SelectorHead":
        return cls(*(fields.get(name, integer(1)) for name in FIELDS))

    def to_hf(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"selector_rank": self.selector_rank, "selector_top_k": self.selector_top_k}, {}

    def check(self, proposals: int) -> None:
        for name in FIELDS:
            if getattr(self, name) < 1:
                raise DominoError(f"{name} must be at least 1, found {getattr(self, name)}.")

    def describe(self) -> str:
        return f"selector of rank {self.selector_rank} among {self.selector_top_k} tokens"

    def weights(self, leaf: Leaf) -> SelectorWeights:
        return SelectorWeights(leaf)

    def tabulate(self, weights: SelectorWeights, embed: AnyMatrix, largest: int) -> None:
        pass

    def propose(
        self,
        weights: SelectorWeights,
        z: Array,
        base: Array,
        view: View,
        keys: Array | None,
        candidates: int | None = None,
    ) -> DraftTokens:
        """See `heads.base.Head`. Every proposal knows the token before it, so each is drawn from its distribution."""
        return chosen_along(self.paths(weights, z, base, view, candidates), base, view, keys)

    def paths(
        self, weights: SelectorWeights, z: Array, base: Array, view: View, candidates: int | None = None
    ) -> "SelectorPaths":
        return SelectorPaths(weights, min(self.selector_top_k, candidates or self.selector_top_k), z, base, view)

    def teacher_forced(self, weights: SelectorWeights, z: Array, tokens: Array, embed: AnyMatrix) -> Correction:
        """See `heads.base.Head`."""
        rank = weights.predecessor_codebook[tokens] * dot(z, weights.hidden_projection)
        return Correction(constrain(rank, "B A J R"), weights.successor_codebook, among=self.selector_top_k)

    def products(self, weights: SelectorWeights, proposals: int, scored: float = 1.0) -> tuple[Product, ...]:
        share = min(1.0, self.selector_top_k / weights.successor_codebook.shape[0])
        return (
            Product((weights.hidden_projection,), proposals),
            Product((weights.successor_codebook,), 1, turns=proposals, share=share),  # of the other only rows are read
        )


class SelectorPaths:
    """The selector along paths: a `heads.base.Paths`. A state is the last token's row of the predecessors' table."""

    def __init__(self, weights: SelectorWeights, count: int, z: Array, base: Array, view: View):
        """Args: count: k, tokens that are scored; the others: see `heads.base.Head.propose`."""
        self._table, self._view, self._dtype = weights.predecessor_codebook, view, z.dtype
        self._part = dot(z, weights.hidden_projection)  # [B, J, R]: no token changes it
        self._best, places = largest(base, count, divided=True)  # [B, J, k]
        self._names = places if view.names is None else view.names[places]
        self._rows = take(weights.successor_codebook, self._names)  # [B, J, k, R]

    def start(self) -> Array:
        return self.advance(None, self._view.token[:, None], 0)

    def advance(self, state: Array | None, tokens: Array, place: int) -> Array:
        return take(self._table, tokens).astype(self._dtype)

    def logits(self, state: Array, place: int) -> tuple[Array, Array]:
        rank = state * self._part[:, place, None]
        return corrected_few(self._best[:, place], rank, self._rows[:, place]), self._names[:, place]
