"""The block-parallel drafter over the target's hidden states (DFlash; docs/algorithm.md, section 3).

The context side of attention is a function of its position alone, so in decoding each layer's
context keys and values are cached, and a cycle adds the positions it committed.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from domino_jax import layers, target
from domino_jax.attention import Backend, attend_cached
from domino_jax.cache import init_cache
from domino_jax.config import BlockShape, DraftConfig
from domino_jax.drafters import training_attention
from domino_jax.drafters.base import DraftTokens, View
from domino_jax.drafters.convolution import ConvolvedLayer, convolve, convolved_residual, filters
from domino_jax.drafters.heads import has_confidence, head_of
from domino_jax.errors import DominoError
from domino_jax.matrix import AnyMatrix, dot
from domino_jax.paged import AnyKVCache
from domino_jax.sharding import constrain, gathered
from domino_jax.weights import Draft, Layer, axes

ENDLESS = 2**30  # a window of more positions than there are


@dataclass(frozen=True)
class BlockDrafter:
    """DFlash's backbone with a head, or without one: a `drafters.base.Drafter`.

    Its weights are a `weights.Draft`, its state the keys and values of the target's context.

    Args:
        candidates: C, tokens of (nearly) the highest base logits that the head scores; the vocabulary when None.
        confidence_threshold: a chain ends before the first proposal that it is less sure of; all when None. Sure is
            what a confidence head says, else the likeliest token's probability; each after the config's temperatures.

    Raises:
        DominoError: `candidates` is below 1, or there is no head; or the threshold is not from 0 to 1.
    """

    config: DraftConfig
    candidates: int | None = None
    confidence_threshold: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.candidates is not None and not self.config.head:
            raise DominoError("head candidates need a drafter with a causal head, and this one has none.")
        if self.candidates is not None and self.candidates < 1:
            raise DominoError(f"head candidates must be at least 1, found {self.candidates}.")
        threshold = self.confidence_threshold
        if threshold is not None and not 0 <= threshold <= 1:
            raise DominoError(f"a confidence threshold must be from 0 to 1, found {threshold}.")

    @property
    def name(self) -> str:
        return head_of(self.config).name

    @property
    def most(self) -> int:
        return self.config.num_proposals

    @property
    def calibrated(self) -> bool:
        chances = bool(self.config.confidence_temperatures) or has_confidence(self.config)
        return chances and self.confidence_threshold is None

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        return self.config.target_layer_ids

    def scratch(self, proposals: int) -> int:
        return self.config.block_size

    def init(self, batch: int, capacity: int, dtype: Any) -> AnyKVCache:
        return init_cache(self.config, batch, capacity, dtype)

    def propose(
        self, weights: Draft, state: AnyKVCache, view: View, proposals: int, keys: Array | None
    ) -> tuple[DraftTokens, AnyKVCache, AnyKVCache]:
        z, base, state = self.draft_block(weights, state, view, proposals)
        with jax.named_scope("head"):
            draft = head_of(self.config).propose(
                weights.head, z, base, self.named(weights, view), keys, self.candidates
            )
        temperatures = self.config.confidence_temperatures
        if temperatures and draft.confidence is not None:
            draft = draft._replace(confidence=draft.confidence / jnp.array(temperatures[:proposals], jnp.float32))
        if self.confidence_threshold is not None:
            assert draft.confidence is not None, f"{self.name}'s proposals come without a confidence"
            sure = jax.nn.sigmoid(draft.confidence) >= self.confidence_threshold
            draft = draft._replace(lengths=jnp.sum(jnp.cumprod(sure.astype(jnp.int32), axis=1), axis=1))
        return draft, state, view.cache

    def draft_block(
        self, weights: Draft, state: AnyKVCache, view: View, proposals: int
    ) -> tuple[Array, Array, AnyKVCache]:
        """The backbone over one block a row: z [B, J, D] and base logits of the proposals, [B, J, V]; its cache.

        With a reduced vocabulary the logits are [B, J, DV], of the tokens that `named` says.
        """
        with jax.named_scope("draft"):
            x = block_inputs(view.target.embed, self.config, view.token)
            z, state = block(weights, self.config, x, view.length, state, view.attention)
            z = proposing(self.config, z)[:, :proposals]
            return z, base_logits(weights, self.config, view, z), state

    def named(self, weights: Draft, view: View) -> View:
        """The view of a head, which is to know what tokens the drafter's logits are of."""
        return view._replace(names=draft_names(weights))

    def observe(
        self, weights: Draft, state: AnyKVCache, tokens: Array, features: Array, start: Array, proposed: bool = False
    ) -> AnyKVCache:
        with jax.named_scope("context"):
            return append_context(weights, self.config, state, features, start)


def context(params: Draft, config: DraftConfig, features: Array) -> Array:
    """c = hidden_norm(fc(features)): [..., LD] -> [..., D]."""
    return layers.rms_norm(dot(features, params.fc), params.context_norm, config.rms_norm_eps)


def block_inputs(embed: AnyMatrix, config: BlockShape, anchor: Array) -> Array:
    """The target's embeddings of [anchor, MASK, ..., MASK]: anchor [...] -> [..., M, D]."""
    masks = jnp.full((*anchor.shape, config.block_size - 1), config.mask_token_id, anchor.dtype)
    return layers.embed(embed, jnp.concatenate([anchor[..., None], masks], axis=-1))


def proposing(config: DraftConfig, rows: Array) -> Array:
    """Those of a block's rows [..., M, D] that make proposals 1 to J: [..., J, D] (docs/algorithm.md, section 4)."""
    return rows if config.shift_label else rows[..., 1:, :]


