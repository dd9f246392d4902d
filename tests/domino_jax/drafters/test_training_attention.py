"""The blocks' Pallas kernel, interpreted, against the dense backend; what it reads, how it lowers, what is refused.

On a TPU, `JAX_PLATFORMS=tpu pytest tests/domino_jax/test_training_attention.py` also runs it compiled.
"""

import math
import re
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax import sharding
from domino_jax.config import DraftConfig
from domino_jax.drafters import training_attention
from domino_jax.errors import DominoError
from domino_jax.kernels import training_attention_tpu
from train import anchors

SIZE, WIDTH, LENGTH = 4, 8, 45  # M, H, S
CONFIG = DraftConfig(50, 16, 1, 2, 1, 128, 16, 1e-6, 1e4, 4096, 16, 3, (0,), 2, True, None)
NAMES = "out", "q", "own k", "own v", "k", "v"
# Rows of anchors, the first position that each sees, N, K, S, window.
SORTED = [[0, 3, 9, 17, 20, 40, 44], [1, 8, 8, 13, 16, 24, 44]]
MIXED = [[20, 3, 8, 8, 0, 44, 40], [0, 0, 0, 0, 0, 0, 0]]  # the second: a sequence without anchors
NONE = [[0] * 7] * 2
PACKED = [[18, 0, 5, 8, 0, 20, 20], [0, 0, 0, 0, 0, 0, 0]]
CASES = {
    "grouped heads, sizes that fill no tile": (SORTED, NONE, 4, 2, LENGTH, None),
    "packed, in no order, a row that sees nothing": (MIXED, PACKED, 4, 2, LENGTH, None),
    "a window less than a block": (SORTED, PACKED, 3, 1, LENGTH, 6),
    "no groups, sizes that fill their tiles": ([[0, 2, 9, 31], [7, 8, 20, 30]], [[0] * 4] * 2, 2, 2, 32, 3),
}

LAST = list(CASES.values())[-1]
spans = jax.jit(training_attention_tpu.spans, static_argnums=1)
visitors = jax.jit(training_attention_tpu.visitors, static_argnums=2)


@pytest.fixture(scope="module", autouse=True)
def small_tiles():
    """So that small shapes have several tiles of queries and several key blocks."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ROWS", 20), ("KEYS", 8), ("LANES", 8)):
            patch.setattr(training_attention_tpu, name, value)
        yield


def arrays(count: int, heads: int, kv_heads: int, length: int, dtype: Any = jnp.float32, batch: int = 2) -> list[Any]:
    """Queries, own keys and values, the context's, and what their attention is weighted with for a loss."""
    rng = np.random.default_rng(count)
    shapes = (SIZE, heads), (SIZE, kv_heads), (SIZE, kv_heads)
    sizes = [(batch, count, *shape, WIDTH) for shape in shapes] + [(batch, length, kv_heads, WIDTH)] * 2
    return [jnp.asarray(rng.normal(size=size), dtype) for size in (*sizes, sizes[0])]


@cache
def program(window: int | None, backend: Any, remat: bool = False) -> Any:
    """The attention and the gradients of all five arrays. Compiling is what these tests take, so cases share it."""

    def run(given: list[Any], places: Any, first: Any) -> Any:
        def loss(q: Any, own_k: Any, own_v: Any, k: Any, v: Any) -> Any:
            attend = partial(training_attention.attend_blocks, window=window, backend=backend)
            out = (jax.checkpoint(attend) if remat else attend)(q, (own_k, own_v), (k, v), places, first)
            return (out * given[5]).sum(dtype=jnp.float32), out

        gradients, out = jax.grad(loss, argnums=tuple(range(5)), has_aux=True)(*given[:5])
        return dict(zip(NAMES, (out, *gradients), strict=True))

    return jax.jit(run)


def differentiated(given: list[Any], places: Any, first: Any, window: int | None, backend: Any) -> dict[str, Any]:
    return program(window, backend)(given, places, first)


def positions(rows: Any) -> Any:
    return jnp.asarray(rows, jnp.int32)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=name, marks=[pytest.mark.slow] * (c == LAST)) for name, c in CASES.items()],
)
def test_values_and_gradients_are_those_of_the_dense_form(case):
    places, first, heads, kv_heads, length, window = case
    given = arrays(len(places[0]), heads, kv_heads, length)
    dense, ours = (differentiated(given, positions(places), positions(first), window, f) for f in ("dense", "pallas"))
    for name in NAMES:
        assert np.abs(dense[name]).max() > 0.1, name
        np.testing.assert_allclose(ours[name], dense[name], atol=1e-5, rtol=0, err_msg=name)


