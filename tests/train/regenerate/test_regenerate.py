"""Rewriting answers: what is asked and answered, drafts, interruptions, refusals, meshes."""

import errno
import json
import os
import re
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factory import CHAT_END_ID, END_ID, make_draft, make_target
from loops import hf_greedy

from convert import loading
from convert.tokenizer import final_answer
from domino_jax import target
from domino_jax.runtime import slots
from domino_jax.runtime.files import lock_file
from domino_jax.runtime.slots import Completion, Request, Slots
from domino_jax.sampling import SamplingParams, probabilities, settings
from train.regenerate import output, prompts
from train.regenerate.command import main

pytestmark = pytest.mark.usefixtures("quick_compilation")

# As Qwen3's, but short: earlier answers without thoughts, and something before the next one if thinking is off.
TEMPLATE = """
{%- for m in messages %}
    {%- if m.content == 'refuse me' %}{{ raise_exception('no such thing') }}{% endif %}
    {%- set said = m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else m.content %}
    {{- '<|im_start|>' + m.role[0] + ':' + said + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>a:' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '~~' }}{%- endif %}
{%- endif %}"""
STOPS = (END_ID, CHAT_END_ID, 4, 60, 61)  # several, so that random answers end


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


DATA = [
    {"messages": [{"role": "system", "content": "Be brief."}, user("Hi"), said("old"), user("Why?"), said("older")]},
    {
        "conversations": [
            {"from": "human", "value": "One"},
            {"from": "gpt", "value": "old"},
            {"from": "human", "value": "2"},
        ]
    },
    {"prompt": "def f("},
    {"input_ids": [40, 41, 42]},
    {"messages": [user("a"), said("b"), user("c"), said("d"), user("e"), said("f")]},
    {"messages": [user("x " * 20), said("y")]},
]
TURNS = [2, 2, 1, 1, 3, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A target with a template, a drafter, and data."""
    root = tmp_path_factory.mktemp("regenerate")
    make_target(root / "target", template=TEMPLATE, eos=STOPS)
    make_draft(root / "draft")
    write(root / "data.jsonl", DATA)
    return root


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))  # blank lines do not count
    return path


def run(folder: Path, out: Path, *words: str, data: Path | None = None, status: int = 0) -> list[dict]:
    """The command's lines, by their numbers."""
    given = ["--target", str(folder / "target"), "--data", str(data or folder / "data.jsonl"), "--out", str(out)]
    assert main([*given, "--max-new-tokens", "9", "--batch-size", "3", *words]) == status
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return sorted(rows, key=lambda row: (row["row"], row["turn"]))


def drafted(folder: Path) -> tuple[str, str]:
    return "--draft", str(folder / "draft")


@pytest.fixture(scope="module")
def greedy(folder, tmp_path_factory) -> list[dict]:
    return run(folder, tmp_path_factory.mktemp("greedy") / "out.jsonl", "--temperature", "0")


@pytest.fixture(scope="module")
def sampled(folder, tmp_path_factory) -> list[dict]:
    return run(folder, tmp_path_factory.mktemp("sampled") / "out.jsonl", *drafted(folder), "--temperature", "1.2")


@pytest.mark.e2e
def test_each_turn_is_asked_in_the_template_and_answered_as_transformers_answers_it(folder, greedy):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "target", dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    assert [(row["row"], row["turn"]) for row in greedy] == [(r, t) for r, n in enumerate(TURNS) for t in range(n)]
    conversations = {
        0: [DATA[0]["messages"][0], user("Hi"), None, user("Why?"), None],
        1: [user("One"), None, user("2"), None],
        4: [user("a"), None, user("c"), None, user("e"), None],
        5: [user("x " * 20), None],
    }
    ends = Counter()
    for row in greedy:
        if row["row"] in conversations:
            messages = conversations[row["row"]]
            place = messages.index(None)
            asked = tokenizer.apply_chat_template(
                messages[:place], add_generation_prompt=True, enable_thinking=False, return_dict=False
            )
            messages[place] = said(tokenizer.decode(row["tokens"], skip_special_tokens=True))
            assert row["messages"] == messages[: place + 1]
        else:
            asked = [40, 41, 42] if row["row"] == 3 else tokenizer("def f(")["input_ids"]
            assert "messages" not in row
        assert row["input_ids"] == asked
        assert row["tokens"] == hf_greedy(model, asked, 9, STOPS)
        ended = row["tokens"][-1] in STOPS
        assert row["finish_reason"] == ("stop" if ended else "length")
        assert ended or len(row["tokens"]) == 9
        ends[row["finish_reason"]] += 1
    assert len(ends) == 2, "both ways to end were to be seen"


@pytest.mark.e2e
def test_a_drafter_changes_no_greedy_answer_and_its_acceptance_is_told(folder, greedy, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("train.monitor.decoding_progress.EVERY", 0.0)
    assert run(folder, tmp_path / "a.jsonl", "--temperature", "0", *drafted(folder)) == greedy
    out, err = capfd.readouterr()
    assert ", τ " in out
    assert re.search(r"^6/10 answers  [\d,]+ tokens/s  τ \d\.\d\d  0:\d\d:\d\d left$", err, re.MULTILINE)


@pytest.mark.e2e
@pytest.mark.slow
def test_a_mesh_changes_no_greedy_answer(folder, greedy, tmp_path):
    mesh = ("--mesh", "data=2,model=2", "--dtype", "float32")
    assert run(folder, tmp_path / "b.jsonl", "--temperature", "0", *drafted(folder), *mesh) == greedy


@pytest.mark.e2e
def test_an_interrupted_run_ends_as_an_undisturbed_one(folder, sampled, tmp_path, monkeypatch, capfd):
    assert len({tuple(row["tokens"]) for row in sampled}) > 6, "samples were to be expected"
    out, words = tmp_path / "out.jsonl", [*drafted(folder), "--temperature", "1.2"]
    seen, count = set(), 0
    update = slots.fetch

    def interrupt(tree):
        nonlocal count
        count += 1
        if count in (2, 5):  # within the first batch of this run, and of a later one
            os.kill(os.getpid(), signal.SIGTERM if count == 2 else signal.SIGINT)
        return update(tree)

    monkeypatch.setattr(slots, "fetch", interrupt)
    for _ in range(2):
        seen.add(len(run(folder, out, *words, status=130)))
        assert "the same command goes on" in capfd.readouterr().err
    assert max(seen) < len(sampled)
    whole = out.read_bytes()
    if whole:  # killed while writing
        out.write_bytes(whole[:-7])
    assert run(folder, out, *words) == sampled
    monkeypatch.setattr("train.regenerate.decoding.load_model", None)  # nothing is missing, so nothing is loaded
    assert run(folder, out, *words) == sampled


@pytest.mark.e2e
@pytest.mark.parametrize("kept", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 8))])
def test_a_killed_run_goes_on(folder, sampled, tmp_path, kept):
    """Whichever lines are there, the others come out as they would have."""
    out, words = tmp_path / "out.jsonl", [*drafted(folder), "--temperature", "1.2"]
    run(folder, out, *words)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:kept]) + lines[kept][:-5])
    assert run(folder, out, *words) == sampled


