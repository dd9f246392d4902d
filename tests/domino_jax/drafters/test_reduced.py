"""Drafters that propose some of the target's tokens: every head against its restatement, chains, samples, trees."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import factory
import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
import reference
from factory import Pair

from domino_jax import prepare, sharding
from domino_jax.config import DraftConfig
from domino_jax.drafters import block
from domino_jax.drafters.base import View
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.heads import head_of
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.drafters.heads.markov import MarkovHead
from domino_jax.drafters.tree import TreeDrafter, best_first
from domino_jax.sampling import sample, settings
from domino_jax.weights import Params

HEADS = {"Domino": DominoHead(14, 7, 1), "DSpark": MarkovHead(7, "rnn", enable_confidence_head=True), "DFlash": None}
ROWS, PLACES, SOME = 3, 4, 30


def config_of(name: str, **changes: Any) -> DraftConfig:
    return factory.draft_config(head=HEADS[name], draft_vocab_size=SOME, **changes)


@pytest.mark.parametrize("name", HEADS)
def test_what_is_proposed_is_the_restatement(name):
    """Tokens are the target's, predecessors too; no other token has a probability, and no node of a tree."""
    config = config_of(name)
    head, weights = head_of(config), factory.random_weights(config, 3)
    draft_w, draft_cfg = factory.hf_weights(weights, config), config.to_hf()
    z, _, anchors, keys, temperatures, hot = factory.head_case()
    embed = np.random.default_rng(3).normal(size=(89, 32)).astype(np.float32)
    none: Any = None

    @jax.jit
    def run(weights: Any, z: Any, embed: Any, anchors: Any) -> Any:
        target: Any = SimpleNamespace(embed=embed)
        names = block.draft_names(weights)
        view = View(target, none, none, "xla", none, anchors, none, hot, names)
        base = block.base_logits(weights, config, view, z)
        greedy = head.propose(weights.head, z, base, view, None)
        few = head.propose(weights.head, z, base, view, None, 6 if config.head else None)
        sampled = head.propose(weights.head, z, base, view, keys)
        tree = best_first(head.paths(weights.head, z, base, view), 9, PLACES, 9)
        return greedy.tokens, few.tokens, sampled.tokens, sampled.probs, tree.tokens, names

    greedy, few, drawn, probs, nodes, names = jax.device_get(run(weights, z, embed, anchors))
    np.testing.assert_array_equal(names, np.arange(SOME) + draft_w["d2t"])
    assert len(set(names)) == SOME and sorted(names) != list(names), "an order of its own"
    np.testing.assert_array_equal(drawn, sample(keys, jnp.asarray(probs)))
    outside = np.setdiff1d(np.arange(89), names)
    assert probs.shape == (ROWS, PLACES, 89) and not probs[..., outside].any()
    np.testing.assert_allclose(probs.sum(axis=-1), 1, atol=1e-5)
    for found in (greedy, few, drawn, nodes):
        assert np.isin(found, names).all()
    for row in range(ROWS):
        for tokens, temperature in ((greedy[row], None), (drawn[row], temperatures[row])):
            before = [int(anchors[row]), *map(int, tokens[:-1])]
            logits = reference.linear(z[row], draft_w["lm_head.weight"])  # [J, DV]
            if name == "DSpark":
                logits = logits + reference.markov_correction(draft_w, draft_cfg, before, z[row])
            if name == "Domino":
                states = reference.gru_states(draft_w, embed, before)
                logits = reference.corrected_logits(draft_w, draft_cfg, logits, z[row], states)
            for place in range(PLACES):
                if temperature is None:
                    assert tokens[place] == names[logits[place].argmax()]
                elif name != "DFlash" or place == 0:
                    expected = reference.filtered_probabilities(logits[place], temperature)
                    np.testing.assert_allclose(probs[row, place, names], expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["as it is", "tree", "a CPU's matrices", "int8", "mesh", "mesh, few candidates"])
@pytest.mark.parametrize("name", HEADS)
def test_greedy_output_is_the_targets_and_each_cycle_the_restatements(name, form):
    if name == "DFlash" and "candidates" in form:
        pytest.skip("no head that has candidates")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    target = dataclasses.replace(factory.TARGET, num_hidden_layers=2)
    config = config_of(name, num_target_layers=2, **heads)
    pair, mesh = Pair.make(config, target, seed=4), None
    prompts = [[3, 1, 4, 1, 5], [9] * 11]
    expected = [reference.decode_greedy(*pair.reference(), prompt, 16, []) for prompt in prompts]
    if form == "tree":
        pair = Pair(pair.params, dataclasses.replace(pair.configs, drafter=TreeDrafter(config, nodes=6)))
    elif form == "int8":
        pair = Pair(prepare.quantize_drafter(pair.params, config, "int8"), pair.configs)
        assert pair.params.output is None, "its own LM head drafts"
    elif form == "a CPU's matrices":
        pair = factory.turned(pair)
    elif form != "as it is":
        mesh = sharding.make_mesh(1, 2)
        params = Params(factory.place(pair.params.target, target, mesh), factory.place(pair.params.draft, config, mesh))
        drafter = BlockDrafter(config, 29 if "candidates" in form else None)
        pair = Pair(params, dataclasses.replace(pair.configs, drafter=drafter))
    with sharding.mesh_context(mesh):
        outputs = loops.speculate(*pair, loops.begin(*pair, prompts, 16))
    assert [output.tokens for output in outputs] == [one["tokens"] for one in expected]
    if form in ("as it is", "a CPU's matrices", "mesh"):
        assert [output.accepted for output in outputs] == [one["accepted"] for one in expected]


@pytest.mark.slow
@pytest.mark.parametrize("coupled", [False, True])
def test_samples_on_a_mesh_are_those_of_one_device(coupled):
    """The 31st row of an odd vocabulary's LM head pads it, and names no token."""
    target = dataclasses.replace(factory.TARGET, num_hidden_layers=2)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "draft_vocab_size": 31}
    config = dataclasses.replace(config_of("DSpark", num_target_layers=2), **heads)
    pair = Pair.make(config, target, seed=4)
    prompts, hot = [[3, 1, 4, 1, 5], [9] * 11], settings(2, 1.0)
    keys = jax.random.split(jax.random.key(7), 2)

    def run(pair: Pair) -> list[list[int]]:
        state = loops.begin(pair.params, pair.configs, prompts, 24, loops.NO_STOP, hot, keys, [coupled] * 2)
        return [o.tokens for o in loops.speculate(pair.params, pair.configs, state, greedy=False)]

    alone, mesh = run(pair), sharding.make_mesh(1, 2)
    params = Params(factory.place(pair.params.target, target, mesh), factory.place(pair.params.draft, config, mesh))
    with sharding.mesh_context(mesh):
        assert run(Pair(params, pair.configs)) == alone
