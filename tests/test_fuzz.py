"""What others wrote, changed at random, is read as it stands or refused in one sentence: no traceback, no silent loss.

The short run is for every day; `python -m pytest -m slow tests/test_fuzz.py` tries more than 10,000 cases.
"""

import copy
import json
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factory import BYTE_DRAFT, BYTE_TARGET, make_draft, make_target, make_tokenizer
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from convert import hf
from convert.messages import LeftOut, parse_messages
from convert.tensors import INDEX, SINGLE, open_tensors
from convert.tokenizer import render
from domino_jax.config import MoeConfig
from domino_jax.errors import DominoError
from domino_jax.runtime.command import UsageError, parse_words
from domino_jax.weights import flatten
from infer.bench.options import Bench, check_bench
from infer.options import Generate
from infer.prompts import read_prompts
from train.data.dataset import read_corpus
from train.evaluate.calibrate import Calibrate, check_calibrate
from train.evaluate.validate import Validate, check_validate
from train.options import parse_options
from train.regenerate.command import Regenerate, check_regenerate

FEW, MANY = pytest.param(60, id="few"), pytest.param(3000, id="many", marks=pytest.mark.slow)
CASES = pytest.mark.parametrize("cases", [FEW, MANY])

EVERY: Any = list(HealthCheck)
Property = Callable[[Any], bool]  # whether a case was refused


def fuzz(cases: int, strategy: st.SearchStrategy[Any], check: Property) -> None:
    """Try so many cases, of which some must be read and some refused; a failing one is made small and printed."""
    counts = Counter[bool]()
    how = settings(max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=EVERY)
    how(given(strategy)(lambda case: counts.update([check(case)])))()
    assert min(counts[True], counts[False]) > cases // 50, counts


def refused(run: Callable[[], Any], *, about: str = "") -> tuple[Any, bool]:
    """What `run` gives, and whether it was refused, in one sentence that names what it is about."""
    try:
        return run(), False
    except DominoError as error:
        said = str(error)
        assert said.strip() and "\n" not in said and len(said) < 1500, said
        assert about in said, said
        return None, True


def as_bytes(content: Any) -> bytes:
    """What a file holds: bytes, or a JSON value."""
    return content if isinstance(content, bytes) else json.dumps(content).encode("utf-8", "surrogatepass")


# --- JSON of any kind ---------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "1", "true", "qwen3", "yarn", "full_attention", "F8_E4M3", "../up", "\ud800", "a\u2028b"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for name, one in inner for found in ((*path, name), *places(one, (*path, name)))]


@st.composite
def changed(draw: Any, bases: list[Any], names: list[str]) -> Any:
    """One of the values with one to three changes: something else, gone, new, moved, or given as text."""
    value = copy.deepcopy(draw(st.sampled_from(bases)))
    for _ in range(draw(st.integers(1, 3))):
        found = places(value)
        if not found:
            return value
        *path, last = draw(st.sampled_from(found))
        holder = value
        for step in path:
            holder = holder[step]
        how = draw(st.sampled_from(["other", "gone", "text", "new", "list"]))
        if how == "other":
            holder[last] = draw(VALUES)
        elif how == "gone":
            del holder[last]
        elif how == "text":
            holder[last] = str(holder[last])
        elif how == "list":
            holder[last] = [holder[last]]
        elif isinstance(holder, dict):
            holder[draw(st.one_of(st.sampled_from(names), st.text(max_size=6)))] = draw(VALUES)
    return value


@st.composite
def damaged(draw: Any, texts: list[bytes]) -> bytes:
    """One of the texts with some bytes put in, replaced or cut off."""
    content = bytearray(draw(st.sampled_from(texts)))
    bits = st.one_of(
        st.binary(max_size=4),
        st.sampled_from(
            [b"NaN", b"1e999", b"[" * 300, b"\xef\xbb\xbf", b"\x1f\x8b", b"PAR1", b"\n", b'"', b"{}", b"\\u"]
        ),
    )
    for _ in range(draw(st.integers(1, 3))):
        at, how = draw(st.integers(0, len(content))), draw(st.sampled_from(["in", "over", "cut"]))
        if how == "cut":
            del content[at:]
        else:
            bit = draw(bits)
            content[at : at + (len(bit) if how == "over" else 0)] = bit
    return bytes(content)


# --- Models' files ------------------------------------------------------------------------------------------------

EXPERTS = MoeConfig(4, 2, 16, norm_topk_prob=True)
CONFIGS = [
    BYTE_TARGET.to_hf(),
    type(BYTE_TARGET)(**BYTE_TARGET.geometry(), tie_word_embeddings=False, moe=EXPERTS).to_hf(),
    BYTE_DRAFT.to_hf(),
]
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "block_size", "mask_token_id")


