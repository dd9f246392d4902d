"""DSpark's head: the token before each proposal corrects its logits (arXiv 2607.05147)."""

from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from domino_jax.config import MarkovHeadType
from domino_jax.drafters.base import DraftTokens, Product, View
from domino_jax.drafters.heads.base import Correction
from domino_jax.drafters.heads.choosing import LowRankLogits, chosen_along
from domino_jax.errors import DominoError
from domino_jax.fields import BOOLEAN, Fields, integer, number, one_of
from domino_jax.matrix import AnyMatrix, dot, take
from domino_jax.sharding import constrain
from domino_jax.weights import Leaf, TensorRow

State = tuple[Array, ...]  # the rank vector of the last token; of "rnn" the recurrent state too


class MarkovWeights(nnx.Module):
    """A table of tokens and the projection of a rank vector; what the other parts of the config ask for, else None.

    A projection of several inputs side by side is a matrix for each.
    """

    def __init__(self, config: "MarkovHead", leaf: Leaf):
        def given(letters: str, there: bool) -> Any:
            return leaf(letters) if there else nnx.data(None)

        gated, rnn = config.markov_head_type == "gated", config.markov_head_type == "rnn"
        confidence = config.enable_confidence_head
        self.w1: Array = leaf("V R")
        self.w2: Array = leaf("DV R")
        self.gate_block: Any = given("R D", gated)
        self.gate_token: Any = given("R R", gated)
        self.gate_bias: Any = given("R", gated)
        self.joint_state: Any = given("3R R", rnn)
        self.joint_token: Any = given("3R R", rnn)
        self.joint_block: Any = given("3R D", rnn)
        self.joint_bias: Any = given("3R", rnn)
        self.confidence_block: Any = given("1 D", confidence)
        self.confidence_token: Any = given("1 R", confidence and config.confidence_head_with_markov)
        self.confidence_bias: Any = given("1", confidence)


