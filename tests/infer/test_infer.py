"""`python -m infer` through its own command line, on tiny random models."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from factory import BYTE_DRAFT, END, MASK, MASK_ID, REPEATING, make_draft, make_target, make_tokenizer

from domino_jax import decode
from infer import text
from infer.__main__ import main
from infer.output import Output, color_drafts, histogram

pytestmark = pytest.mark.usefixtures("quick_compilation")
TEMPLATE = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}{% if not enable_thinking %}!{% endif %}"


class Result(NamedTuple):
    """What a run gave: exit status, standard output and error."""

    status: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Standard output as JSON lines; every line must be one."""
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Result]


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Folders: target, draft; bare (no tokenizer); chat (with a template); loop and loop-draft (repeating)."""
    root = tmp_path_factory.mktemp("models")
    make_target(root / "target")
    make_draft(root / "draft")
    make_target(root / "bare", tokenizer=False)
    make_target(root / "chat", template=TEMPLATE)
    make_target(root / "loop", std=REPEATING)
    make_draft(root / "loop-draft", std=REPEATING)
    return root


@pytest.fixture
def run(models, monkeypatch, capsys) -> Run:
    """Runs the command line on the model `target` (with its drafter unless told) in this process."""

    def run(*words: str, target: str = "target", draft: str | None = "draft", stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        drafter = [] if draft is None else ["--draft", draft if draft == "none" else str(models / draft)]
        if draft not in (None, "none") and not {"--drafts", "--num-draft-tokens"} & set(words):
            drafter += ["--drafts", str(BYTE_DRAFT.num_proposals)]  # not auto, which goes by times
        status = main([*words, "--model", str(models / target), *drafter])
        return Result(status, *capsys.readouterr())

    return run


def generated(run: Run, *words: str, **where: Any) -> dict[str, Any]:
    """The one JSON object of a run that must succeed."""
    result = run(*words, "--json", **where)
    assert result.status == 0, result.err
    (row,) = result.rows
    return row


def test_json_has_the_promised_keys(run):
    row = generated(run, "hello", "--max-new-tokens", "20")
    assert row["prompt_tokens"] == len(row["input_ids"]) == 5
    assert len(row["tokens"]) == 20
    assert row["finish_reason"] == "length"
    assert row["text"] == text.decode(make_tokenizer(), row["tokens"])
    assert row["cycles"] == len(row["accepted"]) > 0
    assert row["tau"] == pytest.approx(sum(row["accepted"]) / row["cycles"] + 1)
    assert set(row["seconds"]) == {"load", "compile", "prefill", "calibrate", "decode"}
    assert (row["drafts"], row["plain_steps"]) == ([BYTE_DRAFT.num_proposals] * row["cycles"], 0)
    assert all(seconds >= 0 for seconds in row["seconds"].values())
    assert row["tokens_per_second"] == pytest.approx(19 / row["seconds"]["decode"])


@pytest.mark.parametrize("limit", [1, pytest.param(2, marks=pytest.mark.slow), 7])
def test_max_new_tokens_is_exact(run, limit):
    row = generated(run, "hello", "--max-new-tokens", str(limit))
    assert len(row["tokens"]) == limit
    assert (row["tau"] is None) == (limit == 1)  # the only token is the prefill's


def test_plain_decoding_gives_the_same_tokens_without_cycles(run):
    drafted = generated(run, "hello", "--max-new-tokens", "20")
    plain = generated(run, "hello", "--max-new-tokens", "20", draft="none")
    assert plain["tokens"] == drafted["tokens"]
    assert (plain["cycles"], plain["accepted"], plain["tau"]) == (0, [], None)


def test_accepted_drafts_are_counted_whole(run):
    # The mask token is what the drafter proposes and the target repeats: everything is accepted.
    whole = generated(run, "--input-ids", f"5,{MASK_ID}", "--max-new-tokens", "9", target="loop", draft="loop-draft")
    assert whole["tokens"] == [MASK_ID] * 9
    assert whole["accepted"] == [BYTE_DRAFT.num_proposals] * 2  # 1 + 5 + 3: the limit cuts the second
    assert whole["tau"] == BYTE_DRAFT.num_proposals + 1
    # Any other token is proposed once, by the anchor's own row.
    one = generated(run, "--input-ids", "5,70", "--max-new-tokens", "9", target="loop", draft="loop-draft")
    assert (one["tokens"], one["accepted"], one["tau"]) == ([70] * 9, [1] * 4, 2.0)


def test_fewer_drafts_a_cycle_give_the_same_tokens(run):
    words = ("--input-ids", f"5,{MASK_ID}", "--max-new-tokens", "9", "--drafts", "2")
    row = generated(run, *words, target="loop", draft="loop-draft")
    assert (row["tokens"], row["accepted"]) == ([MASK_ID] * 9, [2] * 3)  # 1 + 3 + 3 + 3: the limit cuts the last
    assert run(*words, target="loop", draft="loop-draft").err.count("█") > 0


@pytest.mark.slow
def test_drafts_chosen_by_measurement_give_the_same_tokens(run):
    # 120 positions of prompt leave room for one cycle in the first bucket; measuring must not touch them.
    words = ("x" * 120, "--max-new-tokens", "30")
    result = run(*words, "--drafts", "auto", "--json")
    (row,) = result.rows
    assert row["tokens"] == generated(run, *words, draft="none")["tokens"]
    assert len(row["drafts"]) == len(row["accepted"]) == row["cycles"]
    assert row["cycles"] + row["plain_steps"] > 0 and row["seconds"]["calibrate"] > 0
    assert "calibrating" in result.err and "drafts auto: " in result.err
    shown = run("--input-ids", "5,70", "--max-new-tokens", "9", "--drafts", "auto", "--show-drafts", target="loop")
    letter = text.decode(make_tokenizer(), [70])
    assert shown.out.splitlines()[0].count(letter) == 9


def test_growing_past_a_bucket_changes_nothing(run):
    # 120 positions of prompt leave 8 of the first bucket of 128.
    words = ("x" * 120, "--max-new-tokens", "60")
    assert generated(run, *words)["tokens"] == generated(run, *words, draft="none")["tokens"]


def test_without_a_tokenizer_text_is_null(run):
    row = generated(run, "--input-ids", "10, 20,30", "--max-new-tokens", "5", target="bare")
    assert row["text"] is None
    assert row["input_ids"] == [10, 20, 30]
    result = run("--input-ids", "10,20,30", "--max-new-tokens", "5", target="bare")
    assert result.out == ",".join(map(str, row["tokens"])) + "\n"
    refused = run("hello", target="bare")
    assert refused.status == 1
    assert "--input-ids" in refused.err


def test_standard_input_is_the_prompt_without_its_last_newline(run):
    argument = generated(run, "one\ntwo", "--max-new-tokens", "5")
    for words in ((), ("-",)):
        piped = generated(run, *words, "--max-new-tokens", "5", stdin="one\ntwo\n")
        assert (piped["input_ids"], piped["tokens"]) == (argument["input_ids"], argument["tokens"])


@pytest.mark.parametrize("draft", ["draft", pytest.param("none", marks=pytest.mark.slow)])
def test_a_batch_equals_its_prompts_one_by_one(run, tmp_path, draft):
    file = tmp_path / "prompts.jsonl"
    prompts = [{"prompt": "hello"}, {"input_ids": [50] * 33, "max_new_tokens": 3}, {"prompt": "a much longer prompt"}]
    file.write_text("\n".join(map(json.dumps, prompts)) + "\n\n")
    words = ("--max-new-tokens", "15", "--dtype", "float32")
    result = run("--prompts", str(file), "--batch-size", "2", "--json", *words, draft=draft)
    assert result.status == 0
    rows = result.rows
    assert [len(row["tokens"]) for row in rows] == [15, 3, 15]
    for row in rows:
        words = ("--max-new-tokens", str(len(row["tokens"])), "--dtype", "float32")
        alone = generated(run, "--input-ids", ",".join(map(str, row["input_ids"])), *words, draft=draft)
        assert (alone["tokens"], alone["accepted"]) == (row["tokens"], row["accepted"])
    assert "3/3 prompts" in result.err


def test_sampling_follows_the_seed_and_not_the_batch(run, tmp_path):
    def sampled(seed: int, size: int) -> list[list[int]]:
        file = tmp_path / "prompts.jsonl"
        file.write_text('{"prompt": "hello"}\n' * 3)
        words = ("--prompts", str(file), "--temperature", "1", "--max-new-tokens", "12", "--json")
        return [r["tokens"] for r in run(*words, "--seed", str(seed), "--batch-size", str(size)).rows]

    rows = sampled(0, 2)
    assert len({tuple(tokens) for tokens in rows}) == 3  # every row has a key of its own
    assert sampled(0, 1) == rows
    assert sampled(1, 2) != rows


def test_a_temperature_next_to_zero_is_greedy(run):
    greedy, cold = (generated(run, "hello", "--max-new-tokens", "9", "--temperature", t) for t in ("0", "1e-37"))
    assert greedy["tokens"] == cold["tokens"] and len(set(greedy["tokens"])) > 1


def test_a_stop_token_is_kept_and_ends_the_output(run, models, tmp_path):
    free = generated(run, "hello", "--max-new-tokens", "30")["tokens"]
    stop = free[4]
    ending = tmp_path / "ending"
    make_target(ending, eos=[stop, stop])
    row = generated(run, "hello", "--max-new-tokens", "30", target=str(ending))
    assert row["tokens"] == free[: free.index(stop) + 1]
    assert row["finish_reason"] == "stop"
    # Where generation_config.json is silent, config.json counts.
    (ending / "generation_config.json").unlink()
    config = json.loads((ending / "config.json").read_text())
    (ending / "config.json").write_text(json.dumps(config | {"eos_token_id": [stop, stop]}))
    assert generated(run, "hello", "--max-new-tokens", "30", target=str(ending))["tokens"] == row["tokens"]


def test_a_stop_string_cuts_the_text(run):
    words = ("--input-ids", "5,70", "--max-new-tokens", "40")
    free = generated(run, *words, target="loop", draft="loop-draft")
    letter = free["text"][0]
    row = generated(run, *words, "--stop", "never", "--stop", letter * 3, target="loop", draft="loop-draft")
    assert (row["text"], row["tokens"], row["finish_reason"]) == ("", [70] * 3, "stop")
    assert row["cycles"] == len(row["accepted"]) == 1  # later cycles of the dispatch do not count
    out = run(*words, "--stop", letter * 3, target="loop", draft="loop-draft").out
    assert out == "\n"


def test_a_stopped_row_leaves_its_neighbours_alone(run, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"input_ids": [5, 70]}\n{"input_ids": [5, 71]}\n')
    letter = text.decode(make_tokenizer(), [70])
    words = ("--prompts", str(file), "--max-new-tokens", "90", "--stop", letter, "--json")
    first, second = run(*words, target="loop", draft="loop-draft").rows
    assert (first["tokens"], first["finish_reason"]) == ([70], "stop")
    assert (second["tokens"], second["finish_reason"]) == ([71] * 90, "length")


def test_a_long_row_that_stops_at_its_first_token_does_not_hold_up_a_short_one(run, tmp_path):
    """The device knows nothing of stop strings: unless told, it would wait for room in the row that is over."""
    file = tmp_path / "prompts.jsonl"
    rows = [[5] * 119 + [70], [5, 71]]
    file.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in rows))
    letter = text.decode(make_tokenizer(), [70])
    words = ("--prompts", str(file), "--max-new-tokens", "60", "--stop", letter, "--json")
    first, second = run(*words, target="loop", draft="loop-draft").rows
    assert (first["tokens"], second["tokens"]) == ([70], [71] * 60)


def test_a_special_token_can_be_a_stop_string(run):
    row = generated(
        run, "--input-ids", f"5,{MASK_ID}", "--max-new-tokens", "9", "--stop", MASK, target="loop", draft="loop-draft"
    )
    assert (row["tokens"], row["text"], row["finish_reason"]) == ([MASK_ID], "", "stop")


def test_a_stop_string_may_be_several_special_tokens_and_one_that_cannot_come_is_warned_of(run):
    words = ("--input-ids", f"5,{MASK_ID}", "--max-new-tokens", "9", "--stop", MASK * 3, "--stop", f"{END} and on")
    result = run(*words, "--json", target="loop", draft="loop-draft")
    (row,) = result.rows
    assert (row["tokens"], row["text"], row["finish_reason"]) == ([MASK_ID] * 3, "", "stop")
    assert f"warning: the stop string '{END} and on' can't come" in result.err


def command(models: Path, *words: str) -> list[str]:
    folders = ["--model", str(models / "loop"), "--draft", str(models / "loop-draft")]
    return [sys.executable, "-m", "infer", "--input-ids", "5,70", "--max-new-tokens", "30", *folders, *words]


def buffered() -> dict[str, str]:
    """The environment, with Python's standard output buffered as it usually is."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    }