@CASES
def test_config_json(tmp_path, cases):
    file = tmp_path / "config.json"
    texts = [json.dumps(raw).encode() for raw in CONFIGS]
    names = sorted(
        {name for raw in CONFIGS for name in raw} | {"is_causal", "final_logit_softcapping", "rope_parameters"}
    )

    def check(content: Any) -> bool:
        file.write_bytes(
            content if isinstance(content, bytes) else json.dumps(content).encode("utf-8", "surrogatepass")
        )
        config, no = refused(lambda: hf.parse_config(hf.read_json(file), file=file), about=str(file))
        if no:
            return True
        raw = json.loads(file.read_bytes())
        for level in (raw, raw.get("dflash_config") or {}):
            stated = {name: level[name] for name in SIZES if level.get(name) is not None and hasattr(config, name)}
            assert stated == {name: getattr(config, name) for name in stated}
        assert hf.parse_config(config.to_hf()) == config
        return False

    fuzz(cases, st.one_of(changed(CONFIGS, names), damaged(texts)), check)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """A target in three files with an index, and its weights."""
    folder = tmp_path_factory.mktemp("parts")
    make_target(folder, tokenizer=False, num_hidden_layers=1)
    tensors, placed = load_file(folder / SINGLE), {}
    for part in range(3):
        names = sorted(tensors)[part::3]
        save_file({name: tensors[name] for name in names}, folder / f"m-{part}.safetensors")
        placed |= dict.fromkeys(names, f"m-{part}.safetensors")
    (folder / SINGLE).unlink()
    hf.write_json(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": placed})
    return folder, tensors


@CASES
def test_the_index_of_weights(parts, cases):
    """What is loaded in spite of a change is what the files hold."""
    folder, tensors = parts
    config = hf.parse_config(hf.read_json(folder / "config.json"))
    index = folder / INDEX
    base = json.loads(index.read_text())
    names = [*base["weight_map"], "weight_map", "m-1.safetensors"]

    def check(content: Any) -> bool:
        index.write_bytes(
            content if isinstance(content, bytes) else json.dumps(content).encode("utf-8", "surrogatepass")
        )
        loaded, no = refused(lambda: open_tensors(folder), about=str(folder))
        if not no:
            assert loaded.stored.keys() == tensors.keys()
            assert refused(lambda: hf.load_hf(folder, config))[1] is False
        return no

    try:
        fuzz(cases, st.one_of(changed([base], names), damaged([index.read_bytes()])), check)
    finally:
        hf.write_json(index, base)


DTYPES = {"F32": np.float32, "F16": np.float16}


@CASES
def test_the_header_of_safetensors(tmp_path, cases):
    """What is read in spite of a change is what the header says, byte for byte."""
    make_draft(tmp_path, num_hidden_layers=1)
    file = tmp_path / SINGLE
    whole = file.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    config = hf.parse_config(hf.read_json(tmp_path / "config.json"))

    def check(content: Any) -> bool:
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            text = as_bytes(content)
            file.write_bytes(struct.pack("<Q", len(text)) + text + data)
        loaded, no = refused(lambda: flatten(hf.load_hf(tmp_path, config)), about=str(tmp_path))
        if no:
            return True
        after = file.read_bytes()
        length = struct.unpack("<Q", after[:8])[0]
        stated, held = json.loads(after[8 : 8 + length]), after[8 + length :]
        entry = next(one for name, one in stated.items() if name.endswith("fc.weight"))
        begin, end = entry["data_offsets"]
        assume(entry["dtype"] in DTYPES)
        fc = np.frombuffer(held[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        np.testing.assert_array_equal(np.asarray(loaded["fc"]), fc)
        return False

    fuzz(cases, st.one_of(changed([header], [*header, "dtype", "shape"]), damaged([whole[: size + 40]])), check)


# --- Data ---------------------------------------------------------------------------------------------------------

CHATML = """
{%- for m in messages %}{{- '<|im_start|>' + m.role + ':' + m.content + '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant:' }}{%- endif %}"""
ROWS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
    {"prompt": "ab", "completion": "cd"},
    {"text": "abc"},
    {"input_ids": [1, 2, 3], "tokens": [4, 5]},
    {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]},
    {"prompt": "hi", "max_new_tokens": 3},
]
FIELDS = [
    "messages",
    "prompt",
    "completion",
    "text",
    "input_ids",
    "tokens",
    "loss_mask",
    "tools",
    "role",
    "content",
    "weight",
]


@CASES
def test_json_lines(tmp_path, cases):
    """Every line is read, or counted as left out, or refused by its number."""
    file, tokenizer = tmp_path / "data.jsonl", make_tokenizer(CHATML)
    texts = ["".join(json.dumps(row) + "\n" for row in ROWS[i : i + 2]).encode() for i in range(len(ROWS) - 1)]

    def check(content: Any) -> bool:
        file.write_bytes(as_bytes(content))
        lines = sum(bool(line.strip()) for line in file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"))
        read, left = refused(lambda: read_corpus([file], 64, 260, tokenizer), about=str(file))
        if not left:
            summary = read[1]
            assert summary.lines == lines and summary.sequences + summary.left_out >= lines
        prompts, no = refused(lambda: read_prompts(file), about=str(file))
        assert no or len(prompts) == lines
        return left and no

    fuzz(cases, st.one_of(changed(ROWS, FIELDS), damaged(texts)), check)


ROLES = st.one_of(
    st.sampled_from(["user", "assistant", "system", "human", "gpt", "developer", "tool"]), st.text(max_size=5)
)
PARTS = st.builds(lambda text: {"type": "text", "text": text}, st.text(max_size=5))
CONTENTS = st.one_of(
    st.text(max_size=12),
    st.lists(st.one_of(st.text(max_size=5), PARTS), max_size=3),
    VALUES,
)
MESSAGES = st.one_of(
    st.builds(lambda role, content: {"role": role, "content": content}, ROLES, CONTENTS),
    st.builds(lambda role, content: {"from": role, "value": content}, ROLES, CONTENTS),
    VALUES,
)


def said(content: Any) -> str:
    """The text of a message's content, in whatever form."""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part["text"] for part in content or ())


@CASES
def test_chat_messages(cases):
    """All that a conversation says is in what the model is asked, or the conversation is refused."""
    tokenizer = make_tokenizer(CHATML)

    def check(given: list[Any]) -> bool:
        try:
            messages = parse_messages(given)
            asked = render(tokenizer, messages)
        except (DominoError, LeftOut, ValueError) as error:
            assert "\n" not in str(error) and not isinstance(error, UnicodeError)
            return True
        assert len(messages) == len(given)
        shown = "".join(asked.split())
        for message in given:
            content = message.get("content") if message.get("content") is not None else message.get("value")
            assert "".join(said(content).split()) in shown
        return False

    fuzz(cases, st.lists(MESSAGES, min_size=1, max_size=4), check)


# --- Words --------------------------------------------------------------------------------------------------------

Run = Callable[[list[str]], Any]
OF_ALL = {"--temperature": "0.7", "--top-k": "5", "--top-p": "0.9", "--dtype": "float32", "--attention": "xla"}
# Words that a command needs, what reads and checks them, and some of its flags with values that it takes.
COMMANDS: dict[str, tuple[list[str], Run, dict[str, str]]] = {
    "infer": (
        ["hi"],
        lambda words: parse_words(Generate, words, prog="x").check(chat=False),
        OF_ALL | {"--max-new-tokens": "5", "--seed": "3", "--stop": "x", "--num-draft-tokens": "auto"},
    ),
    "infer.bench": (
        [],
        lambda words: check_bench(parse_words(Bench, words, prog="x")),
        OF_ALL | {"--batch-sizes": "2", "--rounds": "1", "--num-prompts": "4", "--simulate-tau": "2.5"},
    ),
    "train": (
        ["--target", "t", "--data", "d", "--out", "o"],
        parse_options,
        {
            "--steps": "5",
            "--lr": "1e-3",
            "--length": "64",
            "--target-layer-ids": "1",
            "--mesh": "data=2",
            "--dtype": "float32",
        },
    ),
    "train regenerate": (
        ["--target", "t", "--data", "d", "--out", "o"],
        lambda words: check_regenerate(parse_words(Regenerate, words, prog="x")),
        OF_ALL | {"--batch": "4", "--max-new-tokens": "5", "--seed": "3"},
    ),
    "train validate": (
        ["--target", "t", "--draft", "d", "--prompts", "p"],
        lambda words: check_validate(parse_words(Validate, words, prog="x")),
        OF_ALL | {"--num-prompts": "4", "--prompt-tokens": "16", "--mesh": "data=2,model=4"},
    ),
    "train calibrate": (
        ["--target", "t", "--draft", "d", "--prompts", "p"],
        lambda words: check_calibrate(parse_words(Calibrate, words, prog="x")),
        OF_ALL | {"--num-prompts": "4", "--temperature": "0.5", "--sampler": "coupled"},
    ),
}
WORDS = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=6).filter(lambda text: "\0" not in text),
    st.sampled_from(["", "-1", "none", "auto", "data=2,model=4", "1,2,3", "nan", "1e999", "float32", "\udcff", "--"]),
)


