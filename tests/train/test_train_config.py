"""Settings of a training run: flags, TOML files, shipped recipes, and what a resumed run may change."""

import dataclasses
from pathlib import Path

import factory
import pytest

from domino_jax.errors import DominoError
from domino_jax.runtime.command import UsageError
from train import options as settings
from train.config import GROUPS, TrainConfig, check_options, draft_config, flat
from train.options import dump, parse_options, read_recipe, recipe_path, with_absolute_paths, write_recipe

GIVEN = ["--target", "t", "--data", "a.jsonl", "b.jsonl"]


@pytest.fixture
def out(tmp_path) -> list[str]:
    return ["--out", str(tmp_path / "run")]


def test_no_name_is_in_two_groups():
    names = [f.name for form in (TrainConfig, *GROUPS.values()) for f in dataclasses.fields(form)]
    both = {"data", "drafter", "optimizer"}  # a group and a setting of it
    assert len(set(names) - both) == len(names) - 2 * len(both)


def test_what_is_saved_reads_back(tmp_path, out):
    words = "--target-layer-ids 1 3 --no-head --lr 1e-3 --mesh fsdp=2 --lambda-schedule cosine --epochs 2"
    words += " --features f --pack"
    options = parse_options([*GIVEN, *words.split(), *out])
    values = flat(options)
    assert values["data"] == ("a.jsonl", "b.jsonl") and values["target_layer_ids"] == (1, 3)
    assert values["head"] == "none"
    assert values["features"] == Path("f") and values["steps"] is None and values["lr"] == 1e-3
    (tmp_path / "x.toml").write_text(dump(options))
    assert flat(read_recipe(tmp_path / "x.toml")) == values


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path, out):
    (tmp_path / "mine.toml").write_text(
        'target = "mine"\n[objective]\ngamma = 5\nanchors = 12\n[data]\ndata = "d.jsonl"\n'
    )
    options = parse_options(["--config", str(tmp_path / "mine.toml"), "--anchors", "13", *out])
    assert (options.target, options.data.data) == ("mine", ("d.jsonl",))
    assert (options.objective.gamma, options.objective.anchors) == (5.0, 13)
    assert options.objective.loss == TrainConfig().objective.loss


@pytest.mark.parametrize(
    "words",
    [
        "--lambda-base-start 0 --lambda-base-floor 0.1",
        "--lambda-base-start 0.5 --lambda-base-floor 0.6",
        "--lambda-schedule constant --lambda-base-start 0.2 --lambda-base-floor 0.3",
    ],
)
def test_a_floor_above_the_start_is_refused(out, words):
    with pytest.raises(UsageError, match="--lambda-base-floor at most --lambda-base-start"):
        parse_options([*GIVEN, *words.split(), *out])
    assert parse_options([*GIVEN, "--lambda-base-floor", "0.3", *out]).objective.lambda_base_floor == 0.3


def test_the_recipe_of_a_second_view_is_whole(out):
    options = parse_options(["--config", "demo-orthrus", "--data", "d.jsonl", *out])
    values, base = flat(options), flat(parse_options(["--config", "ablation", "--data", "d.jsonl", *out]))
    assert values["drafter"] == "orthrus"
    different = {name for name in values if values[name] != base[name]}
    own = {"steps", "drafter", "layers", "block_size", "target_layer_ids", "init", "gamma", "lambda_base_decay_ratio"}
    assert different == own, "what is compared has the same data and optimizer"
    demo = flat(parse_options(["--config", "demo", "--data", "d.jsonl", *out]))
    assert {name for name in demo if demo[name] != base[name]} == {"steps", "causal", "lambda_base_floor"}
    assert parse_options(["--config", "demo-orthrus", "--data", "d.jsonl", "--drafter", "orthrus-domino", *out])


