"""Training data: loss masks against the chat template's own rendering, packing, and the order of batches."""

import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factory import CHAT_END, CHAT_START, make_tokenizer
from rows import corpus_of_rows

from convert.messages import LeftOut, parse_messages
from domino_jax.errors import DominoError
from train.data import cache, dataset, workers
from train.data.conversations import Template
from train.data.corpus import Batch, Corpus, endless_order
from train.data.dataset import read_corpus
from train.data.examples import sequences_of
from train.data.packing import best_fit
from train.data.sources import read_rows as source_rows
from train.demo.pretrain import train_tokenizer

# What Qwen3's template does: thoughts (an empty one as well) stay with an answer that follows the last question, and go
# from those before it; without thinking the prompt ends in an empty thought. {% generation %} is for transformers.
QWEN = """
{%- set ns = namespace(asked=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}
{%- if tools %}{{- '<|im_start|>system\\n' + tools|tojson + '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set thought, said = m.reasoning_content or '', m.content %}
        {%- if not thought and '</think>' in said %}
            {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.asked and (loop.last or thought) %}
            {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
            {%- set said = said.lstrip('\\n') %}
        {%- endif %}
        {%- generation %}{{- said }}
            {%- for call in m.tool_calls or [] %}{{- '<tool_call>' + call.function.name + '</tool_call>' }}{%- endfor %}
            {{- '<|im_end|>' }}{%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
# Without thoughts a conversation is one text that only grows.
CHATML = """
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}{{- m.content + '<|im_end|>' }}{%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
ASKED = f"{CHAT_START}assistant\n"


def said(role: str, content: str) -> str:
    return f"{CHAT_START}{role}\n{content}{CHAT_END}\n"


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def user(content: Any) -> dict[str, Any]:
    return message("user", content)


def answer(content: Any, **more: Any) -> dict[str, Any]:
    return message("assistant", content, **more)


@pytest.fixture(scope="module")
def bpe() -> Callable[[str | None], Any]:
    """Makes tokenizers with merges, of line ends and across words' ends among others, and Qwen3's tags for thoughts."""
    text = ["yes yes\n\n\n no\n\nHello there, so what? <think>\n\n</think>\n\nassistant\nuser\n wörter 你好 " * 20]

    def make(template: str | None) -> Any:
        tokenizer = train_tokenizer(text, 320)
        tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="module")
def qwen(bpe) -> Any:
    return bpe(QWEN)


@pytest.fixture(scope="module")
def chatml(bpe) -> Any:
    return bpe(CHATML)


# --- Masks ----------------------------------------------------------------------------------------------------------

