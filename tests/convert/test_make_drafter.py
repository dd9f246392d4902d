"""From --draft to the drafter that runs: names, folders of either kind, and what does not fit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factory import BYTE_DRAFT, BYTE_TARGET, make_draft, make_target, make_tokenizer

from convert import registry
from convert.drafters import make_drafter
from convert.loading import load_model, plan_load
from convert.options import DraftingOptions, ModelOptions, TreeSettings
from convert.registry import locate, split_draft
from domino_jax.drafters.assistant import AssistantDrafter
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.combined import CombinedDrafter
from domino_jax.drafters.ngram import NgramDrafter
from domino_jax.drafters.tree import TreeDrafter
from domino_jax.errors import DominoError
from domino_jax.runtime.command import UsageError
from infer.engine import Decoding, Engine


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, (None, False)),
        ("none", ("none", False)),
        ("ngram", (None, True)),
        ("demo+ngram", ("demo", True)),
        ("org/repo+ngram", ("org/repo", True)),
        ("./ngram", ("./ngram", False)),
    ],
)
def test_what_draft_names(given, found):
    assert split_draft(given) == found


def test_a_tree_needs_a_mask_of_attention():
    with pytest.raises(DominoError, match="no mask for trees of drafts: give --attention auto or xla"):
        plan_load(BYTE_TARGET, BYTE_DRAFT, attention="pallas", tree=TreeSettings(4))


@pytest.mark.parametrize("given", ["+ngram", "none+ngram", "ngram+ngram"])
def test_ngram_beside_nothing_is_refused(given):
    with pytest.raises(UsageError, match="n-grams alone"):
        ModelOptions(drafting=DraftingOptions(given)).check()


FEW = replace(BYTE_DRAFT, tree_candidates=8)


@pytest.mark.parametrize(
    ("config", "how", "drafter"),
    [
        (None, {}, None),
        (None, {"ngram": True}, NgramDrafter(7, 5, 2)),
        (None, {"ngram": True, "num_draft_tokens": 3}, NgramDrafter(3, 5, 2)),
        (None, {"ngram": True, "prompt_lookup_max": 1}, NgramDrafter(7, 1, 1)),
        (None, {"ngram": True, "prompt_lookup_min": 9}, NgramDrafter(7, 9, 9)),
        (BYTE_DRAFT, {"candidates": 4}, BlockDrafter(BYTE_DRAFT, 4)),
        (BYTE_DRAFT, {"tree": TreeSettings(9)}, TreeDrafter(BYTE_DRAFT, nodes=9)),
        (BYTE_DRAFT, {"tree": TreeSettings(9, 3, 32, "depth")}, TreeDrafter(BYTE_DRAFT, 32, 9, 3, "depth")),
        (FEW, {"tree": TreeSettings(9)}, TreeDrafter(FEW, 8, 9)),
        (FEW, {"tree": TreeSettings(9, candidates=16)}, TreeDrafter(FEW, 16, 9)),
        (FEW, {"tree": TreeSettings(9, candidates="all")}, TreeDrafter(FEW, None, 9)),
        (FEW, {}, BlockDrafter(FEW)),
        (BYTE_DRAFT, {"confidence_threshold": 0.5}, BlockDrafter(BYTE_DRAFT, confidence_threshold=0.5)),
        (BYTE_TARGET, {}, AssistantDrafter(BYTE_TARGET, 5)),
        (BYTE_TARGET, {"num_draft_tokens": 2}, AssistantDrafter(BYTE_TARGET, 2)),
        (BYTE_DRAFT, {"ngram": True}, CombinedDrafter(BlockDrafter(BYTE_DRAFT), NgramDrafter(7, 8, 4))),
        (
            BYTE_TARGET,
            {"ngram": True, "prompt_lookup_min": 3},
            CombinedDrafter(AssistantDrafter(BYTE_TARGET), NgramDrafter(7, 8, 3)),
        ),
    ],
)
def test_the_drafter_of_a_config_and_settings(config, how, drafter):
    assert make_drafter(config, **how) == drafter


@pytest.mark.parametrize(
    ("config", "how", "said"),
    [
        (None, {"candidates": 4}, "head candidates need a drafter with a causal head"),
        (BYTE_TARGET, {"candidates": 4}, "head candidates need a drafter with a causal head"),
        (BYTE_DRAFT, {"prompt_lookup_min": 2}, "are for n-grams"),
        (BYTE_TARGET, {"confidence_threshold": 0.5}, "a confidence threshold needs chains of a block drafter"),
        (None, {"confidence_threshold": 0.5}, "a confidence threshold needs chains of a block drafter"),
        (BYTE_DRAFT, {"confidence_threshold": 0.5, "tree": TreeSettings(9)}, "needs chains of a block drafter"),
        (BYTE_TARGET, {"tree": TreeSettings(9)}, "--tree needs a block drafter alone, found another model as drafter"),
        (None, {"tree": TreeSettings(9)}, "--tree needs a block drafter alone, found no drafter"),
        (None, {"tree": TreeSettings(9), "ngram": True}, "--tree needs a block drafter alone, found n-grams"),
        (BYTE_DRAFT, {"tree": TreeSettings(9), "ngram": True}, "--tree needs a block drafter alone, found n-grams"),
        (BYTE_DRAFT, {"tree": TreeSettings(9), "num_draft_tokens": 3}, "leave --num-draft-tokens out"),
        (None, {"ngram": True, "prompt_lookup_max": 2, "prompt_lookup_min": 3}, "from 1 to prompt_lookup_max"),
    ],
)
def test_settings_of_another_drafter_are_refused(config, how, said):
    with pytest.raises(DominoError, match=said):
        make_drafter(config, **how)


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-1.7b", "qwen3-32b"])
def test_a_name_without_a_drafter_is_an_assistant(name):
    assert locate("qwen3-8b", name) == ("Qwen/Qwen3-8B", registry.TABLE[name].target)
    with pytest.raises(DominoError, match=f"no drafter is public for {name}"):
        locate(name, name)


@pytest.fixture
def target(tmp_path) -> Path:
    make_target(tmp_path / "target")
    return tmp_path / "target"


def generated(target: Path, draft: Path | None = None, **how: Any) -> tuple[list[int], set[int]]:
    """Greedy tokens after a prompt that repeats itself, and the numbers of drafts accepted."""
    engine = Engine(load_model(target, draft, "float32", **how))
    sequence, _ = engine.sequence([5, 70, 9, 30] * 4, 20)
    engine.generate([sequence], Decoding())
    return sequence.tokens, set(sequence.accepted)


@pytest.mark.slow
def test_every_kind_of_drafter_loads_and_changes_no_token(tmp_path, target):
    make_draft(tmp_path / "draft")
    make_target(tmp_path / "small", seed=3, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    twin = tmp_path / "twin"
    make_target(twin)
    plain, none = generated(target)
    assert not none
    for draft, how in (
        (None, {"ngram": True}),
        (tmp_path / "draft", {}),
        (tmp_path / "draft", {"ngram": True, "prompt_lookup_min": 1}),
        (tmp_path / "small", {}),
        (tmp_path / "small", {"ngram": True}),
        (twin, {"drafts": 3}),
    ):
        tokens, accepted = generated(target, draft, **how)
        assert tokens == plain and accepted, (draft, how)
        assert draft != twin or accepted == {3}, "the target as its own assistant is always right"
    with pytest.raises(DominoError, match="is the target itself"):
        load_model(target, target)


@pytest.mark.parametrize("size", [259, 261, 512])
def test_an_assistant_of_another_vocabulary_is_refused_with_both_sizes(tmp_path, target, size):
    make_target(tmp_path / "other", tokenizer=False, vocab_size=size)
    with pytest.raises(DominoError, match=f"its vocabulary has {size} tokens, the target's 260"):
        load_model(target, tmp_path / "other")


def test_an_assistant_whose_tokens_mean_other_text_is_refused(tmp_path, target):
    make_target(tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(DominoError, match="they must have the same tokenizer"):
        load_model(target, tmp_path / "other")
    assert make_tokenizer() is not None


def test_eight_bits_are_for_block_drafters(tmp_path, target):
    make_target(tmp_path / "small", seed=3, num_hidden_layers=1)
    ways: list[tuple[Path | None, dict[str, Any]]] = [(tmp_path / "small", {}), (None, {"ngram": True})]
    for draft, how in ways:
        with pytest.raises(DominoError, match="--draft-weights is for a drafter"):
            load_model(target, draft, draft_weights="int8", **how)
