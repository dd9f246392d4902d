"""Which mesh a model needs, by the memory of pretended devices."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from convert.shapes import SHAPES
from domino_jax.runtime.memory import default_mesh_sizes

QWEN3_8B = [SHAPES["qwen3-8b"].target, SHAPES["qwen3-8b"].draft]  # 16.4 GB and 2.1 GB of weights in bfloat16
GIB = 2**30


@pytest.fixture
def pretend(monkeypatch):
    """`count` devices of one kind, each with so many bytes of memory (None: it doesn't say), of so many processes."""

    def pretend(count: int, limit: int | None, platform: str = "gpu", processes: int = 1) -> list[Any]:
        stats = None if limit is None else {"bytes_limit": limit}
        device: Any = SimpleNamespace(platform=platform, device_kind=platform, memory_stats=lambda: stats)
        monkeypatch.setattr(jax, "process_count", lambda: processes)
        return [device] * count

    return pretend


@pytest.mark.parametrize(
    ("count", "limit", "sizes"),
    [
        (8, 80 * GIB, (1, 1)),
        (1, 16 * GIB, (1, 1)),  # there is no other choice
        (8, 16 * GIB, (1, 8)),
        (3, 16 * GIB, (1, 2)),  # 32 heads can't be divided over 3
        (8, None, (1, 1)),
    ],
)
def test_a_mesh_is_for_what_one_device_can_not_hold(pretend, count, limit, sizes):
    devices = pretend(count, limit)
    assert default_mesh_sizes(QWEN3_8B, jnp.bfloat16, devices) == sizes


def test_memory_is_counted_in_the_dtype_and_with_a_cache(pretend):
    devices = pretend(4, 24 * GIB)
    assert default_mesh_sizes(QWEN3_8B, jnp.bfloat16, devices) == (1, 1)
    assert default_mesh_sizes(QWEN3_8B, jnp.float32, devices) == (1, 4)


def test_a_cpu_is_one_device_and_several_processes_share_a_mesh(pretend):
    devices = pretend(8, 1, platform="cpu")
    assert default_mesh_sizes(QWEN3_8B, jnp.float32, devices) == (1, 1)
    devices = pretend(8, 80 * GIB, processes=2)
    assert default_mesh_sizes(QWEN3_8B, jnp.bfloat16, devices) == (1, 8)
    devices = pretend(2, None, platform="cpu", processes=2)
    assert default_mesh_sizes(QWEN3_8B, jnp.float32, devices) == (1, 2)