HI = said("user", "hi")
# Conversation, and the sequences it makes: text off the mask and on it, in turns.
CASES = {
    "single turn": ([user("hi"), answer("yes")], [[HI + ASKED + EMPTY_THOUGHT, f"yes{CHAT_END}"]]),
    "system prompt": (
        [message("system", "Be brief."), user("hi"), answer("yes")],
        [[said("system", "Be brief.") + HI + ASKED + EMPTY_THOUGHT, f"yes{CHAT_END}"]],
    ),
    "several turns, without the thought once it is over": (
        [user("hi"), answer("yes"), user("so?"), answer("no")],
        [
            [HI + ASKED + EMPTY_THOUGHT, f"yes{CHAT_END}"],
            [HI + said("assistant", "yes") + said("user", "so?") + ASKED + EMPTY_THOUGHT, f"no{CHAT_END}"],
        ],
    ),
    "thoughts in the data": (
        [user("hi"), answer("<think>\nhm\n</think>\n\nyes"), user("so?"), answer("no", reasoning_content="hm")],
        [
            [HI + ASKED + EMPTY_THOUGHT, f"yes{CHAT_END}"],
            [HI + said("assistant", "yes") + said("user", "so?") + ASKED + EMPTY_THOUGHT, f"no{CHAT_END}"],
        ],
    ),
    "an empty thought in the data": (
        [user("hi"), answer(EMPTY_THOUGHT + "yes")],
        [[HI + ASKED + EMPTY_THOUGHT, f"yes{CHAT_END}"]],
    ),
    "a thought that broke off": ([user("hi"), answer("<think>\nhm")], []),
    "empty answer": ([user("hi"), answer("")], [[HI + ASKED + EMPTY_THOUGHT, CHAT_END]]),
    "lines before and after": (
        [user("hi"), answer("\n\n  yes\n\n")],
        [[HI + ASKED + EMPTY_THOUGHT, f"  yes\n\n{CHAT_END}"]],
    ),
    "unicode": (
        [user("wörter 👩‍👧"), answer("你好 🙂\u2028é")],
        [[said("user", "wörter 👩‍👧") + ASKED + EMPTY_THOUGHT, f"你好 🙂\u2028é{CHAT_END}"]],
    ),
    "ends with the user": ([user("hi"), answer("yes"), user("so?")], [[HI + ASKED + EMPTY_THOUGHT, f"yes{CHAT_END}"]]),
    "begins with the assistant": (
        [answer("Hello"), user("hi"), answer("yes")],
        [[said("assistant", "Hello") + HI + ASKED + EMPTY_THOUGHT, f"yes{CHAT_END}"]],
    ),
    "an answer that is not to be learned": (
        [user("hi"), answer("yes", weight=0), user("so?"), answer("no", weight=1)],
        [[HI + said("assistant", "yes") + said("user", "so?") + ASKED + EMPTY_THOUGHT, f"no{CHAT_END}"]],
    ),
    "a tool": (
        [
            user("hi"),
            answer(None, tool_calls=[{"function": {"name": "look"}}]),
            message("tool", "so"),
            answer("yes"),
        ],
        [
            [HI + ASKED + EMPTY_THOUGHT, f"<tool_call>look</tool_call>{CHAT_END}"],
            [
                HI + said("assistant", "<tool_call>look</tool_call>") + said("tool", "so") + ASKED + EMPTY_THOUGHT,
                f"yes{CHAT_END}",
            ],
        ],
    ),
    "no answer": ([user("hi")], []),
}


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pieced(tokenizer: Any, pieces: list[str]) -> tuple[list[int], list[int]]:
    """Ids of pieces encoded each alone, and a mask that is on in every second one."""
    ids = [encode(tokenizer, piece) for piece in pieces]
    return list(itertools.chain(*ids)), [i % 2 for i, piece in enumerate(ids) for _ in piece]


@pytest.mark.parametrize("name", CASES)
def test_masks_are_exact_at_their_boundaries(qwen, name):
    messages, expected = CASES[name]
    if not expected:
        with pytest.raises(LeftOut):
            Template(qwen).sequences(parse_messages(messages))
        return
    made = Template(qwen).sequences(parse_messages(messages))
    assert made == [pieced(qwen, pieces) for pieces in expected]


@pytest.mark.parametrize("name", ["single turn", "system prompt", "unicode", "empty answer", "several turns"])
def test_a_turn_is_what_is_prompted_in_use_and_what_the_template_says_of_the_whole(qwen, name):
    """transformers marks the assistant's tokens from the template's {% generation %}."""
    name = next(case for case in CASES if case.startswith(name))
    messages, _ = CASES[name]
    *_, (ids, mask) = Template(qwen).sequences(messages)
    begin = mask.index(1)
    prompt = qwen.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert ids[:begin] == encode(qwen, prompt) == Template(qwen).prompt(messages[:-1])
    whole = qwen.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert qwen.decode(whole["input_ids"]) == qwen.decode(ids) + "\n"
    runs = [
        list(run)
        for on, run in itertools.groupby(range(len(whole["input_ids"])), whole["assistant_masks"].__getitem__)
        if on
    ]
    assert qwen.decode([whole["input_ids"][i] for i in runs[-1]]) == qwen.decode(ids[begin:])
    assert all(mask[begin:]) and not any(mask[:begin])


def test_a_conversation_that_only_grows_is_one_sequence(chatml):
    messages = [message("system", "Be brief."), user("hi"), answer("yes"), user("so?"), answer("no no"), user("and?")]
    ((ids, mask),) = Template(chatml).sequences(messages)
    whole = chatml.apply_chat_template(messages[:-1], return_dict=True, return_assistant_tokens_mask=True)
    assert whole["input_ids"][: len(ids)] == ids and chatml.decode(whole["input_ids"][len(ids) :]) == "\n"
    assert whole["assistant_masks"][: len(ids)] == mask and sum(mask) > 4


