"""Temperatures of confidences: what they are fitted to, what comes of them, and the command."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import factory
import jax.numpy as jnp
import loops
import numpy as np
import pytest
import reference
from factory import Pair, make_draft, make_target

from convert import folders, hf
from convert.loading import LoadedModel, load_model
from convert.options import SamplingOptions, TreeSettings
from domino_jax import decode
from domino_jax.config import DraftConfig
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.heads.markov import MarkovHead
from domino_jax.drafters.tree import TreeDrafter
from domino_jax.runtime.auto import survival
from domino_jax.runtime.slots import Completion, FixedDrafts, Request, Slots
from domino_jax.sampling import SamplingParams
from train.evaluate.calibrate import fewest, main, observe_cycles, write_calibrated
from train.evaluate.calibration import (
    Calibration,
    Cycles,
    brier_score,
    calibrate,
    calibration_error,
    fit_temperatures,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

TRUE = np.array([0.5, 3.0, 1.0])


def simulated(count: int = 20_000, seed: int = 0) -> Cycles:
    """Cycles whose proposals are accepted with the chances that logits divided by TRUE say."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(1.0, 2.0, (count, len(TRUE)))
    stands = rng.random(logits.shape) < 1 / (1 + np.exp(-logits / TRUE))
    return Cycles(logits, np.cumprod(stands, axis=1).sum(axis=1), np.arange(count) % 2 == 1)


def test_the_temperatures_that_chances_came_from_are_found():
    cycles = simulated()
    np.testing.assert_allclose(fit_temperatures(cycles), TRUE, rtol=0.15)
    for row in calibrate(cycles).rows():
        j = row["position"] - 1
        assert row["cycles"] == (cycles.accepted >= j).sum()
        assert row["accepted"] == pytest.approx((cycles.accepted > j).sum() / row["cycles"])
        assert row["ece_after"] < 0.015 and row["ece_after"] < row["ece_before"]
        assert row["brier_after"] < row["brier_before"]


def test_what_is_said_of_each_half_was_fitted_to_the_other():
    cycles = simulated(600)
    found = calibrate(cycles)
    for half in (False, True):
        mine = cycles.second == half
        others = fit_temperatures(cycles.where(~mine))
        np.testing.assert_array_equal(found.after[mine], survival(cycles.logits[mine], others))


def test_the_scores_are_their_definitions():
    chances, stood = np.array([0.0, 0.02, 0.51, 0.54, 1.0]), np.array([False, True, True, False, True])
    # Bins [0, 0.05), [0.5, 0.55) and [0.95, 1] with two, two and one cycles.
    expected = 2 / 5 * abs(0.01 - 0.5) + 2 / 5 * abs(0.525 - 0.5) + 1 / 5 * abs(1.0 - 1.0)
    assert calibration_error(chances, stood) == pytest.approx(expected)
    assert brier_score(chances, stood) == pytest.approx(np.mean((chances - stood) ** 2))
    logits = np.array([[0.0, 2.0], [800.0, -800.0]])
    sigmoid = 1 / (1 + np.exp(-2.0 / 4.0))
    np.testing.assert_allclose(survival(logits, np.array([1.0, 4.0])), [[0.5, 0.5 * sigmoid], [1.0, 0.0]])


def test_of_equally_good_temperatures_the_nearest_to_1_is_taken():
    cycles = Cycles(np.zeros((10, 2)), np.arange(10) % 3, np.arange(10) % 2 == 1)
    assert fit_temperatures(cycles).tolist() == [1.0, 1.0]


def loaded(pair: Pair, **changes: Any) -> LoadedModel:
    """A pair as loading gives it, with a drafter of other settings."""
    drafter = pair.configs.drafter
    assert isinstance(drafter, BlockDrafter)
    temperatures = (7.0,) * pair.configs.proposals
    config = dataclasses.replace(drafter.config, confidence_temperatures=temperatures)
    configs = dataclasses.replace(pair.configs, drafter=BlockDrafter(config, **changes))
    return LoadedModel(configs, pair.params, None, (33,), jnp.dtype("float32"), (), 0.0)