@pytest.mark.e2e
def test_workers_share_the_lines_and_together_write_what_one_would(folder, greedy, tmp_path):
    out, rows = tmp_path / "out.jsonl", []
    files = [tmp_path / f"out-0000{i}-of-00002.jsonl" for i in range(2)]
    for i in range(2):
        run(folder, out, "--temperature", "0", "--shard", f"{i}/2")
        rows.append(files[i].read_bytes().splitlines(keepends=True))
        assert {json.loads(line)["row"] % 2 for line in rows[i]} == {i}
    files[1].write_bytes(b"".join(rows[1][:2]) + rows[1][2][:-5])  # killed
    run(folder, out, "--temperature", "0", "--shard", "1/2")
    found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert sorted(found, key=lambda row: (row["row"], row["turn"])) == greedy
    assert not out.exists()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_line_is_in_one_shard(folder, count):
    parts = [prompts.Lines(folder / "data.jsonl", 260, prompts.RowShard(i, count)) for i in range(count)]
    assert np.sum([part.turns for part in parts], axis=0).tolist() == TURNS
    assert all((part.turns > 0).tolist() == [row % count == i for row in range(6)] for i, part in enumerate(parts))


@pytest.mark.parametrize("text", ["", "4", "4/4", "5/4", "-1/4", "0/0", "a/b", "0/4/1", "1.0/4", "٣/4", "0 /4"])
def test_what_is_no_shard_is_refused(folder, tmp_path, capsys, text):
    run(folder, tmp_path / "out.jsonl", f"--shard={text}", status=2)
    assert "a shard is given as I/N" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_shard_without_a_line_says_so(folder, tmp_path, capsys):
    run(folder, tmp_path / "out.jsonl", "--shard", "7/9", status=1)
    assert "data.jsonl has nothing to answer in shard 7/9" in capsys.readouterr().err