def test_where_an_answer_would_merge_into_its_prompt_it_stays_apart(chatml):
    """An answer that begins with a line end: encoded in one, it merges with the prompt's."""
    messages = [user("hi"), answer("\n yes"), user("so?"), answer("no")]
    first = [HI + ASKED, f"\n yes{CHAT_END}"]
    assert pieced(chatml, first)[0] != encode(chatml, "".join(first)), "the case does not tell"
    second = [HI + said("assistant", "\n yes") + said("user", "so?") + ASKED, f"no{CHAT_END}"]
    assert Template(chatml).sequences(messages) == [pieced(chatml, first), pieced(chatml, second)]


def test_an_answer_that_spells_a_special_token_is_text(qwen):
    """The target writes about <|im_end|> with ordinary tokens: the token itself would end its turn."""
    ((ids, mask),) = Template(qwen).sequences([user(f"what is {CHAT_END}?"), answer(f"{CHAT_END} ends it")])
    end = qwen.convert_tokens_to_ids(CHAT_END)
    learned = [token for token, on in zip(ids, mask, strict=True) if on]
    assert learned.count(end) == 1 and learned[-1] == end
    assert qwen.decode(learned) == f"{CHAT_END} ends it{CHAT_END}"
    assert ids[: len(ids) - len(learned)] == encode(qwen, said("user", f"what is {CHAT_END}?") + ASKED + EMPTY_THOUGHT)


def test_a_prompt_that_begins_a_thought_keeps_the_thoughts(bpe):
    thinker = bpe(QWEN.replace("'<think>\\n\\n</think>\\n\\n' }}{%- endif %}", "'<think>\\n' }}{%- endif %}"))
    ((ids, mask),) = Template(thinker).sequences([user("hi"), answer("<think>\nhm\n</think>\n\nyes")])
    assert (ids, mask) == pieced(thinker, [HI + ASKED + "<think>\n", f"hm\n</think>\n\nyes{CHAT_END}"])


def test_a_template_without_an_end_token_has_none_to_learn():
    plain = make_tokenizer(
        "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}{{ '[assistant:' if add_generation_prompt }}"
    )
    ((ids, mask),) = Template(plain).sequences([user("hi"), answer("yes")])
    assert (ids, mask) == pieced(plain, ["[user:hi][assistant:", "yes"])


# --- Forms ----------------------------------------------------------------------------------------------------------

SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "yes yes"},
    ]
}
OPENAI = {
    "messages": [
        message("system", "Be brief."),
        user([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]),
        answer("yes yes"),
    ]
}


def whole(corpus: Corpus) -> Batch:
    """All rows."""
    return corpus.take(range(len(corpus)))


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_both_forms_of_conversations_are_the_same(qwen, tmp_path):
    made = [
        read_corpus([write(tmp_path / f"{i}.jsonl", row)], 60, 400, qwen)[0] for i, row in enumerate((OPENAI, SHAREGPT))
    ]
    assert made[0].fingerprint == made[1].fingerprint
    rows = whole(made[0])
    on = rows.ids[0][rows.mask[0]]
    assert qwen.decode(on) == f"yes yes{CHAT_END}"


def test_tools_reach_the_template(qwen):
    tools = [{"name": "look"}]
    for given in (tools, json.dumps(tools)):
        ((ids, _),) = sequences_of({"messages": CASES["single turn"][0], "tools": given}, Template(qwen))
        assert qwen.decode(ids).startswith(said("system", json.dumps(tools)))


