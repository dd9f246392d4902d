"""DFlash 2's convolutions within the layers of a block drafter: each row is mixed with those before it in its block.

Two of them are around each sublayer, one of its input and one of its output, and their filters depend on the input:
with x = norm(h) of the block's rows alone, and δ a projection of x,

    conv_side(v)_t[c] = Σ_τ (base[side, τ, c] + δ_t[side, τ, ⌊c/g⌋]) · v_{t-τ}[c]
    h = h + conv_1(sublayer(conv_0(x)))

Nothing crosses the beginning of a block, and the context is never convolved.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from domino_jax import layers
from domino_jax.errors import DominoError
from domino_jax.fields import Fields, integer
from domino_jax.matrix import dot
from domino_jax.weights import Layer, Leaf, TensorRow

SIDES = 2  # of a sublayer's input, and of its output


class ConvolutionWeights(nnx.Module):
    """The filters of one sublayer: a constant part, and the projection that gives the other."""

    def __init__(self, leaf: Leaf):
        self.base_kernel: Array = leaf("CS CT D")
        self.kernel_projection: Array = leaf("CG D")


class ConvolvedLayer(Layer):
    """A decoder layer with convolutions around its attention and its MLP."""

    def __init__(self, leaf: Leaf, bias: bool):
        super().__init__(leaf, bias)
        self.attention_conv = ConvolutionWeights(leaf)
        self.mlp_conv = ConvolutionWeights(leaf)


@dataclass(frozen=True)
class Convolution:
    """The filters' sizes; the names are z-lab's.

    Args:
        conv_kernel_size: taps of a filter: a row, and those before it.
        conv_group_size: g, channels that share the part of the filter which depends on the input.
    """

    tensors: ClassVar[tuple[TensorRow, ...]] = tuple(
        (f"layers.{{i}}.{conv}.{path}", letters, (f"layers.{{i}}.{conv}.{name}",))
        for conv in ("attention_conv", "mlp_conv")
        for path, letters, name in (
            ("base_kernel", "CS CT D", "base_kernel"),
            ("kernel_projection", "CG D", "kernel_projection.weight"),
        )
    )

    conv_kernel_size: int
    conv_group_size: int

    @classmethod
    def read(cls, fields: Fields) -> "Convolution | None":
        """The convolutions of a config.json, None where it has none.

        Raises:
            DominoError: one of its two fields is missing.
        """
        size, group = (fields.get(name, integer(), 0) for name in ("conv_kernel_size", "conv_group_size"))
        if not size and not group:
            return None
        if not size or not group:
            raise DominoError(
                f"{fields.where} has conv_kernel_size {size} and conv_group_size {group}; a drafter with convolutions "
                "has both, any other neither."
            )
        return cls(size, group)

    def to_hf(self) -> dict[str, Any]:
        """Its fields of a dflash_config."""
        return {"conv_kernel_size": self.conv_kernel_size, "conv_group_size": self.conv_group_size}

    def check(self, width: int) -> None:
        """Refuse groups that do not divide the model's width.

        Raises:
            DominoError: they do not.
        """
        if width % self.conv_group_size:
            raise DominoError(f"conv_group_size {self.conv_group_size} does not divide hidden_size {width}.")

    def layer(self, leaf: Leaf, bias: bool) -> "ConvolvedLayer":
        """The weights of one decoder layer."""
        return ConvolvedLayer(leaf, bias)

    def sizes(self, width: int) -> dict[str, int]:
        """Sizes of the axis letters of its weights."""
        taps = self.conv_kernel_size
        return {"CS": SIDES, "CT": taps, "CG": SIDES * taps * (width // self.conv_group_size)}

    def at_first(self, weights: Mapping[str, Array]) -> dict[str, Array]:
        """The convolutions' weights before training, with which each row passes as it is.

        Args:
            weights: a drafter's, by path.
        """
        made = {path: jnp.zeros_like(w) for path, w in weights.items() if "_conv." in path}
        return {path: w.at[:, 0].set(1) if path.endswith(".base_kernel") else w for path, w in made.items()}

    def describe(self) -> str:
        """Its sizes in a few words."""
        return f"convolutions of {self.conv_kernel_size} rows in groups of {self.conv_group_size} channels"


def filters(weights: ConvolutionWeights, x: Array) -> tuple[Array, Array]:
    """The filters of both sides at each row, from a sublayer's input [..., M, D]: each [..., M, CT, D]."""
    base = weights.base_kernel.astype(x.dtype)
    moving = dot(x, weights.kernel_projection)
    moving = moving.reshape(*moving.shape[:-1], *base.shape[:2], -1, 1)
    both = base.reshape(*base.shape[:2], moving.shape[-2], -1) + moving
    both = both.reshape(*x.shape[:-1], *base.shape)
    return both[..., 0, :, :], both[..., 1, :, :]


def convolve(filters: Array, v: Array) -> Array:
    """Each row of v [..., M, D] and those before it, channel by channel times its filter [..., M, CT, D]."""
    rows = v.shape[-2]
    out = filters[..., 0, :] * v
    for tap in range(1, min(filters.shape[-2], rows)):
        before = jnp.pad(v[..., : rows - tap, :], [(0, 0)] * (v.ndim - 2) + [(tap, 0), (0, 0)])
        out += filters[..., tap, :] * before
    return out


def convolved_residual(layer: ConvolvedLayer, x: Array, attended: Array, after: Array, eps: float) -> Array:
    """`layers.residual` of a layer with convolutions.

    Args:
        after: the filters of attention's output.
    """
    out = layers.biased(dot(attended.reshape(*x.shape[:-1], -1), layer.o), layer.o_bias)
    x = x + convolve(after, out)
    y = layers.rms_norm(x, layer.mlp_norm, eps)
    before, after = filters(layer.mlp_conv, y)
    return x + convolve(after, layers.swiglu(layer, convolve(before, y)))
