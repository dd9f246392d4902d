"""One reading of messages and one way to encode them, for training, regenerating, validating and generating."""

import json
from pathlib import Path
from typing import Any

import pytest
from factory import make_tokenizer

from convert.messages import LeftOut, conversation_of, parse_messages
from convert.tokenizer import RefusedByTemplate, encode, encode_chat, render
from domino_jax.errors import DominoError
from infer.prompts import read_prompts
from train.data.dataset import read_corpus
from train.evaluate.prompts import read_heldout_prompts
from train.regenerate.prompts import Lines, encode_turn

CHATML = """
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + ':' + m.content }}
    {%- for call in m.tool_calls or [] %}{{- '[' + call.function.name + ']' }}{%- endfor %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant:' }}{%- endif %}"""


def message(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALL = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
CALLED = [message("user", "hi"), message("assistant", "", tool_calls=[CALL]), message("tool", "so")]
BRIEF = [message("system", "Be brief."), message("user", "hi")]
# What comes before an answer, in the forms that data has it, and as a template is given it.
FORMS: dict[str, tuple[list[Any], ...]] = {
    "plain": (BRIEF, BRIEF),
    "parts": ([message("user", [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}])], BRIEF[1:]),
    "texts": ([message("user", ["h", {"text": "i"}])], BRIEF[1:]),
    "ShareGPT's keys": ([{"from": "system", "value": "Be brief."}, {"from": "human", "value": "hi"}], BRIEF),
    "ShareGPT's roles under OpenAI's keys": ([message("human", "hi")], BRIEF[1:]),
    "both pairs of keys": ([message("user", "hi") | {"from": None, "value": None}], BRIEF[1:]),
    "developer": ([message("developer", "Be brief."), message("user", "hi")], BRIEF),
    "tool calls": ([CALLED[0], message("assistant", None, tool_calls=[CALL]), CALLED[2]], CALLED),
    "null tool calls": ([message("user", "hi", tool_calls=None, name=None)], BRIEF[1:]),
    "older calls": (
        [CALLED[0], message("assistant", None, function_call=CALL["function"]), message("function", "so")],
        CALLED,
    ),
    "ShareGPT's calls": (
        [
            {"from": "human", "value": "hi"},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "so"},
        ],
        CALLED,
    ),
    "a role of its own": ([message("critic", "hm"), message("user", "hi")],) * 2,
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", FORMS)
def test_every_command_takes_a_line_for_the_same_conversation(tmp_path, name):
    given, meant = FORMS[name]
    assert parse_messages(given) == meant
    tokenizer = make_tokenizer(CHATML)
    ids = encode(tokenizer, render(tokenizer, meant), special=False)

    answered = [*given, {"from": "gpt", "value": "yes"}]
    for key in ("messages", "conversations"):
        path = write(tmp_path / f"{key}.jsonl", {key: answered})
        corpus, summary = read_corpus([path], 200, 260, tokenizer)
        rows = corpus.take([len(corpus) - 1])
        assert rows.ids[0][: len(ids)].tolist() == ids
        learned = rows.ids[0][len(ids) :][rows.mask[0][len(ids) :]]  # a call before it is learned as well
        assert tokenizer.decode(learned) == "yes<|im_end|>" and summary.left_out == 0

        lines = Lines(path, 260)
        ((_, source),) = lines.sources(0, 1)
        assert source.turns == 1 and not lines.left_out
        assert encode_turn(source, 0, [], tokenizer, thinking=False) == ids
        assert read_heldout_prompts(path, 260, 256, tokenizer, 4) == [ids]
    (prompt,) = read_prompts(write(tmp_path / "prompts.jsonl", {"messages": given}))
    assert prompt.messages is not None and encode_chat(tokenizer, prompt.messages) == ids