def test_two_processes_do_not_write_into_one_file(folder, tmp_path, capsys, monkeypatch):
    """Each would read the other's answers as its own."""
    monkeypatch.setattr("train.regenerate.decoding.load_model", lambda *_, **__: pytest.fail("loaded"))
    with lock_file(tmp_path / "out.jsonl"):
        run(folder, tmp_path / "out.jsonl", status=1)
    assert f"error: {tmp_path / 'out.jsonl'} is being written by another process" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--temperature", "0.3"], "temperature"),
        (["--seed", "1"], "seed"),
        (["--max-new-tokens", "8"], "max_new_tokens"),
        (["--thinking"], "thinking"),
        (["--draft", "draft"], "draft_identity"),
        (["--draft", "draft", "--draft-weights", "int8"], "draft_identity"),
        (["--weights", "int8"], "weights"),
    ],
)
def test_another_setting_is_refused(folder, tmp_path, capsys, monkeypatch, words, name):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("train.regenerate.decoding.load_model", lambda *_, **__: pytest.fail("loaded"))
    out = tmp_path / "out.jsonl"
    with pytest.raises(pytest.fail.Exception):
        run(folder, out)
    run(folder, out, *words, status=1)
    assert f"begun with other settings: {name} was" in capsys.readouterr().err


def test_other_data_another_target_and_foreign_files_are_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train.regenerate.decoding.load_model", lambda *_, **__: pytest.fail("loaded"))
    out = tmp_path / "out.jsonl"
    with pytest.raises(pytest.fail.Exception):
        run(folder, out)
    out.write_text('{"row": 0, "turn": 0, "tokens": [5]}\n{"row": 1, "turn": false')  # the latter is cut off
    with pytest.raises(pytest.fail.Exception):
        run(folder, out)
    words = ["--target", str(folder / "target"), "--data", str(folder / "data.jsonl"), "--out", str(out)]
    for damage in ("[1]", '{"row": 1, "turn": 0}', '{"row": "1", "turn": 0, "tokens": [5]}', "null", '{"row": 1, "tu'):
        out.write_text('{"row": 0, "turn": 0, "tokens": [5]}\n' + damage + "\n")
        assert main([*words, "--max-new-tokens", "9"]) == 1
        assert f"{out}, line 2 is damaged" in capsys.readouterr().err
    out.write_text("")
    run(folder, out, data=write(tmp_path / "other.jsonl", DATA[:3]), status=1)
    assert "data_sha256 was" in capsys.readouterr().err
    make_target(tmp_path / "target", seed=1, template=TEMPLATE, eos=STOPS)
    run(tmp_path, out, data=folder / "data.jsonl", status=1)
    assert "target_identity was" in capsys.readouterr().err
    foreign = write(tmp_path / "foreign.jsonl", [{"text": "mine"}])
    before = foreign.read_bytes()
    assert main([*words[:-1], str(foreign)]) == 1
    assert "not written by this command" in capsys.readouterr().err
    assert foreign.read_bytes() == before