def test_lines_of_ids_and_of_text(tmp_path):
    tokenizer = make_tokenizer()
    path = write(
        tmp_path / "data.jsonl",
        {"input_ids": [5, 6], "tokens": [7, 8, 9]},
        {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]},
        {"prompt": "ab", "completion": "cd\u2028"},
        {"text": "efg"},
    )
    path.write_text(path.read_text().replace("\\u2028", "\u2028").replace("\n", "\n\n"), encoding="utf-8")
    read, summary = read_corpus([path], 8, 260, tokenizer)
    corpus = whole(read)
    assert corpus.ids[:2].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [5, 6, 7, 0, 0, 0, 0, 0]]
    assert corpus.mask[:2].tolist() == [[False] * 2 + [True] * 3 + [False] * 3, [False, True, True] + [False] * 5]
    assert [tokenizer.decode(row[on]) for row, on in zip(corpus.ids[2:], corpus.mask[2:], strict=True)] == [
        "cd\u2028",
        "efg",
    ]
    assert (summary.lines, summary.sequences, summary.rows) == (4, 4, 4)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The datasets library with a cache of its own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def test_a_dataset_reads_as_its_lines_do(qwen, tmp_path, offline, monkeypatch):
    rows = [OPENAI | {"tools": None}, {"messages": [user("so?"), answer("no no", name="x")], "tools": "[]"}]
    lines = read_corpus([write(tmp_path / "data.jsonl", *rows)], 60, 400, qwen)
    plain = [dict(row) for row in rows]
    plain[0]["messages"] = [*OPENAI["messages"]]
    plain[0]["messages"][1] = user("hi")  # a table's column has one type: no lists of parts beside texts
    (tmp_path / "folder").mkdir()
    offline.Dataset.from_list(plain).to_parquet(tmp_path / "folder" / "train.parquet")
    for source in (tmp_path / "folder" / "train.parquet", tmp_path / "folder"):
        corpus, summary = read_corpus([source], 60, 400, qwen)
        assert corpus.fingerprint == lines[0].fingerprint and summary == lines[1]

    asked = []

    def load(dataset: str, **how: Any) -> Any:
        asked.append((dataset, how))
        return offline.Dataset.from_list(plain)

    monkeypatch.setattr(offline, "load_dataset", load)
    for source, config in (("org/set", None), ("org/set:small", "small")):
        assert read_corpus([source], 60, 400, qwen, split="rest")[0].fingerprint == lines[0].fingerprint
        assert asked[-1] == ("org/set", {"name": config, "split": "rest"})


def test_what_a_tables_row_has_no_value_for_is_not_there(tmp_path, offline):
    """A table has every column in every row, and every key in every message."""
    call = {"function": {"name": "look"}}
    rows = [{"text": "abc"}, {"messages": [user("hi"), answer(None, tool_calls=[call])]}, {"messages": [user("hi")]}]
    full = [{"text": None, "messages": None} | row for row in rows]
    offline.Dataset.from_list(full).to_parquet(tmp_path / "data.parquet")
    found = [row for _, row in source_rows(tmp_path / "data.parquet")]
    assert found[0] == rows[0] and found[1]["messages"][1] == {"role": "assistant", "tool_calls": [call]}
    assert found[2] == rows[2]


def test_a_dataset_that_fails_is_one_sentence(tmp_path, offline, monkeypatch):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DominoError, match=r"folder can't be read: [^\n]*\.$"):
        read_corpus([tmp_path / "folder"], 60, 400, None)
    offline.Dataset.from_list([{"text": "a"}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DominoError, match=r"a\.parquet row 1 is not a training sequence: .* no tokenizer"):
        read_corpus([tmp_path / "a.parquet"], 60, 400, None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DominoError, match="pip install"):
        read_corpus(["org/set"], 60, 400, None)


ROW = '{"text": "a"}\n'
FOLDERS = {
    "JSON lines and CSV": ({"a.jsonl": ROW, "b.csv": "text\nx\n", "c.csv": "text\ny\n"}, "(a.jsonl, b.csv)"),
    "JSON lines and notes": ({"a.jsonl": ROW, "notes.txt": "to do"}, "(a.jsonl, notes.txt)"),
    "in folders of their own": ({"train/a.json": ROW, "test/b.tsv": "text\nx\n"}, "(test/b.tsv, train/a.json)"),
    "compressed": ({"a.jsonl.gz": "", "b.parquet": ""}, "(a.jsonl.gz, b.parquet)"),
    "other columns": (
        {"a.jsonl": ROW, "a.jsonl.settings.json": '{"seed": {"a": 1}}'},
        "expected files of one form (JSON lines, Parquet, Arrow, CSV) with the same columns, found a.jsonl, a.",
    ),
    "a file that is no table": ({"a.parquet": "no table"}, "with the same columns, found a.parquet"),
    "no data": ({"a.py": "pass"}, "data files"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_can_not_be_read_whole_names_its_files(tmp_path, offline, name):
    files, says = FOLDERS[name]
    for file, text in files.items():
        path = tmp_path / "data" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with pytest.raises(DominoError) as error:
        list(source_rows(tmp_path / "data"))
    said = str(error.value)
    assert said.startswith((f"{tmp_path / 'data'} holds files of several forms", "the training data "))
    assert says in said and "\n" not in said and "An error occurred" not in said


def test_a_folder_may_hold_what_is_no_data_and_say_itself_what_is_read(tmp_path, offline):
    (tmp_path / "a.jsonl").write_text(ROW)
    (tmp_path / "LICENSE").write_text("MIT")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "b.csv").write_text("text\nx\n")
    (tmp_path / "README.md").write_text("# Data")
    assert [row for _, row in source_rows(tmp_path)] == [{"text": "a"}]
    (tmp_path / "c.csv").write_text("text\nx\n")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: c.csv\n---\n# Data")
    assert [row for _, row in source_rows(tmp_path)] == [{"text": "x"}]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.parquet", ROW.encode(), "has the name of a table, and is none (Parquet)"),
        ("a.arrow", ROW.encode(), "has the name of a table, and is none (Arrow)"),
        ("a.parquet", b"\x1f\x8b\x08", "is compressed by gzip"),
        ("a.parquet", b"", "has the name of a table, and is none (Parquet)"),
        ("a.arrow", b"PAR1....", "is a Parquet table: give its name the ending .parquet"),
    ],
)
def test_a_file_that_is_only_named_a_table_is_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DominoError, match=re.escape(f"{tmp_path / name} {says}")):
        list(source_rows(tmp_path / name))


