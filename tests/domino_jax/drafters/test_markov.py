"""DSpark's head against its restatement in NumPy: chains, trees, samples, candidates, training; and causal blocks."""

import dataclasses
from typing import Any, get_args

import factory
import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
import reference
import trees as restated
from factory import Pair

from domino_jax.config import DraftConfig, MarkovHeadType
from domino_jax.drafters.base import View
from domino_jax.drafters.heads.choosing import likeliest
from domino_jax.drafters.heads.markov import MarkovHead
from domino_jax.drafters.tree import TreeDrafter, best_first
from domino_jax.errors import DominoError
from domino_jax.sampling import sample
from domino_jax.weights import weight_shapes

KINDS = get_args(MarkovHeadType)
ROWS, PLACES = 3, 4


def config_of(kind: MarkovHeadType, **changes: Any) -> DraftConfig:
    return factory.draft_config(head=MarkovHead(7, kind, enable_confidence_head=True), **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_its_restatement(kind):
    """Greedy and sampled chains, of all tokens and of few, trees, and what training computes of the same tokens."""
    config = config_of(kind)
    head, weights = config.head, factory.random_weights(config, 3)
    assert isinstance(head, MarkovHead)
    draft_w, draft_cfg, embed = factory.hf_weights(weights, config), config.to_hf(), np.zeros((89, 32))
    z, base, anchors, keys, temperatures, hot = factory.head_case()
    none: Any = None

    @jax.jit
    def run(weights: Any, z: Any, base: Any, anchors: Any) -> Any:
        view = View(none, none, none, "xla", none, anchors, none, hot)
        greedy, few = (head.propose(weights, z, base, view, None, count) for count in (None, 6))
        assert greedy.confidence is not None
        sure = jax.nn.sigmoid(greedy.confidence)
        sampled = head.propose(weights, z, base, view, keys)
        before = jnp.concatenate([anchors[:, None], sampled.tokens[:, :-1]], axis=1)
        forced = head.teacher_forced(weights, z[:, None], before[:, None], none)
        tree = best_first(head.paths(weights, z, base, view), 9, PLACES, 9)
        tree_of_few = best_first(head.paths(weights, z, base, view, 6), 9, PLACES, 9)
        added = (forced.rank @ forced.output.T)[:, 0]
        return greedy.tokens, few.tokens, likeliest(base, 6)[1], sampled, added, sure, tree, tree_of_few

    greedy, few, candidates, sampled, added, sure, *trees = jax.device_get(run(weights.head, z, base, anchors))
    assert sampled.probs is not None
    np.testing.assert_array_equal(sampled.tokens, sample(keys, jnp.asarray(sampled.probs)))
    changed = 0
    for row in range(ROWS):
        anchor = int(anchors[row])
        chosen: list[int] = []
        chosen_of_few: list[int] = []
        for place in range(PLACES):
            for tokens, among in ((chosen, range(89)), (chosen_of_few, candidates[row, place])):
                correction = reference.markov_correction(draft_w, draft_cfg, [anchor, *tokens], z[row, : place + 1])
                logits = base[row, place] + correction[place]
                tokens.append(max(map(int, among), key=lambda token: logits[token]))
        assert greedy[row].tolist() == chosen and few[row].tolist() == chosen_of_few
        expected = reference.markov_confidence(draft_w, [anchor, *chosen[:-1]], z[row])
        np.testing.assert_allclose(sure[row], expected, atol=2e-5)
        changed += sum(chosen != base[row].argmax(axis=-1))
        before = [anchor, *sampled.tokens[row, :-1]]
        expected = reference.markov_correction(draft_w, draft_cfg, before, z[row])
        np.testing.assert_allclose(added[row], expected, atol=2e-5)
        for place in range(PLACES):
            logits = base[row, place] + expected[place]
            probs = reference.filtered_probabilities(logits, temperatures[row])
            np.testing.assert_allclose(sampled.probs[row, place], probs, atol=2e-5)
        for tree, of in zip(trees, (None, candidates[row].tolist()), strict=True):
            following = restated.head_following(draft_w, draft_cfg, embed, z[row], base[row], anchor, of)
            found = list(zip(tree.tokens[row].tolist(), tree.parents[row].tolist(), strict=True))
            assert found == restated.best_first(following, 9, PLACES)
    assert changed >= 4, "a head that changes nothing tests nothing"


DECODED = {
    "vanilla, fill-in": config_of("vanilla", shift_label=False),
    "rnn, causal blocks": config_of("rnn", causal=True, windows=(None, 3)),
    "JetSpec": factory.draft_config(head=None, shift_label=False, causal=True),
    "DeepSpec's DFlash": factory.draft_config(head=None),
    "gated": config_of("gated"),
}
LONGER = ("gated", "JetSpec", "DeepSpec's DFlash", "vanilla, fill-in")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONGER else []) for n in DECODED])
def test_greedy_output_is_the_targets_and_each_cycle_the_restatements(name):
    target = dataclasses.replace(factory.TARGET, num_hidden_layers=2)
    pair = Pair.make(dataclasses.replace(DECODED[name], num_target_layers=2), target, seed=4)
    prompts = [[3, 1, 4, 1, 5], [9] * 11]
    outputs = loops.speculate(*pair, loops.begin(*pair, prompts, 16))
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = reference.decode_greedy(*pair.reference(), prompt, 16, [])
        assert (output.tokens, output.accepted) == (expected["tokens"], expected["accepted"])


