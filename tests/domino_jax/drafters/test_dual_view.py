"""Orthrus's second view: its one pass over a block against the NumPy reference, and what it leaves behind."""

import dataclasses
from functools import partial
from math import prod
from typing import Any

import factory
import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
import reference

from domino_jax import cache as kv
from domino_jax import target
from domino_jax.config import TargetConfig
from domino_jax.decode import DecodeConfig
from domino_jax.drafters import dual_view
from domino_jax.drafters.base import View
from domino_jax.drafters.dual_view import DualViewConfig, DualViewDrafter
from domino_jax.errors import DominoError
from domino_jax.sampling import settings
from domino_jax.weights import Params, flatten, weight_shapes

TARGET = dataclasses.replace(factory.TARGET, num_hidden_layers=2)
VIEW = DualViewConfig(**TARGET.geometry(), block_size=5, mask_token_id=88)
LENGTHS = [0, 1, 5, 12]
TEXT = np.random.default_rng(3).integers(0, 88, (4, 13)).astype(np.int32)


@pytest.fixture(scope="module")
def params() -> Params:
    return Params(factory.random_weights(TARGET, 1), factory.random_weights(VIEW, 2))


@partial(jax.jit, static_argnames=("capacity", "drafter"))
def drafted(params: Params, length: Any, capacity: int = 20, drafter: Any = None, keys: Any = None) -> Any:
    """Base logits of each row's block after some of TEXT, which the cache holds all of; what is proposed; the cache."""
    text, rows = jnp.asarray(TEXT), len(TEXT)
    cache = kv.init_cache(TARGET, rows, capacity, jnp.float32)
    _, _, cache = target.forward(params.target, TARGET, text, jnp.zeros(rows, jnp.int32), cache)
    assert cache is not None
    token = jnp.take_along_axis(text, length[:, None], axis=1)[:, 0]
    chosen = settings(rows, temperature=0.0 if keys is None else 1.0)
    view = View(params.target, TARGET, None, "xla", cache, token, length, chosen)
    z, after = dual_view.view_block(params.draft, VIEW, view)
    logits = target.logits(params.target, TARGET, z)
    made = [] if drafter is None else drafter.propose(params.draft, (), view, 3, keys)[0]
    return logits, made, (cache, after)


def test_a_block_is_the_references(params):
    logits, made, (before, after) = drafted(params, jnp.array(LENGTHS), drafter=DualViewDrafter(VIEW))
    weights, view = factory.hf_weights(params.target, TARGET), factory.hf_weights(params.draft, VIEW)
    for row, a in enumerate(LENGTHS):
        expected = reference.dual_view_block(weights, TARGET.to_hf(), view, 88, 5, TEXT[row].tolist(), a)
        np.testing.assert_allclose(logits[row], expected, atol=1e-4)
        np.testing.assert_array_equal(made.tokens[row], expected[:3].argmax(axis=-1))
        for was, now in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(was[row, :, :a], now[row, :, :a], "the text's keys and values stay")
            np.testing.assert_array_equal(was[row, :, a + 5 :], now[row, :, a + 5 :])
    assert made.probs is None


@pytest.mark.slow
def test_what_is_drawn_is_drawn_from_what_it_says(params):
    keys = jax.random.split(jax.random.key(5), (4, 3))
    for drawn, certain in ((True, [False, False, False]), (False, [False, True, True])):
        _, made, _ = drafted(params, jnp.array(LENGTHS), drafter=DualViewDrafter(VIEW, drawn=drawn), keys=keys)
        assert [bool((made.probs[:, j].max(axis=-1) == 1).all()) for j in range(3)] == certain
        assert (np.take_along_axis(np.asarray(made.probs), np.asarray(made.tokens)[..., None], axis=2) > 0).all()


@pytest.mark.slow
def test_fewer_drafts_than_a_block_has(params):
    """They are the first ones of the whole block."""
    prompts = [[1, 2, 3], [40, 7] * 4, [11]]
    plain = DecodeConfig(TARGET)
    expected = loops.autoregress(params.without_drafter, plain, loops.begin(params.without_drafter, plain, prompts, 9))
    configs = DecodeConfig(TARGET, DualViewDrafter(VIEW), drafts=2)
    assert configs.lookahead == VIEW.block_size
    outputs = loops.speculate(params, configs, loops.begin(params, configs, prompts, 9))
    assert [o.tokens for o in outputs] == [o.tokens for o in expected]


@pytest.mark.parametrize(
    ("target", "count", "tensors"),
    [((2048, 28, 16), 352_328_704, 478), ((2560, 36, 32), 943_727_616, 614), ((4096, 36, 32), 1_509_958_656, 615)],
)
def test_published_second_views_have_their_numbers_of_parameters(target, count, tensors):
    width, layers, heads = target
    sizes: dict[str, Any] = {"num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 4}
    sizes |= {"vocab_size": 151936, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    model = TargetConfig(
        **sizes,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=40960,
        tie_word_embeddings=tensors != 615,
    )
    view = DualViewConfig(**model.geometry(), block_size=32, mask_token_id=151669)
    assert sum(prod(leaf.shape) for leaf in flatten(weight_shapes(view)).values()) == count
    names = [name for config in (model, view) for entry in factory.entries(config) for name in entry.hf_names]
    assert len(set(names)) == len(names) == tensors


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: dataclasses.replace(VIEW, block_size=1), "must be at least 2"),
        (lambda: dataclasses.replace(VIEW, mask_token_id=89), "outside the vocabulary of 89"),
        (lambda: dataclasses.replace(VIEW, attention_bias=True), "no biases"),
        (lambda: VIEW.check_target(dataclasses.replace(TARGET, num_hidden_layers=3)), "num_hidden_layers is 2, not 3"),
        (lambda: VIEW.check_target(dataclasses.replace(TARGET, head_dim=8)), "head_dim is 6, not 8"),
        (lambda: VIEW.check_target(dataclasses.replace(TARGET, hidden_size=48)), "hidden_size is 32"),
        (lambda: VIEW.check_target(dataclasses.replace(TARGET, qk_norm=False)), "this target is a llama"),
    ],
)
def test_views_that_make_no_sense(build, said):
    with pytest.raises(DominoError, match=said):
        build()
