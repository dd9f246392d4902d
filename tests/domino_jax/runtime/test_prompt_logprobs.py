"""Log-probabilities of a prompt's own tokens, in chunks and on a mesh, against the whole prompt at once."""

from collections.abc import Generator
from dataclasses import replace
from typing import Any

import factory
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factory import BYTE_TARGET, Pair

from domino_jax import decode, sharding, target
from domino_jax.runtime import prompt_logprobs as module
from domino_jax.runtime.prompt_logprobs import prompt_logprobs
from domino_jax.runtime.slots import TokenLogprobs
from domino_jax.weights import Params

pytestmark = pytest.mark.usefixtures("quick_compilation")
FLOAT32 = jnp.dtype("float32")


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair.make(target=replace(BYTE_TARGET, max_position_embeddings=1024))


def finished(steps: Generator[None, None, Any]) -> tuple[list[Any], int]:
    """What it gives, and how often something else could run."""
    pauses = 0
    while True:
        try:
            next(steps)
            pauses += 1
        except StopIteration as end:
            return end.value, pauses


def check(pair: Pair, ids: list[int], told: list[TokenLogprobs | None], most: int) -> None:
    hidden, _, _ = target.forward(pair.params.target, pair.configs.target, jnp.array([ids]))
    whole = jax.nn.log_softmax(target.logits(pair.params.target, pair.configs.target, hidden))[0]
    assert told[0] is None and len(told) == len(ids)
    for place, one in enumerate(told[1:], 1):
        assert one is not None and len(one.likeliest) == most
        row = np.asarray(whole[place - 1])
        assert one.chosen == pytest.approx(float(row[ids[place]]), abs=1e-4)
        values = [value for _, value in one.likeliest]
        assert values == sorted(values, reverse=True) == pytest.approx(sorted(row.tolist())[: -most - 1 : -1], abs=1e-4)
        assert [row[i] for i, _ in one.likeliest] == pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize(
    ("length", "chunk", "pauses", "most"), [(1, 512, 0, 3), (40, 16, 2, 0), (64, 16, 3, 3), (150, 64, 2, 20)]
)
def test_the_whole_prompt_at_once_says_the_same(pair, monkeypatch, length, chunk, pauses, most):
    monkeypatch.setattr(decode, "LARGEST_CHUNK", chunk)
    monkeypatch.setattr(module, "UNEMBEDDED", 8)
    ids = np.random.default_rng(length).integers(0, 260, length).tolist()
    told, paused = finished(prompt_logprobs(pair.params, pair.configs, ids, FLOAT32, most))
    check(pair, ids, told, most)
    assert paused == pauses


def test_on_a_mesh(pair):
    mesh, ids = sharding.make_mesh(2, 2), np.random.default_rng(0).integers(0, 260, 70).tolist()
    config = pair.configs.target
    params = Params(factory.place(pair.params.target, config, mesh), None)
    configs = replace(pair.configs.without_drafter, target=sharding.fit_to_mesh(config, 2))
    with jax.set_mesh(mesh):
        told, _ = finished(prompt_logprobs(params, configs, ids, FLOAT32, 2))
    check(pair, ids, told, 2)
