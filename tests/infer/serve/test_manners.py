"""An answer's parts in OpenAI's form, however its tokens come; a request's messages as templates take them."""

import json

import pytest
from factory import MASK, MASK_ID, make_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from convert.tokenizer import special_tokens
from domino_jax.errors import DominoError
from infer.serve.manners import (
    AnswerParser,
    ContentPiece,
    Piece,
    ReasoningPiece,
    ToolCallArguments,
    ToolCallStart,
    has_thinking,
    has_tools,
    messages_for_template,
    opens_reasoning,
)
from infer.text import TextStream, encode

MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


def tokenizer_with(special: list[str], plain: list[str]):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens(plain)
    return tokenizer


TOKENIZERS = {
    "Qwen3's: tokens that are text": tokenizer_with([], MARKERS),
    "special tokens": tokenizer_with(MARKERS, []),
    "no tokens": make_tokenizer(),
    "some of each": tokenizer_with(["</think>"], ["<tool_call>"]),
}
QWEN = TOKENIZERS["Qwen3's: tokens that are text"]


def ids(text, tokenizer=QWEN):
    return encode(tokenizer, text, special=False)


def joined(pieces: list[Piece]) -> list[tuple[str, ...]]:
    """Pieces as ("content", text), ("reasoning", text) and ("call", name, arguments); neighbours of a kind as one."""
    made: list[tuple[str, ...]] = []
    calls = 0
    for piece in pieces:
        if isinstance(piece, ToolCallStart):
            assert piece.index == calls and piece.id.startswith("call_") and len(piece.id) > 20
            calls += 1
            made.append(("call", piece.name, ""))
        elif isinstance(piece, ToolCallArguments):
            assert piece.index == calls - 1 and made[-1][0] == "call"
            made[-1] = (*made[-1][:2], made[-1][2] + piece.text)
        else:
            kind = "content" if isinstance(piece, ContentPiece) else "reasoning"
            assert piece.text
            before = made.pop()[1] if made and made[-1][0] == kind else ""
            made.append((kind, before + piece.text))
    return made


def parsed(tokens, stops=(), tokenizer=QWEN, sizes=(), **more):
    """The parts of an answer whose tokens come in pieces of these sizes and then all, and how many tokens count."""
    parser = AnswerParser(tokenizer, stops, **{"reasoning": True, "tools": True, **more})
    pieces, used, at = [], 0, 0
    for size in [*sizes, len(tokens)]:
        if parser.stopped:
            break
        used += parser.feed(tokens[at : at + size])
        at += size
        pieces += parser.take()
    parser.finish()
    return joined(pieces + parser.take()), used


def call(arguments: str = "{}", name: str = "look") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


