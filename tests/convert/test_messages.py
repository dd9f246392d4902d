"""One reading of messages and one way to encode them, for training, regenerating, validating and generating."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from factory import make_tokenizer

from convert.messages import LeftOut, conversation_of, parse_messages
from convert.tokenizer import RefusedByTemplate, encode, encode_chat, render
from domino_jax.errors import DominoError
from infer.bench.questions import Question
from infer.bench.questions import prompt as encode_question
from infer.prompts import Encoder, Prompt, read_prompts
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
    "no text": ([message("user", None)], "found null"),
    "a number": ([message("user", 3)], "found a number"),
    "an image": ([message("user", [{"type": "image_url", "image_url": "x"}])], "found 'image_url'"),
    "half a character": ([message("user", "\ud800")], "not valid Unicode"),
    "a call that is no JSON": (
        [{"from": "function_call", "value": "{"}],
        "function_call of a message can't be read as JSON",
    ),
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
        "1 left out that are refused by the chat template (it leaves out a message of the role 'critic'; known roles",
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
    with pytest.raises(ValueError, match="tools must be a list"):
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


# --- What a template does not show ------------------------------------------------------------------------------------


def only(*roles: str) -> str:
    """A template that leaves out every role but these."""
    return CHATML.replace("{%- for m in messages %}", f"{{%- for m in messages if m.role in {list(roles)} %}}")


HI = [message("user", "hi"), message("assistant", "yes"), message("user", "so?")]
HIDDEN = {
    "a role": (only("user"), HI, "role 'assistant'"),
    "a system message": (only("user", "assistant"), [*BRIEF], "role 'system'"),
    "a short text that stands elsewhere": (
        only("assistant"),
        [message("user", "e"), message("assistant", "yes")],
        "'user'",
    ),
    "an empty text": (only("user"), [message("user", "hi"), message("assistant", "")], "role 'assistant'"),
    "all but the last": ("{{ messages[-1].content }}", HI, "role 'user'"),
    "what comes before the first question": (
        "{%- for m in messages[1:] %}[{{ m.content }}]{%- endfor %}",
        [message("assistant", "Hello"), *HI],
        "role 'assistant'",
    ),
    "the end of a long text": (
        "{%- for m in messages %}[{{ m.content[:9] }}]{%- endfor %}",
        [message("user", "x" * 10)],
        "'user'",
    ),
    "the words beside a call": (
        CHATML.replace("m.content", "('' if m.tool_calls else m.content)"),
        [CALLED[0], message("assistant", "Let me look.", tool_calls=[CALL]), CALLED[2]],
        "role 'assistant'",
    ),
    "a call": (CHATML.replace("m.tool_calls or []", "[]"), CALLED, "role 'assistant'"),
    "a tool's answer": (only("user", "assistant"), CALLED, "role 'tool'"),
    "a role that only the data knows": (
        only("user", "assistant", "system"),
        [message("narrator", "Once"), *HI],
        "'narrator'; known",
    ),
    "one of two messages of a role": (
        "{%- for m in messages[:2] %}[{{ m.content }}]{%- endfor %}",
        HI,
        "role 'user'",
    ),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_the_template_does_not_show_is_refused_wherever_templates_are_applied(tmp_path, name):
    template, messages, says = HIDDEN[name]
    tokenizer = make_tokenizer(template)
    with pytest.raises(RefusedByTemplate, match="it leaves out a message of the role") as error:
        render(tokenizer, messages)
    assert says in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(DominoError, match="chat template refuses these messages: it leaves out"):
        Encoder(tokenizer).ids(Prompt(messages=messages))  # infer, its Python API and its chat
    with pytest.raises(DominoError, match="refuses these messages"):
        encode_question(Question("line 1", messages=tuple(messages)), [], tokenizer)  # infer.bench --quality
    if messages[-1]["role"] == "user":
        asked = write(tmp_path / "a.jsonl", {"messages": messages}, {"prompt": "x"})
        ((_, source), _) = Lines(asked, 260).sources(0, 2)
        with pytest.raises(LeftOut, match="leaves out"):
            encode_turn(source, source.turns - 1, ["yes"], tokenizer, thinking=False)
    answered = [*messages, message("assistant", "An answer.")]
    if any(m["role"] == "user" for m in messages):
        with pytest.raises(DominoError, match="leaves out"):
            read_corpus([write(tmp_path / "b.jsonl", {"messages": answered})], 200, 260, tokenizer)


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


def test_tools_that_the_template_does_not_show_are_refused(tmp_path):
    shows = make_tokenizer("{{ tools | tojson if tools }}" + CHATML)
    odd = [{"name": 'say "ä" & <b>'}]
    assert render(shows, BRIEF, tools=odd)
    path = write(tmp_path / "a.jsonl", {"messages": BRIEF, "tools": TOOLS})
    (prompt,) = read_prompts(path)
    assert '"name": "look"' in shows.decode(Encoder(shows).ids(prompt))
    with pytest.raises(DominoError, match="it leaves out the tool 'look'"):
        Encoder(make_tokenizer(CHATML)).ids(prompt)


# What templates of public models do, and what is no loss: it stays allowed.
FAITHFUL = {
    "thoughts go from earlier answers": (
        CHATML.replace("m.content }}", "m.content.split('</think>')[-1] }}"),
        [message("user", "a"), message("assistant", "<think>\nhm\n</think>\n\nyes"), message("user", "b")],
    ),
    "thoughts of a key of their own": (
        CHATML,
        [message("user", "a"), message("assistant", "b", reasoning_content="hm")],
    ),
    "texts are stripped": (CHATML.replace("m.content", "m.content.strip()"), [message("user", "\n a b \n\n")]),
    "the system message is put into the first question": (
        "{%- for m in messages if m.role != 'system' %}[{{ messages[0].content if loop.first }}{{ m.content }}]"
        "{%- endfor %}",
        [*BRIEF],
    ),
    "the system message goes to the end": (
        "{%- for m in messages[1:] %}[{{ m.content }}]{%- endfor %}({{ messages[0].content }})",
        [*BRIEF],
    ),
    "names of roles of its own": (
        "{%- for m in messages %}[{{ {'assistant': 'model'}.get(m.role, m.role) }}:{{ m.content }}]{%- endfor %}",
        HI,
    ),
    "a template that looks into a tool's answer": (
        "{%- for m in messages %}{%- if m.role == 'tool' and m.content[0] != '{' %}{{ raise_exception('no JSON') }}"
        "{%- endif %}[{{ m.content }}{%- for call in m.tool_calls or [] %}{{- call.function.name }}{%- endfor %}]"
        "{%- endfor %}",
        [*CALLED[:2], message("tool", "{}")],
    ),
}


@pytest.mark.parametrize("name", FAITHFUL)
def test_what_templates_rightly_change_is_no_loss(name):
    template, messages = FAITHFUL[name]
    assert render(make_tokenizer(template), messages)


# --- Roles, columns and forms -----------------------------------------------------------------------------------------

SPELLED = {
    "User": "user",
    " ASSISTANT ": "assistant",
    "Human": "user",
    "GPT": "assistant",
    "AI": "assistant",
    "prompter": "user",
    "System": "system",
    "tool_response": "tool",
    "critic": "critic",
    "Narrator": "Narrator",
}


@pytest.mark.parametrize("role", SPELLED)
def test_a_role_is_known_by_other_spellings(role):
    messages = [*CALLED[:2], message(role, "hi")]
    assert parse_messages(messages)[-1]["role"] == SPELLED[role]


def test_null_is_not_there(tmp_path):
    rows: list[dict[str, Any]] = [
        {"messages": None, "conversations": None, "text": "abc", "prompt": None, "completion": None, "input_ids": None},
        {"messages": None, "prompt": "ab", "completion": "cd", "text": None},
        {"messages": [message("user", "hi", name=None) | {"from": None}, message("assistant", "yes")], "text": None},
        {"input_ids": None, "conversations": [{"from": "human", "value": "hi", "role": None}, message("gpt", "yes")]},
    ]  # fmt: skip
    _, summary = read_corpus([write(tmp_path / "a.jsonl", *rows)], 200, 260, make_tokenizer(CHATML))
    assert (summary.sequences, summary.left_out) == (4, 0)
    asked = [rows[1] | {"completion": None}, rows[2], rows[3], {"prompt": None, "messages": None, "input_ids": [4]}]
    prompts = read_prompts(write(tmp_path / "b.jsonl", *asked))
    assert [(p.text, p.messages and len(p.messages), p.ids) for p in prompts] == [
        ("ab", None, None), (None, 2, None), (None, 2, None), (None, None, [4]),
    ]  # fmt: skip
    assert Lines(tmp_path / "b.jsonl", 260).turns.tolist() == [1] * 4


def test_lists_of_prompt_and_completion_are_a_conversation_of_which_the_completion_is_learned(tmp_path):
    prompt = [*HI[:2], message("user", "so?")]
    row = {"prompt": prompt, "completion": [message("assistant", "no")], "messages": None}
    tokenizer = make_tokenizer(CHATML)
    corpus, summary = read_corpus([write(tmp_path / "a.jsonl", row)], 200, 260, tokenizer)
    rows = corpus.take(range(len(corpus)))
    assert summary.sequences == 1 and tokenizer.decode(rows.ids[0][rows.mask[0]]) == "no<|im_end|>"
    before = encode(tokenizer, render(tokenizer, prompt), special=False)
    assert rows.ids[0][: len(before)].tolist() == before
    ((_, source),) = Lines(tmp_path / "a.jsonl", 260).sources(0, 1)
    assert source.turns == 1 and encode_turn(source, 0, [], tokenizer, thinking=False) == before
    assert read_heldout_prompts(tmp_path / "a.jsonl", 260, 256, tokenizer, 4) == [before]
    (asked,) = read_prompts(write(tmp_path / "b.jsonl", {"prompt": prompt}))
    assert asked.messages is not None and encode_chat(tokenizer, asked.messages) == before


MISSHAPEN = {
    "null text": ({"text": None}, "expected input_ids .*; found text \\(null\\)"),
    "a number for a text": ({"text": 5}, "text must be text, found a number"),
    "a list for a text": ({"text": ["a"]}, "text must be text, found a list"),
    "no prompt": ({"completion": "a"}, "prompt must be text, found null"),
    "a null prompt": ({"prompt": None, "completion": "a"}, "prompt must be text, found null"),
    "text and messages": (
        {"prompt": "a", "completion": [message("assistant", "b")]},
        "must both be text, or both be lists",
    ),
    "messages and text": ({"prompt": [message("user", "a")], "completion": "b"}, "found a list and text"),
    "messages without a prompt": ({"completion": [message("assistant", "b")]}, "found null and a list"),
    "one message": ({"messages": message("user", "a")}, "a list of messages, .* found an object"),
    "texts": ({"messages": ["a", "b"]}, "each message is an object .*; found text"),
    "null among them": ({"messages": [message("user", "a"), None]}, "each message is an object .*; found null"),
    "a role that is a number": ({"messages": [message(1, "a")]}, "found a number for a role"),
    "a weight that is text": (
        {"messages": [message("user", "a"), message("assistant", "b", weight="0")]},
        "weight .* found '0'",
    ),
    "a weight of a half": (
        {"messages": [message("user", "a"), message("assistant", "b", weight=0.5)]},
        "weight .* found 0.5",
    ),
    "tools that are no JSON": ({"messages": [message("user", "a")], "tools": "look"}, "tools can't be read as JSON"),
    "labels": ({"input_ids": [1, 2], "labels": [-100, 2]}, "neither tokens nor loss_mask"),
}


@pytest.mark.parametrize("name", MISSHAPEN)
def test_a_row_of_another_shape_is_a_sentence(tmp_path, name):
    row, says = MISSHAPEN[name]
    path = write(tmp_path / "a.jsonl", {"text": "fine"}, row)
    with pytest.raises(DominoError, match=rf"a\.jsonl, line 2 is not a training sequence: [^\n]*{says}"):
        read_corpus([path], 200, 260, make_tokenizer(CHATML))


NOTHING = {
    "unknown roles": (
        [message("usr", "a"), message("bot2", "b")],
        r"no answer \(its roles are 'bot2', 'usr'; known are system,",
    ),
    "an unknown role in the answer's place": (
        [message("user", "a"), message("Narrator", "b")],
        "its roles are 'Narrator'",
    ),
    "questions alone": ([message("user", "a")], "have no answer"),
    "an answer after a system message": ([message("system", "a"), message("assistant", "b")], "nobody asked for"),
    "answers alone": ([message("assistant", "a"), message("assistant", "b")], "nobody asked for"),
    "weights of 0": ([message("user", "a"), message("assistant", "b", weight=0)], "weight is 0"),
    "no message": ([], "have no answer"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_conversation_without_anything_to_learn_says_why(tmp_path, name):
    messages, says = NOTHING[name]
    path = write(tmp_path / "a.jsonl", {"messages": messages})
    with pytest.raises(
        DominoError, match=rf"a\.jsonl, line 1 is not a training [^\n]* conversations that [^\n]*{says}"
    ):
        read_corpus([path], 200, 260, make_tokenizer(CHATML))
    write(path, {"messages": messages}, {"text": "fine"})
    _, summary = read_corpus([path], 200, 260, make_tokenizer(CHATML))
    assert re.search(f"; 1 left out that .*{says}", str(summary))


def test_unknown_roles_are_named_where_nothing_is_asked(tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": [message("assistant", "a"), message("system", "b")]})
    with pytest.raises(DominoError, match="has nothing to answer; 1 left out that ask nothing"):
        Lines(path, 260)
