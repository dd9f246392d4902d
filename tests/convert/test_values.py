"""Loose values: of ids, masks, weights and settings only what is meant is taken, wherever it is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factory import make_tokenizer

from convert.options import SamplingOptions, check_count
from convert.values import json_kind, loss_mask, shown, token_ids
from domino_jax.errors import DominoError
from domino_jax.runtime.command import UsageError
from infer.bench.questions import read_sets
from infer.model import as_prompt
from infer.options import Generate
from infer.prompts import parse_ids, read_prompts
from train.data.dataset import read_corpus
from train.evaluate.prompts import read_heldout_prompts
from train.options import configure, parse_options
from train.regenerate.prompts import Lines

VOCABULARY = 260
BAD_IDS = {
    "text of digits": ["1", 2],
    "floats": [1.0, 2.0],
    "true": [True, 2],
    "null among them": [None, 2],
    "a negative one": [3, -1],
    "lists of ids": [[1, 2]],
    "one text": "12",
    "a number": 12,
    "an object": {"0": 1},
}
OUTSIDE = {"the size of the vocabulary": 260, "beyond 32 bits": 2**40, "beyond 64 bits": 10**30}
READERS: dict[str, Callable[[Path], Any]] = {
    "train": lambda path: read_corpus([path], 8, VOCABULARY, make_tokenizer()),
    "regenerate": lambda path: Lines(path, VOCABULARY),
    "validate": lambda path: read_heldout_prompts(path, VOCABULARY, 64, make_tokenizer(), 4),
    "infer": read_prompts,
    "bench --quality": lambda path: read_sets((f"a={path}",), None),
}


GOOD = '{"prompt": "a", "completion": "bc"}'


def pairs(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, bad) for name, values in table.items() for bad in values]


def refused(
    reader: Callable[[Path], Any], path: Path, row: str, good: str = '{"prompt": "a", "completion": "bc"}'
) -> str:
    path.write_text(f"{good}\n{row}\n", encoding="utf-8")
    with pytest.raises(DominoError) as error:
        reader(path)
    said = str(error.value)
    assert f"{path}, line 2" in said and "\n" not in said and len(said) < 400
    return said


@pytest.mark.parametrize("name", BAD_IDS)
@pytest.mark.parametrize("command", READERS)
def test_what_is_no_token_id_is_refused_with_its_line_and_value(tmp_path, command, name):
    said = refused(READERS[command], tmp_path / "a.jsonl", json.dumps({"input_ids": BAD_IDS[name], "tokens": [1, 2]}))
    assert "input_ids must be " in said
    if isinstance(BAD_IDS[name], list) and name != "a negative one":
        assert shown(BAD_IDS[name][0]) in said or name == "lists of ids"


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_id_outside_the_vocabulary_is_refused_with_its_line_and_value(tmp_path, name):
    for command in ("train", "regenerate", "validate"):
        row = json.dumps({"input_ids": [1, OUTSIDE[name]], "tokens": [1, 2]})
        said = refused(READERS[command], tmp_path / "a.jsonl", row)
        assert f"it has id {shown(OUTSIDE[name])}, outside the target's vocabulary of 260" in said


@pytest.mark.parametrize("bad", [2, -100, -1, 0.5, 1.0, "1", "true", None, [1]], ids=str)
def test_a_loss_mask_is_0_or_1(tmp_path, bad):
    row = json.dumps({"input_ids": [1, 2, 3], "loss_mask": [0, 1, bad]})
    said = refused(READERS["train"], tmp_path / "a.jsonl", row)
    assert f"loss_mask must be 0 or 1 for each token, found {shown(bad)} at 2" in said


def test_what_is_meant_is_taken():
    assert loss_mask([0, 1, True, False]) == loss_mask(np.array([0, 1, 1, 0])) == [0, 1, 1, 0]
    assert token_ids((3, 4)) == token_ids(np.array([3, 4], np.uint16)) == token_ids([np.int64(3), 4]) == [3, 4]
    assert all(type(i) is int for i in token_ids([np.int64(3)]))
    assert parse_ids("1, 2 ,3") == [1, 2, 3]
    ids: Any = np.array([5, 6])
    assert as_prompt(ids).ids == [5, 6]


@pytest.mark.parametrize("bad", ["1_000", "1,2,", "+1", "0x1", "1.0", "", "true", "\u0661", "1 2"])
def test_ids_on_the_command_line_are_digits(bad):
    with pytest.raises(ValueError):
        parse_ids(bad)


@pytest.mark.parametrize("bad", [b"ab", [1.5], ["a"], [True], 3, {"role": "user"}, [[1]], None], ids=str)
def test_what_is_no_prompt_is_refused_in_python(bad):
    with pytest.raises(UsageError, match="a prompt is text, a list of messages, or a list of token ids"):
        as_prompt(bad)


SAMPLING = {
    "temperature": ["0.5", True, float("nan"), float("inf"), -1e-9, 10**400],
    "top_k": ["20", True, 1.5, 2.0, -1, 2**31, 10**30],
    "top_p": ["1", True, 0, float("nan"), 1.0001, -0.5],
    "min_p": ["0", False, float("nan"), -0.1, 1.1],
    "seed": ["0", True, 0.0, -1, 2**32, 10**30],
}


@pytest.mark.parametrize(("name", "bad"), pairs(SAMPLING), ids=shown)
def test_settings_of_sampling_are_numbers_in_their_range(name, bad):
    with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')} must be [^\n]* found [^\n]*$"):
        SamplingOptions(**{name: bad}).check()


@pytest.mark.parametrize("bad", [0, -3, 2**31, 10**20, 1.0, "8", True, None], ids=str)
def test_counts_are_whole_numbers_in_their_range(bad, tmp_path):
    with pytest.raises(UsageError, match=r"^--new-tokens must be "):
        check_count("new_tokens", bad)
    row = {"prompt": "a", "max_new_tokens": bad}
    if bad is not None:
        said = refused(READERS["infer"], tmp_path / "a.jsonl", json.dumps(row), '{"prompt": "a"}')
        assert f"max_new_tokens {shown(bad)}, expected a whole number" in said
    check_count("new_tokens", np.int32(3))


@pytest.mark.parametrize("name", ["temperature", "top_k", "seed", "stop", "max_tokens"])
def test_a_row_has_no_settings_that_would_be_ignored(tmp_path, name):
    row = json.dumps({"prompt": "a", name: "x" if name == "stop" else 1})
    said = refused(READERS["infer"], tmp_path / "a.jsonl", row, '{"prompt": "a", "seed": "a text", "top_k": null}')
    assert f"has {name}, which is no setting of a row: give --" in said


FLAGS = [
    *(f"--temperature {x}" for x in ("nan", "inf", "-inf", "-0.1")),
    *(f"--top-k {x}" for x in (2**31, 2**64, -1)),
    *(f"--top-p {x}" for x in ("0", "nan", "1.5", "-1")),
    *(f"--min-p {x}" for x in ("nan", "2")),
    *(f"--seed {x}" for x in (-1, 2**32, 2**70)),
    *(f"--max-new-tokens {x}" for x in (0, -1, 2**31, 2**64)),
    *(f"--batch-size {x}" for x in (0, 2**31)),
    "--head-candidates -1",
]


@pytest.mark.parametrize("words", FLAGS)
def test_flags_out_of_range_are_usage_errors(words):
    from domino_jax.runtime.command import parse_words

    with pytest.raises(UsageError, match=words.split()[0]):
        parse_words(Generate, ["hi", *words.split()], prog="infer").check(chat=False)


TRAINING = {
    "seed": [-1, 2**32, 2**70],
    "steps": [0, 2**31, 10**30],
    "batch": [0, 2**31],
    "block_size": [0, -4],
    "gru_hidden_dim": [0, -1],
    "emb_dim": [0, 2**40],
    "pure_draft_prefix_len": [-1, 2**31],
    "mask_token_id": [-1, 2**31],
    "gamma": [float("nan"), float("inf"), -1.0, 0.0],
    "lr": [float("nan"), float("inf"), 0.0, -1e-4],
    "ema": [float("nan"), 1.0, -0.1],
    "lambda_base_start": [float("nan"), 1.5],
    "lambda_base_floor": [float("nan"), float("inf"), -0.1, 1.5],
    "weight_decay": [float("inf"), -0.1],
    "validate_every": [-1, 2**31],
}


@pytest.mark.parametrize(("name", "bad"), pairs(TRAINING), ids=shown)
def test_settings_of_a_training_are_refused_alike_as_flag_keyword_and_in_a_file(tmp_path, name, bad):
    from train.config import GROUPS

    group = next(group for group, form in GROUPS.items() if name in form.__dataclass_fields__)
    (tmp_path / "x.toml").write_text(f'target = "t"\n[data]\ndata = ["d"]\n[{group}]\n{name} = {bad}\n')
    given = ["--out", str(tmp_path / "run"), "--target", "t", "--data", "d"]
    flag = f"--{name.replace('_', '-')}"
    for way in (
        lambda: parse_options([*given, f"{flag}={bad}"]),
        lambda: configure(None, {"target": "t", "data": "d", name: bad}),
    ):
        with pytest.raises(UsageError, match=f"^{flag} must be [^\n]*$"):
            way()
    with pytest.raises(DominoError, match=f"^[^\n]*x.toml: {flag} must be [^\n]*$") as found:  # the file's fault
        parse_options([*given, "--config", str(tmp_path / "x.toml")])
    assert not isinstance(found.value, UsageError)


LOOSE = [("steps", '"3"'), ("steps", "3.0"), ("steps", "true"), ("lr", '"1e-3"'), ("lr", "[1e-3]"), ("lr", "true")]
LOOSE += [("pack", "1"), ("pack", '"true"'), ("loss", "1"), ("loss", "true"), ("target_layer_ids", "[1, 2.0]")]
LOOSE += [
    ("target_layer_ids", "[true]"),
    ("target_layer_ids", "3"),
    ("data", "[1]"),
    ("mesh", "2"),
    ("steps", "{a = 1}"),
]
LOOSE += [("lr", "1979-05-27"), ("lr", "9" * 400), ("init_from", "3")]


@pytest.mark.parametrize(("name", "text"), LOOSE, ids=shown)
def test_a_value_of_another_type_names_the_file_and_the_key(tmp_path, name, text):
    from train.config import GROUPS

    group = next(group for group, form in GROUPS.items() if name in form.__dataclass_fields__)
    (tmp_path / "x.toml").write_text(f"[{group}]\n{name} = {text}\n")
    with pytest.raises(DominoError) as error:
        parse_options(["--config", str(tmp_path / "x.toml"), "--out", str(tmp_path / "run")])
    said = str(error.value)
    assert said.startswith(f"[{group}] of {tmp_path / 'x.toml'} sets {name} to ") and "; expected " in said
    assert "\n" not in said and len(said) < 300 and "<class" not in said and "tuple[" not in said


@pytest.mark.parametrize(
    ("name", "bad"),
    pairs({"out": [None, 3, ["run"]], "config": [3, b"demo", {}], "resume": ["yes", 1], "processes": ["host:1", None]}),
    ids=shown,
)
def test_keywords_of_a_training_are_of_their_type_before_they_are_used(name, bad):
    with pytest.raises(DominoError, match=rf"^{name} is set to [^\n]*; expected [^\n<]*\.$"):
        configure(None, {"target": "t", "data": "d", name: bad})


def test_words_for_values():
    assert [json_kind(x) for x in (None, True, 1, 1.5, "a", [1], (1,), {}, b"a")] == [
        "null", "a boolean", "a number", "a number", "text", "a list", "a list", "an object", "bytes",
    ]  # fmt: skip
    assert shown(10**5000) == "an integer of thousands of digits" and len(shown("x" * 1000)) < 50
