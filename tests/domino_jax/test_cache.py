"""Contiguous caches: what is written where, on every kind of device and mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax import cache as kv
from domino_jax import sharding


def arrays(rows: int, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A buffer [B, K, S, H], new values [B, T, K, H] and starts [B], one of them at the end."""
    rng = np.random.default_rng(rows)
    buffer, new = rng.normal(size=(rows, 2, 32, 4)), rng.normal(size=(rows, tokens, 2, 4))
    return buffer, new, np.concatenate([rng.integers(0, 32 - tokens, rows - 1), [32 - max(tokens, 2)]])


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (1, 5), (3, 1), (8, 5), (kv.FEW_ROWS + 4, 3)])
@pytest.mark.parametrize("sizes", [None, (1, 2), (4, 2)], ids=str)
def test_every_row_is_written_from_its_own_start(rows, tokens, sizes):
    """As this device does it and as a TPU does; a single position may come with a copy behind it."""
    if sizes and rows % sizes[0]:
        rows = sizes[0] * rows
    buffer, new, start = arrays(rows, tokens)
    given = jnp.asarray(buffer, jnp.float32), jnp.asarray(new, jnp.float32), jnp.asarray(start, jnp.int32)
    expected = np.array(given[0])
    for row, (values, at) in enumerate(zip(np.asarray(given[1]).swapaxes(1, 2), start, strict=True)):
        expected[row, :, at : at + tokens] = values

    def on_tpu(buffer: Any, new: Any, start: Any) -> Any:
        return kv._write_on_tpu(buffer, new.swapaxes(1, 2), start)

    with sharding.mesh_context(sharding.make_mesh(*sizes) if sizes else None):
        if sizes:
            letters = ("B K S H", "B - K H", "B")
            given = tuple(sharding.shard_copy(x, names) for x, names in zip(given, letters, strict=True))
        for write in (kv.write, on_tpu):
            written = np.asarray(jax.jit(write)(*given))
            changed = written != expected
            assert not changed.any() or (write is kv.write and rows == tokens == 1 and changed[:, :, start + 1].all())
            if changed.any():
                np.testing.assert_array_equal(written[:, :, start + 1], written[:, :, start])


@pytest.mark.parametrize(("rows", "loops"), [(1, 0), (8, 0), (kv.FEW_ROWS + 1, 1)])
def test_a_tpus_program_writes_rows_one_by_one_and_scatters_none(rows, loops):
    given = (jnp.asarray(x, jnp.float32) for x in arrays(rows, 3))
    buffer, new, start = given
    traced = jax.jit(kv.write).trace(buffer, new, start.astype(jnp.int32))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "scatter" not in text and text.count("stablehlo.while") == loops
    assert text.count("stablehlo.dynamic_update_slice") == (1 if loops else rows)
    plain = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert ("scatter" in plain) == (rows > 1)
