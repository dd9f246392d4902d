"""Chats on the command line: the model's own template, thinking, and turns that go on where the last one ended."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from factory import BYTE_DRAFT, CHAT_END, CHAT_START, make_draft, make_target, make_tokenizer

from convert.tokenizer import final_answer, load_tokenizer
from domino_jax.errors import DominoError
from domino_jax.runtime import slots
from infer import text
from infer.__main__ import main
from infer.engine import Chunk, Engine, Sequence

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Like Qwen3's: earlier answers without their thoughts, and an empty thought before the next one if thinking is off.
THINKER = """
{%- for m in messages %}
    {%- set said = m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else m.content %}
    {{- '<|im_start|>' + m.role + '\\n' + said + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
PLAIN = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


def said(role: str, content: str) -> str:
    return f"{CHAT_START}{role}\n{content}{CHAT_END}\n"


SYSTEM = "Be brief. " * 13  # long enough for a bucket in which a continued chunk has room
ANSWER = f"{CHAT_START}assistant\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders: thinker and plain (templates), raw (without one), and their drafter."""
    root = tmp_path_factory.mktemp("models")  # without stop tokens every answer has its full length
    make_target(root / "thinker", template=THINKER, eos=(), max_position_embeddings=512)
    make_target(root / "plain", template=PLAIN, eos=())
    make_target(root / "raw", eos=())
    make_draft(root / "draft")
    return root


class Result(NamedTuple):
    """What a run gave."""

    status: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(models, monkeypatch, capsys) -> Run:
    """Runs the command line; with `lines`, as a chat at a terminal."""

    def run(*words: str, target: str = "thinker", draft: str = "draft", lines: tuple[str, ...] = ()) -> Result:
        terminal = io.StringIO()
        monkeypatch.setattr(terminal, "isatty", lambda: bool(lines))
        monkeypatch.setattr(sys, "stdin", terminal)
        typed = iter(lines)

        def typing(_: str) -> str:
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", typing)
        folders = ["--model", str(models / target), "--draft", draft if draft == "none" else str(models / draft)]
        if draft != "none":
            folders += ["--drafts", str(BYTE_DRAFT.num_proposals)]  # not auto, which goes by times
        return Result(main([*words, *folders]), *capsys.readouterr())

    return run


@pytest.fixture
def turns(monkeypatch) -> list[Sequence]:
    """The sequences that are generated, in their order."""
    seen: list[Sequence] = []
    stream = Engine.stream

    def recorded(self: Engine, sequences: list[Sequence], *rest: Any, **how: Any) -> Iterator[Chunk]:
        seen.extend(sequences)
        return stream(self, sequences, *rest, **how)

    monkeypatch.setattr(Engine, "stream", recorded)
    return seen


# --- Templates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_template_is_read_from_either_of_its_places(tmp_path, place):
    make_tokenizer(None if place.endswith("json") else THINKER).save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").exists() == (place == "chat_template.jinja")
    if place == "tokenizer_config.json":
        config = tmp_path / place
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": THINKER}))
    tokenizer = load_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "hi"}]

    def rendered(*how: Any) -> str:
        return tokenizer.decode(text.encode_chat(tokenizer, messages, *how))

    assert rendered() == said("user", "hi") + ANSWER + EMPTY_THOUGHT
    assert rendered(True) == said("user", "hi") + ANSWER
    messages += [{"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}, {"role": "user", "content": "so?"}]
    assert rendered(True) == said("user", "hi") + said("assistant", "yes") + said("user", "so?") + ANSWER


def test_whether_a_template_knows_thinking_is_found_by_rendering():
    assert text.knows_thinking(make_tokenizer(THINKER))
    assert not text.knows_thinking(make_tokenizer(PLAIN))
    with pytest.raises(DominoError, match="no chat template"):
        text.knows_thinking(make_tokenizer())


@pytest.mark.parametrize(
    ("whole", "answer"),
    [
        ("yes", "yes"),
        ("<think>\nhm\n</think>\n\nyes\n", "yes\n"),
        ("hm\n</think>\nyes", "yes"),  # where the template has begun the thought
        ("<think>\nhm", ""),  # cut off
        ("a <think> is a tag", "a <think> is a tag"),
    ],
)
def test_later_turns_are_told_the_final_answer_only(whole, answer):
    assert final_answer(whole) == answer


# --- The flag ------------------------------------------------------------------------------------------------------


def test_thinking_is_off_unless_asked_for(run):
    def prompt(*words: str, **where: Any) -> tuple[str, list[str]]:
        result = run("hi", "--json", "--max-new-tokens", "1", *words, **where)
        assert result.status == 0, result.err
        warnings = [line for line in result.err.splitlines() if line.startswith("warning")]
        return make_tokenizer().decode(json.loads(result.out)["input_ids"]), warnings

    assert prompt() == (said("user", "hi") + ANSWER + EMPTY_THOUGHT, [])
    rendered, (warning,) = prompt("--thinking")
    assert rendered == said("user", "hi") + ANSWER
    assert "fewer drafts will be accepted" in warning
    assert prompt("--thinking", draft="none") == (rendered, [])
    rendered, (warning,) = prompt("--thinking", target="plain")
    assert rendered == "[user:hi]"
    assert "--thinking changes nothing" in warning


@pytest.mark.parametrize(
    ("words", "target", "status", "says"),
    [
        (("hi", "--thinking"), "raw", 1, "no chat template"),
        (("hi", "--thinking", "--raw"), "thinker", 2, "--thinking needs the chat template"),
        (("--input-ids", "5,6", "--thinking"), "thinker", 2, "--thinking does nothing to --input-ids"),
    ],
)
def test_where_there_is_nothing_to_turn_on_it_is_refused(run, words, target, status, says):
    result = run(*words, target=target)
    assert (result.status, result.out) == (status, "")
    assert result.err.startswith("error: ") and says in result.err and result.err.count("\n") == 1


# --- Turns ---------------------------------------------------------------------------------------------------------


@pytest.mark.e2e
@pytest.mark.parametrize("words", [(), pytest.param(("--thinking",), marks=pytest.mark.slow)])
@pytest.mark.parametrize("draft", ["draft", pytest.param("none", marks=pytest.mark.slow)])
def test_each_turn_of_a_chat_answers_as_a_fresh_run_of_the_conversation(run, turns, tmp_path, words, draft):
    words = (*words, "--max-new-tokens", "12", "--dtype", "float32", "--system", SYSTEM)
    result = run(*words, draft=draft, lines=("hi", "and?", "ok"))
    assert result.status == 0, result.err
    chat, messages, file = list(turns), [], tmp_path / "prompts.jsonl"
    assert len(chat) == 3
    for i, (turn, line) in enumerate(zip(chat, ("hi", "and?", "ok"), strict=True)):
        messages.append({"role": "user", "content": line})
        file.write_text(json.dumps({"messages": messages}) + "\n")
        alone = json.loads(run("--prompts", str(file), "--json", *words, draft=draft).out)
        assert (turn.prompt, turn.tokens, turn.accepted) == (alone["input_ids"], alone["tokens"], alone["accepted"])
        messages.append({"role": "assistant", "content": turn.text or ""})
        if i == 0:
            assert turn.reused == 0
            continue
        # What the last turn was given, up to where the template has put an empty thought that it now leaves out.
        before = chat[i - 1].prompt
        held = len(before) - (0 if "--thinking" in words else len(EMPTY_THOUGHT))
        assert turn.prompt[:held] == before[:held]
        assert held - 64 < turn.reused <= len(before) + len(chat[i - 1].tokens)
        assert f"({len(turn.prompt) - turn.reused} tokens, {turn.reused} reused)" in result.err
    assert chat[2].reused > len(chat[0].prompt)


def test_a_conversation_that_is_too_long_starts_over(run, turns):
    result = run("--max-new-tokens", "4", lines=("x" * 60, "y" * 440, "z"))
    assert result.status == 0
    (line,) = [line for line in result.err.splitlines() if line.startswith("error")]
    assert "but the model has 512 positions" in line and line.endswith("The conversation starts over.")
    assert [make_tokenizer().decode(turn.prompt) for turn in turns] == [
        said("user", what) + ANSWER + EMPTY_THOUGHT for what in ("x" * 60, "z")
    ]


def test_after_an_answer_that_was_interrupted_the_chat_goes_on_from_it(run, turns, monkeypatch):
    fetch = slots.fetch
    calls: Iterator[int] = iter(range(1000))

    def impatient(tree: Any) -> Any:
        if next(calls) == 2:  # the first token, a dispatch, another
            raise KeyboardInterrupt
        return fetch(tree)

    monkeypatch.setattr(slots, "fetch", impatient)
    result = run("--max-new-tokens", "60", "--system", SYSTEM, lines=("hi", "more"))
    assert result.status == 0
    first, second = turns
    assert first.finish_reason == "cancelled" and first.text and first.text in make_tokenizer().decode(second.prompt)
    assert second.finish_reason == "length" and second.reused > 0


@pytest.mark.parametrize(("words", "told"), [(("--thinking",), "yes"), ((), "<think>\nhm\n</think>\n\nyes")])
def test_thoughts_are_shown_and_not_remembered(run, monkeypatch, words, told):
    """A random model has no thoughts, so its text is replaced; without --thinking the template is left to do it."""
    messages: list[list[dict[str, str]]] = []
    encode = text.encode_chat

    def record(tokenizer: Any, conversation: list[dict[str, str]], *how: Any) -> list[int]:
        messages.append(conversation)
        return encode(tokenizer, conversation, *how)

    monkeypatch.setattr(text, "encode_chat", record)
    monkeypatch.setattr(Sequence, "text", property(lambda _: "<think>\nhm\n</think>\n\nyes"))
    result = run(*words, "--max-new-tokens", "2", lines=("hi", "so?"))
    assert result.out.count("<think>\nhm\n</think>\n\nyes\n") == 2
    assert messages[1][1] == {"role": "assistant", "content": told}


def test_a_model_without_a_template_goes_on_with_each_line(run, turns):
    start = "x" * 150
    result = run("--max-new-tokens", "5", target="raw", lines=(start + "a line", start + "more"))
    assert result.status == 0
    assert [make_tokenizer().decode(turn.prompt) for turn in turns] == [start + "a line", start + "more"]
    assert turns[1].reused == len(start)


def test_a_chat_samples_as_the_checkpoint_recommends(run, turns, models):
    file = models / "thinker" / "generation_config.json"
    before = file.read_text() if file.exists() else None
    file.write_text('{"temperature": 1.5, "top_k": 50}')
    try:
        for words in ((), ("--temperature", "0"), ("--generation-config", "none")):
            assert run("--max-new-tokens", "3", *words, lines=("hi",)).status == 0
    finally:
        file.unlink() if before is None else file.write_text(before)
    used = [turn.request.params for turn in turns]
    assert [(p.temperature, p.top_k) for p in used] == [(1.5, 50), (0.0, 0), (0.0, 0)]
