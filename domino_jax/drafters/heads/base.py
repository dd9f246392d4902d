"""The interface of heads: what makes proposals of a block's base logits (docs/algorithm.md, section 4).

A head is a frozen dataclass and its own config: it is static to every program. Its weights are a module of their own,
or None. It stands in `DraftConfig.head`; None there is `heads.none`. `domino_jax.drafters.heads` is the list of them.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from jax import Array

from domino_jax.drafters.base import DraftTokens, Product, View
from domino_jax.fields import Fields
from domino_jax.matrix import AnyMatrix
from domino_jax.weights import Leaf, TensorRow


class Correction(NamedTuple):
    """What a head adds to the base logits: rank @ output.T, which training multiplies in pieces."""

    rank: Array  # [B, A, J, R]
    output: Array  # [V, R], a weight
    confidence: Array | None = None  # [B, A, J] float32, logits of how likely each proposal is to be accepted
    among: int | None = None  # only so many of the highest base logits can be proposed; all when None


class Paths(Protocol):
    """What a head says along the paths of one block: its state after some tokens, and the logits of what follows.

    Rows have L paths each, which share the block's states and base logits. All of it is traced into the program.
    """

    def start(self) -> Any:
        """The state at the anchor: a pytree of arrays [B, 1, ...]."""
        ...

    def logits(self, state: Any, place: int) -> tuple[Array, Array | None]:
        """Of the proposal at a place of the block, from 0 on, after the tokens of the paths.

        Returns:
            [B, L, V], or [B, 1, V] where all paths have the same; [B, L, C] with the tokens [B, C] that they are of.
        """
        ...

    def advance(self, state: Any, tokens: Array, place: int) -> Any:
        """The state after one token more of each path: tokens [B, L], proposed at that place."""
        ...


class Head(Protocol):
    """Proposes the tokens of a block from left to right, each knowing those before it, or none of them.

    `propose` and `teacher_forced` are two forms of one computation: in decoding each correction depends on the token
    chosen before it, in training the tokens are known.
    """

    name: ClassVar[str]
    """Of a drafter with this head, for people"""
    projector_type: ClassVar[str]
    """Of a config.json whose drafter has this head"""
    architecture: ClassVar[str]
    """Of a config.json that is written for a drafter with this head"""
    tensors: ClassVar[tuple[TensorRow, ...]]
    """Rows of the table in `convert.names`, with paths within the head"""
    unquantized: ClassVar[tuple[str, ...]]
    """Matrices that stay as they are in an 8-bit drafter, by their paths"""
    looped: ClassVar[tuple[str, ...]]
    """Weights that a loop of the loss reads. They are float32 there, so that the loop sums their gradients in it"""
    zero_at_first: ClassVar[tuple[str, ...]]
    """Weights that are zeros before training, so that nothing is corrected"""

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the axis letters that the backbone does not have."""
        ...

    @classmethod
    def read(cls, fields: Fields, warnings: list[str]) -> "Head":
        """The head of a config.json; what had to be guessed is added to `warnings`.

        Raises:
            DominoError: a field is missing or of another kind.
        """
        ...

    def to_hf(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Its fields of a config.json: of dflash_config, and of the top level."""
        ...

    def check(self, proposals: int) -> None:
        """Refuse what makes no sense with blocks of so many proposals.

        Raises:
            DominoError: it does not.
        """
        ...

    def describe(self) -> str:
        """Its sizes in a few words; empty where it has none."""
        ...

    def weights(self, leaf: Leaf) -> Any:
        """The module of its weights, each made by `leaf` from its axis letters; None where it has none."""
        ...

    def tabulate(self, weights: Any, embed: AnyMatrix, largest: int) -> None:
        """Put tables of at most `largest` bytes in the place of weights whose products with `embed` they hold."""
        ...

    def propose(
        self, weights: Any, z: Array, base: Array, view: View, keys: Array | None, candidates: int | None = None
    ) -> DraftTokens:
        """Choose the proposals of a block, or its first J.

        Args:
            z: [B, J, D] block states of the proposing rows.
            base: [B, J, V] their logits.
            view: what a drafter may look at.
            keys: [B, J] random keys, see `Drafter.propose`; None where all is greedy.
            candidates: C, tokens of (nearly) the highest base logits, which alone are scored and of which one is
                proposed; the vocabulary when None.
        """
        ...

    def paths(self, weights: Any, z: Array, base: Array, view: View, candidates: int | None = None) -> Paths:
        """What a tree of proposals is grown by (`drafters.tree`); see `propose`."""
        ...

    def teacher_forced(self, weights: Any, z: Array, tokens: Array, embed: AnyMatrix) -> Correction | None:
        """The correction of every proposal, given the true tokens; None where nothing is corrected.

        Args:
            z: [B, A, J, D] of the proposing rows.
            tokens: [B, A, J], t_a, t_{a+1}, ..., t_{a+J-1}: what stands before each proposal.
            embed: the target's embeddings [V, D].
        """
        ...

    def products(self, weights: Any, proposals: int, scored: float = 1.0) -> Sequence[Product]:
        """What proposing multiplies.

        Args:
            scored: share of the vocabulary that is scored.
        """
        ...


def under(prefix: str, names: Iterable[str]) -> set[str]:
    """Paths within a module as paths from outside it: "gru_in" -> "head.gru_in"."""
    return {f"{prefix}.{name}" for name in names}
