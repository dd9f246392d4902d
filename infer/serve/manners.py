"""What Qwen3's clients expect, in OpenAI's form: an answer's parts while its tokens come, a request's messages.

Stop strings are looked for in the whole answer, reasoning and tool calls too, as vLLM (V1) does it.
"""

import json
import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from convert.messages import Message, valid_unicode
from convert.tokenizer import THOUGHTS_END, THOUGHTS_START, decode
from convert.values import json_kind
from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.parsing import parse_json
from infer.rows import conversation_in_row
from infer.text import TextStream, overlap

CALL_START, CALL_END = "<tool_call>", "</tool_call>"  # as Qwen3 writes them, with JSON between
JSON_SCANNER = json.JSONDecoder()


class ContentPiece(NamedTuple):
    text: str


class ReasoningPiece(NamedTuple):
    text: str


class ToolCallStart(NamedTuple):
    index: int  # of the answer's calls, from 0 on
    id: str
    name: str


class ToolCallArguments(NamedTuple):
    index: int
    text: str  # JSON; pieces of the same index follow one another


Piece = ContentPiece | ReasoningPiece | ToolCallStart | ToolCallArguments


class Mark(NamedTuple):
    at: int  # its place in the text
    marker: str
    width: int  # how many characters of the text it is


class AnswerParser:
    """The parts of one answer, from its tokens.

    A marker that the tokenizer has as one token is that token, and what spells it is text; else what spells it is the
    marker. `<think>` opens only where nothing but line ends has been said. A call is certain when it has come to its
    end and can be read: until then nothing of it is given out, and one that can't be read is content, as written.
    Line ends beside a marker are left out.

    Args:
        stops: stop strings, as TextStream takes them.
        reasoning: thoughts are told apart; else their markers are text.
        tools: so are calls.
        in_reasoning: the prompt has opened the thoughts already.
        forced: names of functions of which a grammar makes calls: such a call needs no reading.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str] = (),
        *,
        reasoning: bool,
        tools: bool,
        in_reasoning: bool = False,
        forced: Sequence[str] = (),
    ):
        self.stream = TextStream(tokenizer, stops)
        markers = (THOUGHTS_START, THOUGHTS_END) * reasoning + (CALL_START, CALL_END) * tools
        added = {token.content: number for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        written = {marker: decode(tokenizer, [added[marker]]) for marker in markers if marker in added}
        # Special tokens are no text, so that their width is 0.
        widths = {marker: len(text) for marker, text in written.items() if text in ("", marker)}
        self.single = {added[marker]: (marker, width) for marker, width in widths.items()}
        self.spelled = [marker for marker in markers if marker not in widths]
        self.marks: list[Mark] = []
        self.read = 0  # characters of the stream's text that are in pieces, or held below
        self.splits, self.forced = reasoning, {call_opening(name): name for name in forced}
        self.section: type[ContentPiece] | type[ReasoningPiece] = ContentPiece
        self.begins = False  # a marker has just been: line ends are left out
        self.line_ends = ""  # held: left out if a marker follows
        self.call: str | None = None  # what a call says that has not come to its end
        self.calls = 0
        self.answered = False  # there has been content
        self.finished = False
        self.pieces: list[Piece] = []
        self.reasoning_tokens = 0  # of the thoughts, without their markers
        self.places: deque[int] = deque()  # where in the text each token begins that has not been read
        if reasoning and in_reasoning:
            self._begin(ReasoningPiece)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended it."""
        return self.stream.stopped

    @property
    def thinking(self) -> bool:
        """Whether the thoughts are open."""
        return self.section is ReasoningPiece

    @property
    def tokens_of_markers(self) -> dict[str, int]:
        """The markers that the tokenizer has as one token; the others are spelled."""
        return {marker: token for token, (marker, _) in self.single.items()}

    def feed(self, tokens: Sequence[int]) -> int:
        """Take tokens, and return how many count: all, or those up to a stop string's last."""
        for used, token in enumerate(tokens, 1):
            marker, width = self.single.get(token, ("", 0))
            if marker:
                self.stream.flush()  # no character goes on after a marker
            before = self._length()
            self.stream.feed([token])
            if marker and not width:
                self.marks.append(Mark(before, marker, 0))
            elif marker and not self.stopped:  # else the stop string has cut into it
                self.marks.append(Mark(self._length() - width, marker, width))
                self.places.append(self.marks[-1].at)
            else:
                self.places.append(before)
            if self.stopped:
                self.finish()
                return used
        self._read()
        return len(tokens)

    def finish(self) -> None:
        """Release what was held back: the answer is at its end."""
        if self.finished:
            return
        self.finished = True
        self.stream.finish()
        self._read(last=True)
        if self.call is not None:
            self._end_call()
        self._give(self.line_ends)
        self.line_ends = ""

    def take(self) -> list[Piece]:
        """What is new and certain since the last time."""
        taken, self.pieces = self.pieces, []
        return taken

    def _length(self) -> int:
        """Characters of the text so far, with those that may become a stop string."""
        return len(self.stream.text) + sum(self.stream.shown)

    def _read(self, last: bool = False) -> None:
        """Read on in the stream's text, up to what may become a marker; to its end if this is the last of it."""
        text = self.stream.text
        while True:
            mark = self.marks[0] if self.marks else Mark(len(text) + 1, "", 0)
            end = min(mark.at, len(text))
            places = [(at, marker) for marker in self.spelled if (at := text.find(marker, self.read, end)) >= 0]
            if places:
                at, marker = min(places)
                mark = Mark(at, marker, len(marker))
            elif mark.at + mark.width > len(text):
                break
            else:
                self.marks.pop(0)
            self._say(text[self.read : mark.at])
            self._count(mark.at)
            is_text, self.read = not self._pass(mark.marker), mark.at + mark.width
            self._count(self.read, is_text)
        if last:
            end = len(text)
        elif end == len(text):
            end -= max((overlap(text[self.read :], marker) for marker in self.spelled), default=0)
        self._say(text[self.read : end])
        self._count(end)
        self.read = end

    def _count(self, end: int, is_text: bool = True) -> None:
        """Count the tokens that begin before a place in the text as those of the section, if they are its text."""
        while self.places and self.places[0] < end:
            self.places.popleft()
            self.reasoning_tokens += is_text and self.thinking

    def _pass(self, marker: str) -> bool:
        """Go over a marker, or say it as text where it marks nothing; whether it marks something."""
        if self.call is not None:
            if marker in (CALL_START, CALL_END):
                self._end_call(marker if marker == CALL_END else "")
                self.call = "" if marker == CALL_START else None
            else:
                self.call += marker
        elif marker == THOUGHTS_START and self.section is ReasoningPiece and self.begins:
            pass  # the prompt has opened them, and the model again
        elif marker == THOUGHTS_START and self.section is ContentPiece and not self.answered:
            self._begin(ReasoningPiece)
        elif marker == THOUGHTS_END and self.section is ReasoningPiece:
            self._begin(ContentPiece)
        elif marker == CALL_START and self.section is ContentPiece:
            self.call = ""
        else:
            self._say(marker)
            return False
        return True

    def _begin(self, section: type[ContentPiece] | type[ReasoningPiece]) -> None:
        self.section, self.line_ends, self.begins = section, "", True

    def _end_call(self, end: str = "") -> None:
        said, self.call = self.call or "", None
        call = (self._forced_call(said) if end else None) or _read_call(said)
        if call is None:
            self._say(CALL_START + said + end)
            return
        self._begin(ContentPiece)
        name, arguments = call
        self.pieces.append(ToolCallStart(self.calls, f"call_{secrets.token_hex(12)}", name))
        self.pieces.append(ToolCallArguments(self.calls, arguments))
        self.calls += 1

    def _forced_call(self, said: str) -> tuple[str, str] | None:
        """What a whole call says that a grammar has made. Its arguments may be what JSON allows and we read nowhere."""
        said = said.strip("\n")
        name = next((name for start, name in self.forced.items() if said.startswith(start)), None)
        return None if name is None else (name, said[len(call_opening(name)) : -1])

    def _say(self, text: str) -> None:
        """Text of the section or call that is open."""
        if self.call is not None:
            self.call += text
            return
        text = text.lstrip("\n") if self.begins else self.line_ends + text
        self.begins = self.begins and not text
        said = text.rstrip("\n")
        self.line_ends = text[len(said) :]
        self._give(said)

    def _give(self, text: str) -> None:
        if not text:
            return
        self.answered |= self.section is ContentPiece
        last = self.pieces[-1] if self.pieces else None
        if isinstance(last, self.section):
            self.pieces[-1] = self.section(last.text + text)
        else:
            self.pieces.append(self.section(text))


