"""Domino's head: a GRU over realised tokens corrects a block's logits left to right (docs/algorithm.md, section 4)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from domino_jax import matrix
from domino_jax.drafters.base import DraftTokens, Product, View
from domino_jax.drafters.heads.base import Correction
from domino_jax.drafters.heads.choosing import LowRankLogits, chosen_along
from domino_jax.errors import DominoError
from domino_jax.fields import Fields, integer
from domino_jax.matrix import AnyMatrix, beside, dot, dot_rows, operands, take
from domino_jax.sharding import constrain
from domino_jax.weights import Leaf, TensorRow


class DominoWeights(nnx.Module):
    """A GRU over realised tokens and a low-rank correction of the logits.

    The inner projection is two matrices: one for the block's state z, one for the GRU's state h.
    """

    def __init__(self, leaf: Leaf):
        self.gru_in: Array = leaf("GU D")
        self.gru_state: Array = leaf("GU U")
        self.proj_block: Array = leaf("R D")
        self.proj_state: Array = leaf("R U")
        self.proj_out: Array = leaf("DV R")


@dataclass(frozen=True)
class DominoHead:
    """The causal head: a `heads.base.Head`.

    Args:
        gru_hidden_dim: U, width of the GRU.
        emb_dim: R, rank of the correction.
        pure_draft_prefix_len: P, so many proposals at first are not corrected.
    """

    name: ClassVar[str] = "Domino"
    projector_type: ClassVar[str] = "domino"
    architecture: ClassVar[str] = "DFlashDraftModel"
    tensors: ClassVar[tuple[TensorRow, ...]] = (
        ("gru_in", "GU D", ("prefix_gru.weight_ih_l0",)),
        ("gru_state", "GU U", ("prefix_gru.weight_hh_l0",)),
        ("proj_block", "R D", ("embed_proj.0.weight",)),
        ("proj_state", "R U", ("embed_proj.0.weight",)),
        ("proj_out", "DV R", ("embed_proj.2.weight",)),
    )
    # The recurrent part is not quantized: it is small, and its error would be carried from proposal to proposal.
    unquantized: ClassVar[tuple[str, ...]] = ("gru_in", "gru_state", "proj_block", "proj_state")
    looped: ClassVar[tuple[str, ...]] = ("proj_out", "gru_state")
    zero_at_first: ClassVar[tuple[str, ...]] = ("proj_out",)

    gru_hidden_dim: int
    emb_dim: int
    pure_draft_prefix_len: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        return {"U": self.gru_hidden_dim, "GU": 3 * self.gru_hidden_dim, "R": self.emb_dim}

    @classmethod
    def read(cls, fields: Fields, warnings: list[str]) -> "DominoHead":
        prefix = fields.get("pure_draft_prefix_len", integer(), None)
        if prefix is None:
            warnings.append(f"{fields.where} has no pure_draft_prefix_len: taken as 0, the format's default.")
        return cls(
            gru_hidden_dim=fields.get("gru_hidden_dim", integer(1)),
            emb_dim=fields.get("emb_dim", integer(1)),
            pure_draft_prefix_len=prefix or 0,
        )

    def to_hf(self) -> tuple[dict[str, Any], dict[str, Any]]:
        nested = {
            "projector_type": self.projector_type,
            "gru_hidden_dim": self.gru_hidden_dim,
            "emb_dim": self.emb_dim,
            "pure_draft_prefix_len": self.pure_draft_prefix_len,
        }
        return nested, {"emb_dim": self.emb_dim}  # some loaders look for it there

    def check(self, proposals: int) -> None:
        if not 0 <= self.pure_draft_prefix_len < proposals:
            raise DominoError(
                f"pure_draft_prefix_len must be from 0 to {proposals - 1} (one less than the proposals of a block), "
                f"found {self.pure_draft_prefix_len}."
            )

    def describe(self) -> str:
        return f"GRU {self.gru_hidden_dim}, rank {self.emb_dim}"

    def weights(self, leaf: Leaf) -> DominoWeights:
        return DominoWeights(leaf)

    def tabulate(self, weights: DominoWeights, embed: AnyMatrix, largest: int) -> None:
        """Look up what a token gives the gates of the GRU, where the vocabulary is small."""
        gru_in = weights.gru_in
        if isinstance(gru_in, Array) and embed.shape[0] * gru_in.shape[0] * gru_in.dtype.itemsize <= largest:
            weights.gru_in = nnx.data(jax.jit(matrix.tabulate)(embed, gru_in))

    def propose(
        self,
        weights: DominoWeights,
        z: Array,
        base: Array,
        view: View,
        keys: Array | None,
        candidates: int | None = None,
    ) -> DraftTokens:
        """See `heads.base.Head`.

        The first proposal and every corrected one are drawn from their distributions. The others, of the uncorrected
        prefix, would be drawn independently of their neighbours: they are the argmax, with a one-hot distribution.
        """
        paths = self.paths(weights, z, base, view, candidates)
        return chosen_along(paths, base, view, keys, self.pure_draft_prefix_len)

    def paths(
        self, weights: DominoWeights, z: Array, base: Array, view: View, candidates: int | None = None
    ) -> "DominoPaths":
        return DominoPaths(weights, self.pure_draft_prefix_len, z, base, view, candidates)

    def teacher_forced(self, weights: DominoWeights, z: Array, tokens: Array, embed: AnyMatrix) -> Correction:
        embedded = constrain(take(embed, tokens), "B A J D")
        gates = jnp.moveaxis(dot(embedded, weights.gru_in), -2, 0)  # [J, B, A, GU]
        start = jnp.zeros((*gates.shape[1:-1], weights.gru_state.shape[1]), z.dtype)

        def step(state: Array, x: Array) -> tuple[Array, Array]:
            state = gru_cell(x, dot(state, weights.gru_state.astype(state.dtype)), state)
            return state, state

        _, states = jax.lax.scan(step, start, gates)
        inner = dot(z, weights.proj_block) + dot(jnp.moveaxis(states, 0, -2), weights.proj_state)
        rank = constrain(jax.nn.silu(inner), "B A J R")
        corrected = jnp.arange(z.shape[-2]) >= self.pure_draft_prefix_len
        rank = jnp.where(corrected[:, None], rank, 0)  # a zero rank vector leaves the base logits as they are
        return Correction(rank, weights.proj_out)

    def products(self, weights: DominoWeights, proposals: int, scored: float = 1.0) -> tuple[Product, ...]:
        corrected = max(0, proposals - self.pure_draft_prefix_len)
        return (
            # Small: read once, then they stay in the cache. Of a table only rows are read.
            Product((*operands(weights.gru_in), weights.gru_state), proposals),
            Product((weights.proj_block, weights.proj_state), corrected),
            # Each proposal scores the vocabulary or its candidates, and needs the token before it to do so.
            Product((weights.proj_out,), 1, turns=corrected, share=scored),
        )


class DominoPaths:
    """The GRU along paths: a `heads.base.Paths`. A state is the GRU's, and what the gates and the rank get of it."""

    def __init__(self, weights: DominoWeights, prefix: int, z: Array, base: Array, view: View, candidates: int | None):
        """Args: prefix: proposals that are not corrected; the others: see `heads.base.Head.propose`."""
        self._weights, self._prefix, self._view = weights, prefix, view
        self._part = dot(z, weights.proj_block)  # no token changes it, so a block needs it once
        self._from_state = beside(weights.gru_state, weights.proj_state)  # one product with a state, not two
        self._logits = LowRankLogits(base, weights.proj_out, candidates, view.names)

    def start(self) -> tuple[Array, Array, Array]:
        batch, width = self._view.token.shape[0], self._weights.gru_state.shape[1]
        state = jnp.zeros((batch, 1, width), self._part.dtype)
        recurrent = jnp.zeros((batch, 1, 3 * width), self._part.dtype)  # what a state of zeros gives the gates
        return self._advance((state, recurrent, None), self._view.token[:, None])

    def advance(self, state: tuple[Array, Array, Array], tokens: Array, place: int) -> tuple[Array, Array, Array]:
        return self._advance(state, tokens)

    def _advance(self, state: tuple[Array, Array, Array | None], tokens: Array) -> tuple[Array, Array, Array]:
        before, recurrent, _ = state
        gates = dot_rows(self._view.target.embed, tokens, self._weights.gru_in)
        after = gru_cell(gates, recurrent, before)
        recurrent, inner = jnp.split(dot(after, self._from_state), [recurrent.shape[-1]], axis=-1)
        return after, recurrent, inner

    def logits(self, state: tuple[Array, Array, Array], place: int) -> tuple[Array, Array | None]:
        if place < self._prefix:
            return self._logits.plain(place)
        return self._logits.corrected(place, jax.nn.silu(self._part[:, place, None] + state[2]))


def gru_cell(inputs: Array, recurrent: Array, state: Array) -> Array:
    """One GRU step from what the input and the state [..., U] give the gates, each [..., GU]; PyTorch's gate order.

    r = σ(W_ir x + W_hr h);  u = σ(W_iz x + W_hz h);  n = tanh(W_in x + r ∘ W_hn h);  h' = (1 - u) ∘ n + u ∘ h
    """
    reset_x, update_x, new_x = jnp.split(inputs, 3, axis=-1)
    reset_h, update_h, new_h = jnp.split(recurrent, 3, axis=-1)
    update = jax.nn.sigmoid(update_x + update_h)
    new = jnp.tanh(new_x + jax.nn.sigmoid(reset_x + reset_h) * new_h)
    return (1 - update) * new + update * state
