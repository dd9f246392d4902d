"""DFlash 2 against its restatement in NumPy: convolutions, windows both ways, the selector's chains and trees."""

import dataclasses
from typing import Any

import factory
import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
import reference
import trees as restated
from factory import Pair

from domino_jax import prepare, sharding
from domino_jax.config import DraftConfig
from domino_jax.drafters import block
from domino_jax.drafters.base import View
from domino_jax.drafters.convolution import Convolution
from domino_jax.drafters.heads.selector import SelectorHead
from domino_jax.drafters.tree import TreeDrafter, best_first
from domino_jax.errors import DominoError
from domino_jax.sampling import sample
from domino_jax.weights import Params

CONFIG = factory.draft_config(
    shift_label=False, head=SelectorHead(7, 6), convolution=Convolution(2, 4), windows=(3, None),
    sliding_window_non_causal=True,
)  # fmt: skip
ROWS, PLACES = 3, 4


def test_the_selector_is_its_restatement():
    """Greedy and sampled chains, of its candidates and of fewer, trees, and what a loss computes of the same tokens."""
    config = CONFIG
    head = config.head
    weights = factory.random_weights(config, 3)
    assert isinstance(head, SelectorHead)
    draft_w, draft_cfg = factory.hf_weights(weights, config), config.to_hf()
    z, base, anchors, keys, temperatures, hot = factory.head_case()
    none: Any = None

    @jax.jit
    def run(weights: Any, z: Any, base: Any, anchors: Any) -> Any:
        view = View(none, none, none, "xla", none, anchors, none, hot)
        greedy, few = (head.propose(weights, z, base, view, None, count) for count in (None, 2))
        sampled = head.propose(weights, z, base, view, keys)
        before = jnp.concatenate([anchors[:, None], sampled.tokens[:, :-1]], axis=1)
        forced = head.teacher_forced(weights, z[:, None], before[:, None], none)
        tree = best_first(head.paths(weights, z, base, view), 9, PLACES, 9)
        return greedy.tokens, few.tokens, sampled, (forced.rank @ forced.output.T)[:, 0], tree

    greedy, few, sampled, added, tree = jax.device_get(run(weights.head, z, base, anchors))
    assert sampled.probs is not None
    np.testing.assert_array_equal(sampled.tokens, sample(keys, jnp.asarray(sampled.probs)))
    narrow = {**draft_cfg, "dflash_config": draft_cfg["dflash_config"] | {"selector_top_k": 2}}
    changed = 0
    for row in range(ROWS):
        anchor = int(anchors[row])
        for found, of in ((greedy, draft_cfg), (few, narrow)):
            token = anchor
            for place in range(PLACES):
                scores = reference.selector_logits(draft_w, of, base[row, place], z[row, place], token)
                token = int(scores.argmax())
                assert found[row, place] == token
        changed += sum(greedy[row] != base[row].argmax(axis=-1))
        before = [anchor, *sampled.tokens[row, :-1]]
        for place in range(PLACES):
            scores = reference.selector_logits(draft_w, draft_cfg, base[row, place], z[row, place], before[place])
            probs = reference.filtered_probabilities(scores, temperatures[row])
            np.testing.assert_allclose(sampled.probs[row, place], probs, atol=2e-5)
            inside = np.isfinite(scores)
            assert inside.sum() == 6 and not sampled.probs[row, place][~inside].any()
            np.testing.assert_allclose((base[row, place] + added[row, place])[inside], scores[inside], atol=2e-5)
        following = restated.head_following(draft_w, draft_cfg, np.zeros((89, 32)), z[row], base[row], anchor)
        found = list(zip(tree.tokens[row].tolist(), tree.parents[row].tolist(), strict=True))
        assert found == restated.best_first(following, 9, PLACES)
    assert changed >= 4, "a head that changes nothing tests nothing"