@pytest.mark.parametrize("kind", KINDS)
def test_its_tensors_have_deepspecs_names_and_shapes(kind):
    """heads.md 1.1: the concatenations are [z; token] of the gate, [state; token; z] of the joint projection."""
    config = config_of(kind)
    tensors = factory.hf_weights(factory.random_weights(config, 0), config)
    shapes = {name: x.shape for name, x in tensors.items() if name.startswith(("markov_head.", "confidence_head."))}
    expected = {"markov_head.markov_w1.weight": (89, 7), "markov_head.markov_w2.weight": (89, 7)}
    expected |= {"confidence_head.proj.weight": (1, 39), "confidence_head.proj.bias": (1,)}
    if kind == "gated":
        expected |= {"markov_head.gate_proj.weight": (7, 39), "markov_head.gate_proj.bias": (7,)}
    if kind == "rnn":
        expected |= {"markov_head.joint_proj.weight": (21, 46), "markov_head.joint_proj.bias": (21,)}
    assert shapes == expected


def test_the_public_drafters_have_as_many_parameters_as_published():
    """heads.md, section 0, less the copies of the target's embeddings and LM head."""
    sizes = {"dspark 8b": (4096, 12288, 32, 1), "jetspec 8b": (4096, 12288, 32, 0)}
    counts = {}
    for name, (width, inner, heads, dspark) in sizes.items():
        config = DraftConfig(
            151936, width, 5, heads, 8, 128, inner, 1e-6, 1e6, 40960, 7, 151669, (1, 9, 17, 25, 33), 36,
            bool(dspark), MarkovHead(256, enable_confidence_head=True) if dspark else None, (), not dspark,
        )  # fmt: skip
        counts[name] = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(weight_shapes(config)))
    assert counts["jetspec 8b"] == 1_048_626_432
    assert round((counts["dspark 8b"] + 2 * 151936 * 4096) / 1e9, 3) == 2.371


def test_a_rank_of_nothing_is_refused():
    with pytest.raises(DominoError, match="markov_rank must be at least 1"):
        config = config_of("vanilla")
        dataclasses.replace(config, head=MarkovHead(0))


@pytest.mark.slow
def test_a_tree_over_it_changes_no_token():
    config = config_of("rnn", num_target_layers=2)
    pair = Pair.make(config, dataclasses.replace(factory.TARGET, num_hidden_layers=2), seed=4)
    plain = loops.autoregress(*pair, loops.begin(*pair, [[3, 1, 4], [9] * 5], 12))
    tree = Pair(pair.params, dataclasses.replace(pair.configs, drafter=TreeDrafter(config, nodes=6)))
    assert [o.tokens for o in loops.speculate(*tree, loops.begin(*tree, [[3, 1, 4], [9] * 5], 12))] == [
        o.tokens for o in plain
    ]
