"""The target model: hidden states, features, logits (docs/algorithm.md, section 2)."""

import jax.numpy as jnp
from jax import Array

from domino_jax import layers
from domino_jax.attention import Backend, attend_cached, attend_without_cache
from domino_jax.config import TargetConfig
from domino_jax.matrix import AnyMatrix
from domino_jax.paged import AnyKVCache
from domino_jax.ragged import Ragged
from domino_jax.sharding import constrain, gathered
from domino_jax.tree import Tree
from domino_jax.weights import Target, axes, lm_head


def forward(
    params: Target,
    config: TargetConfig,
    tokens: Array,
    start: Array | None = None,
    cache: AnyKVCache | None = None,
    target_layer_ids: tuple[int, ...] = (),
    attention: Backend = "xla",
    starts: Array | None = None,
    tree: Tree | None = None,
    lengths: Ragged | None = None,
) -> tuple[Array, Array, AnyKVCache | None]:
    """Run T tokens per row, after what the cache already holds.

    Args:
        tokens: [B, T] int32. Rows are padded on the right; what a padded token writes is never seen.
        start: [B] int32, each row's first position; zeros when None.
        cache: earlier keys and values, or None to attend among `tokens` alone (training).
        target_layer_ids: decoder layers whose output is wanted, in this order.
        attention: its backend; without a cache xla, which can be differentiated, or cudnn.
        starts: [B, T], without a cache: the first position that each token sees, where rows hold several sequences
            (packing); 0 when None.
        tree: with a cache: the tokens are its nodes, the first the anchor. Each stands at the anchor's position plus
            its depth; its keys and values are written in the order of the tokens all the same.
        lengths: with a cache: of each row's tokens only the first ones are run, and what is returned is a line of those
            of all rows, [1, Q, ...].

    Returns:
        Hidden states after the final norm [B, T, D]; features [B, T, LD], the residual stream after
        each of those layers (for the very last layer after the final norm, as in Hugging Face's
        `hidden_states`); the cache with T positions written from `start`.
    """
    begin = jnp.zeros(1, jnp.int32) if start is None else start
    ahead = jnp.arange(tokens.shape[1], dtype=jnp.int32) if tree is None else tree.depth
    positions = begin[:, None] + ahead  # [B or 1, T]
    if lengths is not None:
        tokens, positions = lengths.line(tokens), lengths.line(positions)
    angles = layers.rotary(positions, config)
    letters = axes(config)
    x = constrain(layers.embed(gathered(params.embed, letters.embed), tokens), "B T D")
    outputs = {}
    for i, layer in enumerate(params.layers):
        layer = gathered(layer, letters.layers[i])
        y = layers.rms_norm(x, layer.input_norm, config.rms_norm_eps)
        q, k, v = layers.queries_keys_values(layer, y, angles, config.rms_norm_eps)
        if cache is None:
            attended = attend_without_cache(q, k, v, starts, attention)
        else:
            assert start is not None, "a cache needs the rows' start positions"
            if lengths is not None:
                q, k, v = (lengths.rows(x) for x in (q, k, v))
            cache = cache.append(i, k, v, start)
            sees = None if tree is None else tree.sees
            attended = attend_cached(q, cache, i, begin, backend=attention, sees=sees)
            attended = attended if lengths is None else lengths.line(attended)
        x = constrain(layers.residual(layer, x, attended, config.rms_norm_eps, config.moe), "B T D")
        outputs[i] = x
    x = outputs[config.num_hidden_layers - 1] = layers.rms_norm(x, params.norm, config.rms_norm_eps)
    features = jnp.concatenate([x[..., :0], *(outputs[i] for i in target_layer_ids)], axis=-1)
    return x, features, cache


def logits(params: Target, config: TargetConfig, hidden: Array, output: AnyMatrix | None = None) -> Array:
    """LM head: [B, T, D] -> [B, T, V], float32; entries that only pad the vocabulary are -inf.

    `output` is a copy of the LM head to use in its place, for drafting.
    """
    scores = layers.unembed(hidden, lm_head(params) if output is None else output)
    if scores.shape[-1] > config.vocab_size:
        scores = jnp.where(jnp.arange(scores.shape[-1]) < config.vocab_size, scores, -jnp.inf)
    return constrain(scores, "B T V")