@pytest.mark.parametrize("name", ["demo", "qwen3-4b", "qwen3-8b"])
def test_shipped_recipes_are_whole(name, out):
    options = parse_options(["--config", name, "--data", "d.jsonl", *out])
    assert options.target == name and options.drafter.head == "domino"
    if name != "demo":  # the public recipe, docs/algorithm.md, section 7
        values = flat(options)
        wanted = {"optimizer": "adamw", "lr": 6e-4, "warmup": 0.04, "clip": 1.0, "epochs": 6.0, "length": 3072}
        wanted |= {"anchors": 256, "gamma": 7.0, "block_size": 16, "layers": 5, "gru_hidden_dim": 1024, "emb_dim": 256}
        wanted |= {"lambda_base_start": 1.0, "lambda_base_decay_ratio": 1.0, "lambda_schedule": "linear"}
        assert {key: values[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("words", "shifted"),
    [
        ("", True),
        ("--no-head", False),
        ("--head none --shift-label", True),
        ("--head markov", True),
        ("--head selector", False),
        ("--head markov --no-shift-label", False),
        ("--no-shift-label", False),
        ("--config qwen3-8b", True),
        ("--config qwen3-8b --no-head", False),
    ],
)
def test_a_drafter_without_a_head_is_unshifted_unless_it_is_asked_for(out, words, shifted):
    """No other loader knows a shifted one without a head."""
    options = parse_options([*GIVEN, "--mask-token-id", "3", "--layers", "2", *words.split(), *out]).drafter
    draft = draft_config(options, factory.TARGET)
    assert draft.shift_label is shifted and draft.num_proposals == options.block_size - (not shifted)
    assert draft.to_hf()["dflash_config"].get("sample_from_anchor", False) is (shifted and options.head == "none")


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("depth", [2, 3, 5, 28])
def test_a_drafter_reads_no_last_layer_by_default(out, depth, layers):
    target = dataclasses.replace(factory.TARGET, num_hidden_layers=depth)
    options = parse_options([*GIVEN, "--mask-token-id", "3", "--layers", str(layers), *out]).drafter
    assert depth - 1 not in draft_config(options, target).target_layer_ids


def test_earlier_names_mean_what_they_meant(tmp_path, out):
    """In flags, and in the files of runs that began before the names of today."""
    flags = ["--taps", "1", "3", "--begin-as", "d", "--explosion", "5", "--trains", "head"]
    drafter = (options := parse_options([*GIVEN, *flags, *out])).drafter
    assert (drafter.target_layer_ids, drafter.init_from) == ((1, 3), Path("d"))
    assert drafter.freeze_backbone and options.run.max_grad_norm_ratio == 5
    assert parse_options([*GIVEN, "--warm", "--trains=all", *out]).drafter.init == "target-layers"
    with pytest.raises(DominoError, match="give --freeze-backbone"):
        parse_options([*GIVEN, "--trains", "tail", *out])
    (tmp_path / "before.toml").write_text(
        '[drafter]\ntaps = [1, 3]\nhead = false\nwarm = true\ntrains = "head"\n[run]\nexplosion = 5\nremat = true\n'
    )
    values = flat(read_recipe(tmp_path / "before.toml"))
    assert (values["target_layer_ids"], values["init"], values["freeze_backbone"]) == ((1, 3), "target-layers", True)
    assert (values["max_grad_norm_ratio"], values["remat"], values["head"]) == (5.0, True, "none")


WRONG = [
    ("steps = 3", "sets steps, which is no setting there"),
    ('[run]\nsteps = "3"', "sets steps to '3'; expected int"),
    ("[run]\nsteps = true", "sets steps to True"),
    ('[objective]\nloss = "mse"', "expected ce or kl or tv or dspark or acceptance"),
    ("[objective]\nanchor = 3", "sets anchor, which is no setting there; those are anchors"),
    ('out = "x"', "sets out, which belongs on the command line"),
    ("data = 3", "is no table"),
    ("[run", "can't be read as TOML"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_wrong_file_is_refused_by_name(tmp_path, out, text, message):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(DominoError) as error:
        parse_options(["--config", str(tmp_path / "x.toml"), *GIVEN, *out])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "more", "of_file", "message"),
    [
        ("[run]\nbatch = 0", "", True, "--batch must be at least 1, found 0."),
        ("[optimizer]\nlr = -1.0", "--batch 4", True, "--lr must be above 0, found -1.0."),
        ("[data]\nlength = 0", "--layers 2", True, "--length must be at least 1, found 0."),
        ("[run]\nbatch = 8\naccumulate = 3", "", True, "--accumulate 3 does not divide --batch 8."),
        ("[drafter]\nhead = false\nfreeze_backbone = true", "", True, "--freeze-backbone trains the head alone"),
        ("[run]\nbatch = 8", "--accumulate 3", False, "--accumulate 3 does not divide --batch 8."),
        ("[run]\nbatch = 0", "--batch -1", False, "--batch must be at least 1, found -1."),
        ("[run]\nbatch = 8", "--lr 0", False, "--lr must be above 0, found 0.0."),
        ("[run]\nbatch = 0", "--batch 4", None, ""),
    ],
)
def test_a_value_of_a_file_that_makes_no_sense_is_the_files_fault(tmp_path, out, text, more, of_file, message):
    file = tmp_path / "x.toml"
    file.write_text(text)
    words = ["--config", str(file), *GIVEN, *more.split(), *out]
    if of_file is None:  # a flag is given instead
        parse_options(words)
        return
    with pytest.raises(DominoError) as error:
        parse_options(words)
    assert str(error.value).startswith(f"{file}: {message}" if of_file else message)
    assert isinstance(error.value, UsageError) != of_file


def test_a_recipe_that_leaves_the_data_to_the_words_is_not_at_fault(out):
    with pytest.raises(UsageError, match=r"^give --target"):
        parse_options(["--config", "demo", *out])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--batch 0", "--batch must be at least 1, found 0"),
        ("--gamma 0", "--gamma must be above 0, found 0.0"),
        ("--clip nan", "--clip must be above 0, found nan"),
        ("--lambda-base-start 2", "--lambda-base-start must be from 0 to 1, found 2.0"),
        ("--intermediate-size 0", "--intermediate-size must be at least 1"),
        ("--ema 1", "--ema must be from 0 to below 1"),
        ("--max-grad-norm-ratio 1", "--max-grad-norm-ratio must be above 1"),
        ("--epochs 0", "--epochs must be above 0"),
        ("--steps 0", "--steps must be at least 1"),
        ("--batch 8 --accumulate 3", "--accumulate 3 does not divide --batch 8"),
        ("--init target-layers --init-from x", "not both"),
        ("--freeze-backbone --no-head", "needs a head"),
        ("--markov-head-type rnn", "--markov-head-type is of a Markov head"),
        ("--head markov --selector-top-k 8", "--selector-top-k is of a selector"),
        ("--conv-group-size 8", "--conv-group-size is of convolutions"),
        ("--drafter orthrus --conv-group-size 8", "leave out --conv-group-size"),
        ("--head selector --loss kl", "give --loss ce"),
        ("--head selector --selector-top-k 0", "--selector-top-k must be at least 1"),
        ("--head none --enable-confidence-head --loss dspark", "--enable-confidence-head is of a Markov head"),
        ("--head markov --enable-confidence-head", "give --loss tv, dspark or acceptance"),
        ("--head markov --enable-confidence-head --loss kl", "give --loss tv, dspark or acceptance"),
        ("--loss acceptance --position-weights exponential", "weighs a block's proposals by itself"),
        ("--drafter orthrus --head markov", "leave out --head"),
        ("--drafter orthrus-domino --causal", "leave out --causal"),
        ("--config nothing", "neither a file nor a shipped recipe (ablation, demo, demo-orthrus, qwen3-4b, qwen3-8b)"),
    ],
)
def test_refused_values(out, more, message):
    with pytest.raises(DominoError, match=r"^[^\n]*$") as error:
        parse_options([*GIVEN, *out, *more.split()])
    assert message in str(error.value)


