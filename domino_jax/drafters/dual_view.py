"""Orthrus: a second view of the target drafts a block from the target's own cache (docs/algorithm.md, section 11).

The second view is another set of attention projections in each layer. All else is the target's: embeddings, norms of
layers, MLPs, LM head, and the keys and values of the text. The block's own lie behind them and are never kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from domino_jax import layers, target
from domino_jax.attention import attend_cached
from domino_jax.config import CustomDraftConfig, TargetConfig
from domino_jax.drafters.base import DraftTokens, View
from domino_jax.drafters.block import block_inputs
from domino_jax.drafters.heads.choosing import chosen_along
from domino_jax.drafters.heads.none import SamePaths
from domino_jax.errors import DominoError
from domino_jax.fields import Fields, integer
from domino_jax.paged import AnyKVCache
from domino_jax.sharding import constrain
from domino_jax.weights import Attention, TensorRow

BLOCK_SIZE, MASK_TOKEN_ID = 32, 151669  # of the public ones
SHARED = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")  # beside width and vocabulary
PREFIX = "model.layers.{i}.self_attn."
MARK = "_diff."  # in the name of each of its tensors, and of no other


@dataclass(frozen=True)
class DualViewConfig(CustomDraftConfig):
    """A second view; its fields of DecoderConfig are the target's.

    Args:
        block_size: M, the anchor and M - 1 masks. All rows but the last propose.
    """

    architecture: ClassVar[str] = "OrthrusLM"
    """Of a folder that holds the target too, as the public ones do"""
    alone: ClassVar[str] = "OrthrusView"
    """Of a folder that holds the second view alone"""
    tensors: ClassVar[tuple[TensorRow, ...]] = (
        ("layers.{i}.q", "(N H) D", (f"{PREFIX}q_proj_diff.weight",)),
        ("layers.{i}.kv", "(K H) D", (f"{PREFIX}k_proj_diff.weight", f"{PREFIX}v_proj_diff.weight")),
        ("layers.{i}.q_norm", "H", (f"{PREFIX}q_norm_diff.weight",)),
        ("layers.{i}.k_norm", "H", (f"{PREFIX}k_norm_diff.weight",)),
        ("layers.{i}.o", "D NH", (f"{PREFIX}o_proj_diff.weight",)),
    )

    block_size: int
    mask_token_id: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 2:
            raise DominoError(f"block_size {self.block_size} proposes nothing; it must be at least 2.")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise DominoError(f"mask_token_id {self.mask_token_id} is outside the vocabulary of {self.vocab_size}.")
        if self.attention_bias:
            raise DominoError("a second view has no biases, found attention_bias true.")

    @property
    def num_proposals(self) -> int:
        """J at most: row j proposes the token at position a + j + 1, and the last row none."""
        return self.block_size - 1

    @classmethod
    def read(cls, fields: Fields, decoder: dict[str, Any], warnings: list[str]) -> Self:
        fields.given("r", "lora_alpha")  # which nothing reads, in the authors' code neither
        size, mask = fields.get("block_size", integer(2), None), fields.get("mask_token_id", integer(), None)
        for name, given, taken in (("block_size", size, BLOCK_SIZE), ("mask_token_id", mask, MASK_TOKEN_ID)):
            if given is None:
                warnings.append(f"{fields.where} has no {name}: taken as {taken}, as in the public checkpoints.")
        return cls(
            **decoder,
            block_size=BLOCK_SIZE if size is None else size,
            mask_token_id=MASK_TOKEN_ID if mask is None else mask,
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json of a folder that holds the second view alone."""
        blocks = {"block_size": self.block_size, "mask_token_id": self.mask_token_id}
        return {"architectures": [self.alone], **self.hf_fields(), **blocks}

    def weights(self, leaf: Callable[[str], Any]) -> "DualView":
        return DualView(self, leaf)

    def check_target(self, target: TargetConfig) -> list[str]:
        warnings = super().check_target(target)
        for name in SHARED:
            theirs, ours = getattr(self, name), getattr(target, name)
            if theirs != ours:
                raise DominoError(f"the second view was made for another target: its {name} is {theirs}, not {ours}.")
        if not target.qk_norm or target.attention_bias:
            raise DominoError(f"a second view is of a Qwen3 without biases, and this target is a {target.family}.")
        return warnings

    def describe(self) -> str:
        return (
            f"Orthrus's second view: {self.num_hidden_layers} layers of width {self.hidden_size}, "
            f"{self.num_attention_heads} query and {self.num_key_value_heads} KV heads of {self.head_dim}, "
            f"block {self.block_size} with {self.num_proposals} proposals"
        )


class DualView(nnx.Module):
    """The second view's attention of each of the target's layers."""

    def __init__(self, config: DualViewConfig, leaf: Callable[[str], Any]):
        self.layers = nnx.List([Attention(leaf) for _ in range(config.num_hidden_layers)])


@dataclass(frozen=True)
class DualViewDrafter:
    """A second view of the target: a `drafters.base.Drafter`. Its weights are a `DualView`, and it has no state.

    Args:
        drawn: all proposals of a sampled row are drawn, each from its own distribution. Since no row knows its
            neighbours' draws fewer are accepted than where, as by default, all but the first are the argmax.
    """

    config: DualViewConfig
    drawn: bool = False

    @property
    def name(self) -> str:
        return "Orthrus"

    @property
    def most(self) -> int:
        return self.config.num_proposals

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        return ()

    def scratch(self, proposals: int) -> int:
        return self.config.block_size  # of the target's cache

    def init(self, batch: int, capacity: int, dtype: Any) -> tuple[()]:
        return ()

    def propose(
        self, weights: DualView, state: tuple[()], view: View, proposals: int, keys: Array | None
    ) -> tuple[DraftTokens, tuple[()], AnyKVCache]:
        with jax.named_scope("draft"):
            z, cache = view_block(weights, self.config, view)
            base = target.logits(view.target, view.config, z[:, :proposals], view.output)
        with jax.named_scope("head"):
            drawn_from = 0 if self.drawn else proposals
            return chosen_along(SamePaths(base), base, view.sampling, keys, drawn_from), state, cache

    def observe(
        self,
        weights: DualView,
        state: tuple[()],
        tokens: Array,
        features: Array,
        start: Array,
        proposed: bool = False,
    ) -> tuple[()]:
        return state


def view_block(weights: DualView, config: DualViewConfig, view: View) -> tuple[Array, AnyKVCache]:
    """Run the block [anchor, MASK, ...] of each row through the second view.

    Its keys and values are written into the target's cache behind the text, where attention finds both in one buffer.
    Verification overwrites those of its own positions, and the others lie beyond every length.

    Returns:
        States after the target's final norm [B, M, D], and the cache.
    """
    model, frozen = view.config, view.target
    x = block_inputs(frozen.embed, config, view.token)
    positions = view.length[:, None] + jnp.arange(config.block_size, dtype=jnp.int32)
    angles, cache = layers.rotary(positions, model), view.cache
    for i, (layer, own) in enumerate(zip(frozen.layers, weights.layers, strict=True)):
        y = layers.rms_norm(x, layer.input_norm, model.rms_norm_eps)
        q, k, v = layers.queries_keys_values(own, y, angles, model.rms_norm_eps)
        cache = cache.append(i, k, v, view.length)
        # Every row sees the whole text and the whole block.
        attended = attend_cached(q, cache, i, view.length, causal=False, backend=view.attention)
        x = constrain(layers.residual(layer, x, attended, model.rms_norm_eps, model.moe, own), "B M D")
    return layers.rms_norm(x, frozen.norm, model.rms_norm_eps), cache
