"""Penalties, biases, a minimum of tokens and log-probabilities, against a plain restatement run token by token."""

from dataclasses import replace
from typing import Any

import factory
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factory import BYTE_TARGET, Pair

from domino_jax import decode, sharding, target
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.ngram import NgramDrafter
from domino_jax.drafters.tree import TreeDrafter
from domino_jax.errors import DominoError
from domino_jax.processors import WORD, new_processors, process_logits
from domino_jax.runtime.slots import Completion, FixedDrafts, Request, Slots
from domino_jax.sampling import SamplingParams
from domino_jax.weights import Params

pytestmark = pytest.mark.usefixtures("quick_compilation")
FLOAT32 = jnp.dtype("float32")
PROMPTS = [[70, 30, 9, 120, 8, 70], [17] * 20, [5, 6, 7]]
STOPS = (9, 31)
COUNT = 30


@pytest.fixture(scope="module")
def pair() -> Pair:
    """A drafter that is often right."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return factory.good_pair(replace(BYTE_TARGET, tie_word_embeddings=False), 3, num_hidden_layers=1, **heads)


@pytest.fixture(scope="module")
def logits_of(pair):
    """The target's logits after some ids, from the whole text each time."""
    width = 64

    @jax.jit
    def run(ids: jax.Array, last: jax.Array) -> jax.Array:
        hidden, _, _ = target.forward(pair.params.target, pair.configs.target, ids[None])
        return target.logits(pair.params.target, pair.configs.target, hidden)[0, last]

    def logits(ids: list[int]) -> np.ndarray:
        padded = np.zeros(width, np.int32)
        padded[: len(ids)] = ids
        return np.asarray(run(padded, len(ids) - 1), np.float64)

    return logits


def processed(logits: np.ndarray, prompt: list[int], output: list[int], p: SamplingParams) -> np.ndarray:
    """vLLM's order: repetition, then frequency and presence; then the bias and the minimum."""
    logits = logits.copy()
    for token in {*prompt, *output}:
        logits[token] = (
            logits[token] / p.repetition_penalty if logits[token] > 0 else logits[token] * p.repetition_penalty
        )
    for token in set(output):
        logits[token] -= p.presence_penalty + p.frequency_penalty * output.count(token)
    for token, bias in p.logit_bias:
        logits[token] += bias
    if len(output) < p.min_tokens:
        logits[list(p.stop_token_ids)] = -np.inf
    return logits


