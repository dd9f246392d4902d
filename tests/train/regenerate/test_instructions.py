"""Questions that a model asks itself: what is sampled, which are taken, how they are split, interruptions."""

import json
import os
import signal
from pathlib import Path

import pytest
from factory import CHAT_END_ID, END_ID, make_target

from convert.tokenizer import load_tokenizer
from domino_jax.errors import DominoError
from domino_jax.runtime.slots import Slots
from train.regenerate.instructions import main, user_turn
from train.regenerate.selection import Rules, Selection, header_of, is_held_out, normalized

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>s:Be kind.<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role[0] }}:{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a:{% endif %}"
)
RULES = Rules(min_tokens=3, min_ascii=0.9, most_alike=2)


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("instructions") / "target"
    make_target(folder, template=TEMPLATE, eos=(END_ID, 4, 60, 61, 62, 63, 64))
    return folder


def words(target: Path, out: Path, *more: str) -> list[str]:
    some = ["--count", "12", "--max-new-tokens", "24", "--batch-size", "4", "--min-ascii", "0", "--min-tokens", "1"]
    return ["--target", str(target), "--out", str(out), *some, *more]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_interrupted_run_goes_on_to_the_same_questions(target, tmp_path, capsys, monkeypatch):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    assert main(words(target, whole)) == 0
    samples = rows(tmp_path / "whole.samples.jsonl")
    assert sorted(one["row"] for one in samples) == list(range(12)) and len({str(one["tokens"]) for one in samples}) > 6
    assert f"of 12 questions {len(rows(whole))} in {whole}" in capsys.readouterr().out
    taken = {one["row"] for one in rows(whole)}
    assert all(one["tokens"][-1] == CHAT_END_ID for one in samples if one["row"] in taken)
    step, count = Slots.step, iter(range(1, 100))

    def step_once(slots: Slots):
        if next(count) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(slots)

    monkeypatch.setattr(Slots, "step", step_once)
    assert main(words(target, parts)) == 130 and not parts.exists()
    monkeypatch.undo()
    before = (tmp_path / "parts.samples.jsonl").read_bytes()
    assert main(words(target, parts)) == 0
    assert (tmp_path / "parts.samples.jsonl").read_bytes().startswith(before)
    assert parts.read_bytes() == whole.read_bytes()
    assert main(words(target, whole, "--seed", "9")) == 1 and "seed" in capsys.readouterr().err
    assert (
        main([*words(target, whole, "--count", "14", "--held-out", str(tmp_path / "held.jsonl")), "--held-out-share=1"])
        == 0
    )
    assert whole.read_text() == "" and {one["row"] for one in rows(tmp_path / "held.jsonl")} >= taken


def test_the_prompt_is_the_template_up_to_the_users_text(target):
    tokenizer = load_tokenizer(target)
    ids, end = user_turn(tokenizer, None)
    assert tokenizer.decode(ids) == "<|im_start|>s:Be kind.<|im_end|><|im_start|>u:" and end == CHAT_END_ID
    assert tokenizer.decode(user_turn(tokenizer, "Code.")[0]) == "<|im_start|>s:Code.<|im_end|><|im_start|>u:"
    tokenizer.chat_template = TEMPLATE.replace("<|im_end|>{% endfor %}", ".{% endfor %}")
    with pytest.raises(DominoError, match=r"ends a user's turn with '\.', expected a special token"):
        user_turn(tokenizer, None)
    with pytest.raises(ValueError, match="once"):
        header_of("a mark and a mark", "mark")
    with pytest.raises(DominoError, match="no tokenizer"):
        user_turn(None, None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("What is a monad?", None),
        ("what is  a Monad", "came before"),
        ("hi", "are short"),
        ("   ", "are short"),
        ("\u6771\u4eac\u306f\u4f55\u3067\u3059\u304b why", "are of other scripts"),
        ("tell me a joke " * 8, "repeat themselves"),
        ("Please tell me a short joke about dogs and cats", None),
        ("Please tell me a short joke about rain and snow", None),
        ("Please tell me a short joke about tea and milk", "begin as many others do"),
        ("a <think> of it", "have special tokens in them"),
    ],
)
def test_questions_that_are_left_out_and_why(text, reason):
    selection = Selection(RULES)
    earlier = ["What is a monad?"] if reason == "came before" else []
    if reason and "begin" in reason:
        earlier = [f"Please tell me a short joke about {thing}" for thing in ("dogs and cats", "rain and snow")]
    assert not any(selection.refusal(one, 9, True, False) for one in earlier)
    assert selection.refusal(text, len(text.split()) + 1, True, False) == reason
    assert Selection(RULES).refusal("What is it for?", 9, False, False) == "have no end"
    assert Selection(RULES).refusal("What is it for?", 9, True, True) == "have special tokens in them"


def test_a_question_is_held_out_by_its_text_alone():
    texts = [f"Question number {i}?" for i in range(2000)]
    held = [text for text in texts if is_held_out(text, 0.1)]
    assert 150 < len(held) < 250 and set(held) <= {text for text in texts if is_held_out(text, 0.2)}
    assert all(is_held_out(text.upper() + "  ", 0.1) for text in held[:9]) and normalized("A  b!") == "a b"
    assert not any(is_held_out(text, 0) for text in texts) and all(is_held_out(text, 1) for text in texts)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--count", "0"], "count"),
        (["--min-ascii", "2"], "min-ascii"),
        (["--held-out-share", "-1"], "held-out-share"),
        (["--min-tokens", "99"], "--min-tokens 99 is more than --max-new-tokens 24"),
        (["--held-out", "OUT"], "different files"),
    ],
    ids=str,
)
def test_words_that_make_no_sense_are_usage_errors(target, tmp_path, capsys, more, said):
    out = tmp_path / "out.jsonl"
    assert main([*words(target, out), *(str(out) if word == "OUT" else word for word in more)]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())