PROMPTS = [[1, 2, 3], [40, 7] * 4, [11]]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return factory.good_pair(dataclasses.replace(factory.TARGET, num_hidden_layers=2), 1, num_hidden_layers=1)


def test_whole_chains_are_observed_in_decoding(pair):
    """Whatever threshold the drafter has."""
    seen = observe_cycles(loaded(pair, confidence_threshold=0.9), PROMPTS, SamplingOptions(), 14, 4)
    target_w, target_cfg, draft_w, draft_cfg = pair.reference()
    accepted = [
        reference.decode_greedy(target_w, target_cfg, draft_w, draft_cfg, prompt, 14, [33])["accepted"]
        for prompt in PROMPTS
    ]
    assert seen.accepted.tolist() == [count for cycles in accepted for count in cycles]
    assert seen.second.tolist() == [row == 1 for row, cycles in enumerate(accepted) for _ in cycles]
    assert seen.logits.shape == (len(seen.accepted), pair.configs.proposals)
    assert np.isfinite(seen.logits).all() and np.ptp(seen.logits) > 1


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_confidences_are_observed_as_the_drafter_gives_them_without_temperatures(pair, temperature):
    sampling = SamplingOptions(temperature)
    seen = observe_cycles(loaded(pair, confidence_threshold=0.9), PROMPTS, sampling, 14, 2)
    how = dataclasses.replace(sampling.params(), max_tokens=14, stop_token_ids=(33,))
    answers = [Completion(Request(ids, how, (row,))) for row, ids in enumerate(PROMPTS)]
    list(Slots(pair.params, pair.configs, 2, jnp.dtype("float32")).run(answers))
    assert seen.accepted.tolist() == [m for answer in answers for m in answer.accepted]
    assert all(answer.cycles[0].confidence == () for answer in answers), "nobody asked"
    if temperature == 0:
        state = loops.begin(pair.params, pair.configs, PROMPTS[:1], 14)
        view, drafter = decode.view(pair.params, pair.configs, state), pair.configs.drafter
        assert isinstance(drafter, BlockDrafter)
        first = drafter.propose(pair.params.draft, state.drafter, view, pair.configs.proposals, None)[0]
        np.testing.assert_allclose(seen.logits[0], np.asarray(first.confidence)[0], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("calibrate")
    make_target(root / "target", eos=None)
    make_draft(root / "draft", head=MarkovHead(7, enable_confidence_head=True))
    rows = [{"input_ids": [50 + i, 60, 70]} for i in range(4)]
    (root / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def draft_of(folder: Path) -> DraftConfig:
    config = folders.read_config(folder)
    assert isinstance(config, DraftConfig)
    return config


def synthetic(count: int) -> tuple[Calibration, dict[str, list[float]]]:
    """A calibration of so many proposals, and the figures that are written of it."""
    cycles = simulated(60)
    found = calibrate(cycles._replace(logits=np.repeat(cycles.logits[:, :1], count, axis=1)))
    return found, {"temperatures": found.temperatures.tolist()}


@pytest.mark.parametrize(
    ("taus", "candidates"),
    [
        ({}, None),
        ({None: 5.0, 64: 4.96, 256: 5.0}, 64),
        ({None: 5.0, 64: 4.94, 256: 4.96}, 256),
        ({None: 5.0, 64: 4.0, 256: 4.9}, None),
        ({None: 5.0, 64: 5.1, 256: 4.0}, 64),
    ],
)
def test_the_fewest_candidates_that_lose_little_are_kept(taus, candidates):
    assert fewest(taus) == candidates


def test_the_copy_has_the_temperatures_and_the_source_stays(folder, tmp_path):
    source, out = tmp_path / "draft", tmp_path / "out"
    source.mkdir()
    for file in (folder / "draft").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    config = draft_of(source)
    raw = hf.read_json(source / "config.json")
    raw["dflash_config"]["confidence_temperatures"] = [9.0] * config.num_proposals  # another calibration's
    hf.write_json(source / "config.json", raw)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    calibration, figures = synthetic(config.num_proposals)
    write_calibrated(out, source, calibration, figures)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    assert draft_of(out) == dataclasses.replace(config, confidence_temperatures=tuple(figures["temperatures"]))
    after = {file.name: file.read_bytes() for file in out.iterdir()}
    assert after.keys() - before.keys() == {"calibration.json", "reliability.png"}
    assert all(after[name] == before[name] for name in before.keys() - {"config.json"})
    assert json.loads(after["calibration.json"])["temperatures"] == figures["temperatures"]


@pytest.mark.slow
def test_so_has_one_of_orbax(folder, tmp_path):
    folders.convert_folder(folder / "draft", tmp_path / "orbax")
    calibration, figures = synthetic(draft_of(folder / "draft").num_proposals)
    write_calibrated(tmp_path / "out", tmp_path / "orbax", calibration, figures)
    model = load_model(folder / "target", tmp_path / "out", "float32", confidence_threshold=0.5)
    assert model.configs.draft.confidence_temperatures == tuple(figures["temperatures"])


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--temperature", "1", "--sampler", "coupled"]], ids=["greedy", "sampled"])
def test_the_command_prints_and_writes_what_decoding_then_uses(folder, tmp_path, capsys, monkeypatch, how):
    monkeypatch.setattr("train.monitor.decoding_progress.EVERY", 0.0)
    words = ["--target", str(folder / "target"), "--draft", str(folder / "draft"), "--new-tokens", "20", *how]
    words += ["--prompts", str(folder / "held.jsonl"), "--out", str(tmp_path / "out")]
    assert main([*words, "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found == json.loads((tmp_path / "out" / "calibration.json").read_text()) and "cycles are few" in printed.err
    assert " prompts  " in printed.err and " tokens/s  τ " in printed.err
    assert found["num_samples"] == found["positions"][0]["cycles"] > 10
    taus = {None if n == "all" else int(n): tau for n, tau in found["tree_tau"].items()}
    assert list(taus) == [None, 64, 256] and found["tree_candidates"] == fewest(taus)
    tree = load_model(folder / "target", tmp_path / "out", "float32", tree=TreeSettings(6)).configs.drafter
    assert isinstance(tree, TreeDrafter) and tree.candidates == found["tree_candidates"]
    assert main(words) == 1 and "already holds" in capsys.readouterr().err
    assert main([*words[:-2], "--tree-nodes", "0"]) == 0 and "| position | reached |" in capsys.readouterr().out
    model = load_model(folder / "target", tmp_path / "out", "float32", confidence_threshold=0.5)
    assert model.configs.draft.confidence_temperatures == tuple(found["temperatures"])
    both = [Completion(Request([50, 60, 70], SamplingParams(max_tokens=20))) for _ in range(2)]
    for policy, answer in zip((None, FixedDrafts(0)), both, strict=True):
        list(Slots(model.params, model.configs, 1, model.dtype, policy=policy).run([answer]))
    assert both[0].tokens == both[1].tokens


@pytest.mark.parametrize(
    ("status", "words", "sentence"),
    [
        (2, ["--draft", "none"], "give it with --draft"),
        (2, ["--draft", "draft+ngram"], "give it with --draft"),
        (2, ["--draft", "draft", "--tree", "4"], "leave --tree out"),
        (2, ["--draft", "draft", "--confidence-threshold", "0"], "--confidence-threshold out"),
        (2, ["--draft", "draft", "--temperature", "-1"], "--temperature must be 0 or more"),
        (2, ["--draft", "draft", "--out", "draft"], "draft there is read"),
        (2, ["--draft", "draft", "--out", "draft/copy"], "draft there is read"),
        (1, ["--draft", "draft", "--out", "."], "already holds"),
        (1, ["--draft", "draft", "--num-prompts", "9"], "has 4 prompts"),
    ],
)
def test_wrong_words_are_one_sentence(folder, capsys, monkeypatch, status, words, sentence):
    monkeypatch.chdir(folder)
    assert main(["--prompts", "held.jsonl", "--target", "target", *words]) == status
    *warnings, error = capsys.readouterr().err.splitlines()
    assert sentence in error and error.startswith("error: ")
    assert all(line.startswith("warning: ") for line in warnings)