def call_opening(name: str) -> str:
    """How a call of a function begins, as Qwen3 writes it: its arguments and a brace follow."""
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '


def _read_call(text: str) -> tuple[str, str] | None:
    """The name that a call says, and its arguments as JSON text, as they are written; None where it says none."""
    try:
        call = parse_json(text)
        name = call.get("name") if isinstance(call, Mapping) else None
        if not isinstance(name, str) or not valid_unicode(name):
            return None
        arguments = call.get("arguments")
        if not isinstance(arguments, str):
            written = "{}" if arguments is None else _written(text, "arguments")
        else:  # JSON text already
            written = valid_unicode(arguments) or "{}"
            arguments = parse_json(written)
    except ValueError:
        return None
    return (name, written) if arguments is None or isinstance(arguments, Mapping) else None


def _written(text: str, key: str) -> str:
    """The value of a key as it is written in the text of a JSON object that has the key."""
    between, at = " \t\r\n,:", text.index("{") + 1
    while True:
        name, at = JSON_SCANNER.raw_decode(text, len(text) - len(text[at:].lstrip(between)))
        start = len(text) - len(text[at:].lstrip(between))
        _, at = JSON_SCANNER.raw_decode(text, start)
        if name == key:
            return text[start:at]


def messages_for_template(messages: Any) -> list[Message]:
    """The messages of a request as chat templates take them: texts, known roles, a call's arguments as an object.

    Raises:
        DominoError: they are of no known form, there is none, or one has a part that is no text, which is named.
    """
    found = conversation_in_row({"messages": messages}, "the request")
    if found is None:
        raise DominoError("the request has no messages.")
    for message in found[0]:
        thoughts = message.pop("reasoning", None)
        if thoughts is not None:
            message.setdefault("reasoning_content", thoughts)
        if "tool_calls" in message:
            calls = message["tool_calls"]
            if not isinstance(calls, list):
                raise DominoError(f"the tool_calls of a message must be a list, found {json_kind(calls)}.")
            message["tool_calls"] = [_call_for_template(call) for call in calls]
    return found[0]