@pytest.mark.parametrize("windows", [(3, None), pytest.param((None, None), marks=pytest.mark.slow)])
def test_the_backbone_is_its_restatement_in_decoding_and_over_whole_texts(windows):
    """Three taps, so that a filter reaches over a row; blocks near the beginning and further on."""
    config = dataclasses.replace(CONFIG, convolution=Convolution(3, 8), windows=windows)
    weights = factory.random_weights(config, 5)
    draft_w, draft_cfg = factory.hf_weights(weights, config), config.to_hf()
    rng = np.random.default_rng(2)
    embed = rng.normal(size=(89, 32)).astype(np.float32)
    features = rng.normal(size=(1, 12, 64)).astype(np.float32)
    anchors, tokens = np.array([0, 2, 11], np.int32), np.array([4, 7, 80], np.int32)

    @jax.jit
    def run(weights: Any, features: Any) -> Any:
        x = block.block_inputs(jnp.asarray(embed), config, jnp.asarray(tokens[None]))
        whole = block.training_blocks(weights, config, x, jnp.asarray(anchors[None]), features)
        cache = block.BlockDrafter(config).init(3, 32, jnp.float32)
        every = jnp.broadcast_to(features, (3, *features.shape[1:]))
        cache = block.append_context(weights, config, cache, every, jnp.zeros(3, jnp.int32))
        return whole[0], block.block(weights, config, x[0], jnp.asarray(anchors), cache)[0]

    for found in jax.device_get(run(weights, features)):
        for row, (a, token) in enumerate(zip(anchors, tokens, strict=True)):
            expected = reference.draft_block(draft_w, draft_cfg, embed, features[0, :a], token, a)
            np.testing.assert_allclose(found[row], expected, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tree", [False, True])
def test_greedy_output_is_the_targets_and_each_cycle_the_restatements(tree):
    target = dataclasses.replace(factory.TARGET, num_hidden_layers=2)
    pair = Pair.make(dataclasses.replace(CONFIG, num_target_layers=2), target, seed=4)
    prompts = [[3, 1, 4, 1, 5], [9] * 11]
    expected = [reference.decode_greedy(*pair.reference(), prompt, 16, []) for prompt in prompts]
    if tree:
        drafter = TreeDrafter(pair.configs.draft, nodes=6)
        pair = Pair(pair.params, dataclasses.replace(pair.configs, drafter=drafter))
    outputs = loops.speculate(*pair, loops.begin(*pair, prompts, 16))
    assert [output.tokens for output in outputs] == [one["tokens"] for one in expected]
    if not tree:
        assert [output.accepted for output in outputs] == [one["accepted"] for one in expected]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["a CPU's matrices", "int8", "mesh"])
def test_other_forms_of_its_weights_change_no_token(form):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    target = dataclasses.replace(factory.TARGET, num_hidden_layers=2)
    pair = Pair.make(dataclasses.replace(CONFIG, num_target_layers=2, **heads), target, seed=4)
    prompts = [[3, 1, 4, 1, 5], [9] * 11]
    alone = loops.speculate(*pair, loops.begin(*pair, prompts, 16))
    draft, mesh = pair.configs.draft, None
    assert isinstance(draft, DraftConfig)
    if form == "int8":
        pair = Pair(prepare.quantize_drafter(pair.params, draft, "int8"), pair.configs)
    elif form == "mesh":
        mesh = sharding.make_mesh(1, 2)
        params = Params(factory.place(pair.params.target, target, mesh), factory.place(pair.params.draft, draft, mesh))
        pair = Pair(params, pair.configs)
    else:
        pair = factory.turned(pair)
    with sharding.mesh_context(mesh):
        outputs = loops.speculate(*pair, loops.begin(*pair, prompts, 16))
    assert [output.tokens for output in outputs] == [output.tokens for output in alone]
    assert form == "int8" or [output.accepted for output in outputs] == [output.accepted for output in alone]


def test_a_drafter_with_five_layers_has_as_many_tensors_as_the_public_ones():
    """heads.md, section 0 and 2.1."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=5, windows=(9,) * 5)
    tensors = factory.hf_weights(factory.random_weights(config, 0), config)
    assert len(tensors) == 81
    shapes = {name: x.shape for name, x in tensors.items() if "conv" in name or "selector" in name}
    assert len(shapes) == 23
    assert shapes["layers.4.mlp_conv.base_kernel"] == (2, 2, 32)
    assert shapes["layers.0.attention_conv.kernel_projection.weight"] == (2 * 2 * 8, 32)
    assert shapes["candidate_selector.hidden_projection.weight"] == (7, 32)
    assert shapes["candidate_selector.predecessor_codebook"] == (89, 7)
    assert shapes["candidate_selector.successor_codebook"] == (89, 7)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"convolution": Convolution(2, 5)}, "conv_group_size 5 does not divide hidden_size 32"),
        ({"head": SelectorHead(0, 6)}, "selector_rank must be at least 1"),
        ({"head": SelectorHead(7, 0)}, "selector_top_k must be at least 1"),
        ({"windows": (3, None), "causal": True}, "is_causal is one field"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, said):
    with pytest.raises(DominoError, match=said):
        dataclasses.replace(CONFIG, **changes)
