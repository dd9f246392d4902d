"""Trees of proposals over a second view of the target (docs/algorithm.md, sections 10 and 11)."""

from dataclasses import dataclass
from typing import Literal

from jax import Array

from domino_jax.drafters.base import DraftTokens, View
from domino_jax.drafters.dual_view import DualView, DualViewDrafter
from domino_jax.drafters.heads import head_of
from domino_jax.drafters.tree import Growth
from domino_jax.errors import DominoError
from domino_jax.paged import AnyKVCache


@dataclass(frozen=True)
class DualViewTreeDrafter(DualViewDrafter):
    """A second view that proposes a tree: of its rows' own distributions, or of its head's along each path.

    Args:
        nodes, lanes, candidates, correction, coupled: see `drafters.tree.TreeDrafter`.

    Raises:
        DominoError: a number is below 1, there is no head to correct, or all are to be drawn, and nodes are chosen.
    """

    nodes: int = 16
    lanes: int | None = None
    candidates: int | None = None
    correction: Literal["path", "depth"] = "path"
    coupled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.growth.check(self.nodes, self.config)
        if self.drawn:
            raise DominoError("the nodes of a tree are chosen and not drawn: leave out drawn.")

    @property
    def growth(self) -> Growth:
        return Growth(self.candidates, self.lanes, self.correction, self.coupled)

    @property
    def name(self) -> str:
        return f"{super().name}, in trees of {self.nodes}"

    @property
    def most(self) -> int:
        return self.nodes

    @property
    def depth(self) -> int:
        """See `drafters.base.Branching`."""
        return min(self.nodes, self.config.num_proposals)

    def propose(
        self, weights: DualView, state: tuple[()], view: View, proposals: int, keys: Array | None
    ) -> tuple[DraftTokens, tuple[()], AnyKVCache]:
        """See `drafters.base.Drafter`. The nodes are chosen, not drawn: the output is exact whatever they are."""
        z, base, cache = self.draft_block(weights, view, min(proposals, self.depth))
        made = self.growth.grow(head_of(self.config), weights.head, z, base, view, proposals, keys)
        return made, state, cache
