"""The pieces of a decoder layer, as pure functions (docs/algorithm.md, section 2)."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from domino_jax import moe
from domino_jax.config import DecoderConfig, Llama3, MoeConfig, Yarn
from domino_jax.matrix import AnyMatrix, dot, dot_each, take
from domino_jax.weights import Attention, JoinedLayer, Layer

Rotary = tuple[Array, Array]  # cos and sin, each [..., T, H/2] float32


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / √(mean(x²) + eps) · weight over the last axis, statistics in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight


def rotary(positions: Array, config: DecoderConfig) -> Rotary:
    """RoPE angles of absolute `positions` [...]: cos and sin, [..., H/2] float32, with YaRN times its factor."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(config)
    cos, sin, scaling = jnp.cos(angles), jnp.sin(angles), config.rope_scaling
    if isinstance(scaling, Yarn):
        return cos * scaling.attention_factor, sin * scaling.attention_factor
    return cos, sin


def frequencies(config: DecoderConfig) -> Array:
    """RoPE's angle of each element pair at position 1, as `rope_scaling` changes it: [H/2] float32."""
    inverse = 1.0 / config.rope_theta ** (jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    match config.rope_scaling:
        case Yarn() as yarn:
            return stretched(inverse, yarn, config.rope_theta, config.head_dim)
        case Llama3() as llama3:
            return divided(inverse, llama3)
    return inverse


def stretched(inverse: Array, yarn: Yarn, theta: float, head_dim: int) -> Array:
    """YaRN's frequencies from RoPE's [H/2]: slow ones divided by `factor`, fast ones as they are, a ramp between.

    Fast is what turns `beta_fast` times or more over the original positions, slow what turns at most `beta_slow` times
    (Peng et al. 2023, section 3.2; the ramp's ends as transformers rounds and clips them).
    """

    def dimension(turns: float) -> float:
        """Where an element pair turns so often over the original positions."""
        span = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(span) / (2 * math.log(theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    slow = jnp.clip((jnp.arange(head_dim // 2, dtype=jnp.float32) - low) / width, 0, 1)
    return inverse / yarn.factor * slow + inverse * (1 - slow)


def divided(inverse: Array, scaling: Llama3) -> Array:
    """Llama 3.1's frequencies from RoPE's [H/2]: slow ones divided by `factor`, fast ones as they are, a ramp between.

    Slow is what turns at most `low_freq_factor` times over the original positions, fast what turns `high_freq_factor`
    times or more.
    """
    turns = scaling.original_max_position_embeddings * inverse / (2 * math.pi)
    fast = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    fast = jnp.clip(fast, 0, 1)
    return inverse / scaling.factor * (1 - fast) + inverse * fast


def rotate(x: Array, angles: Rotary) -> Array:
    """Rotate element i of the last axis with element i + H/2. x is [..., T, heads, H]."""
    cos, sin = (a[..., None, :] for a in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def embed(vocabulary: AnyMatrix, ids: Array) -> Array:
    """Embeddings of ids [...]: [..., D], in the dtype that is computed in."""
    return take(vocabulary, ids)


def unembed(x: Array, vocabulary: AnyMatrix) -> Array:
    """x [..., in] times a vocabulary's projection [V, in]: logits [..., V], float32."""
    return dot(x, vocabulary, jnp.float32)


def queries(layer: Attention, x: Array, angles: Rotary, eps: float) -> Array:
    """[..., T, D] -> [..., T, N, H]: projected, normed per head where the model does, rotated."""
    return rotate(normed_heads(biased(dot(x, layer.q), layer.q_bias), layer.q_norm, eps), angles)


def keys_values(layer: Attention, x: Array, angles: Rotary, eps: float) -> tuple[Array, Array]:
    """[..., T, D] -> two [..., T, K, H]: keys as queries are, values as projected."""
    k, v = dot_each(x, layer.kv)
    if layer.kv_bias is not None:
        k, v = k + layer.kv_bias[0], v + layer.kv_bias[1]
    return rotate(normed_heads(k, layer.k_norm, eps), angles), v


def queries_keys_values(layer: Attention, x: Array, angles: Rotary, eps: float) -> tuple[Array, Array, Array]:
    """`queries` and `keys_values` of one input."""
    if not isinstance(layer, JoinedLayer):
        return (queries(layer, x, angles, eps), *keys_values(layer, x, angles, eps))
    both, v = dot(x, layer.qk), dot(x, layer.v)  # [..., T, K, G + 1, H]
    heads = rms_norm(both, layer.qk_norm, eps).reshape(*x.shape[:-1], -1, both.shape[-1])
    both = rotate(heads, angles).reshape(both.shape)
    return both[..., :-1, :].reshape(*x.shape[:-1], -1, both.shape[-1]), both[..., -1, :], v


def residual(
    layer: Layer,
    x: Array,
    attended: Array,
    eps: float,
    experts: MoeConfig | None = None,
    attention: Attention | None = None,
) -> Array:
    """The rest of a layer after attention: x + o(attended), then x + MLP(norm(x)).

    Args:
        attended: [..., N, H].
        experts: of a model that has them; the layers with a router use them.
        attention: whose `o` it is; the layer's own when None.
    """
    of = layer if attention is None else attention
    x = x + biased(dot(attended.reshape(*x.shape[:-1], -1), of.o), of.o_bias)
    y = rms_norm(x, layer.mlp_norm, eps)
    if layer.router is not None:
        assert experts is not None
        return x + moe.mlp(layer, experts, y)
    return x + swiglu(layer, y)


def swiglu(layer: Layer, y: Array) -> Array:
    """down(silu(gate(y)) · up(y)): [..., D] -> [..., D]."""
    gate, up = dot_each(y, layer.gate_up)
    return dot(jax.nn.silu(gate) * up, layer.down)


def normed_heads(x: Array, weight: Array | None, eps: float) -> Array:
    """Queries or keys after `rms_norm` per head, if the model has that norm."""
    return x if weight is None else rms_norm(x, weight, eps)


def biased(x: Array, bias: Array | None) -> Array:
    """x plus the bias of its last axes, if there is one."""
    return x if bias is None else x + bias