def _call_for_template(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DominoError("each of a message's tool_calls must have a function with a name.")
    where = f"the arguments of a call of {function['name']}"
    arguments = function.get("arguments") or "{}"
    try:
        arguments = parse_json(arguments) if isinstance(arguments, str) else arguments
    except ValueError as error:
        raise DominoError(f"{where} can't be read as JSON: {first_line(error)}.") from None
    if not isinstance(arguments, Mapping):
        raise DominoError(f"{where} must be the JSON text of an object, found {json_kind(arguments)}.")
    return {**call, "function": {**function, "arguments": dict(arguments)}}


def has_tools(chat_template: Any) -> bool:
    """Whether a chat template, or one of several by name, tells of tools, and to call them by JSON in `<tool_call>`."""
    text = str(chat_template or "")
    return "tools" in text and CALL_START in text and "<function=" not in text  # Qwen3-Coder's form is another


def has_thinking(chat_template: Any) -> bool:
    """Whether a chat template knows thoughts, those that can't be switched off too (see `knows_thinking`)."""
    return THOUGHTS_END in str(chat_template or "")


def opens_reasoning(prompt: str) -> bool:
    """Whether a rendered prompt has opened the thoughts: what `in_reasoning` says."""
    return prompt.rstrip().endswith(THOUGHTS_START)