@pytest.mark.e2e
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_sentence_and_exit_code_1(models):
    root = Path(__file__).parents[2]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command(models, "--json"),
            env=buffered(),
            cwd=root,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the output can't be written") and "no space left" in last


@pytest.mark.e2e
def test_a_reader_that_has_seen_enough_is_no_failure(models):
    root = Path(__file__).parents[2]
    pipe = subprocess.Popen(
        command(models, "--show-drafts"), env=buffered(), cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert pipe.stdout is not None and pipe.stderr is not None
    pipe.stdout.close()
    error = pipe.stderr.read().decode()
    assert pipe.wait() == 0, error
    assert "Traceback" not in error


def test_the_chat_template_is_applied_unless_raw(run, tmp_path):
    tokenizer = make_tokenizer()

    def prompt(*words: str) -> str:
        row = generated(run, *words, "--max-new-tokens", "1", target="chat")
        return tokenizer.decode(row["input_ids"])

    assert prompt("hi") == "[user:hi]!"  # "!": thinking is off
    assert prompt("hi", "--system", "Be brief") == "[system:Be brief][user:hi]!"
    assert prompt("hi", "--raw") == "hi"
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')
    assert prompt("--prompts", str(file)) == "[user:a][assistant:b]!"


def test_a_chat_sends_the_whole_conversation(run, models, monkeypatch, capsys):
    lines = iter(["hi", "more"])

    def next_line(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    rendered = []
    encode = text.encode_chat

    def record(tokenizer: Any, messages: Any, *how: Any) -> list[int]:
        rendered.append([m["role"] for m in messages])
        return encode(tokenizer, messages, *how)

    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", next_line)
    monkeypatch.setattr(text, "encode_chat", record)
    monkeypatch.setattr(sys, "stdin", terminal)
    words = ["--model", str(models / "chat"), "--draft", str(models / "draft"), "--max-new-tokens", "3"]
    assert main(words) == 0
    assert rendered == [["user"], ["user", "assistant", "user"]]
    assert main([*words, "--json"]) == 2


def test_streamed_output_is_the_text(run):
    row = generated(run, "--input-ids", "5,70", "--max-new-tokens", "40", target="loop", draft="loop-draft")
    result = run("--input-ids", "5,70", "--max-new-tokens", "40", target="loop", draft="loop-draft")
    assert result.out == row["text"] + "\n"
    assert "τ = 2.00" in result.err
    assert "tokens/s" in result.err


def test_compare_finds_identical_tokens(run):
    result = run("hello", "--max-new-tokens", "20", "--compare")
    assert result.status == 0
    assert "identical" in result.err
    assert "×" in result.err
    compared = generated(run, "hello", "--max-new-tokens", "20", "--compare")["compare"]
    assert compared["identical"] is True
    assert compared["speedup"] == pytest.approx(compared["tokens_per_second"] / compared["lean_tokens_per_second"])


def test_compare_tells_different_tokens(run, monkeypatch):
    from infer import engine

    generate = engine.Engine.generate

    def spoiled(self, sequences, how, *rest):
        generate(self, sequences, how, *rest)
        if not how.speculative:
            sequences[0].tokens[-1] += 1

    monkeypatch.setattr(engine.Engine, "generate", spoiled)
    result = run("hello", "--max-new-tokens", "20", "--compare")
    assert "different" in result.err
    assert "identical" not in result.err


def test_show_drafts_shows_every_kept_token_and_a_legend(run):
    result = run("--input-ids", "5,70", "--max-new-tokens", "5", "--show-drafts", target="loop", draft="loop-draft")
    letter = text.decode(make_tokenizer(), [70])
    shown, legend = result.out.splitlines()
    assert shown.count(letter) == 5  # the rejected drafts are the mask, a special token without text
    assert "rejected" in legend


@pytest.mark.parametrize(
    ("environment", "terminal", "colored"),
    [
        ({"TERM": "xterm-256color"}, True, True),
        ({"TERM": "dumb"}, True, False),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, True, False),
        ({"TERM": "xterm-256color"}, False, False),
        ({"TERM": "unknown"}, True, False),
    ],
)
def test_colours_are_known_to_be_seen(monkeypatch, environment, terminal, colored):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    assert Output(file=stream).is_colored == colored


@pytest.mark.parametrize("tokenizer", [None, "bytes"])
def test_without_colours_brackets_tell_origins_apart(tokenizer):
    """Whatever a cycle gave: nothing accepted, some, or all, and plain steps between and after."""
    from domino_jax.runtime.slots import Cycle, Request
    from infer.engine import Sequence

    a, b, c, d, e = ids = [make_tokenizer().encode(letter, add_special_tokens=False)[0] for letter in "abcde"]
    cycles = [Cycle(1, [a], 0, [b, c]), Cycle(2, [a, b], 1, [a, c]), Cycle(5, [c, d, e], 2, [c, d])]
    s = Sequence(Request([1]), tokens=[a, a, a, b, b, c, d, e, a, b], cycles=cycles)
    shown = color_drafts(s, make_tokenizer() if tokenizer else None, marks=True).plain
    text, legend = shown.split("\n")
    plain = color_drafts(s, make_tokenizer() if tokenizer else None).plain
    assert legend == "drafted and accepted · [-rejected-] · {+the target's own+}"
    assert "[-" not in plain and "{+" not in plain
    if not tokenizer:
        letters = dict(zip(map(str, ids), "abcde", strict=True))
        text = "".join(letters.get(part, part) for part in re.split(r"(\d+)", text)).replace(" ", "")
    assert text == "{+a+}[-bc-]{+a+}a[-c-]{+bb+}cd{+eab+}"


def test_interrupting_keeps_what_was_generated(run, monkeypatch):
    grow = decode.grow_caches

    def interrupt(*arguments: Any) -> Any:
        grow(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(decode, "grow_caches", interrupt)
    result = run("x" * 120, "--max-new-tokens", "60", "--json")
    assert result.status == 130
    (row,) = result.rows
    assert row["finish_reason"] == "cancelled"
    assert 0 < len(row["tokens"]) < 60


def test_a_limit_beyond_the_positions_is_clamped_with_a_warning(run):
    result = run("x" * 250, "--max-new-tokens", "60", "--json")
    (row,) = result.rows
    assert (len(row["tokens"]), row["finish_reason"]) == (7, "length")
    assert "warning: at most 7 new tokens" in result.err


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (("hi", "--model", "no-such-name"), 1, "'no-such-name' is neither a name (demo, qwen3-0.6b, qwen3-1.7b, "),
        (("hi", "--draft", "/no/such/folder"), 1, "--draft DIR"),
        (("x" * 257,), 1, "257 tokens, but the model has 256 positions"),
        (("",), 1, "empty"),
        (("--input-ids", "1,260"), 1, "id 260, outside the vocabulary of 260"),
        (("--prompts", "/no/such/file"), 1, "/no/such/file"),
        (("hi", "--system", "x"), 1, "no chat template"),
        (("hi", "--input-ids", "1"), 2, "one of PROMPT, --prompts and --input-ids"),
        (("--input-ids", "1,x"), 2, "whole numbers"),
        (("hi", "--draft", "none", "--compare"), 2, "--compare"),
        (("hi", "--draft", "none", "--drafts", "2"), 2, "--drafts"),
        (("hi", "--drafts", "0"), 2, "--num-draft-tokens must be at least 1, found 0"),
        (("hi", "--draft", "none", "--drafts", "auto"), 2, "--drafts"),
        (("hi", "--drafts", "5"), 1, "5 drafts a cycle can't be had"),
        (("hi", "--json", "--show-drafts"), 2, "--show-drafts"),
        (("hi", "--raw", "--system", "x"), 2, "--system"),
        (("hi", "--temperature", "-1"), 2, "--temperature"),
        (("hi", "--temperature", "nan"), 2, "--temperature"),
        (("hi", "--top-p", "0"), 2, "--top-p"),
        (("hi", "--min-p", "1.5"), 2, "--min-p"),
        (("hi", "--top-k", "-1"), 2, "--top-k"),
        (("hi", "--max-new-tokens", "0"), 2, "--max-new-tokens"),
        (("hi", "--no-such-flag"), 2, "--no-such-flag"),
    ],
)
def test_refusals(models, monkeypatch, capsys, words, status, says):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    defaults = []
    if "--model" not in words:
        defaults += ["--model", str(models / "target")]
    if "--draft" not in words:
        defaults += ["--draft", str(models / "draft")]
    assert main([*words, *defaults]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": 64}, "hidden_size"),
        ({"vocab_size": 300}, "vocab_size"),
        ({"num_target_layers": 5}, "number of layers"),
    ],
)
def test_a_drafter_for_another_target_is_refused_before_weights_are_read(run, models, tmp_path, change, says):
    make_draft(tmp_path / "other", **change)
    (tmp_path / "other" / "model.safetensors").unlink()
    result = run("hi", draft=str(tmp_path / "other"))
    assert result.status == 1
    assert result.err.startswith("error: the drafter was made for another target")
    assert says in result.err