C, R = "content", "reasoning"
CASES = {
    "content": ("Hello.\n", [(C, "Hello.\n")]),
    "line ends before content": ("\n\nHello", [(C, "\n\nHello")]),
    "thoughts": ("<think>\nLet me\n\nsee.\n</think>\n\nYes.\n", [(R, "Let me\n\nsee."), (C, "Yes.\n")]),
    "empty thoughts": ("<think>\n\n</think>\n\nYes.", [(C, "Yes.")]),
    "thoughts without an end": ("<think>\nLet me\n", [(R, "Let me\n")]),
    "thoughts alone": ("<think>\nLet me\n</think>\n\n", [(R, "Let me")]),
    "thoughts twice": ("<think>a</think>\n<think>b</think>\nc", [(R, "ab"), (C, "c")]),
    "thoughts within thoughts": ("<think>a <think> b</think>c", [(R, "a <think> b"), (C, "c")]),
    "a marker of thoughts in content": ("Write <think>a</think>.", [(C, "Write <think>a</think>.")]),
    "a call in thoughts": (f"<think>{call()}</think>x", [(R, call()), (C, "x")]),
    "a call": (call('{"city": "Köln", "n": [1, {}]}'), [("call", "look", '{"city": "Köln", "n": [1, {}]}')]),
    "calls among text": (
        f"<think>\nhm\n</think>\n\nI look.\n{call('{}')}\n{call('{ }', 'see')}\nThere.",
        [(R, "hm"), (C, "I look."), ("call", "look", "{}"), ("call", "see", "{ }"), (C, "There.")],
    ),
    "thoughts between calls": (
        f"{call()}\n<think>b</think>{call()}",
        [("call", "look", "{}"), (R, "b"), ("call", "look", "{}")],
    ),
    "as the model wrote it": (
        '<tool_call>{"arguments" :\t{"b": 1.50,"a":"\\u00e9, {\\"arguments\\": 2}"} , "id":7,"name":"f"}</tool_call>',
        [("call", "f", '{"b": 1.50,"a":"\\u00e9, {\\"arguments\\": 2}"}')],
    ),
    "arguments as text": (call('"{\\"a\\": 1}"'), [("call", "look", '{"a": 1}')]),
    "no arguments": ('<tool_call>{"name": "now"}</tool_call>', [("call", "now", "{}")]),
    "a call without an end": (call("{}").removesuffix("</tool_call>"), [("call", "look", "{}")]),
    "a call that another one ends": (
        call("{}").removesuffix("</tool_call>") + call("{}"),
        [("call", "look", "{}"), ("call", "look", "{}")],
    ),
    "a call cut off": ('a\n<tool_call>\n{"name": "lo\n', [(C, 'a\n<tool_call>\n{"name": "lo\n')]),
    "a damaged call before another": (
        f"a\n<tool_call>\n{{\n</tool_call>\n{call()}\n",
        [(C, "a\n<tool_call>\n{\n</tool_call>"), ("call", "look", "{}")],
    ),
    "ends of nothing": ("a</tool_call>b</think>c", [(C, "a</tool_call>b</think>c")]),
}
DAMAGED = [
    "",
    "null",
    "[]",
    '{"arguments": {}}',
    '{"name": "", "arguments": {}}',
    '{"name": 1}',
    '{"name": "\\ud800"}',
    '{"name": "a", "arguments": [1]}',
    '{"name": "a", "arguments": "no JSON"}',
    '{"name": "a", "arguments": "[]"}',
    '{"name": "a", "arguments": {"x": NaN}}',
    '{"name": "a", "arguments": {"x": 1, "x": 2}}',
    '{"name": "a", "arguments": {}} and more',
    '{"name": "a", "arguments": {"x": "\n"}}',
    '{"name": "a", "arguments": ' + "[" * 5000,
    '{"name": "a", "arguments": {"x": ' + "9" * 5000 + "}}",
    "<function=look>\n</function>",
    "<think>",
]
CASES |= {f"damaged: {inside[:40]}": (s := f"a\n<tool_call>\n{inside}\n</tool_call>\n", [(C, s)]) for inside in DAMAGED}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("case", CASES)
def test_the_parts_of_an_answer(kind, case):
    written, parts = CASES[case]
    tokens = ids(written, TOKENIZERS[kind])
    for size in (1, 3, len(tokens)):
        sizes = [size] * (len(tokens) // size)
        assert parsed(tokens, tokenizer=TOKENIZERS[kind], sizes=sizes) == (parts, len(tokens))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_is_certain_is_given_out_at_once(kind):
    tokenizer = TOKENIZERS[kind]
    parser = AnswerParser(tokenizer, reasoning=True, tools=True)

    def given_by(text):
        parser.feed(ids(text, tokenizer))
        return parser.take()

    assert given_by("<think>\na") == [ReasoningPiece("a")]
    assert given_by("b\n") == [ReasoningPiece("b")]
    assert given_by("c < d\n") == [ReasoningPiece("\nc < d")]
    assert given_by("</think>\n\nS") == [ContentPiece("S")]
    assert given_by("o:\n<tool_call>") == [ContentPiece("o:")]
    assert given_by('{"name": "f", "arguments": {}}') == []
    start, arguments = given_by("</tool_call>")
    assert isinstance(start, ToolCallStart) and (start.index, start.name) == (0, "f")
    assert arguments == ToolCallArguments(0, "{}")
    second, _ = given_by(call())
    assert isinstance(second, ToolCallStart) and second.id != start.id and second.index == 1


@pytest.mark.parametrize(
    ("more", "written", "parts"),
    [
        ({"in_reasoning": True}, "\nhm\n</think>\n\nYes", [(R, "hm"), (C, "Yes")]),
        ({"in_reasoning": True}, "<think>\nhm</think>Yes", [(R, "hm"), (C, "Yes")]),
        ({"in_reasoning": True}, "hm", [(R, "hm")]),
        ({"in_reasoning": True, "reasoning": False}, "Yes", [(C, "Yes")]),
        ({"reasoning": False}, f"<think>a</think>{call()}", [(C, "<think>a</think>"), ("call", "look", "{}")]),
        ({"tools": False}, f"<think>a</think>{call()}", [(R, "a"), (C, call())]),
    ],
)
def test_parts_that_are_not_asked_for_are_text(more, written, parts):
    assert parsed(ids(written), **more)[0] == parts


# What is written, and the thoughts in it.
THOUGHTS = {
    "none": ("Yes.", ""),
    "with line ends": ("<think>\nLet me\n\nsee.\n</think>\n\nYes.\n", "\nLet me\n\nsee.\n"),
    "of characters of several bytes": ("<think>é€𝄞</think>é€", "é€𝄞"),
    "without an end": ("<think>\nLet me", "\nLet me"),
    "that end within a character": ("<think>a€", "a€"),
    "twice": ("<think>a</think>\n<think>bc</think>\nd", "abc"),
    "empty": ("<think></think>Yes.", ""),
    "opened by the prompt": ("hm\n</think>\n\nYes", "hm\n"),
    "with a call": (f"<think>I {call()}</think>x", f"I {call()}"),
    "with what may become a marker": ("<think>a </thin</th</think>x", "a </thin</th"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("case", THOUGHTS)
def test_tokens_of_thoughts_are_counted(kind, case):
    """However they come, and whatever is held back for a stop string; markers are none of them."""
    written, thoughts = THOUGHTS[case]
    tokens, expected = ids(written, TOKENIZERS[kind]), len(ids(thoughts, TOKENIZERS[kind]))
    if case == "that end within a character":
        tokens, expected = tokens[:-1], expected - 1
    special = special_tokens(TOKENIZERS[kind]).values()  # those that are no text are no thoughts
    expected -= sum(token in special for token in ids(thoughts, TOKENIZERS[kind]))
    for size, stops in ((1, ()), (3, ()), (len(tokens), ()), (1, ("</think>!", "k>\n\n\n")), (2, ("\n" * 9,))):
        parser = AnswerParser(
            TOKENIZERS[kind], stops, reasoning=True, tools=True, in_reasoning=case == "opened by the prompt"
        )
        for at in range(0, len(tokens), size):
            parser.feed(tokens[at : at + size])
        parser.finish()
        assert parser.reasoning_tokens == expected, (size, stops)


def test_what_spells_a_marker_is_text_where_the_tokenizer_has_it_as_a_token():
    spelled = [token for text in ("<th", "ink>a</thi", "nk>") for token in ids(text)]
    assert parsed(spelled)[0] == [(C, "<think>a</think>")]
    assert parsed([*ids("<think>"), *spelled, *ids("</think>b")])[0] == [(R, "<think>a</think>"), (C, "b")]


def test_other_special_tokens_are_no_text():
    assert parsed(ids(f"a{MASK}b<think>"))[0] == [(C, "ab<think>")]
    assert parsed([MASK_ID, *ids("<think>a")])[0] == [(R, "a")]


# What is written, the stop string, the parts, and what counts as tokens.
STOPS = {
    "in content": ("<think>a</think>b END c", "END", [(R, "a"), (C, "b ")], "<think>a</think>b END"),
    "in thoughts": ("<think>a END b</think>c", "END", [(R, "a ")], "<think>a END"),
    "in a call": (call(), "look", [(C, '<tool_call>\n{"name": "')], '<tool_call>\n{"name": "look'),
    "after a call": (call() + "END", "END", [("call", "look", "{}")], call() + "END"),
    "a marker": (call() + "b", "</tool_call>", [("call", "look", "{}")], call()),
    "within a marker": ("<think>a</think>b", "k>", [(C, "<thin")], "<think>"),
    "over a marker": ("<think>a</think>b", "a</think>b", [], "<think>a</think>b"),
    "a beginning alone": ("<think>a</think>b EN", "END", [(R, "a"), (C, "b EN")], "<think>a</think>b EN"),
    "begun by a marker": ("<think>a</think>b", "<think>b", [(R, "a"), (C, "b")], "<think>a</think>b"),
}


@pytest.mark.parametrize("case", STOPS)
def test_stop_strings_are_found_in_the_whole_answer(case):
    written, stop, parts, counted = STOPS[case]
    tokens = ids(written)
    for size in (1, 2, len(tokens)):
        sizes = [size] * (len(tokens) // size)
        assert parsed(tokens, [stop], sizes=sizes) == (parts, len(ids(counted)))


ATOMS = [*MARKERS, "\n", "\n\n", "a", "b ", "é", "<", "</", '{"name": "f", "arguments": {"x": 1}}', "{"]
SOUP = st.lists(st.sampled_from([*ATOMS, *MARKERS]), max_size=20).map("".join)
SIZES = st.lists(st.integers(0, 9), max_size=12)


def bare(text):
    for marker in MARKERS:
        text = text.replace(marker, "|")
    return text.replace("\n", "").replace("|", "")


@settings(max_examples=150, deadline=None)
@given(SOUP, SIZES, st.booleans())
@example("\n<tool_call>\n\n", [1, 1, 1], False)
def test_nothing_is_lost_however_the_tokens_come(text, sizes, in_reasoning):
    """All but markers and the line ends beside them is in the parts, in its order."""
    whole, used = parsed(ids(text), in_reasoning=in_reasoning)
    assert used == len(ids(text))
    said = "".join(f'{{"name": "{p[1]}", "arguments": {p[2]}}}' if p[0] == "call" else p[1] for p in whole)
    assert bare(said) == bare(text)
    for tokenizer in TOKENIZERS.values():
        tokens = ids(text, tokenizer)
        assert parsed(tokens, tokenizer=tokenizer, sizes=sizes, in_reasoning=in_reasoning)[0] == whole


@settings(max_examples=150, deadline=None)
@given(SOUP, SIZES, st.sampled_from(ATOMS), st.sampled_from([*ATOMS, "a\n", "}</tool_call>", ">a", "b é"]))
def test_stop_strings_are_those_of_a_text_stream(text, sizes, first, second):
    tokens, stops = ids(text), [first, second]
    plain = TextStream(QWEN, stops)
    counted = plain.feed(tokens)
    plain.finish()
    whole, used = parsed(tokens, stops)
    assert used == counted and parsed(tokens, stops, sizes=sizes) == (whole, used)
    assert parsed(tokens, stops, reasoning=False, tools=False)[0] == ([(C, plain.text)] if plain.text else [])
    said = "".join(f'{{"name": "{p[1]}", "arguments": {p[2]}}}' if p[0] == "call" else p[1] for p in whole)
    assert bare(said) == bare(plain.text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, len(QWEN) - 1), max_size=40), SIZES, st.sampled_from(list(TOKENIZERS)))
def test_any_tokens_make_the_same_parts_however_they_come(tokens, sizes, kind):
    tokenizer = TOKENIZERS[kind]
    tokens = [token % len(tokenizer) for token in tokens]
    assert parsed(tokens, tokenizer=tokenizer, sizes=sizes) == parsed(tokens, tokenizer=tokenizer)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.text(), JSON, max_size=3), st.text(min_size=1), st.booleans(), st.sampled_from([None, 1]), SIZES
)
def test_arguments_are_the_json_that_was_written(arguments, name, ascii_only, indent, sizes):
    def written(value):
        return json.dumps(value, ensure_ascii=ascii_only, indent=indent)

    text = f'<tool_call>\n{{"name": {written(name)}, "arguments": {written(arguments)}}}\n</tool_call>'
    if all(text.count(marker) == ("tool" in marker) for marker in MARKERS):
        assert parsed(ids(text), sizes=sizes)[0] == [("call", name, written(arguments))]