@dataclass(frozen=True)
class MarkovHead:
    """DSpark's head: a `heads.base.Head`. The field names are DeepSpec's.

    With e the row of W1 of the token before, and z the block's state at the place:

        vanilla   logits = base + W2 e
        gated     logits = base + W2 (g ∘ e),   g = σ(G [z; e] + b)
        rnn       logits = base + W2 tanh(o),   [u; n; o] = P [s; e; z] + b,   s' = σ(u) ∘ s + (1 - σ(u)) ∘ tanh(n)

    Args:
        markov_rank: R.
        enable_confidence_head: there are weights that say how sure each proposal is: σ(w [z; e] + b).
        confidence_head_with_markov: those take e besides z.
    """

    name: ClassVar[str] = "DSpark"
    projector_type: ClassVar[str] = "dspark"
    architecture: ClassVar[str] = "Qwen3DSparkModel"
    tensors: ClassVar[tuple[TensorRow, ...]] = (
        ("w1", "V R", ("markov_head.markov_w1.weight",)),
        ("w2", "DV R", ("markov_head.markov_w2.weight",)),
        ("gate_block", "R D", ("markov_head.gate_proj.weight",)),
        ("gate_token", "R R", ("markov_head.gate_proj.weight",)),
        ("gate_bias", "R", ("markov_head.gate_proj.bias",)),
        ("joint_state", "3R R", ("markov_head.joint_proj.weight",)),
        ("joint_token", "3R R", ("markov_head.joint_proj.weight",)),
        ("joint_block", "3R D", ("markov_head.joint_proj.weight",)),
        ("joint_bias", "3R", ("markov_head.joint_proj.bias",)),
        ("confidence_block", "1 D", ("confidence_head.proj.weight",)),
        ("confidence_token", "1 R", ("confidence_head.proj.weight",)),
        ("confidence_bias", "1", ("confidence_head.proj.bias",)),
    )
    # Small, and an error of the recurrent part would be carried from proposal to proposal.
    unquantized: ClassVar[tuple[str, ...]] = (
        *("gate_block", "gate_token", "joint_state", "joint_token", "joint_block"),
        *("confidence_block", "confidence_token"),
    )
    looped: ClassVar[tuple[str, ...]] = ("w2", "joint_state")
    zero_at_first: ClassVar[tuple[str, ...]] = ("w2",)

    markov_rank: int
    markov_head_type: MarkovHeadType = "vanilla"
    enable_confidence_head: bool = False
    confidence_head_with_markov: bool = True

    @property
    def sizes(self) -> dict[str, int]:
        return {"R": self.markov_rank, "3R": 3 * self.markov_rank, "1": 1}

    @classmethod
    def read(cls, fields: Fields, warnings: list[str]) -> "MarkovHead":
        kinds = get_args(MarkovHeadType)
        weighed = fields.get("confidence_head_alpha", number(), 0.0) > 0  # in training, as SpecForge writes it
        return cls(
            markov_rank=fields.get("markov_rank", integer(1)),
            markov_head_type=fields.get("markov_head_type", one_of(*kinds), "vanilla"),  # type: ignore[arg-type]
            enable_confidence_head=fields.get("enable_confidence_head", BOOLEAN, weighed, also=["use_confidence_head"]),
            confidence_head_with_markov=fields.get("confidence_head_with_markov", BOOLEAN, True),
        )

    def to_hf(self) -> tuple[dict[str, Any], dict[str, Any]]:
        fields = {
            "markov_rank": self.markov_rank,
            "markov_head_type": self.markov_head_type,
            "enable_confidence_head": self.enable_confidence_head,
            "confidence_head_with_markov": self.confidence_head_with_markov,
        }
        return {"projector_type": self.projector_type, **fields}, fields  # some loaders look at one level alone

    def check(self, proposals: int) -> None:
        if self.markov_rank < 1:
            raise DominoError(f"markov_rank must be at least 1, found {self.markov_rank}.")

    def describe(self) -> str:
        sure = ", with a confidence head" if self.enable_confidence_head else ""
        return f"{self.markov_head_type} Markov head of rank {self.markov_rank}{sure}"

    def weights(self, leaf: Leaf) -> MarkovWeights:
        return MarkovWeights(self, leaf)

    def tabulate(self, weights: MarkovWeights, embed: AnyMatrix, largest: int) -> None:
        pass

    def propose(
        self,
        weights: MarkovWeights,
        z: Array,
        base: Array,
        view: View,
        keys: Array | None,
        candidates: int | None = None,
    ) -> DraftTokens:
        """See `heads.base.Head`. Every proposal knows the token before it, so each is drawn from its distribution."""
        draft = chosen_along(self.paths(weights, z, base, view, candidates), base, view, keys)
        if not self.enable_confidence_head:
            return draft
        before = jnp.concatenate([view.token[:, None], draft.tokens[:, :-1]], axis=1)
        rows = take(weights.w1, before).astype(z.dtype)
        return draft._replace(confidence=confidence_logits(weights, z, rows))

    def paths(
        self, weights: MarkovWeights, z: Array, base: Array, view: View, candidates: int | None = None
    ) -> "MarkovPaths":
        return MarkovPaths(self, weights, z, base, view, candidates)

    def teacher_forced(self, weights: MarkovWeights, z: Array, tokens: Array, embed: AnyMatrix) -> Correction:
        before = rows = constrain(weights.w1[tokens], "B A J R")
        if self.markov_head_type == "gated":
            rows = _gated(weights, dot(z, weights.gate_block), rows)
        if self.markov_head_type == "rnn":
            joint_state = weights.joint_state.astype(z.dtype)
            inputs = dot(z, weights.joint_block) + dot(rows, weights.joint_token) + weights.joint_bias
            start = jnp.zeros((*rows.shape[:-2], self.markov_rank), z.dtype)

            def step(state: Array, x: Array) -> tuple[Array, Array]:
                return _rnn_cell(x + dot(state, joint_state), state)

            _, ranks = jax.lax.scan(step, start, jnp.moveaxis(inputs, -2, 0))
            rows = jnp.moveaxis(ranks, 0, -2)
        sure = confidence_logits(weights, z, before) if self.enable_confidence_head else None
        return Correction(constrain(rows, "B A J R"), weights.w2, sure)

    def products(self, weights: MarkovWeights, proposals: int, scored: float = 1.0) -> tuple[Product, ...]:
        parts = (weights.gate_block, weights.gate_token, weights.joint_state, weights.joint_token, weights.joint_block)
        # Of W1 only rows are read.
        return (
            Product(tuple(part for part in parts if part is not None), proposals),
            Product((weights.w2,), 1, turns=proposals, share=scored),
        )