@st.composite
def commands(draw: Any) -> tuple[str, list[str]]:
    """A command and the words behind its base: flags of its own or of another, with good values or any."""
    command = draw(st.sampled_from(sorted(COMMANDS)))
    flags, words = COMMANDS[command][2], []
    for _ in range(draw(st.integers(1, 3))):
        flag = draw(st.sampled_from(sorted(flags)))
        how = draw(st.sampled_from(["good", "good", "any", "several", "foreign"]))
        if how == "foreign":
            flag = draw(st.sampled_from(["--unknown", "--steps", "--raw", "--rounds", "-x"]))
        words += [flag, *([flags[flag]] if how == "good" else draw(st.lists(WORDS, min_size=how == "any", max_size=2)))]
    return command, words


@CASES
def test_words_of_a_command(tmp_path, monkeypatch, cases):
    monkeypatch.chdir(tmp_path)

    def check(drawn: tuple[str, list[str]]) -> bool:
        command, words = drawn
        base, run, _ = COMMANDS[command]
        assume("--help" not in words and "-h" not in words)
        try:
            run([*base, *words])
            return False
        except UsageError as error:
            assert str(error).strip() and "\n" not in str(error) and len(str(error)) < 1500
        except DominoError as error:  # a file or folder that a flag names
            assert "\n" not in str(error)
        return True

    fuzz(cases // 3, commands(), check)