def stepwise(logits_of: Any, prompt: list[int], p: SamplingParams) -> tuple[list[int], list[np.ndarray]]:
    """Greedy tokens one by one, and the target's own log-probabilities before each."""
    output, found = [], []
    while len(output) < p.max_tokens and not (output and output[-1] in p.stop_token_ids):
        logits = logits_of([*prompt, *output])
        found.append(logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
        output.append(int(processed(logits, prompt, output, p).argmax()))
    return output, found


SETTINGS = {
    "repetition": {"repetition_penalty": 1.3},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "all three": {"repetition_penalty": 0.8, "presence_penalty": -0.4, "frequency_penalty": 0.9},
    "bias": {"logit_bias": ((12, 3.0), (70, -100.0), (200, 2.5))},
    "minimum": {"min_tokens": 9, "stop_token_ids": STOPS, "logit_bias": ((9, 8.0), (31, 7.0))},
    "nothing": {},
}
MIX = [SamplingParams(max_tokens=COUNT, **how) for how in SETTINGS.values()]


def run(pair: Pair, kinds: list[SamplingParams], size: int = 3, policy: Any = None) -> list[Completion]:
    found = [Completion(Request(PROMPTS[i % 3], how, (i,))) for i, how in enumerate(kinds)]
    list(Slots(pair.params, pair.configs, size, FLOAT32, processors=True, policy=policy).run(found))
    return found


@pytest.mark.e2e
@pytest.mark.parametrize("drafts", [0, 1, 5])
def test_greedy_answers_are_those_of_the_restatement(pair, logits_of, drafts):
    """All settings in one batch, with drafts and without; a penalty sees the drafts before it in its block."""
    found = run(pair, MIX, policy=FixedDrafts(drafts))
    for c in found:
        assert c.tokens == stepwise(logits_of, list(c.request.prompt), c.request.params)[0], c.request.params
    assert any(a > 1 for c in found for a in c.accepted) == (drafts > 1)
    assert found[5].tokens[-1] in STOPS and len(found[5].tokens) == 10, "the bias makes it stop as soon as it may"
    plain = run(pair, [replace(MIX[-1]) for _ in MIX])
    assert sum(c.tokens != other.tokens for c, other in zip(found, plain, strict=True)) >= 5


def test_with_the_n_gram_drafter(pair, logits_of):
    """Whose drafts are what a penalty is against."""
    ours = Pair(pair.params.without_drafter, decode.DecodeConfig(pair.configs.target, NgramDrafter(5, 3, 1)))
    for c in run(ours, MIX):
        assert c.tokens == stepwise(logits_of, list(c.request.prompt), c.request.params)[0], c.request.params


def tree_of(pair: Pair, **how: Any) -> Pair:
    assert pair.configs.draft is not None
    return pair._replace(configs=replace(pair.configs, drafter=TreeDrafter(pair.configs.draft, **how)))


@pytest.mark.e2e
def test_with_a_tree(pair, logits_of):
    """A penalty sees the drafts before it on its own path."""
    found = run(tree_of(pair, nodes=9), MIX)
    for c in found:
        assert c.tokens == stepwise(logits_of, list(c.request.prompt), c.request.params)[0], c.request.params
    assert any(a > 1 for c in found for a in c.accepted)


@pytest.mark.e2e
def test_sampled_answers_do_not_depend_on_drafts_or_neighbours(pair):
    kinds = [replace(how, temperature=0.9, top_p=0.95, seed=i) for i, how in enumerate(MIX)]
    expected = [run(pair, [how] * (i + 1), 1, FixedDrafts(0))[i].tokens for i, how in enumerate(kinds)]
    assert [c.tokens for c in run(pair, kinds)] == expected
    assert [c.tokens for c in run(tree_of(pair, nodes=6), kinds)] == expected


@pytest.mark.parametrize("nodes", [None, pytest.param(8, marks=pytest.mark.e2e)])
def test_logprobs_are_the_targets_own_before_anything_is_done_to_them(pair, logits_of, nodes):
    kinds = [
        SamplingParams(max_tokens=12, logprobs=3),
        SamplingParams(1.2, max_tokens=12, logprobs=0, top_k=9, frequency_penalty=0.5),
        SamplingParams(max_tokens=12),
        SamplingParams(max_tokens=12, logprobs=20, presence_penalty=2.0),
    ]
    for c in run(tree_of(pair, nodes=nodes) if nodes else pair, kinds):
        most = c.request.params.logprobs
        assert len(c.logprobs) == (0 if most is None else len(c.tokens))
        ids = list(c.request.prompt)
        for token, told in zip(c.tokens, c.logprobs, strict=False):
            logits = logits_of(ids)
            exact = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            assert told.chosen == pytest.approx(exact[token], abs=1e-4)
            assert [value for _, value in told.likeliest] == pytest.approx(np.sort(exact)[::-1][:most], abs=1e-4)
            assert [exact[i] for i, _ in told.likeliest] == pytest.approx(np.sort(exact)[::-1][:most], abs=1e-4)
            ids.append(token)


@pytest.mark.e2e
def test_on_a_mesh(pair):
    made = sharding.make_mesh(2, 2)
    config, draft = pair.configs.target, pair.configs.draft
    assert draft is not None
    drafter = BlockDrafter(sharding.fit_to_mesh(draft, 2))
    configs = replace(pair.configs, target=sharding.fit_to_mesh(config, 2), drafter=drafter)
    params = Params(factory.place(pair.params.target, config, made), factory.place(pair.params.draft, draft, made))
    kinds = [replace(how, logprobs=2) for how in MIX]
    expected = run(pair, kinds)
    with jax.set_mesh(made):
        found = run(Pair(params, configs), kinds)
    assert [c.tokens for c in found] == [c.tokens for c in expected]
    told, others = ([x.chosen for c in of for x in c.logprobs] for of in (found, expected))
    np.testing.assert_allclose(told, others, atol=1e-4)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"logit_bias": ((260, 1.0),)}, "logit_bias has token 260, outside the vocabulary of 260"),
        ({"logit_bias": tuple((i, 1.0) for i in range(257))}, "logit_bias has 257 tokens, of which 256 can be had"),
        ({"logprobs": 21}, "logprobs of 0 to 20 likeliest tokens can be had, and 21 are asked for"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9, more than the 8"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty must be at least 0.001, found 4.94066e-324"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be at least 0.001"),
        ({"repetition_penalty": -1.0}, "repetition_penalty must be at least 0.001, found -1"),
        ({"min_tokens": 2, "stop_token_ids": tuple(range(9))}, "min_tokens goes with 8 stop_token_ids at most"),
    ],
)
def test_what_can_not_be_had_is_refused(pair, how, said):
    with pytest.raises(DominoError, match=said):
        run(pair, [SamplingParams(**{"max_tokens": COUNT} | how)])


def test_who_does_not_expect_them_is_told(pair):
    batch = Slots(pair.params, pair.configs, 1, FLOAT32)
    with pytest.raises(DominoError, match="processors=True"):
        batch.admit(Completion(Request([5], SamplingParams(presence_penalty=1.0))))


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [((9,), {9}), ((9, 31), {9, 31}), ((9, 40), {40}), ((40, 41), {40, 41}), (None, set(range(260)) - set(STOPS))],
)
def test_a_guide_that_allows_nothing_but_the_end_is_not_held_by_the_minimum(allowed, expected):
    """A grammar may be at its end before so many tokens: then no token could come at all."""
    bits = np.zeros(-(-260 // WORD), np.uint32)
    for token in allowed or ():
        bits[token // WORD] |= np.uint32(1 << token % WORD)
    mask = bits.view(np.int32) if allowed else None
    given = new_processors([SamplingParams(min_tokens=9)], [[5]], 260, [mask])
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 260)), jnp.float32)
    stop, none = jnp.asarray([[*STOPS, -1]], jnp.int32), jnp.zeros((1, 0), jnp.int32)
    for emitted, there in ((3, expected), (9, set(allowed or range(260)))):
        found = process_logits(logits, none, jnp.asarray([emitted], jnp.int32), stop, given)
        assert set(np.flatnonzero(np.isfinite(found[0, 0])).tolist()) == there
