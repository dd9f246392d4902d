"""The shipped pair, by the path that any checkpoint takes: files, transformers, decoding, acceptance."""

import contextlib
import io
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from convert import folders, hf
from convert.registry import DEMO_FOLDER
from domino_jax import target
from domino_jax.config import DraftConfig, TargetConfig, check_pair
from domino_jax.weights import flatten, unflatten
from infer.__main__ import main

MEGABYTES = 40


@pytest.fixture(scope="module", params=[32, pytest.param(160, marks=pytest.mark.slow)])
def held_out(request, tmp_path_factory) -> Path:
    """The first of the held-out prompts, or all."""
    lines = (DEMO_FOLDER / "prompts.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 160
    file = tmp_path_factory.mktemp("demo") / "prompts.jsonl"
    file.write_text("".join(lines[: request.param]))
    return file


def generate(held_out: Path, *words: str) -> list[dict]:
    """Greedy answers to the prompts, as --json prints them."""
    out = io.StringIO()
    prompts = ["--raw", "--json", "--prompts", str(held_out), "--batch-size", "32"]
    with contextlib.redirect_stdout(out):
        assert main([*prompts, "--max-new-tokens", "24", *words]) == 0
    return [json.loads(line) for line in out.getvalue().splitlines()]


def tau(rows: list[dict]) -> float:
    return float(np.mean([m for row in rows for m in row["accepted"]])) + 1


@pytest.fixture(scope="module")
def drafted(held_out) -> list[dict]:
    return generate(held_out)


@pytest.fixture(scope="module")
def lean(held_out) -> list[dict]:
    return generate(held_out, "--draft", "none")


def test_it_is_small_and_fits_together():
    assert sum(f.stat().st_size for f in DEMO_FOLDER.rglob("*") if f.is_file()) <= MEGABYTES * 10**6
    config, draft = (folders.read_config(DEMO_FOLDER / name) for name in ("target", "draft"))
    assert isinstance(config, TargetConfig) and isinstance(draft, DraftConfig) and draft.head
    assert check_pair(config, draft) == []


def test_transformers_loads_it_and_agrees():
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DEMO_FOLDER / "target", dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(DEMO_FOLDER / "target")("def main():\n    return")["input_ids"]
    with torch.inference_mode():
        theirs = model(torch.tensor([ids])).logits.numpy()
    config = folders.read_config(DEMO_FOLDER / "target")
    assert isinstance(config, TargetConfig)
    params = folders.load_weights(DEMO_FOLDER / "target", config, jnp.float32)
    hidden, _, _ = target.forward(params, config, jnp.asarray([ids]))
    np.testing.assert_allclose(np.asarray(target.logits(params, config, hidden)), theirs, atol=1e-4)


def test_drafts_change_nothing_and_are_accepted(held_out, drafted, lean):
    assert len(drafted) == len(held_out.read_text().splitlines())
    assert [row["tokens"] for row in drafted] == [row["tokens"] for row in lean]
    assert tau(drafted) > 3


@pytest.mark.slow
def test_the_head_helps(held_out, drafted, lean, tmp_path):
    """The same drafter without its head, as a plain DFlash folder, is accepted less."""
    raw = hf.read_json(DEMO_FOLDER / "draft" / "config.json")
    kept = ("mask_token_id", "target_layer_ids", "shift_label")
    raw["dflash_config"] = {key: raw["dflash_config"][key] for key in kept}
    with_head, plain = folders.read_config(DEMO_FOLDER / "draft"), hf.parse_config(raw)
    leaves = flatten(folders.load_weights(DEMO_FOLDER / "draft", with_head))
    hf.save_hf(tmp_path, unflatten(plain, leaves), plain, raw)
    off = generate(held_out, "--draft", str(tmp_path))
    assert [row["tokens"] for row in off] == [row["tokens"] for row in lean]
    assert tau(drafted) > 1.2 * tau(off)
