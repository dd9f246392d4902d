"""A target made from text: the corpus and its split, pre-training, prompts cut for it, and what is refused."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from factory import BYTE_TARGET
from transformers import AutoModelForCausalLM, AutoTokenizer

from convert.loading import load_model
from domino_jax.drafters.assistant import AssistantDrafter
from domino_jax.errors import DominoError
from domino_jax.runtime.command import UsageError
from domino_jax.weights import flatten, init_weights
from train.demo import prompts
from train.demo.corpus import model_code, read_texts
from train.demo.pretrain import Pretrain, pretrain_optimizer, run_pretrain

SMALL = {
    "files": "*.txt",
    "vocab_size": 300,
    "hidden_size": 32,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "batch": 2,
    "length": 24,
}


@pytest.fixture(autouse=True, scope="module")
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Forty folders of two files, each line of a file naming its folder."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"part{i}").mkdir()
        for name in ("a.txt", "b.txt"):
            (folder / f"part{i}" / name).write_text(f"the line of part {i} and of {name}\n" * 30)
    (folder / "part0" / "table.csv").write_text("1,2,3\n")
    (folder / "part0" / "latin.txt").write_bytes(b"\xff\xfe\xfd")
    return folder


@pytest.fixture(scope="module")
def model(text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("model") / "target"
    run_pretrain(Pretrain(out, text, steps=60, **SMALL))
    return out


def test_a_folder_is_held_out_whole_and_always_the_same(text):
    train, held_out = read_texts(text, "*.txt")
    assert len(train) + len(held_out) == 80 and held_out
    folders = [{t.split(" and ")[0] for t in texts} for texts in (train, held_out)]
    assert not folders[0] & folders[1]
    assert read_texts(text, "*.txt") == (train, held_out)


def test_the_default_text_is_there():
    train, held_out = read_texts(None)
    assert len(train) > 10 * len(held_out) > 100
    qwen = (model_code() / "qwen3" / "modeling_qwen3.py").read_text()
    assert qwen in train


@pytest.mark.e2e
def test_the_target_learns_and_transformers_loads_it(model):
    rows = [json.loads(line) for line in (model / "pretrain.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 60
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("the line of part 3 and of a.txt\n" * 2, return_tensors="pt")["input_ids"]
    assert float(theirs(ids, labels=ids).loss.detach()) < 0.6 * rows[0]["loss"]
    assert tokenizer.decode(ids[0]) == "the line of part 3 and of a.txt\n" * 2
    assert tokenizer.mask_token_id is not None and tokenizer.eos_token_id == theirs.generation_config.eos_token_id


@pytest.mark.e2e
@pytest.mark.parametrize("held_out", [False, True])
def test_prompts_are_lines_of_the_right_files(text, model, held_out, tmp_path, capsys):
    out = tmp_path / "prompts.jsonl"
    words = ["--tokenizer", str(model), "--out", str(out), "--text", str(text), "--files", "*.txt"]
    assert prompts.main([*words, "--count", "20", "--tokens", "9", *(["--held-out"] if held_out else [])]) == 0
    rows = [json.loads(line)["input_ids"] for line in out.read_text().splitlines()]
    assert len(rows) == 20 and {len(ids) for ids in rows} == {9}
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = read_texts(text, "*.txt")[held_out]
    for ids in rows:
        shown = tokenizer.decode(ids)
        assert shown.startswith("the line") and any(shown in t for t in texts)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "--steps must be at least 1"),
        ({"vocab_size": 200}, "--vocab-size must be at least 260"),
        ({"warmup": 0.7, "decay": 0.7}, "shares of the steps"),
        ({"heads": 3, "kv_heads": 2}, "must be a multiple"),
        ({"length": 100_000}, "fewer than --length"),
        ({"files": "*.rst"}, "too few files named"),
        ({"muon_lr": float("nan")}, "--muon-lr must be above 0, found nan"),
        ({"seed": -1}, "--seed must be from 0 to"),
        ({"muon_lr": 1e38}, "the loss is nan"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_writes_nothing(text, tmp_path, change, words):
    options: dict = SMALL | {"steps": 20} | change
    with pytest.raises(DominoError, match=words):
        run_pretrain(Pretrain(tmp_path / "out", text, **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.e2e
def test_another_models_tokenizer_makes_an_assistant_for_it(text, model, tmp_path):
    """The same tokens with the same numbers, from other text of another size."""
    out = tmp_path / "assistant"
    small = {name: value for name, value in SMALL.items() if name != "vocab_size"}
    run_pretrain(Pretrain(out, text, tokenizer=str(model), steps=2, seed=3, **small))
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    sizes = [json.loads((folder / "config.json").read_text())["vocab_size"] for folder in (out, model)]
    assert sizes[0] == sizes[1]
    loaded = load_model(model, out, "float32")
    assert isinstance(loaded.configs.drafter, AssistantDrafter)
    with pytest.raises(UsageError, match="leave out --vocab-size"):
        run_pretrain(Pretrain(tmp_path / "other", text, tokenizer=str(model), **SMALL))
    with pytest.raises(DominoError, match="--tokenizer"):
        run_pretrain(Pretrain(tmp_path / "other", text, tokenizer=str(tmp_path / "none"), **small))
    assert not (tmp_path / "other").exists()


@pytest.mark.e2e
def test_a_model_is_not_overwritten(text, model):
    with pytest.raises(DominoError, match="already holds a model"):
        run_pretrain(Pretrain(model, text, steps=20, **SMALL))


def test_prompts_without_a_tokenizer_are_refused(tmp_path, capsys):
    assert prompts.main(["--tokenizer", str(tmp_path / "none"), "--out", str(tmp_path / "p.jsonl")]) == 1
    assert "neither a name" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, {"tie_word_embeddings": False}], ids=str)
def test_matrices_of_a_target_decay_by_name_and_norms_and_biases_do_not(changes):
    config = dataclasses.replace(BYTE_TARGET, **changes)
    options = Pretrain(text=Path("x"), out=Path("y"), steps=2, warmup=0.0, decay=0.0, weight_decay=0.5)
    rule = pretrain_optimizer(config, options)
    weights = jax.tree.map(jnp.ones_like, flatten(init_weights(config, jax.random.key(0))))
    nothing = jax.tree.map(jnp.zeros_like, weights)
    changed = jax.jit(lambda: rule.update(nothing, rule.init(weights), weights)[0])()
    found: dict[str, set[bool]] = {}
    for path, step in changed.items():
        found.setdefault(path.rpartition(".")[2], set()).add(bool(np.any(step)))
    assert all(len(moved) == 1 for moved in found.values()), "every layer alike"
    decayed = {name for name, moved in found.items() if True in moved}
    matrices = {"embed", "q", "kv", "o", "gate_up", "down"} | ({"lm_head"} & set(found))
    assert decayed == matrices, sorted(found)
    assert {"norm", "q_norm", "k_norm"} <= set(found) - decayed
