"""The commands made of commands: the ablation, and the shipped pair from nothing."""

import json
import sys
from typing import get_args

import pytest
from factory import make_target

from infer.bench import main as bench
from train import config, options
from train.__main__ import main as train
from train.demo import command
from train.evaluate import ablation
from train.monitor import curves


def test_the_table_has_mean_and_spread():
    taus = {"dflash": (2.0, 2.2), "joint": (3.0, 3.0), "curriculum": (3.1, 3.5)}
    rows = [
        {"kind": kind, "seed": seed, "final_tau": tau, "base_tau": None if kind == "dflash" else tau - 1}
        | {"ways": {} if kind == "dflash" else {"chain, 64 candidates": tau / 2}}
        for kind, both in taus.items()
        for seed, tau in enumerate(both)
    ]
    assert ablation.table(rows).splitlines() == [
        "| | seed 0 | seed 1 | τ, mean ± sd over seeds | without the causal head | chain, 64 candidates |",
        "|---|---|---|---|---|---|",
        "| dflash | 2.000 | 2.200 | **2.100 ± 0.141** |  |  |",
        "| joint | 3.000 | 3.000 | **3.000 ± 0.000** | 2.000 ± 0.000 | 1.500 ± 0.000 |",
        "| curriculum | 3.100 | 3.500 | **3.300 ± 0.283** | 2.300 ± 0.283 | 1.650 ± 0.141 |",
    ]


def test_every_kind_can_be_asked_for():
    assert get_args(ablation.Kind) == tuple(ablation.KINDS)


def test_a_run_that_stopped_early_is_not_finished(tmp_path):
    assert ablation.unfinished(tmp_path, 10)
    curves.write_metrics([{"step": 5}], tmp_path / "metrics.jsonl")
    assert ablation.unfinished(tmp_path, 10) and not ablation.unfinished(tmp_path, 5)


def test_a_drafter_is_measured_over_the_form_of_the_target_that_it_was_trained_over(tmp_path):
    given = ablation.Ablation(("d.jsonl",), tmp_path / "held.jsonl", tmp_path)
    for name, text in (("int8", '[run]\nweights = "int8"\n'), ("usual", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.toml").write_text(text)
    forms = [ablation.measurement(given, "t", tmp_path / n).pair.device.weights for n in ("int8", "usual", "nothing")]
    assert forms == ["int8", "auto", "auto"]


RECIPE = """
[data]
length = 24
[drafter]
{}
block_size = 4
gru_hidden_dim = 8
emb_dim = 6
mask_token_id = 3
[objective]
anchors = 4
[run]
batch = 4
log_every = 2
"""


@pytest.mark.e2e
@pytest.mark.slow
def test_an_ablation_trains_measures_and_compares(tmp_path, capfd):
    make_target(tmp_path / "target")
    lines = [{"input_ids": [5, i], "tokens": [(i + 3 * k) % 30 + 5 for k in range(20)]} for i in range(5, 25)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"input_ids": [7, i]}) + "\n" for i in range(5, 9)))
    (tmp_path / "tiny.toml").write_text(RECIPE.format("layers = 1\ntarget_layer_ids = [0, 1]"))
    (tmp_path / "view.toml").write_text(RECIPE.format('drafter = "orthrus"'))
    words = f"--target {tmp_path}/target --config {tmp_path}/tiny.toml --view-config {tmp_path}/view.toml"
    words += f" --data {tmp_path}/data.jsonl --steps 4"
    words += f" --prompts {tmp_path}/held.jsonl --out {tmp_path}/runs --seeds 0 --num-prompts 4 --prompt-tokens 2"
    words += " --new-tokens 8 --min-distinct 0 --candidates 5 --trees 4 --kinds " + " ".join(ablation.KINDS)
    assert ablation.main(words.split()) == 0
    rows = json.loads((tmp_path / "runs" / "ablation.json").read_text())
    assert [row["kind"] for row in rows] == list(ablation.KINDS)
    assert rows[0]["base_tau"] is None if "base_tau" in rows[0] else True
    assert list(rows[0]["ways"]) == ["tree of 4"]
    assert list(rows[5]["ways"]) == ["chain, 5 candidates", "tree of 4", "tree of 4, 5 candidates"]
    for kind, head, start in (("dflash", "none", 1.0), ("joint", "domino", 0.0), ("dspark", "markov", 0.0)):
        settings = config.flat(options.read_recipe(tmp_path / "runs" / f"{kind}-0" / "settings.toml"))
        assert (settings["head"], settings["lambda_base_start"]) == (head, start)
    assert (tmp_path / "runs" / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "runs" / "ablation.md").read_text() in capfd.readouterr().out
    assert ablation.main(words.split()) == 0
    assert "python -m train " not in capfd.readouterr().out, "what is finished is not run again"