@pytest.mark.e2e
def test_a_full_disk_keeps_what_is_done(folder, greedy, tmp_path, capsys, monkeypatch):
    class Disk:
        """Takes 1500 bytes, the last of them in the middle of a line."""

        def __init__(self, file):
            self.file, self.room = file, 1500

        def write(self, data) -> int:
            taken = self.file.write(data[: self.room])
            self.room -= taken
            if not taken:
                raise OSError(errno.ENOSPC, "No space left on device")
            return taken

        def __getattr__(self, name):
            return getattr(self.file, name)

    real = output.Answers._index

    def index(self):
        self._file = Disk(self._file)
        return real(self)

    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(output.Answers, "_index", index)
        kept = run(folder, out, "--temperature", "0", status=1)
    error = capsys.readouterr().err
    assert 0 < len(kept) < len(greedy) and out.read_bytes().endswith(b"\n")
    assert f"the disk is full; its {len(kept)} answers are kept" in error and "Traceback" not in error
    assert run(folder, out, "--temperature", "0") == greedy


@pytest.mark.e2e
def test_what_does_not_fit_or_is_refused_is_left_out_and_counted(folder, greedy, tmp_path, capsys):
    more = [
        {"messages": [user("long " * 60), said("x"), user("y"), said("z")]},
        {"messages": [user("refuse me"), said("x")]},
        {"messages": [said("nobody asked")]},
        {"messages": [user("call"), {"role": "tool", "content": "x"}, said("y")]},
    ]
    found = run(folder, tmp_path / "a.jsonl", "--temperature", "0", data=write(tmp_path / "d", DATA + more))
    assert found == greedy
    out = capsys.readouterr().out
    for reason in (
        "are too long for the target's 256 positions",
        "are refused by the chat template (no such thing",
        "ask nothing",
        "have messages of a 'tool'",
    ):
        assert f"1 left out that {reason}" in out
    run(folder, tmp_path / "b.jsonl", data=write(tmp_path / "e", more[:2]), status=1)
    assert "nothing could be answered" in capsys.readouterr().err


def test_an_answer_ends_with_the_positions(folder, tmp_path):
    """The last position's token is generated, and it is never run."""
    data = write(tmp_path / "data.jsonl", [{"input_ids": [50] * 12}, {"input_ids": [50] * 16}])
    make_target(tmp_path / "target", eos=None, max_position_embeddings=16)
    found = run(tmp_path, tmp_path / "out.jsonl", "--temperature", "0", data=data)
    assert [len(row["tokens"]) for row in found] == [5, 1]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "is no conversation and no prompt"),
        ('{"text": "x"}', "expected messages, conversations, prompt or input_ids"),
        ('{"input_ids": [260]}', "id 260, outside the target's vocabulary of 260"),
        ('{"messages": [{"content": "x"}]}', 'each message is an object with "role" and "content"'),
        ('{"prompt": "\\ud800"}', "not valid Unicode"),
    ],
)
def test_a_line_of_another_form_is_named_before_anything_is_loaded(folder, tmp_path, capsys, line, sentence):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "x"}\n' + line + "\n")
    run(folder, tmp_path / "out.jsonl", data=data, status=1)
    error = capsys.readouterr().err
    assert "line 2" in error and sentence in error
    assert not (tmp_path / "out.jsonl").exists()