MALFORMED = {
    "no list": ("hi", "a list of messages"),
    "no role": ([{"content": "hi"}], "a message has no role"),
    "no text": ([message("user", None)], "found NoneType"),
    "a number": ([message("user", 3)], "found int"),
    "an image": ([message("user", [{"type": "image_url", "image_url": "x"}])], "found image_url"),
    "half a character": ([message("user", "\ud800")], "not valid Unicode"),
    "a call that is no JSON": ([{"from": "function_call", "value": "{"}], "function_call of a message is not JSON"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_every_command_refuses_what_is_no_conversation(tmp_path, name):
    given, says = MALFORMED[name]
    path = write(tmp_path / "data.jsonl", {"messages": given})
    tokenizer = make_tokenizer(CHATML)
    readers = [lambda: read_corpus([path], 200, 260, tokenizer), lambda: Lines(path, 260)]
    for reader in readers if name == "no list" else [*readers, lambda: read_prompts(path)]:
        with pytest.raises(DominoError) as error:
            reader()
        assert says in str(error.value) and f"{path}, line 1" in str(error.value) and "\n" not in str(error.value)


def test_what_can_not_be_used_is_left_out_counted_and_said_by_all(tmp_path, capsys):
    """A tool's answer that nothing asked for, and messages that the template does not show."""
    forgetful = CHATML.replace("{%- for m in messages %}", "{%- for m in messages if m.role != 'critic' %}")
    tokenizer = make_tokenizer(forgetful)
    good = [message("user", "hi"), message("assistant", "yes")]
    lone, hidden = [message("tool", "so"), *good], [message("critic", "hm"), *good]
    path = write(tmp_path / "data.jsonl", *({"messages": messages} for messages in (good, lone, hidden, lone)))
    _, summary = read_corpus([path], 200, 260, tokenizer)
    assert (summary.lines, summary.sequences, summary.left_out) == (4, 1, 3)
    words = (
        "2 left out that have messages of a 'tool' that no message called",
        "1 left out that are refused by the chat template (it leaves out a message of the role 'critic')",
    )
    assert all(f"; {word}" in str(summary) for word in words) and "nothing to learn" not in str(summary)

    assert len(read_heldout_prompts(path, 260, 256, tokenizer, 4)) == 1
    said = capsys.readouterr().err
    assert said.startswith("warning: 1 prompts of ") and all(word in said for word in words)
    lines = Lines(path, 260)
    assert lines.turns.tolist() == [1, 0, 1, 0] and lines.left_out.total() == 2
    with pytest.raises(LeftOut, match="role 'critic'"):
        encode_turn(dict(lines.sources(0, 4))[2], 0, [], tokenizer, thinking=False)

    with pytest.raises(DominoError, match=r"line 1: conversations that have messages of a 'tool' .* can't be used\."):
        read_prompts(write(tmp_path / "a.jsonl", {"messages": lone}))
    with pytest.raises(DominoError, match=r"template refuses these messages: it leaves out a message"):
        encode_chat(tokenizer, hidden)
    with pytest.raises(DominoError, match=r"line 1 is not a training sequence: conversations that have .* 'tool'"):
        read_corpus([write(tmp_path / "b.jsonl", {"messages": lone})], 200, 260, tokenizer)


def test_a_message_may_be_set_otherwise_and_is_shown_all_the_same():
    spaced = make_tokenizer("{% for m in messages %}{{ m.content.split() | join(' ') }}{% endfor %}")
    assert render(spaced, [message("user", " a\n b ")]) == "a b"
    escaped = make_tokenizer("{% for m in messages %}{{ m.content | tojson }}{% endfor %}")
    assert render(escaped, [message("tool", 'say "ä"')]) == '"say \\"ä\\""'
    with pytest.raises(RefusedByTemplate, match="role 'user'"):
        render(escaped, [message("user", 'say "hi"')])


def test_calls_stay_as_they_are_and_the_answers_after_them_are_turns(tmp_path):
    answers = [message("assistant", "one"), message("user", "and?"), message("assistant", "two")]
    tools = [{"name": "look"}]
    path = write(tmp_path / "data.jsonl", {"messages": [*CALLED, *answers], "tools": json.dumps(tools)})
    ((_, source),) = Lines(path, 9).sources(0, 1)
    assert source.given == [CALLED, [message("user", "and?")]] and source.tools == tools
    for given, turns in ((CALLED, 1), (CALLED[:2], 0), ([*CALLED, answers[0], *CALLED[1:]], 2)):
        path = write(tmp_path / "more.jsonl", {"prompt": "x"}, {"messages": given})
        assert Lines(path, 9).turns.tolist() == [1, turns]


def test_tools_are_a_list_as_json_or_not():
    for tools in ([{"name": "look"}], '[{"name": "look"}]'):
        assert conversation_of({"messages": [], "tools": tools}) == ([], [{"name": "look"}])
    for tools in (None, "", "[]", []):
        assert conversation_of({"messages": None, "conversations": [], "tools": tools}) == ([], None)
    assert conversation_of({"messages": None, "text": "a"}) is None
    with pytest.raises(ValueError, match="tools are a list"):
        conversation_of({"messages": [], "tools": {"name": "look"}})


def bos_tokenizer() -> Any:
    """A tokenizer that puts a token before a raw prompt."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return tokenizer


def test_a_completions_prompt_has_the_ids_of_use(tmp_path):
    """The bench and `infer` encode a raw prompt with the tokenizer's own BOS, and so must training."""
    tokenizer = bos_tokenizer()
    used = encode(tokenizer, "ab")
    assert used == [0, *encode(tokenizer, "ab", special=False)], "the case does not tell"
    rows = {"prompt": "ab", "completion": "cd"}, {"text": "cd"}
    corpus, _ = read_corpus([write(tmp_path / "data.jsonl", *rows)], 8, 260, tokenizer)
    (line, text), masks, *_ = corpus.take([0, 1])
    answer = encode(tokenizer, "cd", special=False)
    assert line.tolist()[:5] == [*used, *answer] and masks[0].tolist() == [False] * 3 + [True] * 2 + [False] * 3
    assert text.tolist()[:3] == [0, *answer] and masks[1].tolist() == [False, True, True] + [False] * 5
    ((_, source),) = Lines(write(tmp_path / "prompts.jsonl", rows[0]), 260).sources(0, 1)
    assert encode_turn(source, 0, [], tokenizer, thinking=False) == used
