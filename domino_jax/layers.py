"""The pieces of a Qwen3 layer, as pure functions (docs/algorithm.md, section 2)."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from domino_jax import moe
from domino_jax.config import DecoderConfig, MoeConfig, Yarn
from domino_jax.weights import FusedLayer, Layer, OutputsFirst, Quantized

FEW_PIECES = 192  # rows of bfloat16 pieces, three for each of x: up to here they are the right factor of a product

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


def linear(x: Array, weight: Array | Quantized | OutputsFirst) -> Array:
    """x [..., in] times weight [in, out...]: [..., out...]."""
    if isinstance(weight, OutputsFirst):
        return product(x, weight.values)
    if isinstance(weight, Quantized):
        return jnp.tensordot(x, weight.values.astype(x.dtype), 1) * weight.scale
    return jnp.tensordot(x, weight, 1)


def scores(x: Array, weight: Array | Quantized | OutputsFirst) -> Array:
    """x [..., in] times a vocabulary's projection [V, in]: [..., V], float32."""
    if isinstance(weight, OutputsFirst):
        return product(x, weight.values)
    values = weight.values.astype(x.dtype) if isinstance(weight, Quantized) else weight
    out = jnp.einsum("...D,VD->...V", x, values, preferred_element_type=jnp.float32)
    return out * weight.scale.astype(jnp.float32) if isinstance(weight, Quantized) else out


def rows(weight: Array | Quantized | OutputsFirst, ids: Array) -> Array:
    """A vocabulary's matrix [V, -] at ids [...]: [..., -], in the dtype that is computed in."""
    if isinstance(weight, OutputsFirst):
        if weight.values.dtype == jnp.float32:
            return weight.values[ids]
        # By its bits: a CPU's gather of bfloat16 would first convert the whole matrix.
        return _widened(jax.lax.bitcast_convert_type(weight.values, jnp.uint16)[ids])
    if isinstance(weight, Quantized):
        return weight.values[ids].astype(weight.scale.dtype) * weight.scale[ids][..., None]
    return weight[ids]


def product(x: Array, values: Array) -> Array:
    """x [..., in] float32 times an OutputsFirst's values [out..., in]: [..., out...]."""
    return turned_product(x, values) if values.dtype == jnp.float32 else exact_product(x, values)


def turned_product(x: Array, values: Array) -> Array:
    """x [..., in] times values [out..., in]: [..., out...], computed as values · xᵀ.

    A CPU's kernels first put the right factor of a product in an order of their own. Here that is the few rows of x,
    and not the matrix; the barriers keep XLA from turning it round.
    """
    matrix, columns = values.reshape(-1, values.shape[-1]), x.reshape(-1, x.shape[-1]).T
    out = jax.lax.optimization_barrier(matrix @ jax.lax.optimization_barrier(columns))
    return out.T.reshape(*x.shape[:-1], *values.shape[:-1])


def exact_product(x: Array, values: Array) -> Array:
    """x [..., in] float32 times bfloat16 values [out..., in]: [..., out...], as a float32 product of both would be.

    A float32 is the sum of three bfloat16 numbers (3 · 8 bits of mantissa), and a product of two bfloat16 numbers is a
    float32: so three products on a processor's bfloat16 units, summed in float32, lose nothing but what any float32
    sum rounds. (Henry, Tang & Heinecke 2019, "Leveraging the bfloat16 Artificial Intelligence Datatype For
    Higher-Precision Computations"; of their nine products six are zero, since the values have one piece.)

    Few rows are the right factor, as in `turned_product`: with the matrix there, XLA would hold a transposed copy of it
    through every loop of decoding, made anew for each. The kernels for many rows want it there.
    """
    matrix, parts = values.reshape(-1, values.shape[-1]), pieces(x)
    parts = parts.reshape(-1, parts.shape[-1])
    if parts.shape[0] <= FEW_PIECES:
        columns = jax.lax.optimization_barrier(parts)
        sums = jnp.einsum("FD,RD->FR", matrix, columns, preferred_element_type=jnp.float32)
        sums = jax.lax.optimization_barrier(sums).T
    else:
        sums = jnp.einsum("RD,FD->RF", parts, matrix, preferred_element_type=jnp.float32)
    sums = sums.reshape(*x.shape[:-1], 3, -1)
    return (sums[..., 2, :] + sums[..., 1, :] + sums[..., 0, :]).reshape(*x.shape[:-1], *values.shape[:-1])


def pieces(x: Array) -> Array:
    """x [..., D] float32 as three bfloat16 numbers whose sum it is, bit for bit (below 1e-33 nearly): [..., 3, D].

    By its bits, since compilers take away a conversion to bfloat16 and back; and by a choice for each element, which a
    CPU's kernels have sooner than a concatenation.
    """
    rest = x - _widened(_upper(x))
    last = rest - _widened(_upper(rest))
    whole, rest, last = (part[..., None, :] for part in (x, rest, last))
    number = jax.lax.broadcasted_iota(jnp.uint32, (*x.shape[:-1], 3, x.shape[-1]), x.ndim - 1)
    chosen = jnp.where(number == 0, whole, jnp.where(number == 1, rest, last))
    return jax.lax.bitcast_convert_type(_upper(chosen), jnp.bfloat16)


def _upper(x: Array) -> Array:
    """The upper half of each float32: the bits of a bfloat16, as uint16."""
    return (jax.lax.bitcast_convert_type(x, jnp.uint32) >> 16).astype(jnp.uint16)


def _widened(upper: Array) -> Array:
    """The float32 whose upper half this is."""
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint32) << 16, jnp.float32)


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


def flat_heads(o: Array | Quantized | OutputsFirst) -> Array | Quantized | OutputsFirst:
    """[N, H, D] -> [NH, D]."""
    if isinstance(o, OutputsFirst):
        return OutputsFirst(o.values.reshape(o.values.shape[0], -1))
    if isinstance(o, Quantized):
        return o._replace(values=o.values.reshape(-1, o.values.shape[-1]))
    return o.reshape(-1, o.shape[-1])
