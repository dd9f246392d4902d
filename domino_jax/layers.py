"""The pieces of a Qwen3 layer, as pure functions (SPEC section 2)."""

import jax
import jax.numpy as jnp
from jax import Array

from domino_jax.weights import FusedLayer, Layer, Quantized

Rotary = tuple[Array, Array]  # cos and sin, each [..., T, H/2] float32


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / √(mean(x²) + eps) · weight over the last axis, statistics in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight


def rotary(positions: Array, theta: float, head_dim: int) -> Rotary:
    """RoPE angles of absolute `positions` [...]: cos and sin, [..., H/2] float32."""
    inverse = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * inverse
    return jnp.cos(angles), jnp.sin(angles)


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
    return rotate(rms_norm(linear(x, layer.q), layer.q_norm, eps), angles)


def keys_values(layer: Layer | FusedLayer, x: Array, angles: Rotary, eps: float) -> tuple[Array, Array]:
    """[..., T, D] -> two [..., T, K, H]: keys normed per head and rotated, values as projected."""
    if isinstance(layer, FusedLayer):
        k, v = jnp.moveaxis(linear(x, layer.kv), -3, 0)
    else:
        k, v = linear(x, layer.k), linear(x, layer.v)
    return rotate(rms_norm(k, layer.k_norm, eps), angles), v


def residual(layer: Layer | FusedLayer, x: Array, attended: Array, eps: float) -> Array:
    """The rest of a layer after attention: x + o(attended), then x + SwiGLU(norm(x))."""
    # Heads flattened by hand: XLA may contract two axes in the order that transposes the weight.
    x = x + linear(attended.reshape(*x.shape[:-1], -1), flat_heads(layer.o))
    y = rms_norm(x, layer.mlp_norm, eps)
    if isinstance(layer, FusedLayer):
        gate, up = jnp.moveaxis(linear(y, layer.gate_up), -2, 0)
    else:
        gate, up = linear(y, layer.gate), linear(y, layer.up)
    return x + linear(jax.nn.silu(gate) * up, layer.down)


def flat_heads(o: Array | Quantized) -> Array | Quantized:
    """[N, H, D] -> [NH, D]."""
    if isinstance(o, Quantized):
        return o._replace(values=o.values.reshape(-1, o.values.shape[-1]))
    return o.reshape(-1, o.shape[-1])