def test_in_bfloat16_it_is_as_near_as_rounding_allows():
    """Eight bits of weights, values and results: 2^-8 of each number at most, by the norm."""
    given = arrays(7, 4, 2, LENGTH, jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in given]
    places, first = positions(SORTED), positions(PACKED)
    exact = differentiated(wide, places, first, None, "dense")
    ours = differentiated(given, places, first, None, "pallas")
    for name in NAMES:
        assert ours[name].dtype == jnp.bfloat16
        error = np.linalg.norm(ours[name].astype(jnp.float32) - exact[name]) / np.linalg.norm(exact[name])
        assert 1e-4 < error < 2**-8, name


def test_blocks_of_the_context_that_no_tile_sees_are_not_read():
    """Poison there shows in no value and no gradient, and the gradient there is zero."""
    places = jnp.asarray([[17, 18, 20, 22, 24, 24, 23], [0, 5, 7, 3, 8, 4, 2]], jnp.int32)
    first = jnp.asarray([[8, 9, 16, 16, 10, 8, 8], [0, 5, 7, 0, 0, 0, 2]], jnp.int32)
    unseen = np.ones((2, LENGTH), bool)
    unseen[0, 8:24] = unseen[1, :8] = False
    given = arrays(7, 4, 2, LENGTH)
    poisoned = list(given)
    for i in (3, 4):
        poisoned[i] = jnp.where(unseen[:, :, None, None], jnp.nan, given[i])
    clean, found = (differentiated(x, places, first, None, "pallas") for x in (given, poisoned))
    for name in NAMES:
        np.testing.assert_array_equal(found[name], clean[name], err_msg=name)
    for name in ("k", "v"):
        assert not np.asarray(found[name])[unseen].any()
        assert np.abs(found[name]).max() > 0.1


def test_what_is_visited_is_what_is_seen():
    """By the pair of tile and key block, of tiles whose anchors are in order and not."""
    rng = np.random.default_rng(0)
    tiles, rows, keys, count = 6, 5, 8, 9
    low = rng.integers(0, keys * count, (3, tiles, rows))
    low[1].sort(axis=0)
    high = np.minimum(low + rng.integers(-9, 20, low.shape), keys * count)
    high[2, :4] = 0
    begin, end = map(np.asarray, spans(jnp.asarray(np.stack([low, high], axis=2), jnp.int32), keys))
    first, last = map(np.asarray, visitors(jnp.asarray(begin), jnp.asarray(end), count))
    place = np.arange(keys * count)
    sees = np.logical_and(low[..., None] <= place, place < high[..., None])
    sees = np.asarray(sees.reshape(3, tiles, rows, count, keys).any(axis=(2, 4)))
    for b in range(3):
        for t in range(tiles):
            seen = np.flatnonzero(sees[b, t])
            assert (begin[b, t], end[b, t]) == ((seen[0], seen[-1] + 1) if len(seen) else (0, 0))
        for block in range(count):
            seen = np.flatnonzero((begin[b] <= block) & (block < end[b]))
            assert (first[b, block], last[b, block]) == ((seen[0], seen[-1] + 1) if len(seen) else (0, 0))


def test_anchors_come_in_order_so_that_tiles_see_no_more_than_half():
    """As drawn, a tile of neighbours visits what its last anchor allows; those that are no anchors see nothing."""
    mask = jnp.ones((2, 512), bool) & (jnp.arange(512) < jnp.asarray([[512], [20]]))
    drawn, valid = map(np.asarray, jax.jit(anchors.draw_anchors, static_argnums=2)(jax.random.key(0), mask, 64))
    assert (np.diff(drawn) >= 0).all()
    assert valid.sum(axis=1).tolist() == [64, 19]
    assert not drawn[~valid].any() and sorted(drawn[1][valid[1]]) == list(range(19))

    def visited(drawn: np.ndarray) -> int:
        tiled = drawn.reshape(2, 16, 1, 4)  # four anchors a tile
        bounds = jnp.asarray(np.concatenate([np.zeros_like(tiled), tiled], axis=2), jnp.int32)
        begin, end = spans(bounds, 8)
        return int((end - begin)[0].sum())

    assert visited(drawn) < 0.56 * 16 * 64
    assert visited(np.random.default_rng(0).permutation(drawn, axis=1)) > 0.7 * 16 * 64