class MarkovPaths:
    """The head along paths: a `heads.base.Paths`."""

    def __init__(
        self, head: MarkovHead, weights: MarkovWeights, z: Array, base: Array, view: View, candidates: int | None
    ):
        """Args: see `heads.base.Head.propose`."""
        self._head, self._weights, self._view = head, weights, view
        self._logits = LowRankLogits(base, weights.w2, candidates, view.names)
        self._dtype = z.dtype
        # What no token changes: a block needs it once.
        matrix = {"gated": weights.gate_block, "rnn": weights.joint_block}.get(head.markov_head_type)
        self._part = None if matrix is None else dot(z, matrix)  # [B, J, R], of "rnn" [B, J, 3R]

    def start(self) -> State:
        rows = self._rows(self._view.token[:, None])
        return (rows, jnp.zeros_like(rows)) if self._head.markov_head_type == "rnn" else (rows,)

    def advance(self, state: State, tokens: Array, place: int) -> State:
        rows = self._rows(tokens)
        return (rows, self._stepped(state, place)[0]) if self._head.markov_head_type == "rnn" else (rows,)

    def logits(self, state: State, place: int) -> tuple[Array, Array | None]:
        rank = state[0]
        if self._head.markov_head_type == "gated":
            assert self._part is not None
            rank = _gated(self._weights, self._part[:, place, None], rank)
        if self._head.markov_head_type == "rnn":
            rank = self._stepped(state, place)[1]
        return self._logits.corrected(place, rank)

    def _rows(self, tokens: Array) -> Array:
        return take(self._weights.w1, tokens).astype(self._dtype)

    def _stepped(self, state: State, place: int) -> tuple[Array, Array]:
        """The recurrent state after a place, and the rank vector of its logits."""
        rows, before = state
        weights = self._weights
        assert self._part is not None
        y = self._part[:, place, None] + dot(rows, weights.joint_token) + dot(before, weights.joint_state)
        return _rnn_cell(y + weights.joint_bias, before)


def _gated(weights: MarkovWeights, from_block: Array, rows: Array) -> Array:
    """Rank vectors [..., R]: those of tokens, of which a gate lets a part through."""
    return jax.nn.sigmoid(from_block + dot(rows, weights.gate_token) + weights.gate_bias) * rows


def confidence_logits(weights: MarkovWeights, z: Array, rows: Array) -> Array:
    """How likely each proposal is to be accepted, if those before it are: the logits [..., J], float32.

    Args:
        z: [..., J, D] block states of the proposing rows.
        rows: [..., J, R] of W1, of the token before each proposal.
    """
    logits = dot(z, weights.confidence_block, jnp.float32)
    if weights.confidence_token is not None:
        logits += dot(rows, weights.confidence_token, jnp.float32)
    return (logits + weights.confidence_bias.astype(jnp.float32))[..., 0]


def _rnn_cell(y: Array, state: Array) -> tuple[Array, Array]:
    """The state [..., R] after a place, and the rank vector of its logits, from the joint projection y [..., 3R]."""
    gate, candidate, output = jnp.split(y, 3, axis=-1)
    keep = jax.nn.sigmoid(gate)
    return keep * state + (1 - keep) * jnp.tanh(candidate), jnp.tanh(output)