# --- Requests -------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "hi"}


def calling(arguments, **more):
    function = {"name": "look", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]}


def test_messages_are_as_templates_take_them():
    thinking = {"role": "assistant", "content": "yes", "reasoning": "hm", "refusal": None, "audio": None}
    given = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        USER,
        calling('{"a": [1]}'),
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "so"}]},
        thinking,
    ]
    kept = json.dumps(given)
    made = messages_for_template(given)
    assert made[0] == {"role": "system", "content": "Be brief."}
    assert made[2]["content"] == "" and made[2]["tool_calls"][0]["id"] == "c"
    assert made[2]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"a": [1]}}
    assert made[3] == {"role": "tool", "tool_call_id": "c", "content": "so"}
    assert made[4] == {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    assert json.dumps(given) == kept  # a request is not changed


@pytest.mark.parametrize("arguments", ["", "{}", {}, None])
def test_a_call_may_have_no_arguments(arguments):
    assert messages_for_template([USER, calling(arguments)])[1]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "image_url"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]}], "input_audio"),
        ([{"role": "user", "content": [{"type": "file", "file": {}}]}], "'file'"),
        ([{"role": "user", "content": [3]}], "a number"),
        ([{"role": "user"}], "content"),
        ([{"content": "a"}], "role"),
        ([USER, {"role": "tool", "content": "a"}], "tool"),
        ([USER, calling("{")], "the arguments of a call of look can't be read as JSON"),
        ([USER, calling("[1]")], "found a list"),
        ([USER, calling(3)], "found a number"),
        ([USER, calling("{}") | {"tool_calls": "look"}], "tool_calls of a message must be a list, found text"),
        ([USER, calling("{}") | {"tool_calls": [{"id": "c"}]}], "a function with a name"),
        ([USER, calling("{}") | {"tool_calls": [None]}], "a function with a name"),
        ([], "no message"),
        (None, "no message"),
        ("hi", "found text"),
        ([None], "found null"),
    ],
    ids=str,
)
def test_messages_that_are_none_are_refused(messages, says):
    with pytest.raises(DominoError) as error:
        messages_for_template(messages)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("template", "tools", "thinking"),
    [
        (None, False, False),
        ("{{ messages }}", False, False),
        ("{% if tools %}<tools>{{ tools }}</tools> in <tool_call></tool_call>{% endif %}", True, False),
        ("{% if tools %}<tool_call>\n<function=name></tool_call>{% endif %}", False, False),
        ("{{ '<think>\\n\\n</think>\\n\\n' }}", False, True),
        ({"default": "{{ messages }}", "tool_use": "{{ tools }}<tool_call></think>"}, True, True),
    ],
)
def test_the_template_says_what_a_model_knows(template, tools, thinking):
    assert (has_tools(template), has_thinking(template)) == (tools, thinking)


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [("assistant\n<think>\n", True), ("assistant\n", False), ("assistant\n<think>\n\n</think>\n\n", False)],
)
def test_a_prompt_may_open_the_thoughts(prompt, opens):
    assert opens_reasoning(prompt) == opens
