"""The shapes of the public models, and random weights for them, which cost what the real ones do and know nothing."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from domino_jax.config import DecoderConfig, DraftConfig, MoeConfig, TargetConfig, default_target_layer_ids
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.errors import DominoError
from domino_jax.sharding import MODEL, fit_to_mesh, stored_spec
from domino_jax.weights import axes, flatten, is_bias, is_table, unflatten

STD = 0.02  # of the random weights, as Qwen3's own were initialised
DRAFT_LAYERS = 5


class Shape(NamedTuple):
    """A target and a drafter for it."""

    target: TargetConfig
    draft: DraftConfig


def _shape(
    width: int,
    layers: int,
    heads: int,
    mlp: int,
    tied: bool = False,
    kv_heads: int = 8,
    moe: MoeConfig | None = None,
) -> Shape:
    """A Qwen3 (docs/algorithm.md, section 2) and a drafter like the public ones: its layers, dense; blocks of 16."""
    target = TargetConfig(
        vocab_size=151936,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        intermediate_size=mlp,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=40960,
        tie_word_embeddings=tied,
        moe=moe,
    )
    draft = DraftConfig(
        **target.geometry(num_hidden_layers=DRAFT_LAYERS),
        block_size=16,
        mask_token_id=151669,
        target_layer_ids=default_target_layer_ids(layers, DRAFT_LAYERS),
        num_target_layers=layers,
        shift_label=True,
        head=DominoHead(gru_hidden_dim=1024, emb_dim=256, pure_draft_prefix_len=1),
    )
    return Shape(target, draft)


SHAPES = {
    "qwen3-0.6b": _shape(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _shape(2048, 28, 16, 6144, tied=True),
    "qwen3-4b": _shape(2560, 36, 32, 9728, tied=True),
    "qwen3-8b": _shape(4096, 36, 32, 12288),
    "qwen3-14b": _shape(5120, 40, 40, 17408),
    "qwen3-32b": _shape(5120, 64, 64, 25600),
    # The MLP's width is its drafter's alone: every layer of this target has experts.
    "qwen3-30b-a3b": _shape(2048, 48, 32, 6144, kv_heads=4, moe=MoeConfig(128, 8, 768, norm_topk_prob=True)),
}


def find_shape(name: str) -> Shape:
    """The shape of a name.

    Raises:
        DominoError: the table has none.
    """
    if name not in SHAPES:
        raise DominoError(f"--shapes {name}: the shapes are {', '.join(SHAPES)}.")
    return SHAPES[name]


def random_weights(
    config: DecoderConfig, dtype: Any, mesh: Mesh | None = None, form: Callable[[str, Any], Any] | None = None
) -> Any:
    """A module (Target or Draft) of random weights, each made where it belongs: nothing crosses from the host.

    Norms are ones and biases zeros, the rest is uniform with standard deviation `STD`. Their shapes are those of
    `described_weights`.

    Args:
        form: is given each weight with its path, and says what is kept of it; the weight itself when None.
    """
    leaves = {}
    for number, (path, leaf) in enumerate(flatten(described_weights(config, dtype, mesh)).items()):
        constant = 0 if is_bias(path) else 1 if len(leaf.shape) == 1 else None
        make = _maker(leaf.shape, dtype, constant, leaf.sharding)
        weight = make(jax.random.fold_in(jax.random.key(0), number))
        leaves[path] = weight if form is None else jax.block_until_ready(form(path, weight))
    return unflatten(config, leaves)


def described_weights(config: DecoderConfig, dtype: Any, mesh: Mesh | None = None, device: Any = None) -> Any:
    """A module (Target or Draft) with a jax.ShapeDtypeStruct for each weight, laid out as loaded weights are.

    On a mesh they have the shapes that `domino_jax.sharding.shard_stored` gives: KV heads for each device, the
    vocabulary padded.

    Args:
        mesh: its devices need not be here.
        device: of a module on one device; None leaves it open.
    """
    model = mesh.shape[MODEL] if mesh else 1
    sizes = fit_to_mesh(config, model).sizes
    sizes |= {letter: -(-sizes[letter] // model) * model for letter in ("V", "DV")}
    alone = None if device is None else SingleDeviceSharding(device)
    leaves = {}
    for path, letters in flatten(axes(config)).items():
        shape = tuple(sizes[letter] for letter in letters.split())
        sharding = NamedSharding(mesh, stored_spec(letters, mesh)) if mesh else alone
        held = jnp.int32 if is_table(path) else dtype
        leaves[path] = jax.ShapeDtypeStruct(shape, held, sharding=sharding)
    return unflatten(config, leaves)


@cache
def _maker(shape: tuple[int, ...], dtype: Any, constant: int | None, sharding: NamedSharding | None) -> Any:
    """A compiled function from a key to a weight, all of it `constant` or (None) random; layers share it."""

    def make(key: Array) -> Array:
        if constant is not None:
            return jnp.full(shape, constant, dtype)
        most = STD * math.sqrt(3)
        return jax.random.uniform(key, shape, dtype, -most, most)

    return jax.jit(make, out_shardings=sharding)
