"""Validation by real decoding: τ against the restatement, compiled once, on meshes, and as a command."""

import dataclasses
import json
from pathlib import Path

import factory
import jax
import jax.numpy as jnp
import loops
import numpy as np
import orbax.checkpoint as ocp
import pytest
import reference
from factory import Pair, make_draft, make_target
from jax.sharding import NamedSharding, PartitionSpec
from loops import compilations

from convert import hf, loading
from convert.registry import DEMO_FOLDER
from domino_jax import sharding
from domino_jax.config import DraftConfig
from domino_jax.errors import DominoError
from domino_jax.runtime.provenance import distinct_ngrams
from domino_jax.runtime.slots import Slots
from domino_jax.weights import Params, axes, flatten, init_weights
from train.evaluate.prompts import read_heldout_prompts, varied
from train.evaluate.validate import (
    MeasuredAcceptance,
    Validate,
    Validation,
    check_validate,
    main,
    measure_acceptance,
)
from train.loading import PairOptions, notes

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = [[1, 2, 3], [40, 7] * 4, [11], [5, 28, 30, 44], [60, 61]]
COUNT = 14
STOPS = (33,)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return factory.good_pair(dataclasses.replace(factory.TARGET, num_hidden_layers=2), 1, num_hidden_layers=1)


def validation(pair: Pair, batch: int = 2) -> Validation:
    return Validation(
        pair.params.target, pair.configs, PROMPTS, STOPS, jnp.dtype("float32"), new_tokens=COUNT, batch=batch
    )


def restated(pair: Pair, head: bool) -> list[list[int]]:
    """Drafts accepted for each prompt by the restatement in NumPy."""
    target_weights, target_config, draft_weights, draft_config = pair.reference()
    if not head:
        draft_config = json.loads(json.dumps(draft_config))
        for key in ("projector_type", "gru_hidden_dim", "emb_dim", "pure_draft_prefix_len"):
            draft_config["dflash_config"].pop(key)
    return [
        reference.decode_greedy(target_weights, target_config, draft_weights, draft_config, p, COUNT, STOPS)["accepted"]
        for p in PROMPTS
    ]


def test_tau_is_that_of_the_restatement_with_and_without_the_head(pair):
    report = validation(pair).run(flatten(pair.params.draft))
    assert report.base is not None and report.final.tau is not None and report.base.tau is not None
    for found, head in ((report.final, True), (report.base, False)):
        expected = restated(pair, head)
        assert [list(row) for row in found.accepted] == expected
        lengths = [m + 1 for row in expected for m in row]
        assert found.tau == pytest.approx(np.mean(lengths)) and found.cycles == len(lengths)
        assert found.per_prompt == [np.mean(row) + 1 if row else None for row in expected]
    assert report.final.tau > 1.3 * report.base.tau, "this pair's head knows what its base does not"
    row = report.row()
    assert row["final_tau"] == report.final.tau and row["base_cycles"] == report.base.cycles
    assert json.loads(json.dumps(row)) == row and report.seconds > 0


def test_later_validations_compile_nothing_and_take_the_weights_as_they_are_now(pair):
    check, weights = validation(pair), flatten(pair.params.draft)
    changed = {**weights, "norm": -weights["norm"]}
    first = check.run(weights)
    check.run(changed)  # whose drafts look broken, which is looked into by a program of its own
    with compilations() as seen:
        again = check.run(weights)
        other = check.run(changed)
        assert check.run(weights).final == first.final
    assert seen == []
    assert (again.final, again.base) == (first.final, first.base)
    assert other.base != first.base
    assert not any(w.is_deleted() for w in weights.values())


def test_masters_are_rounded_to_the_dtype_of_the_computation(pair, monkeypatch):
    seen = []

    def run(self, completions, *_):
        seen.append(flatten(self._params.draft))
        return iter(())

    monkeypatch.setattr(Slots, "run", run)
    weights = flatten(pair.params.draft)
    check = Validation(pair.params.target, pair.configs, PROMPTS, STOPS, jnp.dtype("bfloat16"))
    assert check.run(weights).final.tau is None, "no answer had a cycle"
    with_head, without = seen
    assert set(with_head) == set(weights) and set(without) == {p for p in weights if not p.startswith("head.")}
    for path, weight in with_head.items():
        np.testing.assert_array_equal(weight, weights[path].astype(jnp.bfloat16))


def test_plain_dflash_has_one_figure(pair):
    configs, params = loading.without_head(pair.configs, pair.params)
    report = validation(Pair(params, configs)).run(flatten(params.draft))
    assert report.base is None and "base_tau" not in report.row()
    assert [list(row) for row in report.final.accepted] == restated(pair, head=False)


