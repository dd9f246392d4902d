"""Devices by name, and what fits on them by the shapes alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from factory import make_draft, make_target

from convert.loading import load_model
from domino_jax.errors import DominoError
from domino_jax.runtime.command import parse_words
from infer.bench.devices import DEVICES, find_devices
from infer.bench.plan import GPU_VARIABLES, Plan, check_plan, main, plan_cells, plan_rows


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("v5e-1", "v5e", 1),
        ("v6e", "v6e", 1),
        ("v6e-16", "v6e", 16),
        ("v5p-8", "v5p", 4),  # TensorCores
        ("v4-4096", "v4", 2048),
        ("h100", "h100", 1),
        ("a100-80", "a100-80", 1),
        ("a100-40-8", "a100-40", 8),
    ],
)
def test_devices_are_found_by_name_and_number(text, name, count):
    device, found = find_devices(text)
    assert (device.name, found) == (name, count) and device is DEVICES[name]


@pytest.mark.parametrize(
    "text", ["", "v6e-0", "v6e--4", "a100", "h100-", "-4", "v9-4", "h100-1.5", "h100-٣", "v6e-999999"]
)
def test_what_names_no_devices_is_refused_in_one_sentence(text):
    with pytest.raises(DominoError, match=r"^devices are given by name and number, such as .*v5p-8.*h200"):
        find_devices(text)


def test_half_a_chip_is_none():
    with pytest.raises(DominoError, match=r"counts TensorCores, .* v5p-6 is 3 chips"):
        find_devices("v5p-3")


def plan(*words: str) -> list[dict[str, Any]]:
    options = parse_words(Plan, list(words), prog="plan")
    check_plan(options)
    return plan_rows(options)


def test_a_public_model_by_its_public_sizes():
    (row, *others) = plan("--model", "qwen3-8b", "--devices", "v6e-1")
    assert not others and row["fits"]
    assert row["target_bytes"] == 2 * 8_190_735_360  # parameters, as Qwen states them
    assert row["token_bytes"] == 2 * 36 * 8 * 128 * 2 and row["drafter_token_bytes"] == 2 * 5 * 8 * 128 * 2
    held = row["target_bytes"] + row["drafter_bytes"] + row["temporary_bytes"] + row["left_bytes"]
    assert held == pytest.approx(row["usable_bytes"]) and row["usable_bytes"] < row["device_bytes"] == 32 * 2**30
    assert row["tokens"] == row["left_bytes"] // (row["token_bytes"] + row["drafter_token_bytes"])


def test_a_model_that_does_not_fit_says_by_how_much(capsys):
    assert main(["--model", "qwen3-32b", "--devices", "h100", "--dtype", "float32", "--json"]) == 1
    out, err = capsys.readouterr()
    (row,) = json.loads(out)
    assert not row["fits"] and row["tokens"] == 0 and row["streams"] == {"4096": 0}
    assert f"{row['missing_bytes'] / 1e9:.1f} GB too little" in err and err.count("\n") == 1
    assert main(["--model", "qwen3-32b", "--devices", "h100-8", "--dtype", "float32"]) == 0


@pytest.mark.parametrize(
    ("devices", "meshes"),
    [
        ("v6e-4", [(1, 1), (4, 1), (2, 2), (1, 4)]),  # one is enough
        ("v5e-4", [(1, 4), (4, 1), (2, 2)]),
        ("h100-3", [(1, 1), (3, 1)]),  # heads in three parts there are not
        ("v5p-8", [(1, 1), (4, 1), (2, 2), (1, 4)]),
    ],
)
def test_the_first_mesh_is_what_would_be_chosen(devices, meshes):
    rows = plan("--shapes", "qwen3-8b", "--devices", devices)
    assert [tuple(row["mesh"].values()) for row in rows] == meshes


def test_more_devices_or_shorter_streams_are_more_streams():
    few, many = (plan("--shapes", "qwen3-14b", "--devices", f"h200-{n}", "--mesh", f"model={n}")[0] for n in (1, 4))
    assert 0 < few["streams"]["4096"] < many["streams"]["4096"] and few["tokens"] < many["tokens"]
    (row,) = plan("--shapes", "qwen3-14b", "--devices", "h200", "--context", "30000")
    assert list(row["streams"]) == ["4096", "30000"] and row["streams"]["30000"] < row["streams"]["4096"]


@pytest.mark.parametrize("name", ["qwen3-4b", "qwen3-30b-a3b"])
def test_the_parts_of_all_devices_are_the_whole(name):
    whole = plan("--shapes", name, "--devices", "h200")[0]
    part = plan("--shapes", name, "--devices", "h200-4", "--mesh", "model=4")[0]
    for key in ("target_bytes", "drafter_bytes", "token_bytes", "drafter_token_bytes"):
        most = 1.3 if key == "drafter_bytes" else 1.01  # norms, routers, the drafter's fc and its head's core are whole
        assert whole[key] / 4 <= part[key] < most * whole[key] / 4, key


def test_drafters():
    def drafter(*words: str) -> tuple[int, int]:
        row = plan("--model", "qwen3-8b", "--devices", "h100", *words)[0]
        return row["drafter_bytes"], row["drafter_token_bytes"]

    public = drafter()
    assert drafter("--draft", "none") == (0, 0)
    assert drafter("--draft", "qwen3-8b") == public and drafter("--draft", "qwen3-8b-dflash")[0] < public[0]
    assert drafter("--draft", "qwen3-0.6b") == (2 * 596_049_920, 2 * 28 * 8 * 128 * 2)  # as Qwen states them
    assert drafter("--draft", "ngram") == (0, 4) and drafter("--draft", "qwen3-8b+ngram") == (public[0], public[1] + 4)
    small, copy = drafter("--draft-weights", "int8")[0], 151936 * 4096  # of the LM head, for drafting
    assert 0.45 * public[0] < small - copy < 0.6 * public[0]
    (both,) = plan("--model", "qwen3-8b", "--devices", "v5e-1", "--weights", "int8", "--draft-weights", "int8")
    assert both["drafter_bytes"] == small - copy - 151936 * 2, "the target's LM head serves, and its scales"
    assert 8.1e9 < both["target_bytes"] < 8.9e9 and both["fits"], "the layers in 8 bits, the embeddings in 16"


def test_a_folder_by_its_config_as_it_is_loaded(tmp_path):
    make_target(tmp_path / "target")
    make_draft(tmp_path / "draft")
    words = ["--model", str(tmp_path / "target"), "--draft", str(tmp_path / "draft"), "--dtype", "float32"]
    (row,) = plan(*words, "--devices", "v6e-2", "--mesh", "model=2")
    loaded = load_model(tmp_path / "target", tmp_path / "draft", "float32", mesh=(1, 2), plain=True)
    for part, module in (("target", loaded.params.target), ("drafter", loaded.params.draft)):
        shards = [shard for leaf in jax.tree.leaves(module) for shard in leaf.addressable_shards]
        assert row[f"{part}_bytes"] == sum(s.data.nbytes for s in shards if s.device == jax.devices()[0])
    (tmp_path / "target" / "model.safetensors").unlink()
    assert plan(*words, "--devices", "v6e-2", "--mesh", "model=2") == [row], "no weight is read"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "qwen3-8b"], "missing --devices"),
        (["--devices", "v6e-4"], "give --model, or --shapes"),
        (["--devices", "v6e-4", "--model", "qwen3-8b", "--shapes", "qwen3-8b"], "one of them"),
        (["--devices", "v6", "--model", "qwen3-8b"], "devices are given by name"),
        (["--devices", "v6e-4", "--model", "qwen3-8b", "--mesh", "model"], "a mesh is given as"),
        (["--devices", "v6e-4", "--model", "qwen3-8b", "--context", "1"], "--context must be at least 2"),
        (["--devices", "v6e-4", "--shapes", "qwen3-8b", "--draft", "ngram"], "leave --draft out"),
        (["--devices", "v6e-4", "--model", "qwen3-8b", "--dtype", "int4"], "--dtype is one of"),
    ],
)
def test_words_that_make_no_sense(words, says, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--shapes", "qwen3-9b"], "the shapes are qwen3-0.6b"),
        (["--model", "qwen3-8b", "--mesh", "model=8"], "needs 8 devices; v6e-4 has 4 of 34.4 GB"),
        (["--model", "qwen3-8b", "--mesh", "model=3"], "does not divide num_attention_heads"),
        (["--model", "qwen3-8b-dflash"], "is a drafter"),
        (["--model", "qwen3-8b", "--draft", "qwen3-4b"], "made for another target"),
        (["--model", "nowhere"], "neither a name"),
        (["--model", "qwen3-8b", "--draft", "none", "--draft-weights", "int8"], "--draft-weights is for a drafter"),
    ],
)
def test_what_can_not_be_planned(words, says, capsys):
    assert main([*words, "--devices", "v6e-4"]) == 1
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_a_gpu_gives_what_jax_takes(monkeypatch, capsys):
    words = ["--model", "qwen3-8b", "--devices", "l4"]
    for name in GPU_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert plan(*words)[0]["usable_bytes"] == 0.75 * 24e9 and not plan(*words)[0]["fits"]
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".95")
    assert plan(*words)[0]["usable_bytes"] == 0.95 * 24e9 and plan(*words)[0]["fits"]
    assert plan("--model", "qwen3-8b", "--devices", "v6e")[0]["usable_bytes"] == 0.96 * 2**35
    for value in ("0", "1.5", "x", "nan", "-1"):
        monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", value)
        assert main(words) == 1
        assert "XLA_CLIENT_MEM_FRACTION must be a share of the memory" in capsys.readouterr().err


DEPLOYED = [
    ("qwen3-4b", "v5e-1", 1),
    ("qwen3-8b", "v5e-4", 4),
    ("qwen3-8b", "v6e-1", 1),
    ("qwen3-8b", "v6e-4", 4),
    ("qwen3-14b", "v6e-4", 4),
    ("qwen3-32b", "v6e-8", 8),
    ("qwen3-32b", "v5p-8", 4),
    ("qwen3-30b-a3b", "v6e-8", 4),
    ("qwen3-4b", "l4", 1),
    ("qwen3-8b", "a100-80", 1),
    ("qwen3-14b", "h100", 1),
    ("qwen3-32b", "h200", 1),
]


def test_the_table_of_the_page_is_what_the_command_prints(monkeypatch):
    for name in GPU_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    lines = ["| model | on | `--mesh` | target, drafter | temporaries | left | tokens | streams of 4,096 |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, devices, model in DEPLOYED:
        (row,) = plan("--shapes", name, "--devices", devices, "--mesh", f"model={model}")
        _, target, drafter, temporary, left, _, tokens, streams = plan_cells(row)
        cells = [name, devices, f"`model={model}`", f"{target} + {drafter} GB", f"{temporary} GB", f"{left} GB"]
        lines.append("| " + " | ".join([*cells, tokens, streams]) + " |")
    table = "\n".join(lines)
    page = (Path(__file__).parents[3] / "docs" / "deploy.md").read_text(encoding="utf-8")
    assert table in page, f"docs/deploy.md should hold\n\n{table}"


@pytest.mark.e2e
def test_no_device_is_needed():
    words = [sys.executable, "-m", "infer.bench", "plan", "--shapes", "qwen3-14b", "--devices", "v5p-8"]
    done = subprocess.run(words, env=os.environ | {"JAX_PLATFORMS": "tpu"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "data=1,model=4" in done.stdout and not done.stderr, done.stderr
