"""The target against transformers' Qwen3 and against itself: shapes, padding, chunks, caches."""

import dataclasses
from typing import Any

import factory
import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
import reference
import torch

from convert import hf
from domino_jax import cache as kv
from domino_jax import decode, target
from domino_jax.config import TargetConfig
from domino_jax.decode import DecodeConfig
from domino_jax.weights import Params

TOLERANCE = 1e-4
CLOSE = 2e-5  # between two orders of the same float32 sums

forward = jax.jit(target.forward, static_argnums=(1, 5))
logits = jax.jit(target.logits, static_argnums=1)

SHAPES = {
    "grouped": {},
    "G=1": {"num_key_value_heads": 4},
    "G=N": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide heads, one layer": {"head_dim": 16, "num_hidden_layers": 1, "rope_theta": 1e6},
    "narrow heads, five layers": {"head_dim": 2, "num_hidden_layers": 5, "intermediate_size": 9},
}


def ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, factory.TARGET.vocab_size, (rows, length)).astype(np.int32)


def hf_outputs(model: Any, tokens: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """transformers' logits and hidden_states."""
    with torch.no_grad():
        out = model(torch.from_numpy(tokens).long(), output_hidden_states=True)
    return out.logits.numpy(), [h.numpy() for h in out.hidden_states]


@pytest.fixture(scope="module")
def model() -> tuple[TargetConfig, Any]:
    return factory.TARGET, factory.random_weights(factory.TARGET, 3)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_logits_and_features_are_transformers(changes):
    config = dataclasses.replace(factory.TARGET, **changes)
    params = factory.random_weights(config, 1)
    tokens = ids(2, 13)
    theirs, states = hf_outputs(factory.torch_model(params, config), tokens)
    target_layer_ids = tuple(reversed(range(config.num_hidden_layers)))  # every layer, the last one first
    hidden, features, _ = forward(params, config, tokens, None, None, target_layer_ids)
    ours, features = jax.device_get((logits(params, config, hidden), features))
    assert ours.dtype == np.float32
    assert theirs.std() > 0.3, "flat logits would agree with anything"
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)
    # hidden_states[i + 1] for layer i; the last of them is after the final norm, and ours follows.
    np.testing.assert_allclose(
        features, np.concatenate([states[i + 1] for i in target_layer_ids], -1), atol=TOLERANCE, rtol=0
    )
    np.testing.assert_array_equal(features[..., : config.hidden_size], hidden)
    # And the NumPy restatement, which knows nothing of either.
    again, _ = reference.target_forward(factory.hf_weights(params, config), config.to_hf(), tokens[0], [])
    np.testing.assert_allclose(ours[0], again, atol=TOLERANCE, rtol=0)


def test_both_config_spellings_are_read():
    from transformers import Qwen3Config

    config = dataclasses.replace(factory.TARGET, rope_theta=12345.0)
    public = config.to_hf() | {"torch_dtype": "bfloat16"}
    assert "rope_theta" in public and "rope_parameters" not in public
    hf_config: Any = Qwen3Config.from_dict(dict(public))
    modern = hf_config.to_dict()
    assert "rope_theta" not in modern, "this test is about the spelling of transformers 5"
    assert modern["rope_parameters"]["rope_theta"] == 12345.0
    assert hf.parse_config(public) == hf.parse_config(modern) == config


def test_rows_of_different_lengths_do_not_feel_their_padding(model):
    config, params = model
    lengths = [1, 4, 9, 13]
    named = factory.hf_weights(params, config)
    tokens = ids(4, 13)
    batch = jax.device_get(forward(params, config, tokens)[0])
    other = tokens.copy()
    for row, length in enumerate(lengths):
        other[row, length:] = 5
    padded, _, _ = forward(params, config, other)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(np.asarray(padded)[row, :length], batch[row, :length])
        alone, _ = reference.target_forward(named, config.to_hf(), tokens[row, :length], [])
        np.testing.assert_allclose(
            np.asarray(logits(params, config, padded))[row, :length], alone, atol=TOLERANCE, rtol=0
        )


@pytest.mark.parametrize("pieces", [[13], [4, 9], [5, 5, 3], [1] * 13], ids=str)
def test_chunks_through_the_cache_are_one_piece(model, pieces):
    config, params = model
    tokens, target_layer_ids = ids(2, 13), (0, 2)
    whole, whole_features, _ = forward(params, config, tokens, None, None, target_layer_ids)
    cache, at, hidden, features = kv.init_cache(config, 2, 16, jnp.float32), 0, [], []
    for size in pieces:
        start = np.full(2, at, np.int32)
        h, f, cache = forward(params, config, tokens[:, at : at + size], start, cache, target_layer_ids)
        hidden.append(h)
        features.append(f)
        at += size
    np.testing.assert_allclose(np.concatenate(hidden, 1), whole, atol=CLOSE, rtol=0)
    np.testing.assert_allclose(np.concatenate(features, 1), whole_features, atol=CLOSE, rtol=0)


