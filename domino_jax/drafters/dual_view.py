"""Orthrus: a second view of the target drafts a block from the target's own cache (docs/algorithm.md, section 11).

The second view is another set of attention projections in each layer. All else is the target's: embeddings, norms of
layers, MLPs, LM head, and the keys and values of the text. The block's own lie behind them and are never kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from domino_jax import layers, target
from domino_jax.attention import Backend, attend_cached, attend_without_cache
from domino_jax.config import CustomDraftConfig, TargetConfig
from domino_jax.drafters import training_attention
from domino_jax.drafters.base import DraftTokens, View
from domino_jax.drafters.block import block_inputs
from domino_jax.drafters.heads import HEADS, head_of
from domino_jax.drafters.heads.base import Head
from domino_jax.drafters.heads.choosing import chosen_along
from domino_jax.drafters.heads.none import NoHead, SamePaths
from domino_jax.errors import DominoError
from domino_jax.fields import Fields, integer, one_of
from domino_jax.paged import AnyKVCache
from domino_jax.sharding import constrain, gathered
from domino_jax.weights import Attention, Layer, Target, TensorRow, axes

BLOCK_SIZE, MASK_TOKEN_ID = 32, 151669  # of the public ones
SHARED = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")  # beside width and vocabulary
PREFIX = "model.layers.{i}.self_attn."
HEAD_PREFIX = "model.head_diff."  # before the names of a head's tensors
MARK = "_diff."  # in the name of each of its tensors, and of no other


@dataclass(frozen=True)
class DualViewConfig(CustomDraftConfig):
    """A second view; its fields of DecoderConfig are the target's.

    Args:
        block_size: M, the anchor and M - 1 masks. All rows but the last propose.
        head: what makes proposals of a block's logits; None chooses each by its own logits.
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
    head: Head | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 2:
            raise DominoError(f"block_size {self.block_size} proposes nothing; it must be at least 2.")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise DominoError(f"mask_token_id {self.mask_token_id} is outside the vocabulary of {self.vocab_size}.")
        if self.attention_bias:
            raise DominoError("a second view has no biases, found attention_bias true.")
        if self.head:
            self.head.check(self.num_proposals)

    @property
    def num_proposals(self) -> int:
        """J at most: row j proposes the token at position a + j + 1, and the last row none."""
        return self.block_size - 1

    @property
    def sizes(self) -> dict[str, int]:
        return super().sizes | (self.head.sizes if self.head else {})

    @classmethod
    def read(cls, fields: Fields, decoder: dict[str, Any], warnings: list[str]) -> Self:
        fields.given("r", "lora_alpha")  # which nothing reads, in the authors' code neither
        size, mask = fields.get("block_size", integer(2), None), fields.get("mask_token_id", integer(), None)
        for name, given, taken in (("block_size", size, BLOCK_SIZE), ("mask_token_id", mask, MASK_TOKEN_ID)):
            if given is None:
                warnings.append(f"{fields.where} has no {name}: taken as {taken}, as in the public checkpoints.")
        kind = HEADS[fields.get("projector_type", one_of(*HEADS), NoHead.projector_type)]
        return cls(
            **decoder,
            block_size=BLOCK_SIZE if size is None else size,
            mask_token_id=MASK_TOKEN_ID if mask is None else mask,
            head=None if kind is NoHead else kind.read(fields, warnings),
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json of a folder that holds the second view alone."""
        blocks = {"block_size": self.block_size, "mask_token_id": self.mask_token_id}
        nested, top = self.head.to_hf() if self.head else ({}, {})
        return {"architectures": [self.alone], **self.hf_fields(), **blocks, **nested, **top}

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
        ) + (f", and {self.head.name}'s head: {self.head.describe()}" if self.head else "")


class DualView(nnx.Module):
    """The second view's attention of each of the target's layers, and the weights of its head; None without."""

    def __init__(self, config: DualViewConfig, leaf: Callable[[str], Any]):
        self.layers = nnx.List([Attention(leaf) for _ in range(config.num_hidden_layers)])
        self.head: Any = config.head.weights(leaf) if config.head else nnx.data(None)


@dataclass(frozen=True)
class DualViewDrafter:
    """A second view of the target: a `drafters.base.Drafter`. Its weights are a `DualView`, and it has no state.

    Args:
        drawn: all proposals of a sampled row are drawn, each from its own distribution. Since no row knows its
            neighbours' draws fewer are accepted than where, as by default, all but the first are the argmax.

    Raises:
        DominoError: all are to be drawn, and a head decides that.
    """

    config: DualViewConfig
    drawn: bool = False

    def __post_init__(self) -> None:
        if self.drawn and self.config.head:
            raise DominoError("a second view with a head draws as its head does: leave out drawn.")

    @property
    def name(self) -> str:
        return f"Orthrus with {self.config.head.name}'s head" if self.config.head else "Orthrus"

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
        z, base, cache = self.draft_block(weights, view, proposals)
        with jax.named_scope("head"):
            if self.drawn:
                made = chosen_along(SamePaths(base), base, view, keys)
            else:
                made = head_of(self.config).propose(weights.head, z, base, view, keys)
            return made, state, cache

    def draft_block(self, weights: DualView, view: View, proposals: int) -> tuple[Array, Array, AnyKVCache]:
        """States z [B, J, D] and logits [B, J, V] of the proposals, and the target's cache."""
        with jax.named_scope("draft"):
            z, cache = view_block(weights, self.config, view)
            z = z[:, :proposals]
            return z, target.logits(view.target, view.config, z, view.output), cache

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


def training_view_blocks(
    weights: DualView,
    configs: tuple[TargetConfig, DualViewConfig],
    frozen: Target,
    x: Array,
    ids: Array,
    anchors: Array,
    first: Array | None = None,
    starts: Array | None = None,
    backend: training_attention.BlockBackend = "dense",
    attention: Backend = "xla",
    remat: bool = False,
) -> tuple[Array, Array]:
    """Run all blocks of a sequence in one pass, and the text beside them: layer by layer, by either view.

    The queries of a block see the target's own keys strictly before its anchor, and their own block.

    Args:
        x: block inputs [B, A, M, D].
        ids: [B, S], the text.
        anchors: [B, A] absolute positions a.
        first: [B, A], the first position that each block sees, where rows hold several sequences; 0 when None.
        starts: [B, S], the first position that each token sees; 0 when None.
        backend: of the blocks' attention, see `training_attention`.
        attention: the text's backend.
        remat: keep of each layer's blocks only what goes into them, and compute the rest again in the backward pass.

    Returns:
        z [B, A, M, D], and the target's own states after its final norm [B, S, D]. No gradient reaches the target.
    """
    config, view = configs
    letters, own_letters, eps = axes(config), axes(view), config.rms_norm_eps
    positions = anchors[..., None] + jnp.arange(view.block_size, dtype=jnp.int32)  # [B, A, M]
    angles = layers.rotary(positions, config)
    text_angles = layers.rotary(jnp.arange(ids.shape[1], dtype=jnp.int32), config)
    text = constrain(layers.embed(gathered(frozen.embed, letters.embed), ids), "B T D")

    def run(number: int, own: Attention, layer: Layer, x: Array, seen: tuple[Array, Array]) -> Array:
        own = gathered(own, own_letters.layers[number])
        y = layers.rms_norm(x, layer.input_norm, eps)
        q, k, v = layers.queries_keys_values(own, y, angles, eps)
        attended = training_attention.attend_blocks(q, (k, v), seen, anchors, first, None, backend)
        return constrain(layers.residual(layer, x, attended, eps, config.moe, own), "B A M D")

    for number, (layer, own) in enumerate(zip(frozen.layers, weights.layers, strict=True)):
        layer = gathered(layer, letters.layers[number])
        y = layers.rms_norm(text, layer.input_norm, eps)
        q, k, v = layers.queries_keys_values(layer, y, text_angles, eps)
        step = partial(run, number)
        x = (jax.checkpoint(step) if remat else step)(own, layer, x, (k, v))
        attended = attend_without_cache(q, k, v, starts, attention)
        text = constrain(layers.residual(layer, text, attended, eps, config.moe), "B T D")
    return layers.rms_norm(x, frozen.norm, eps), layers.rms_norm(text, frozen.norm, eps)