def base_logits(params: Draft, config: DraftConfig, view: View, z: Array) -> Array:
    """The logits [B, J, V] of states z [B, J, D], or [B, J, DV] of a reduced vocabulary; of what pads it -inf."""
    if params.lm_head is None:
        return target.logits(view.target, view.config, z, view.output)
    logits = layers.unembed(z, params.lm_head)
    padding = jnp.arange(logits.shape[-1]) >= config.sizes["DV"]
    return constrain(jnp.where(padding, -jnp.inf, logits), "B T V")


def draft_names(params: Draft) -> Array | None:
    """The target's tokens that the rows of a drafter's own LM head are of [DV], of what pads it 0; None without."""
    if params.d2t is None or params.lm_head is None:
        return None
    names = jnp.arange(params.d2t.shape[0], dtype=jnp.int32) + params.d2t
    return jnp.pad(names, (0, params.lm_head.shape[0] - names.shape[0]))


def append_context(params: Draft, config: DraftConfig, cache: AnyKVCache, features: Array, start: Array) -> AnyKVCache:
    """Write the context keys and values of features [B, T, LD] at positions from start [B] on."""
    c = context(params, config, features)
    positions = start[:, None] + jnp.arange(features.shape[1], dtype=jnp.int32)
    angles = layers.rotary(positions, config)
    for i, layer in enumerate(params.layers):
        cache = cache.append(i, *layers.keys_values(layer, c, angles, config.rms_norm_eps), start)
    return cache


def block(
    params: Draft, config: DraftConfig, x: Array, start: Array, cache: AnyKVCache, attention: Backend = "xla"
) -> tuple[Array, AnyKVCache]:
    """Run one block a row in decoding.

    The block's own keys and values are written behind the context (positions from `start` on), where
    attention finds both sides in one buffer; the next context overwrites them.

    Args:
        x: block inputs [B, M, D].
        start: [B] anchor positions a; the cache holds the context of positions 0 to a - 1.
        attention: its backend.

    Returns:
        z = norm(block states) [B, M, D], and the cache.
    """
    positions = start[:, None] + jnp.arange(config.block_size, dtype=jnp.int32)
    angles = layers.rotary(positions, config)
    for i, (layer, window) in enumerate(zip(params.layers, config.windows, strict=True)):
        y, after = _layer_input(layer, config, x)
        q = layers.queries(layer, y, angles, config.rms_norm_eps)
        cache = cache.append(i, *layers.keys_values(layer, y, angles, config.rms_norm_eps), start)
        # Every block position sees the whole context and, unless the layer is causal, the whole block.
        causal = config.causal if window is None else not config.sliding_window_non_causal
        attended = attend_cached(q, cache, i, start, causal=causal, window=window, backend=attention)
        x = constrain(_residual(layer, config, x, attended, after), "B M D")
    return layers.rms_norm(x, params.norm, config.rms_norm_eps), cache


def _layer_input(layer: Layer, config: DraftConfig, x: Array) -> tuple[Array, Array | None]:
    """What attention is given of a block's rows [..., M, D]; of convolutions also the filters of its output."""
    y = layers.rms_norm(x, layer.input_norm, config.rms_norm_eps)
    if not isinstance(layer, ConvolvedLayer):
        return y, None
    before, after = filters(layer.attention_conv, y)
    return convolve(before, y), after


def _residual(layer: Layer, config: DraftConfig, x: Array, attended: Array, after: Array | None) -> Array:
    """The rest of a layer after attention; see `_layer_input`."""
    if after is None or not isinstance(layer, ConvolvedLayer):
        return layers.residual(layer, x, attended, config.rms_norm_eps)
    return convolved_residual(layer, x, attended, after, config.rms_norm_eps)


def training_blocks(
    params: Draft,
    config: DraftConfig,
    x: Array,
    anchors: Array,
    features: Array,
    first: Array | None = None,
    backend: training_attention.BlockBackend = "dense",
    remat: bool = False,
) -> Array:
    """Run all blocks of a sequence in one pass (docs/algorithm.md, section 7).

    The queries of a block see the context strictly before its anchor and their own block.

    Args:
        x: block inputs [B, A, M, D].
        anchors: [B, A] absolute positions a; 0 is legal and sees no context.
        features: [B, S, LD] of the whole sequence.
        first: [B, A], the first position that each block sees, where rows hold several sequences; 0 when None.
        backend: of attention, see `training_attention`.
        remat: keep of each layer only what goes into it, and compute the rest again in the backward pass.

    Returns:
        z [B, A, M, D].
    """
    letters, eps = axes(config), config.rms_norm_eps
    fc = gathered(params.fc, letters.fc)
    c = layers.rms_norm(dot(features, fc), params.context_norm, eps)
    positions = anchors[..., None] + jnp.arange(config.block_size, dtype=jnp.int32)  # [B, A, M]
    angles = layers.rotary(positions, config)
    context_angles = layers.rotary(jnp.arange(features.shape[1], dtype=jnp.int32), config)

    def run(number: int, layer: Layer, x: Array, c: Array) -> Array:
        layer = gathered(layer, letters.layers[number])
        y, after = _layer_input(layer, config, x)
        q = layers.queries(layer, y, angles, eps)
        own = layers.keys_values(layer, y, angles, eps)  # [B, A, M, K, H]
        seen = layers.keys_values(layer, c, context_angles, eps)  # [B, S, K, H]
        # To be causal is to have a window without an end.
        window = config.windows[number] or (ENDLESS if config.causal else None)
        causal = not config.sliding_window_non_causal
        attended = training_attention.attend_blocks(q, own, seen, anchors, first, window, backend, causal=causal)
        return constrain(_residual(layer, config, x, attended, after), "B A M D")

    for number, layer in enumerate(params.layers):
        step = partial(run, number)
        x = (jax.checkpoint(step) if remat else step)(layer, x, c)
    return layers.rms_norm(x, params.norm, eps)