def test_on_a_mesh_each_device_has_its_own_rows_and_heads():
    """And what is computed again in the backward pass is the same."""
    places, first, heads, kv_heads, length, window = CASES["packed, in no order, a row that sees nothing"]
    given = arrays(7, heads, kv_heads, length)
    bounds = positions(places), positions(first)
    alone = differentiated(given, *bounds, window, "pallas")
    letters = ["B A M N H", *["B A M K H"] * 2, *["B S K H"] * 2, "B A M N H"]
    with jax.set_mesh(sharding.make_mesh(1, 2, fsdp=2)):
        placed = [sharding.shard_copy(x, names) for x, names in zip(given, letters, strict=True)]
        spread = [sharding.shard_copy(x, "B A") for x in bounds]
        run = program(window, "pallas", remat=True).lower(placed, *spread).compile()
        found = run(placed, *spread)
    for name in NAMES:
        shards = found[name].addressable_shards
        assert len(shards) == 4 and shards[0].data.size * 4 == found[name].size
        np.testing.assert_allclose(found[name], alone[name], atol=1e-6, rtol=0, err_msg=name)
    text = run.as_text() or ""
    assert "while" in text and not [word for word in ("all-gather", "all-to-all", "all-reduce") if word in text]


@pytest.mark.parametrize(("heads", "kv_heads", "length", "window"), [(32, 8, 2048, None), (16, 8, 1000, 512)])
def test_it_lowers_for_tpus_and_no_scores_exist_outside_of_it(heads, kv_heads, length, window, monkeypatch):
    for name, value in (("ROWS", 512), ("KEYS", 512), ("LANES", 128)):
        monkeypatch.setattr(training_attention_tpu, name, value)
    count, size, width = 256, 16, 128
    shapes = [(1, count, size, n, width) for n in (heads, kv_heads, kv_heads)] + [(1, length, kv_heads, width)] * 2
    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    places = jax.ShapeDtypeStruct((1, count), jnp.int32)

    def loss(q: Any, own_k: Any, own_v: Any, k: Any, v: Any, places: Any, first: Any) -> Any:
        out = training_attention_tpu.attend_blocks_tpu(
            q, (own_k, own_v), (k, v), places, first, window, interpret=False
        )
        return out.astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, argnums=tuple(range(5)))).trace(*given, places, places)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 3
    sizes = [math.prod(map(int, shape[:-1].split("x"))) for shape in re.findall(r"tensor<((?:\d+x)+)\w+>", text)]
    assert max(sizes) < count * size * length * 3, "q's own size is 2 to 4 scores of one head"
    assert max(sizes) >= count * size * heads * width


def test_what_cannot_run_on_a_device_is_refused():
    assert [training_attention.resolve_block_backend("auto", CONFIG, n) for n in (32, 33)] == [
        "dense",
        "chunked",
    ]
    with pytest.raises(DominoError, match=r"Pallas kernel needs a TPU, found cpu: .* auto or chunked"):
        training_attention.check_block_backend("pallas", CONFIG, jnp.bfloat16, jax.devices()[0])

    class Tpu:
        platform, device_kind = "tpu", "TPU v5 lite"

    training_attention.check_block_backend("pallas", CONFIG, jnp.bfloat16, Tpu)
    with pytest.raises(DominoError, match=r"needs an NVIDIA GPU, found TPU v5 lite"):
        training_attention.check_block_backend("cudnn", CONFIG, jnp.bfloat16, Tpu)
    assert training_attention.resolve_block_backend("auto", CONFIG, 256) == "chunked", "nobody has measured the kernel"


def test_compiled_on_a_device(monkeypatch):
    """On a TPU, at sizes and in the type that training has there."""
    try:
        training_attention.check_block_backend("pallas", CONFIG, jnp.bfloat16, jax.devices()[0])
    except DominoError as error:
        pytest.skip(str(error))
    for name, value in (("ROWS", 512), ("KEYS", 512), ("LANES", 128)):
        monkeypatch.setattr(training_attention_tpu, name, value)
    monkeypatch.setitem(globals(), "SIZE", 16)
    monkeypatch.setitem(globals(), "WIDTH", 128)
    rng = np.random.default_rng(0)
    places = positions(np.sort(rng.integers(0, 1000, (2, 60)), axis=1))
    for window in (None, 300):
        given = arrays(60, 8, 2, 1000, jnp.bfloat16)
        first = jnp.zeros_like(places)
        exact = differentiated([x.astype(jnp.float32) for x in given], places, first, window, "dense")
        ours = differentiated(given, places, first, window, "pallas")
        for name in NAMES:
            error = np.linalg.norm(ours[name].astype(jnp.float32) - exact[name]) / np.linalg.norm(exact[name])
            assert error < 0.01, name