def test_conversations_need_a_template_and_values_must_make_sense(folder, tmp_path, capsys):
    make_target(tmp_path / "target")
    run(tmp_path, tmp_path / "out.jsonl", data=folder / "data.jsonl", status=1)
    assert "no chat template" in capsys.readouterr().err
    wrong = (["--top-p", "0"], ["--batch-size", "0"], ["--temperature", "-1"], ["--seed", "-1"], ["--min-p", "nan"])
    wrong += (["--top-k", str(2**64)], ["--max-new-tokens", str(2**31)], ["--head-candidates", "0"])
    for words in wrong:
        run(folder, tmp_path / "out.jsonl", *words, status=2)
        assert f"{words[0]} must be " in capsys.readouterr().err
    for words, says in (
        (["--draft", "none", "--draft-weights", "int8"], "--draft-weights needs a drafter"),
        (["--draft-revision", "main"], "there is no drafter"),
        (["--mesh", "model"], "data=2,model=4"),
        (["--out", str(folder / "data.jsonl")], "is to be written, and"),
    ):
        run(folder, tmp_path / "out.jsonl", *words, status=2)
        assert says in capsys.readouterr().err
    assert main(["--data", str(folder / "data.jsonl"), "--out", str(tmp_path / "out.jsonl")]) == 2
    assert "give --target: demo, qwen3-0.6b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("messages", "given"),
    [
        ([user("a"), said("b")], [[user("a")]]),
        ([user("a"), said("b"), said("c"), user("d")], [[user("a")], [user("d")]]),
        ([said("hello"), user("a"), said("b")], [[said("hello"), user("a")]]),
        ([user("a"), user("b"), said("c"), user("d"), said("e")], [[user("a"), user("b")], [user("d")]]),
    ],
)
def test_what_is_a_turn(messages, given):
    assert prompts.parse_row({"messages": messages}, 9).given == given
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
    assert prompts.parse_row({"conversations": sharegpt}, 9).given == given


def test_later_turns_are_not_told_of_thoughts():
    assert final_answer("<think>hm</think>\n\nYes") == "Yes"
    assert final_answer("<think>cut off") == ""
    assert final_answer("Yes") == "Yes"


@pytest.fixture(scope="module")
def pair(folder):
    return loading.load_model(folder / "target", folder / "draft", "float32")


@pytest.mark.e2e
@pytest.mark.slow
def test_samples_follow_the_targets_distribution_with_a_drafter(pair):
    """The second token after one prompt, drafted: its frequencies against the exact distribution."""
    count, choice = 1024, SamplingParams(temperature=0.5, top_k=6)
    how = replace(choice, max_tokens=3, seed=3, sampler="rejection")
    found = [Completion(Request([70, 71, 72], how, (row, 1))) for row in range(count)]
    ended = list(Slots(pair.params, pair.configs, 128, pair.dtype).run(found))
    assert len(ended) == count and set(ended) == set(found)
    assert any(m for a in found for m in a.accepted), "drafts were to be accepted"

    @jax.jit
    def distributions(ids: jax.Array) -> jax.Array:
        hidden, _, _ = target.forward(pair.params.target, pair.configs.target, ids)
        logits = target.logits(pair.params.target, pair.configs.target, hidden)
        return probabilities(logits, settings(len(ids), 0.5, 6))

    whole = np.tile([70, 71, 72, 0], (260, 1))
    whole[:, 3] = np.arange(260)
    after = np.asarray(distributions(jnp.asarray(whole, jnp.int32)))
    first, exact = after[0, 2], after[0, 2] @ after[:, 3]
    for place, expected in ((0, first), (1, exact)):
        seen = np.bincount([a.tokens[place] for a in found], minlength=260)
        assert not seen[expected == 0].any()
        likely = expected > 0
        chi = ((seen[likely] - count * expected[likely]) ** 2 / (count * expected[likely])).sum()
        freedom = likely.sum() - 1
        assert chi < freedom + 4 * np.sqrt(2 * freedom), place
