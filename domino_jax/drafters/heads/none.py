"""No head: each proposal is chosen by its base logits alone, as in plain DFlash (docs/algorithm.md, section 4)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from jax import Array

from domino_jax.drafters.base import DraftTokens, Product, View
from domino_jax.drafters.heads.base import Correction, Paths
from domino_jax.drafters.heads.choosing import chosen_along, of_rows
from domino_jax.fields import Fields
from domino_jax.matrix import AnyMatrix
from domino_jax.weights import Leaf, TensorRow


@dataclass(frozen=True)
class SamePaths:
    """Every path is as any other: the base logits [B, J, V] alone, or [B, J, DV] of the tokens `names` [DV]."""

    base: Array
    names: Array | None = None

    def start(self) -> tuple[()]:
        return ()

    def logits(self, state: tuple[()], place: int) -> tuple[Array, Array | None]:
        return self.base[:, place, None], of_rows(self.names, self.base.shape[0])

    def advance(self, state: tuple[()], tokens: Array, place: int) -> tuple[()]:
        return state


@dataclass(frozen=True)
class NoHead:
    """What stands where there is no head: a `heads.base.Head` without weights.

    The first proposal knows the token before it and is drawn from its distribution. The others would be drawn
    independently of their neighbours, which wrecks acceptance: they are the argmax, with a one-hot distribution.
    """

    name: ClassVar[str] = "DFlash"
    projector_type: ClassVar[str] = "dflash"
    architecture: ClassVar[str] = "DFlashDraftModel"
    tensors: ClassVar[tuple[TensorRow, ...]] = ()
    unquantized: ClassVar[tuple[str, ...]] = ()
    looped: ClassVar[tuple[str, ...]] = ()
    zero_at_first: ClassVar[tuple[str, ...]] = ()

    @property
    def sizes(self) -> dict[str, int]:
        return {}

    @classmethod
    def read(cls, fields: Fields, warnings: list[str]) -> "NoHead":
        return cls()

    def to_hf(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {}

    def check(self, proposals: int) -> None:
        pass

    def describe(self) -> str:
        return ""

    def weights(self, leaf: Leaf) -> None:
        return None

    def tabulate(self, weights: Any, embed: AnyMatrix, largest: int) -> None:
        pass

    def propose(
        self, weights: Any, z: Array, base: Array, view: View, keys: Array | None, candidates: int | None = None
    ) -> DraftTokens:
        return chosen_along(self.paths(weights, z, base, view), base, view, keys, drawn_from=base.shape[1])

    def paths(self, weights: Any, z: Array, base: Array, view: View, candidates: int | None = None) -> Paths:
        return SamePaths(base, view.names)

    def teacher_forced(self, weights: Any, z: Array, tokens: Array, embed: AnyMatrix) -> Correction | None:
        return None

    def products(self, weights: Any, proposals: int, scored: float = 1.0) -> tuple[Product, ...]:
        return ()