REFUSED = [
    ("{", "line 2 is not"),
    ("[1]", "expected an object, found a list"),
    ('{"input_ids": [1, 2]}', "loss_mask"),
    ('{"input_ids": [1, 2], "loss_mask": [1]}', "1 entries for 2 ids"),
    ('{"input_ids": [1, 2], "tokens": [99]}', "it has id 99, outside the target's vocabulary of 40"),
    ('{"input_ids": [-1, 2], "tokens": [9]}', "found -1 at 0"),
    ('{"text": "a"}', "no tokenizer"),
    ('{"words": "a"}', "expected input_ids"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "no chat template"),
    ('{"messages": "a"}', "a list of messages"),
    ('{"messages": [{"content": "a"}]}', "no role"),
    ('{"messages": [{"role": "user"}]}', "found null"),
    ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "found 'image'"),
]


@pytest.mark.parametrize(("line", "says"), REFUSED)
def test_a_bad_line_is_refused_in_one_sentence(tmp_path, line, says):
    path = tmp_path / "data.jsonl"
    path.write_text('{"input_ids": [1], "tokens": [2, 3]}\n' + line + "\n")
    with pytest.raises(DominoError) as error:
        read_corpus([path], 8, 40, None)
    assert says in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_what_a_template_or_a_text_can_not_be_is_refused(tmp_path):
    strict = make_tokenizer("{{ raise_exception('turns must alternate') }}")
    path = write(tmp_path / "data.jsonl", {"messages": [user("a"), answer("b")]})
    with pytest.raises(DominoError, match=r"line 1 is not .*: the target's chat template refuses it: turns"):
        read_corpus([path], 8, 260, strict)
    with pytest.raises(DominoError, match="leaves out a message of the role 'assistant'"):
        read_corpus([path], 8, 260, make_tokenizer("{{ messages[0].content }}"))
    with pytest.raises(DominoError, match=r"line 1 is not a training sequence: .*can't encode"):
        read_corpus([write(tmp_path / "half.jsonl", {"text": "a\ud800b"})], 8, 260, strict)


@pytest.mark.parametrize("source", ["missing.jsonl", "some/missing.jsonl", "missing", "a/b/c"])
def test_a_missing_file_is_said_to_be(source):
    with pytest.raises(DominoError, match="can't be read"):
        read_corpus([source], 8, 40, None)


def test_nothing_to_learn_is_refused(tmp_path):
    path = write(
        tmp_path / "data.jsonl", {"input_ids": [1, 2], "tokens": [3]}, {"input_ids": [1] * 8, "tokens": [2, 3]}
    )
    with pytest.raises(DominoError, match=r"data.jsonl has no sequence with two neighbouring tokens .* first 9"):
        read_corpus([path], 9, 40, None)


# --- Rows -----------------------------------------------------------------------------------------------------------


def lines_of(sizes: list[int]) -> list[dict[str, Any]]:
    """Lines of so many tokens, the first of them a prompt; the ids tell the line and the place."""
    starts = [100 * i + 1 for i in range(len(sizes))]
    return [{"input_ids": [s], "tokens": list(range(s + 1, s + n))} for s, n in zip(starts, sizes, strict=True)]


