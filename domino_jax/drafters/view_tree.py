"""Trees of proposals over a second view of the target (docs/algorithm.md, sections 10 and 11)."""

from dataclasses import dataclass

from jax import Array

from domino_jax.drafters.base import DraftTokens, View
from domino_jax.drafters.dual_view import DualView, DualViewDrafter
from domino_jax.drafters.tree import Trees
from domino_jax.errors import DominoError
from domino_jax.paged import AnyKVCache


@dataclass(frozen=True)
class DualViewTreeDrafter(Trees, DualViewDrafter):
    """A second view that proposes a tree: of its rows' own distributions, or of its head's along each path.

    Args:
        nodes, lanes, correction, coupled: see `drafters.tree.Trees`.
        candidates: see `drafters.tree.TreeDrafter`.

    Raises:
        DominoError: a number is below 1, there is no head to correct, or all are to be drawn, and nodes are chosen.
    """

    candidates: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_tree()
        if self.drawn:
            raise DominoError("the nodes of a tree are chosen and not drawn: leave out drawn.")

    @property
    def name(self) -> str:
        return f"{super().name}, in trees of {self.nodes}"

    def propose(
        self, weights: DualView, state: tuple[()], view: View, proposals: int, keys: Array | None
    ) -> tuple[DraftTokens, tuple[()], AnyKVCache]:
        """See `drafters.base.Drafter`. A few proposals are a chain."""
        if not self.branches(proposals):
            return super().propose(weights, state, view, proposals, keys)
        z, base, cache = self.draft_block(weights, view, min(proposals, self.depth))
        return self.grow(weights, z, base, view, proposals, keys), state, cache