def test_rows_step_from_positions_of_their_own_and_overwrite_what_was_rejected(model):
    config, params = model
    tokens = ids(3, 12)
    lengths = np.array([2, 7, 11], np.int32)
    whole, _, _ = forward(params, config, tokens)
    cache = kv.init_cache(config, 3, 16, jnp.float32)
    # Fill all rows to the end, as a rejected block does: positions from lengths[b] on are stale.
    _, _, cache = forward(params, config, ids(3, 12, seed=9), np.zeros(3, np.int32), cache)
    _, _, cache = forward(params, config, tokens, np.zeros(3, np.int32), cache)
    stale = ids(3, 4, seed=8)
    _, _, cache = forward(params, config, stale, lengths, cache)
    step = tokens[np.arange(3), lengths][:, None]
    hidden, _, _ = forward(params, config, step, lengths, cache)
    np.testing.assert_allclose(np.asarray(hidden)[:, 0], np.asarray(whole)[np.arange(3), lengths], atol=CLOSE, rtol=0)


def test_prefill_in_small_chunks_is_prefill_in_one(monkeypatch):
    """`decode.prefill_batch` over prompts of 1 to 40 tokens: both caches, the first token, against the forward pass."""
    pair = factory.Pair.make()
    named = pair.reference()[:2]
    prompts = [ids(1, n, seed=n)[0].tolist() for n in (1, 16, 17, 40)]
    one = loops.begin(pair.params, pair.configs, prompts, 9)
    monkeypatch.setattr(decode, "LARGEST_CHUNK", 8)
    many = loops.begin(pair.params, pair.configs, prompts, 9)
    assert one.length.tolist() == many.length.tolist() == [1, 16, 17, 40]
    assert one.emitted.tolist() == [1] * 4 and not one.done.any()
    for row, prompt in enumerate(prompts):
        expected, _ = reference.target_forward(*named, prompt, [])
        assert int(one.token[row]) == int(many.token[row]) == int(expected[-1].argmax())
        valid = slice(0, len(prompt))
        for name, a, b in (("target", one.cache, many.cache), ("drafter", one.drafter, many.drafter)):
            assert a is not None and b is not None
            for x, y in zip(jax.device_get(jax.tree.leaves(a)), jax.device_get(jax.tree.leaves(b)), strict=True):
                np.testing.assert_allclose(x[row, :, valid], y[row, :, valid], atol=CLOSE, rtol=0, err_msg=name)
                assert np.abs(x[row, :, valid]).min() > 0, "a position was never written"


def test_a_prompt_may_end_anywhere_in_a_chunk(monkeypatch):
    """The first token of each length 1 ... 17, in chunks of 8, against the row alone in one piece."""
    pair = factory.Pair.make()
    configs, params = DecodeConfig(pair.configs.target), Params(pair.params.target)
    row = ids(1, 17)[0]
    prompts = [row[:n].tolist() for n in range(1, 18)]
    hidden, _, _ = forward(params.target, configs.target, row[None])
    expected = np.argmax(logits(params.target, configs.target, hidden), axis=-1)[0]
    assert len(set(expected.tolist())) > 5
    monkeypatch.setattr(decode, "LARGEST_CHUNK", 8)
    monkeypatch.setattr(decode, "SMALLEST_CHUNK", 8)
    assert loops.begin(params, configs, prompts, 1).token.tolist() == expected.tolist()


def test_buckets_are_powers_of_two():
    sizes = {1: 128, 127: 128, 128: 128, 129: 256, 256: 256, 257: 512, 40960: 65536}
    assert {n: kv.length_bucket(n) for n in sizes} == sizes


def test_growing_keeps_what_was_there(model):
    config, params = model
    tokens = ids(2, 12)
    _, _, small = forward(params, config, tokens, np.zeros(2, np.int32), kv.init_cache(config, 2, 16, jnp.float32))
    large = jax.tree.map(lambda buffer: kv.resize(buffer, 48), small)
    assert (small.capacity, large.capacity) == (16, 48)
    for a, b in zip(jax.device_get(jax.tree.leaves(small)), jax.device_get(jax.tree.leaves(large)), strict=True):
        np.testing.assert_array_equal(a, b[:, :, :16])
        assert not b[:, :, 16:].any()
    start, step = np.full(2, 12, np.int32), ids(2, 1, seed=4)
    ours, _, _ = forward(params, config, step, start, small)
    grown, _, _ = forward(params, config, step, start, large)
    np.testing.assert_allclose(ours, grown, atol=CLOSE, rtol=0)


def test_append_writes_one_layer_at_each_rows_own_start():
    config = dataclasses.replace(factory.TARGET, num_hidden_layers=2)
    rng = np.random.default_rng(0)
    cache = kv.init_cache(config, 2, 16, jnp.float32)
    new = jnp.asarray(rng.normal(size=(2, 3, config.num_key_value_heads, config.head_dim)), jnp.float32)
    starts = [1, 13]
    written = jax.device_get(cache.append(1, new, -new, jnp.asarray(starts, jnp.int32)))
    assert not written.k[0].any() and not written.v[0].any()
    for row, start in enumerate(starts):
        expected = np.zeros(cache.k[1].shape[1:], np.float32)
        expected[:, start : start + 3] = np.asarray(new[row]).swapaxes(0, 1)
        np.testing.assert_array_equal(written.k[1][row], expected)
        np.testing.assert_array_equal(written.v[1][row], -expected)
    single = kv.init_cache(config, 1, 16, jnp.float32).append(1, new[1:], -new[1:], jnp.asarray(starts[1:], jnp.int32))
    np.testing.assert_array_equal(np.asarray(single.k[1])[0], written.k[1][1])  # the B = 1 shortcut