def test_packing_keeps_every_sequence_once_and_whole(tmp_path):
    sizes = np.random.default_rng(0).integers(3, 60, 80).tolist()
    path = write(tmp_path / "data.jsonl", *lines_of(sizes))
    read, summary = read_corpus([path], 64, 10_000, None, pack=True)
    read_apart, loose = read_corpus([path], 64, 10_000, None)
    assert len(read) == summary.rows < 50 and summary[:4] == loose[:4] and loose.rows == len(read_apart) == 80
    corpus, apart = whole(read), whole(read_apart)
    assert (apart.starts == np.where(apart.ids > 0, 0, np.arange(64))).all()
    found = {}
    for ids, mask, starts in zip(corpus.ids, corpus.mask, corpus.starts, strict=True):
        for begin in np.unique(starts):
            places = np.flatnonzero(starts == begin)
            assert places[0] == begin and (np.diff(places) == 1).all()
            if ids[begin] == 0:
                assert len(places) == 1 and not mask[begin] and not ids[begin:].any()
                continue
            line = ids[begin] // 100
            assert line not in found
            found[line] = ids[places].tolist()
            assert mask[places].tolist() == [False] + [True] * (len(places) - 1)
    assert found == {i: [100 * i + 1 + k for k in range(size)] for i, size in enumerate(sizes)}
    assert summary.padding == pytest.approx(1 - sum(sizes) / corpus.ids.size) and summary.padding < 0.1 < loose.padding


def test_the_longest_goes_first_and_into_the_fullest_row():
    assert best_fit([3, 8, 5, 2, 6, 1, 10], 10) == [[6], [1, 3], [4, 0, 5], [2]]
    assert best_fit([4, 4], 4) == [[0], [1]]


def test_the_summary_counts(tmp_path):
    rows = [*lines_of([5, 12, 2]), {"input_ids": [1, 2], "loss_mask": [0, 0]}]
    seen = []
    first, second = write(tmp_path / "a.jsonl", *rows[:2]), write(tmp_path / "b.jsonl", *rows[2:])
    corpus, summary = read_corpus([first, second], 8, 10_000, None, progress=seen.append)
    assert summary == (4, 2, 13, 11, 2, 1, 2, 8, ()) and seen == [4] and len(corpus) == 2
    assert str(summary) == (
        "4 lines, 2 sequences of 13 tokens (11 to learn), a row each of 8, 19% padding; "
        "2 left out, nothing to learn; 1 cut"
    )


def test_progress_is_told_while_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "REPORT_EVERY", 2)
    seen = []
    read_corpus([write(tmp_path / "data.jsonl", *lines_of([4] * 5))], 8, 10_000, None, progress=seen.append)
    assert seen == [2, 4, 5]


# --- Batches --------------------------------------------------------------------------------------------------------


def numbered(rows: int = 10) -> Corpus:
    ids = np.arange(rows, dtype=np.int32)[:, None].repeat(3, axis=1)
    return corpus_of_rows(ids, ids > 0, np.zeros_like(ids))


def taken(corpus: Corpus, steps: range, size: int, seed: int = 3) -> list[int]:
    return np.concatenate([corpus.batch(step, size, seed).rows for step in steps]).tolist()


def test_batches_are_a_function_of_the_step():
    corpus = numbered()
    seen = taken(corpus, range(5), 4)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))  # each epoch, every row once
    assert seen[:10] != seen[10:]
    assert corpus.batch(2, 4, 3).rows.tolist() == seen[8:12] == taken(numbered(), range(2, 3), 4)
    assert taken(corpus, range(5), 4, seed=4) != seen
    assert len({tuple(taken(corpus, range(e, e + 1), 10)) for e in range(8)}) == 8
    batch = corpus.batch(1, 4, 3)
    assert batch.ids[:, 0].tolist() == batch.rows.tolist() and (batch.mask == whole(corpus).mask[batch.rows]).all()
    assert taken(corpus, range(1), 25, seed=-1)  # more rows than an epoch has


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_a_batch(hosts):
    corpus = numbered()
    for step in (0, 2, 7):
        parts = [corpus.batch(step, 8, 3, (i, hosts)) for i in range(hosts)]
        whole = corpus.batch(step, 8, 3)
        for mine, all_ in zip(zip(*parts, strict=True), whole, strict=True):
            assert np.array_equal(np.concatenate(mine), all_)
        assert {len(part.ids) for part in parts} == {8 // hosts}
    with pytest.raises(DominoError, match="8 rows can't be split evenly over 3"):
        corpus.batch(0, 8, 3, (0, 3))


def test_reading_ahead_gives_the_same_from_any_step_on():
    corpus, before = numbered(), threading.active_count()
    for first in (0, 3):
        for part in ((0, 1), (1, 2)):
            ahead = corpus.batches(first, 4, 3, part)
            for step in range(first, first + 6):
                ours, theirs = next(ahead), corpus.batch(step, 4, 3, part)
                assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))
            ahead.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before  # their threads end


