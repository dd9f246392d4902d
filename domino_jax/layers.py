"""The pieces of a Qwen3 layer, as pure functions (SPEC section 2)."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from domino_jax import moe
from domino_jax.config import DecoderConfig, MoeConfig, Yarn
from domino_jax.weights import FusedLayer, Layer, Quantized

Rotary = tuple[Array, Array]  # cos and sin, each [..., T, H/2] float32


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / √(mean(x²) + eps) · weight over the last axis, statistics in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight


def rotary(positions: Array, config: DecoderConfig) -> Rotary:
    """RoPE angles of absolute `positions` [...]: cos and sin, [..., H/2] float32, with YaRN times its factor."""
    inverse = 1.0 / config.rope_theta ** (jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    if config.yarn:
        inverse = stretched(inverse, config.yarn, config.rope_theta, config.head_dim)
    angles = positions[..., None].astype(jnp.float32) * inverse
    if config.yarn:
        return jnp.cos(angles) * config.yarn.attention_factor, jnp.sin(angles) * config.yarn.attention_factor
    return jnp.cos(angles), jnp.sin(angles)


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


def rotate(x: Array, angles: Rotary) -> Array:
    """Rotate element i of the last axis with element i + H/2. x is [..., T, heads, H]."""
    cos, sin = (a[..., None, :] for a in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def linear(x: Array, weight: Array | Quantized) -> Array:
    """x [..., in] times weight [in, out...]: [..., out...]."""
    if isinstance(weight, Quantized):
        return jnp.tensordot(x, weight.values.astype(x.dtype), 1) * weight.scale
    return jnp.tensordot(x, weight, 1)


def scores(x: Array, weight: Array | Quantized) -> Array:
    """x [..., in] times a vocabulary's projection [V, in]: [..., V], float32."""
    values = weight.values.astype(x.dtype) if isinstance(weight, Quantized) else weight
    out = jnp.einsum("...D,VD->...V", x, values, preferred_element_type=jnp.float32)
    return out * weight.scale.astype(jnp.float32) if isinstance(weight, Quantized) else out


def queries(layer: Layer | FusedLayer, x: Array, angles: Rotary, eps: float) -> Array:
    """[..., T, D] -> [..., T, N, H]: projected, normed per head, rotated."""
    return rotate(rms_norm(biased(linear(x, layer.q), layer.q_bias), layer.q_norm, eps), angles)


def keys_values(layer: Layer | FusedLayer, x: Array, angles: Rotary, eps: float) -> tuple[Array, Array]:
    """[..., T, D] -> two [..., T, K, H]: keys normed per head and rotated, values as projected."""
    if isinstance(layer, FusedLayer):
        k, v = jnp.moveaxis(biased(linear(x, layer.kv), layer.kv_bias), -3, 0)
    else:
        k, v = biased(linear(x, layer.k), layer.k_bias), biased(linear(x, layer.v), layer.v_bias)
    return rotate(rms_norm(k, layer.k_norm, eps), angles), v


def residual(
    layer: Layer | FusedLayer, x: Array, attended: Array, eps: float, experts: MoeConfig | None = None
) -> Array:
    """The rest of a layer after attention: x + o(attended), then x + MLP(norm(x)).

    Args:
        experts: of a model that has them; the layers with a router use them.
    """
    # Heads flattened by hand: XLA may contract two axes in the order that transposes the weight.
    x = x + biased(linear(attended.reshape(*x.shape[:-1], -1), flat_heads(layer.o)), layer.o_bias)
    y = rms_norm(x, layer.mlp_norm, eps)
    if layer.router is not None:
        assert experts is not None
        return x + moe.mlp(layer, experts, y)
    return x + swiglu(layer, y)


def swiglu(layer: Layer | FusedLayer, y: Array) -> Array:
    """down(silu(gate(y)) · up(y)): [..., D] -> [..., D]."""
    if isinstance(layer, FusedLayer):
        assert layer.gate_up is not None, "a layer with experts"
        gate, up = jnp.moveaxis(linear(y, layer.gate_up), -2, 0)
    else:
        gate, up = linear(y, layer.gate), linear(y, layer.up)
    return linear(jax.nn.silu(gate) * up, layer.down)


def biased(x: Array, bias: Array | None) -> Array:
    """x plus the bias of its last axes, if there is one."""
    return x if bias is None else x + bias


def flat_heads(o: Array | Quantized) -> Array | Quantized:
    """[N, H, D] -> [NH, D]."""
    if isinstance(o, Quantized):
        return o._replace(values=o.values.reshape(-1, o.values.shape[-1]))
    return o.reshape(-1, o.shape[-1])
