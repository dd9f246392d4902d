"""Programs compiled ahead of time for TPUs that are not here: no weight is copied, transposed or gathered.

Two layers at Qwen3-8B's widths on four devices, plain steps (one token) and Domino cycles (17 tokens). Needs libtpu
(`pip install -e ".[aot]"`).
"""

import dataclasses
import re
from functools import cache
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from convert.shapes import SHAPES
from domino_jax import cache as kv
from domino_jax import decode, sharding
from domino_jax.config import DecoderConfig
from domino_jax.decode import DecodeConfig, DecodeState, Rows
from domino_jax.drafters.block import BlockDrafter
from domino_jax.sampling import Sampling
from domino_jax.weights import Params, axes, flatten, unflatten, weight_shapes

pytestmark = pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[aot]'")

CAPACITY = 2048
SMALLEST = 2**20  # bytes of a device's part, above which an array counts as a weight
MOVES = ("copy", "copy-start", "transpose", "all-gather", "all-gather-start", "all-to-all", "collective-permute")


@cache
def mesh(kind: str) -> Mesh:
    """Four devices of a TPU that is described and not here."""
    devices = topologies.get_topology_desc(f"{kind}:2x2", platform="tpu").devices
    return jax.make_mesh((1, 4), (sharding.DATA, sharding.MODEL), (AxisType.Auto,) * 2, devices=devices)


def configs() -> DecodeConfig:
    """Qwen3-8B's pair with two layers and one."""
    target, draft = SHAPES["qwen3-8b"]
    target = dataclasses.replace(target, num_hidden_layers=2)
    draft = dataclasses.replace(
        draft, num_hidden_layers=1, num_target_layers=2, target_layer_ids=(0, 1), windows=(None,)
    )
    return DecodeConfig(target, BlockDrafter(draft))


def described(shape: tuple[int, ...], dtype: Any, letters: str, mesh: Mesh) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, sharding.spec(letters, mesh)))


def module(config: DecoderConfig, mesh: Mesh) -> Any:
    letters = flatten(axes(config))
    return unflatten(
        config,
        {
            path: described(leaf.shape, leaf.dtype, letters[path], mesh)
            for path, leaf in flatten(weight_shapes(config, jnp.bfloat16)).items()
        },
    )


def state(configs: DecodeConfig, mesh: Mesh) -> DecodeState:
    def row(dtype: Any) -> Any:
        return described((1,), dtype, "B", mesh)

    def cache(config: DecoderConfig) -> kv.KVCache:
        shape = (1, config.num_key_value_heads, CAPACITY, config.head_dim)
        buffer = described(shape, jnp.bfloat16, "B K S H", mesh)
        return kv.KVCache(*((buffer,) * config.num_hidden_layers for _ in "kv"))

    assert configs.draft is not None
    sampling = Sampling(row(jnp.float32), row(jnp.int32), row(jnp.float32), row(jnp.float32))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    where = NamedSharding(mesh, sharding.spec("B", mesh))
    described_keys: Any = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=where)
    return DecodeState(
        row(jnp.int32),
        row(jnp.int32),
        row(jnp.int32),
        row(bool),
        row(bool),
        Rows(described_keys, row(jnp.int32), described((1, 2), jnp.int32, "B -", mesh), sampling, row(bool)),
        None,
        cache(configs.target),
        cache(configs.draft),
    )


def compiled(kind: str, tokens: int) -> str:
    """The text of the program that runs `tokens` tokens of the target a cycle."""
    pair, made = configs(), mesh(kind)
    assert pair.draft is not None
    params = Params(module(pair.target, made), module(pair.draft, made))
    run = decode.autoregress if tokens == 1 else decode.speculate
    with jax.sharding.use_abstract_mesh(made.abstract_mesh):
        return run.lower(params, pair, state(pair, made), 8, True).compile().as_text() or ""


def weights(mesh: Mesh) -> dict[tuple[int, ...], str]:
    """The sizes of each weight's part on a device and of the whole weight, sorted without ones: its path."""
    pair, found = configs(), {}
    assert pair.draft is not None
    for config in (pair.target, pair.draft):
        for path, leaf in flatten(module(config, mesh)).items():
            for shape in (leaf.sharding.shard_shape(leaf.shape), leaf.shape):
                if jnp.dtype(leaf.dtype).itemsize * int(jnp.prod(jnp.array(shape))) >= SMALLEST:
                    found[tuple(sorted(n for n in shape if n > 1))] = path
    return found


def moved(text: str, weights: dict[tuple[int, ...], str]) -> list[str]:
    """The operations of a program that move an array of a weight's sizes, in whatever order its axes are.

    A copy into the chip's vector memory, S(1), in the layout that it has is no move: it is the weight being read early.
    """
    found = []
    for line in text.splitlines():
        match = re.search(r"= \(?(\w+)\[([\d,]*)\](\S*) (?:[^=]*\) )?([\w-]+)\(", line)
        if match is None or match[4] not in MOVES:
            continue
        if match[4] == "copy-start" and "S(1)" in match[3]:
            read, source = re.findall(r"\{[^{}]*\}", line)[:2]
            if read.replace("S(1)", "") == source:
                continue
        shape = tuple(sorted(int(n) for n in match[2].split(",") if n and int(n) > 1))
        if shape in weights:
            found.append(f"{weights[shape]}: {line.strip()[:160]}")
    return found


def test_a_moved_weight_is_found():
    """The check would see a copy, a transpose and a gather, also of an array with other axes in front."""
    known = {(1024, 4096): "q"}
    lines = (
        "  %copy.1 = bf16[4096,1024]{0,1:T(8,128)} copy(bf16[4096,1024]{1,0} %p)",
        "  %t = bf16[1,4096,1024]{2,1,0} transpose(bf16[1024,4096,1]{2,1,0} %p)",
        "  %g = (bf16[1024,4096]{1,0}, u32[]{:S(2)}) copy-start(bf16[1024,4096]{1,0} %p)",
        "  ROOT %a = bf16[1024,4096]{1,0:T(8,128)(2,1)} all-gather(bf16[256,4096]{1,0} %p)",
    )
    assert len(moved("\n".join(lines), known)) == 4
    read = "(bf16[1024,4096]{1,0:T(8,128)S(1)}, bf16[1024,4096]{%s:T(8,128)}, u32[]{:S(2)}) copy-start(%%p)"
    assert not moved(f"  %c = {read % '1,0'}", known) and moved(f"  %c = {read % '0,1'}", known)
    others = "  %f = bf16[1024,4096]{1,0} fusion(bf16[1024,4096]{1,0} %p)\n  %c = f32[8] copy(f32[8] %p)"
    assert not moved(others, known)


@pytest.mark.e2e
@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("kind", ["v5e", "v6e"])
def test_no_weight_is_copied_transposed_or_gathered(kind, tokens, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # nobody answers for a TPU's metadata here
    monkeypatch.delenv("XLA_FLAGS")  # libtpu ends the process where it does not know a CPU's flag
    known = weights(mesh(kind))
    assert len(known) >= 8
    text = compiled(kind, tokens)
    assert "while(" in text and "all-reduce" in text
    assert not moved(text, known), "\n".join(moved(text, known))