def test_a_large_corpus_is_not_shuffled_to_find_a_batch():
    """An epoch's order is computed place by place, so that no step waits for all of it."""
    order = endless_order(10**9, 0)
    assert len({order[place] for place in range(10**9 - 5, 10**9 + 5)}) >= 9


def test_the_fingerprint_is_of_ids_mask_and_starts():
    made = {numbered().fingerprint, numbered().fingerprint}
    for name in ("ids", "mask", "starts"):
        rows = whole(numbered())
        getattr(rows, name)[1, 1] ^= 1
        made.add(corpus_of_rows(*rows[:3]).fingerprint)
    assert len(made) == 4


def test_without_grain_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(DominoError, match="pip install"):
        numbered(11).batch(0, 1, 12345)


# --- Memory, processes and the cache ---------------------------------------------------------------------------------


def conversations(count: int) -> list[dict[str, Any]]:
    return [{"messages": [user("hi " * (i % 7)), answer(f"yes {i}"), user("so?"), answer("no")]} for i in range(count)]


def same(one: Corpus, other: Corpus) -> bool:
    fields = ("ids", "mask", "starts", "rows")
    return all(np.array_equal(getattr(whole(one), f), getattr(whole(other), f)) for f in fields)


@pytest.mark.parametrize("pack", [False, True])
def test_a_corpus_holds_its_tokens_and_no_padding(tmp_path, pack):
    sizes = np.random.default_rng(0).integers(3, 60, 300).tolist()
    path = write(tmp_path / "data.jsonl", *lines_of(sizes))
    corpus, summary = read_corpus([path], 4096, 40_000, None, pack=pack)
    held = sum(getattr(corpus, name).nbytes for name in cache.ARRAYS)
    assert summary.tokens == sum(sizes) == corpus.lengths.sum() and held <= 9 * sum(sizes)
    rows = whole(corpus)
    assert [row.dtype for row in rows] == [np.int32, bool, np.int32, np.int64] and rows.ids.shape[1] == 4096
    digest = hashlib.sha256(repr(rows.ids.shape).encode())
    for values in rows[:3]:
        digest.update(values.data)
    assert corpus.fingerprint == digest.hexdigest(), "features and runs of earlier versions are known by it"


def test_several_processes_tokenize_as_one_does(qwen, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "GROUP_LINES", 8)
    path = write(tmp_path / "data.jsonl", *conversations(100), {"text": "abc"}, {"input_ids": [1], "tokens": [2, 3]})
    alone, summary = read_corpus([path], 60, 400, qwen, pack=True)
    started, real = [], workers.Workers
    monkeypatch.setattr(workers, "ALONE_SECONDS", 0.0)
    monkeypatch.setattr(workers, "_cores", lambda: 2)
    monkeypatch.setattr(workers, "Workers", lambda *how: started.append(real(*how)) or started[-1])
    together, again = read_corpus([path], 60, 400, qwen, pack=True)
    assert same(alone, together) and summary == again and len(started) == 1
    assert all(process.returncode is not None for process in started[0]._processes)
    bad = write(tmp_path / "bad.jsonl", *conversations(40), {"words": "a"}, *conversations(40))
    with pytest.raises(DominoError, match=r"line 41 is not a training sequence: expected input_ids"):
        read_corpus([bad], 60, 400, qwen)

    def killed(*how: Any) -> workers.Workers:
        made = real(*how)
        made._processes[0].kill()
        return made

    monkeypatch.setattr(workers, "Workers", killed)
    with pytest.raises(DominoError, match="a tokenizing process ended early"):
        read_corpus([path], 60, 400, qwen)


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """A cache that keeps small corpora as well; grows by one each time that one is made."""
    monkeypatch.setattr(cache, "WORTH_TOKENS", 0)
    made: list[int] = []
    read = dataset._read
    monkeypatch.setattr(dataset, "_read", lambda *how: made.append(1) or read(*how))
    return made