def test_a_run_needs_target_and_data(out):
    with pytest.raises(DominoError, match="give --target"):
        parse_options(out)


def test_a_resumed_run_keeps_its_settings_but_for_some(tmp_path, out):
    folder = tmp_path / "run"
    with pytest.raises(DominoError, match="no run to resume"):
        parse_options(["--resume", *out])
    folder.mkdir()
    options = parse_options([*GIVEN, *out, "--gamma", "3", "--mesh", "fsdp=2"])
    settings.write_recipe(options, folder)
    again = parse_options(["--resume", *out])
    assert flat(again) == flat(options) and again.resume
    assert parse_options(["--resume", *out, "--lr", "1e-5", "--mesh", "data=4"]).run.mesh == "data=4"
    assert parse_options(["--resume", *out, "--gamma", "3"]).objective.gamma == 3  # the same is no change
    with pytest.raises(DominoError, match="leave out --gamma, --batch"):
        parse_options(["--resume", *out, "--gamma", "2", "--batch", "9"])
    with pytest.raises(DominoError, match="leave out --config"):
        parse_options(["--resume", *out, "--config", "demo"])
    with pytest.raises(DominoError, match="already holds a run"):
        parse_options([*GIVEN, *out])


def test_a_path_is_taken_before_a_recipe_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_path("demo").parent.name == "recipes"
    Path("demo").write_text("")
    assert recipe_path("demo") == Path("demo")
    with pytest.raises(DominoError, match="give --target"):
        check_options(read_recipe(Path("demo")))


def test_a_run_goes_on_from_another_working_folder(tmp_path, monkeypatch):
    """What is a file or a folder is kept by its absolute path; names of models and datasets are kept as they are."""
    for folder in ("model", "features", "first", "elsewhere"):
        (tmp_path / folder).mkdir()
    for file in ("a.jsonl", "held.jsonl"):
        (tmp_path / file).write_text("")
    monkeypatch.chdir(tmp_path)
    words = "--target model --data a.jsonl org/dataset --features features --validation held.jsonl --init-from first"
    options = parse_options([*words.split(), "--out", "run"])
    Path("run").mkdir()
    write_recipe(options, options.out)
    begun = flat(with_absolute_paths(options))
    monkeypatch.chdir("elsewhere")
    again = flat(parse_options(["--resume", "--out", "../run"]))
    assert again == begun and again["target"] == str(tmp_path / "model")
    assert again["data"] == (str(tmp_path / "a.jsonl"), "org/dataset")
    assert [again[name] for name in ("features", "validation", "init_from")] == [
        tmp_path / name for name in ("features", "held.jsonl", "first")
    ]
    (tmp_path / "elsewhere" / "demo").mkdir()
    again = parse_options(["--resume", "--out", str(tmp_path / "run"), "--target", "demo"])
    assert again.target == "demo"  # the public name, which comes first
