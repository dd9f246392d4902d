"""The pieces of a Qwen3 layer, as pure functions (SPEC section 2)."""

import jax
import jax.numpy as jnp
from jax import Array

from domino_jax.weights import Layer

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


def queries(layer: Layer, x: Array, angles: Rotary, eps: float) -> Array:
    """[..., T, D] -> [..., T, N, H]: projected, normed per head, rotated."""
    return rotate(rms_norm(jnp.einsum("...D,DNH->...NH", x, layer.q), layer.q_norm, eps), angles)


def keys_values(layer: Layer, x: Array, angles: Rotary, eps: float) -> tuple[Array, Array]:
    """[..., T, D] -> two [..., T, K, H]: keys normed per head and rotated, values as projected."""
    k = rotate(rms_norm(jnp.einsum("...D,DKH->...KH", x, layer.k), layer.k_norm, eps), angles)
    return k, jnp.einsum("...D,DKH->...KH", x, layer.v)


def residual(layer: Layer, x: Array, attended: Array, eps: float) -> Array:
    """The rest of a layer after attention: x + o(attended), then x + SwiGLU(norm(x))."""
    # Heads flattened by hand: XLA may contract two axes in the order that transposes the weight.
    x = x + attended.reshape(*x.shape[:-1], -1) @ layer.o.reshape(-1, x.shape[-1])
    y = rms_norm(x, layer.mlp_norm, eps)
    return x + (jax.nn.silu(y @ layer.gate) * (y @ layer.up)) @ layer.down