def test_a_corpus_is_tokenized_once(qwen, bpe, tmp_path, counted):
    path, kept = write(tmp_path / "data.jsonl", *conversations(20)), tmp_path / "cache"
    first, summary = read_corpus([path], 60, 400, qwen, cache=kept, pack=True)
    seen = []
    again, same_summary = read_corpus([path], 60, 400, bpe(QWEN), cache=kept, pack=True, progress=seen.append)
    assert len(counted) == 1 and same(first, again) and summary == same_summary and seen == [20]
    assert again.fingerprint == first.fingerprint and isinstance(again.ids, np.memmap)
    assert all(np.array_equal(a, b) for a, b in zip(first.batch(3, 8, 1), again.batch(3, 8, 1), strict=True))

    copy = tmp_path / "copy.jsonl"
    shutil.copy2(path, copy)
    read_corpus([copy], 60, 400, qwen, cache=kept, pack=True)
    assert len(counted) == 1, "the same data under another name"
    changes: list[Callable[[], Any]] = [
        lambda: read_corpus([path], 61, 400, qwen, cache=kept, pack=True),
        lambda: read_corpus([path], 60, 400, qwen, cache=kept),
        lambda: read_corpus([path], 60, 401, qwen, cache=kept, pack=True),
        lambda: read_corpus([path], 60, 400, bpe(CHATML), cache=kept, pack=True),
        lambda: read_corpus([path, path], 60, 400, qwen, cache=kept, pack=True),
        lambda: os.utime(path, (0, 0)) or read_corpus([path], 60, 400, qwen, cache=kept, pack=True),
    ]
    for number, change in enumerate(changes, 2):
        change()
        assert len(counted) == number
    path.write_text(path.read_text().replace("yes 3", "yes 4"))
    assert read_corpus([path], 60, 400, qwen, cache=kept)[0].fingerprint != first.fingerprint
    assert sorted(entry.suffix for entry in kept.iterdir()) == [""] * (len(counted))


def test_a_cache_that_is_damaged_or_can_not_be_written_is_no_error(qwen, tmp_path, counted):
    path, kept = write(tmp_path / "data.jsonl", *conversations(20)), tmp_path / "cache"
    first, _ = read_corpus([path], 60, 400, qwen, cache=kept)
    (place,) = kept.iterdir()
    for number, name in enumerate(["corpus.json", "ids.npy"], 2):
        (place / name).write_bytes(b"{")
        assert same(first, read_corpus([path], 60, 400, qwen, cache=kept)[0]) and len(counted) == number
    read_corpus([path], 60, 400, qwen, cache=kept)
    assert len(counted) == 3, "what was damaged was written anew"
    (tmp_path / "file").touch()
    assert same(first, read_corpus([path], 60, 400, qwen, cache=tmp_path / "file")[0])


def test_small_corpora_are_not_kept(qwen, tmp_path):
    path = write(tmp_path / "data.jsonl", *conversations(20))
    read_corpus([path], 60, 400, qwen, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_of_several_processes_one_tokenizes(qwen, tmp_path, counted, monkeypatch):
    """As hosts do that share a disk: threads stand for them, with locks of their own."""
    path, kept = write(tmp_path / "data.jsonl", *conversations(20)), tmp_path / "cache"
    slow = dataset._read

    def waiting(*how: Any) -> Any:
        time.sleep(0.3)
        return slow(*how)

    monkeypatch.setattr(dataset, "_read", waiting)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: read_corpus([path], 60, 400, qwen, cache=kept)[0], range(4)))
    assert len(counted) == 1 and all(same(found[0], corpus) for corpus in found)


def test_datasets_of_the_hub_are_known_by_their_files(qwen, tmp_path, offline, counted, monkeypatch):
    rows = conversations(5)
    offline.Dataset.from_list(rows).save_to_disk(tmp_path / "arrow")
    held = [offline.load_from_disk(tmp_path / "arrow"), offline.Dataset.from_list(rows)]
    for table, times in zip(held, (1, 3), strict=True):  # one in memory has no files, and is read each time
        monkeypatch.setattr(offline, "load_dataset", lambda *_, table=table, **__: table)
        for _ in range(2):
            read_corpus(["org/set"], 60, 400, qwen, cache=tmp_path / "cache")
        assert len(counted) == times