def test_swapped_folders_are_told_apart(run):
    assert "holds a drafter" in run("hi", target="draft").err
    assert "is the target itself" in run("hi", draft="target").err


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        "{}",
        '{"prompt": 1}',
        '{"prompt": "a", "input_ids": [1]}',
        '{"prompt": "a", "max_new_tokens": 0}',
        '{"prompt": "half a pair: \\ud800"}',
    ],
)
def test_a_bad_row_is_refused_by_its_line(run, tmp_path, line):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line)
    result = run("--prompts", str(file), "--json")
    assert (result.status, result.out) == (1, "")
    assert f"{file}, line 2" in result.err


def test_a_row_may_hold_any_character(run, tmp_path):
    file = tmp_path / "prompts.jsonl"
    prompt = "a\u2028b\x85c"
    file.write_text(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n\n")
    (row,) = run("--prompts", str(file), "--json", "--max-new-tokens", "1").rows
    assert make_tokenizer().decode(row["input_ids"]) == prompt


@pytest.mark.e2e
def test_without_network_the_error_says_what_was_looked_for(tmp_path):
    command = [sys.executable, "-m", "infer", "hi", "--model", "qwen3-4b"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: Qwen/Qwen3-4B is no folder here")
    assert "--model DIR" in done.stderr
    assert "Traceback" not in done.stderr


def test_text_arrives_in_whole_characters():
    tokenizer = make_tokenizer()
    message = "naïve 👩🏽‍🚀 日本 ok"
    stream, pieces = text.Detokenizer(tokenizer), []
    for token in text.encode(tokenizer, message):
        pieces.append(stream.feed([token]))
    assert "".join(pieces) == message
    assert not any(text.INCOMPLETE in piece for piece in pieces)
    assert "👩" in pieces  # it came when it was whole, not before and not later
    assert stream.finish() == ""


def test_half_a_character_at_the_end_is_what_the_tokenizer_makes_of_it():
    tokenizer = make_tokenizer()
    tokens = text.encode(tokenizer, "ok 👩")[:-1]
    stream = text.Detokenizer(tokenizer)
    assert stream.feed(tokens[:3]) == "ok "
    assert stream.feed(tokens[3:]) == ""
    assert "ok " + stream.finish() == text.decode(tokenizer, tokens)


def test_what_may_begin_a_stop_string_is_held_back():
    tokenizer = make_tokenizer()
    stream = text.TextStream(tokenizer, ["END", "NO"])
    seen = []
    tokens = text.encode(tokenizer, "a EN NEND b")
    used = 0
    for token in tokens:
        used += stream.feed([token])
        seen.append(stream.text)
        if stream.stopped:
            break
    assert seen == ["a", "a ", "a ", "a ", "a EN ", "a EN ", "a EN N", "a EN N", "a EN N"]
    assert used == len("a EN NEND")
    unfinished = text.TextStream(tokenizer, ["END"])
    unfinished.feed(text.encode(tokenizer, "an EN"))
    assert unfinished.text == "an "
    unfinished.finish()
    assert unfinished.text == "an EN"


def test_the_first_of_several_stop_strings_counts_within_one_feed():
    tokenizer = make_tokenizer()
    stream = text.TextStream(tokenizer, ["long stop", "st"])
    tokens = text.encode(tokenizer, "a long stop here")
    assert stream.feed(tokens) == len("a long st")
    assert stream.text == "a long "


def test_the_histogram_counts_every_length():
    assert histogram([0, 2, 2], 3, width=4) == ["  0 ██ 1", "  1  0", "  2 ████ 2", "  3  0"]
