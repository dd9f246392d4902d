"""The options that commands share, and loading by them."""

from dataclasses import replace

import pytest
from factory import make_draft, make_target
from rich.console import Console

from convert import options
from convert.options import DeviceOptions, DraftingOptions, ModelOptions, ProcessOptions, SamplingOptions
from domino_jax.drafters.block import BlockDrafter
from domino_jax.errors import DominoError
from domino_jax.runtime.command import UsageError


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (ModelOptions(drafting=DraftingOptions(head_candidates=0)), "--head-candidates must be at least 1, found 0"),
        (ModelOptions(drafting=DraftingOptions("none", head_candidates=4)), "--head-candidates needs a drafter"),
        (ModelOptions(drafting=DraftingOptions("none", draft_weights="int8")), "--draft-weights needs a drafter"),
        (ModelOptions(drafting=DraftingOptions("ngram", draft_weights="float8")), "--draft-weights needs a drafter"),
        (ModelOptions(drafting=DraftingOptions(draft_weights="int4")), "--draft-weights int4: 4 bits need scales"),
        (ModelOptions(device=DeviceOptions(weights="int4")), "--weights int4: 4 bits need scales"),
        (ModelOptions(device=DeviceOptions(weights="int9")), "--weights must be auto, exact, int8 or float8, found"),  # type: ignore[arg-type]
        (ModelOptions(device=DeviceOptions(weights=None)), "--weights must be auto, exact, int8 or float8, found"),  # type: ignore[arg-type]
        (ModelOptions(drafting=DraftingOptions(tree=0)), "--tree must be at least 1, found 0"),
        (ModelOptions(drafting=DraftingOptions("none", tree=4)), "--tree needs a drafter with weights"),
        (ModelOptions(drafting=DraftingOptions("ngram", tree=4)), "--tree needs a drafter with weights"),
        (ModelOptions(drafting=DraftingOptions("demo+ngram", tree=4)), "--tree needs a block drafter alone"),
        (ModelOptions(drafting=DraftingOptions(tree=4, tree_lanes=0)), "--tree-lanes must be at least 1"),
        (ModelOptions(drafting=DraftingOptions(tree=4, tree_lanes=5)), "--tree-lanes 5 is more than the 4 nodes"),
        (ModelOptions(drafting=DraftingOptions(tree=4, tree_candidates=0)), "--tree-candidates must be at least 1"),
        (ModelOptions(drafting=DraftingOptions(tree=4, head_candidates=8)), "with --tree give --tree-candidates"),
        (ModelOptions(drafting=DraftingOptions(confidence_threshold=1.5)), "confidence-threshold must be from 0 to 1"),
        (
            ModelOptions(drafting=DraftingOptions(confidence_threshold=0.5, tree=4)),
            "--confidence-threshold is for chains",
        ),
        (ModelOptions(drafting=DraftingOptions("none", confidence_threshold=0.5)), "--confidence-threshold needs a"),
        (ModelOptions(drafting=DraftingOptions("ngram", confidence_threshold=0.5)), "--confidence-threshold needs a"),
        (
            ModelOptions(drafting=DraftingOptions("a+ngram", confidence_threshold=0.5)),
            "is for chains of a block drafter",
        ),
        (ModelOptions(drafting=DraftingOptions(tree_lanes=2)), "--tree-lanes says how a tree of drafts is made"),
        (ModelOptions(drafting=DraftingOptions(tree_candidates="all")), "--tree-candidates says how a tree"),
        (ModelOptions(drafting=DraftingOptions(tree_correction="depth")), "--tree-correction says how a tree"),
        (ModelOptions(revision="v1"), "--revision chooses a revision of a Hub repository"),
        (ModelOptions(device=DeviceOptions(mesh="3")), "data=2,model=4"),
        (SamplingOptions(temperature=-1), "--temperature must be 0 or more, found -1"),
        (SamplingOptions(temperature=float("nan")), "--temperature must be 0 or more, found nan"),
        (SamplingOptions(top_k=-1), "--top-k"),
        (SamplingOptions(top_p=0), "--top-p"),
        (SamplingOptions(min_p=1.5), "--min-p"),
        (SamplingOptions(seed=2**32), "--seed"),
    ],
    ids=str,
)
def test_words_that_make_no_sense_are_usage_errors(given, says):
    with pytest.raises(UsageError, match=says):
        given.check()


@pytest.mark.parametrize(
    ("model", "draft", "asked", "candidates"),
    [
        ("qwen3-8b", None, None, 64),
        ("Qwen/Qwen3-4B", None, None, 64),
        ("folder", "Huang2020/Qwen3-8B-Domino-b16", None, 64),
        ("qwen3-8b", None, "all", "all"),
        ("qwen3-8b", None, 256, 256),
        ("qwen3-8b", "qwen3-8b-dflash", None, None),
        ("qwen3-8b", "folder", None, None),
        ("demo", None, None, None),
        ("demo", None, 8, 8),
    ],
)
def test_a_tree_has_few_candidates_where_that_loses_nothing(model, draft, asked, candidates):
    options = ModelOptions(model, drafting=DraftingOptions(draft, tree=12, tree_candidates=asked))
    options.check()
    assert options.tree == (12, None, candidates, "path")


def test_a_part_of_the_process_options_is_a_usage_error():
    with pytest.raises(UsageError, match="--num-processes"):
        ProcessOptions("host:1", process_id=0).resolve()
    assert ProcessOptions().resolve() is None


def test_load_takes_every_option(tmp_path):
    make_target(tmp_path / "target")
    make_draft(tmp_path / "draft")
    drafting = DraftingOptions(str(tmp_path / "draft"), head_candidates=8)
    device = DeviceOptions(dtype="bfloat16", mesh="data=2,model=1", attention="xla")
    asked = ModelOptions(str(tmp_path / "target"), drafting=drafting, device=device)
    loaded = options.load_pair(asked, Console(quiet=True), num_draft_tokens=2)
    assert (loaded.dtype.name, loaded.configs.drafts) == ("bfloat16", 2)
    assert isinstance(loaded.configs.drafter, BlockDrafter) and loaded.configs.drafter.candidates == 8
    assert loaded.mesh is not None and dict(loaded.mesh.shape) == {"data": 2, "model": 1}
    alone = replace(asked, drafting=DraftingOptions("none"), device=DeviceOptions("float32"))
    assert options.load_pair(alone, Console(quiet=True)).configs.draft is None
    with pytest.raises(DominoError, match="5 drafts"):
        options.load_pair(asked, Console(quiet=True), num_draft_tokens=5)