@pytest.mark.e2e
@pytest.mark.slow
def test_the_shipped_drafter_from_nothing(tmp_path, capfd):
    """The one command, with a hundredth of the work; the second start finds everything done but the measuring."""
    words = f"--out {tmp_path} --target demo --prompts 16 --held-out 4 --new-tokens 24 --steps 4".split()
    assert command.main(words) == 0
    said = capfd.readouterr().out
    order = ["train.prompts", "train.regenerate", "train --config demo", "train calibrate", "train.validate"]
    places = [said.index(f"$ python -m {command}") for command in order]
    assert places == sorted(places) and "without the causal head" in said
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()
    assert command.main(words) == 0
    assert [line.split()[3] for line in capfd.readouterr().out.splitlines() if line.startswith("$")] == [
        "train.validate"
    ]


def test_the_demo_names_every_command_from_the_text_to_the_measure(tmp_path):
    found = [stage.words[:2] for stage in command.stages(command.Demo(tmp_path))]
    found = [first if second.startswith("-") else f"{first} {second}" for first, second in found]
    data = ["train.pretrain", *["train.prompts"] * 3, *["train.regenerate"] * 2]
    assert found == [*data, "train", "train.prompts", "train calibrate", "train.validate"]
    assert command.main(["--out", str(tmp_path), "--prompts", "1"]) == 2


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        (["--seeds"], 2, "at least one of --seeds"),
        (["--kinds"], 2, "at least one of --kinds"),
        (["--candidates", "0"], 2, "--candidates must be at least 1"),
        (["--steps", "0"], 2, "--steps must be at least 1"),
        (["--seeds", "-1"], 2, "--seeds must be from 0 to 2^32 - 1"),
        (["--num-prompts", "0"], 2, "--num-prompts must be at least 1"),
        (["--new-tokens", "0"], 2, "--new-tokens must be at least 1"),
        (["--min-distinct", "nan"], 2, "--min-distinct must be from 0 to 1"),
        (["--config", "nothing"], 2, "neither a file nor a shipped recipe"),
        (["--kinds", "dflash", "orthrus", "--view-config", "nothing"], 2, "neither a file nor a shipped recipe"),
    ],
)
def test_what_an_ablation_would_find_wrong_in_the_end_is_said_before_it_trains(
    tmp_path, capsys, monkeypatch, more, status, says
):
    monkeypatch.setattr(ablation, "run_missing", lambda _: pytest.fail("trained"))
    words = ["--data", "a.jsonl", "--prompts", "b.jsonl", "--out", str(tmp_path / "runs")]
    assert ablation.main([*words, *more]) == status
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_plots_that_can_not_be_drawn_are_said_before_anything_runs(tmp_path, capsys, monkeypatch):
    """Of the ablation, the benchmark and a training: matplotlib is imported at their ends."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(ablation, "run_missing", lambda _: pytest.fail("trained"))
    monkeypatch.setattr("train.run.find", lambda _: pytest.fail("looked for the target"))
    monkeypatch.setattr("train.data.dataset.read_corpus", lambda *_, **__: pytest.fail("read the data"))
    out = str(tmp_path / "out")
    for main, words in (
        (ablation.main, ["--data", "a.jsonl", "--prompts", "b.jsonl", "--out", out]),
        (bench, ["--plot", out]),
        (bench, ["--quality", "a.jsonl", "--plot", out]),
        (train, ["--target", "demo", "--data", "a.jsonl", "--out", out]),
    ):
        assert main(words) == 1
        assert (
            'matplotlib is not installed; install it with: pip install "domino-jax[plots]"' in capsys.readouterr().err
        )
        assert not (tmp_path / "out").exists()