def test_the_error_of_tau_is_that_of_resampled_prompts():
    rng = np.random.default_rng(0)
    easy = rng.random(200) < 0.4
    rows = [tuple(rng.binomial(6, 0.9 if e else 0.3, size=rng.integers(4, 9) if e else 15)) for e in easy]
    found = MeasuredAcceptance(tuple(tuple(int(m) for m in row) for row in rows))
    resampled = []
    for _ in range(2000):
        chosen = [rows[i] for i in rng.integers(0, len(rows), len(rows))]
        resampled.append(sum(map(sum, chosen)) / sum(map(len, chosen)) + 1)
    assert found.error == pytest.approx(np.std(resampled), rel=0.1)
    assert found.spread == pytest.approx(np.std([np.mean(row) for row in rows], ddof=1))
    nothing = MeasuredAcceptance(((), ()))
    assert nothing.tau is None and nothing.error is None and nothing.per_prompt == [None, None]


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_sharded_weights_give_the_same(axis):
    target = dataclasses.replace(factory.TARGET, num_hidden_layers=2, vocab_size=88)
    pair = factory.good_pair(target, 1, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    weights = flatten(pair.params.draft)
    alone = validation(pair).run(weights)
    if axis == "data":
        mesh = sharding.make_mesh(2, 2)
    else:  # a trainer's mesh may have a third axis, over which matrices are divided while they lie in memory
        kinds = (jax.sharding.AxisType.Auto,) * 3
        mesh = jax.make_mesh((1, 2, 2), ("data", "fsdp", "model"), kinds, devices=jax.devices()[:4])
    assert pair.configs.draft is not None
    letters = flatten(axes(pair.configs.draft))

    def place(path: str, weight: jax.Array) -> jax.Array:
        parts = list(sharding.spec(letters[path]))
        names = letters[path].split()
        if axis == "fsdp" and len(names) > 1 and "D" in names:
            parts[names.index("D")] = "fsdp"
        return jax.device_put(weight, NamedSharding(mesh, PartitionSpec(*parts)))

    with jax.set_mesh(mesh):
        spread = {path: place(path, w) for path, w in weights.items()}
        frozen = factory.place(pair.params.target, pair.configs.target, mesh)
        check = validation(Pair(Params(frozen, pair.params.draft), pair.configs), batch=4)
        report = check.run(spread)
        with compilations() as seen:
            again = check.run(spread)
    assert seen == [] and again.final == report.final
    assert (report.final, report.base) == (alone.final, alone.base)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("validate")
    make_target(root / "target", eos=None)
    make_draft(root / "draft")
    rows = [{"input_ids": [50 + i, 60, 70]} for i in range(3)] + [{"prompt": "def f("}]
    (root / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.e2e
@pytest.mark.slow
def test_the_command_prints_what_validation_gives(folder, capsys, monkeypatch):
    monkeypatch.setattr("train.monitor.decoding_progress.EVERY", 0.0)
    words = ["--target", str(folder / "target"), "--draft", str(folder / "draft")]
    words += ["--prompts", str(folder / "held.jsonl"), "--new-tokens", "9", "--batch-size", "3"]
    assert main([*words, "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert "/4 prompts  " in printed.err and "/4 prompts without the head  " in printed.err
    pair = loading.load_model(folder / "target", folder / "draft", "float32", plain=True)
    prompts = [[50, 60, 70], [51, 60, 70], [52, 60, 70], pair.tokenizer("def f(")["input_ids"]]
    report = Validation(pair.params.target, pair.configs, prompts, (), pair.dtype, new_tokens=9, batch=3).run(
        flatten(pair.params.draft)
    )
    assert {key: found[key] for key in report.row() if key != "validation_seconds"} == {
        key: value for key, value in report.row().items() if key != "validation_seconds"
    }
    assert found["num_prompts"] == 4 and len(found["final_tau_per_prompt"]) == 4
    assert main(words) == 0
    text = capsys.readouterr().out
    words += ["--json", "--draft-weights", "int8", "--head-candidates", "16", "--mesh", "data=2,model=1"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["head_candidates"] == 16
    assert f"τ {report.final.tau:.2f} ± {report.final.error:.2f}" in text and "without the causal head " in text


@pytest.mark.e2e
def test_a_training_runs_newest_checkpoint_is_measured(folder, tmp_path):
    config = hf.parse_config(hf.read_json(folder / "draft" / "config.json"))
    assert isinstance(config, DraftConfig)
    hf.write_json(tmp_path / "config.json", config.to_hf())
    (tmp_path / "settings.toml").write_text(f'target = "{folder / "target"}"')
    with ocp.CheckpointManager((tmp_path / "checkpoints").absolute()) as manager:
        for step in (1, 2):
            weights = flatten(init_weights(config, jax.random.key(step)))
            manager.save(step, args=ocp.args.StandardSave({"weights": weights}))
        manager.wait_until_finished()
    options = Validate(folder / "held.jsonl", run=tmp_path)
    assert check_validate(options).folders(notes()) == (folder / "target", tmp_path)
    found = loading.load_model(*check_validate(options).folders(notes()), "float32", plain=True).params.draft
    for path, weight in flatten(found).items():
        np.testing.assert_array_equal(weight, weights[path])
    other = dataclasses.replace(options, pair=PairOptions(str(folder / "draft")))
    assert check_validate(other).folders(notes()) == (folder / "draft", tmp_path)


@pytest.mark.parametrize(
    ("status", "words", "sentence"),
    [
        (2, [], "give either --run"),
        (2, ["--draft", "draft"], "give either --run"),
        (2, ["--draft", "draft", "--run", "target"], "not both"),
        (2, ["--target", "target"], "give one with --draft"),
        (2, ["--target", "target", "--draft", "none"], "give one with --draft"),
        (2, ["--model", "qwen3-0.6b"], "give one with --draft"),
        (2, ["--model", "target", "--draft", "draft", "--mesh", "3"], "data=2,model=4"),
        (2, ["--model", "target", "--draft", "draft", "--revision", "main"], "--revision chooses a revision of a Hub"),
        (
            2,
            ["--model", "target", "--draft", "draft", "--head-candidates", "0"],
            "--head-candidates must be at least 1",
        ),
        (2, ["--model", "target", "--draft", "draft", "--min-distinct", "nan"], "--min-distinct must be from 0 to 1"),
        (2, ["--model", "target", "--draft", "draft", "--num-processes", "2"], "several processes need --coordinator"),
        (1, ["--run", "target"], "settings.toml"),
        (1, ["--draft", "target", "--target", "target"], "is the target itself"),
        (1, ["--draft", "draft", "--target", "target", "--num-prompts", "5"], "has 4 prompts"),
        (1, ["--draft", "draft", "--target", "target", "--new-tokens", "300"], "no room for 300 new tokens in 256"),
        (2, ["--draft", "draft", "--target", "target", "--new-tokens", "0"], "--new-tokens must be at least 1"),
    ],
)
def test_wrong_words_are_one_sentence(folder, capsys, monkeypatch, status, words, sentence):
    monkeypatch.chdir(folder)
    assert main(["--prompts", "held.jsonl", *words]) == status
    *warnings, error = capsys.readouterr().err.splitlines()
    assert sentence in error and error.startswith("error: ")
    assert all(line.startswith("warning: ") for line in warnings)


def test_prompts_are_cut_and_those_without_room_left_out(tmp_path):
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps({"input_ids": [7] * length}) + "\n" for length in (3, 57, 58)))
    assert list(map(len, read_heldout_prompts(path, 9, 60, None, 4))) == [3, 57]
    assert list(map(len, read_heldout_prompts(path, 9, 60, None, 4, cut=10))) == [3, 10, 10]
    with pytest.raises(DominoError, match="no prompt to validate with; 3 left out that have no room"):
        read_heldout_prompts(path, 9, 60, None, 60)


def test_prompts_whose_answers_loop_are_left_out(pair):
    start = loops.begin(pair.params, pair.configs, PROMPTS, COUNT)
    lean = loops.autoregress(pair.params, pair.configs, start)
    shares = []
    for tokens in (output.tokens for output in lean):
        grams = list(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
        shares.append(len(set(grams)) / len(grams))
    assert shares == [distinct_ngrams(output.tokens) for output in lean]
    least = sorted(shares)[2]
    kept = [p for p, share in zip(PROMPTS, shares, strict=True) if share >= least]
    assert 0 < len(kept) < len(PROMPTS)

    def chosen(count: int | None) -> list[list[int]]:
        return varied(
            pair.params,
            pair.configs,
            PROMPTS,
            (),
            jnp.dtype("float32"),
            new_tokens=COUNT,
            batch=2,
            least=least,
            count=count,
        )

    assert chosen(None) == kept and chosen(1) == kept[:1]


@pytest.mark.e2e
@pytest.mark.slow
def test_the_shipped_pair_has_the_acceptance_that_its_page_says():
    found = measure_acceptance(
        Validate(
            DEMO_FOLDER / "prompts.jsonl",
            pair=PairOptions("demo"),
            num_prompts=64,
            prompt_tokens=48,
            min_distinct=0.8,
        )
    )
    assert round(found["final_tau"], 2) == 4.61 and round(found["base_tau"], 2) == 3.41
