"""Questions to measure acceptance on, from JSONL files in the formats of the usual sets.

A format is recognised by its fields. The wording around a question is that of DFlash's and Domino's released
benchmarks, which the published figures come from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from convert.messages import Message
from convert.tokenizer import encode, encode_chat, has_template
from convert.values import fields_of, json_kind, token_ids
from domino_jax.errors import DominoError
from domino_jax.runtime.files import read_jsonl
from infer.rows import conversation_in_row, max_new_tokens


@dataclass(frozen=True)
class Question:
    """One row of a file: turns of text, or a conversation, or ids."""

    where: str  # file and line, for errors
    turns: tuple[str, ...] = ()  # what the user says; each but the first follows the model's own answers
    messages: tuple[Message, ...] = ()
    tools: list[Any] | None = None  # that the messages may call
    ids: tuple[int, ...] = ()
    limit: int | None = None  # tokens to generate at most, where the row has its own "max_new_tokens"

    @property
    def answers(self) -> int:
        """How many the model gives."""
        return len(self.turns) or 1


# How DFlash's and Domino's released benchmarks ask these questions.
STEP_BY_STEP = "\nPlease reason step by step, and put your final answer within \\boxed{}."
FUNCTION = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n"


class Format(NamedTuple):
    """A kind of row, recognised by its fields."""

    fields: dict[str, type]  # that it must have
    turns: Callable[[dict[str, Any]], list[str]]


FORMATS = (  # the first that fits: narrow ones come before wide ones
    Format({"question": str, "answer": str}, lambda row: [row["question"] + STEP_BY_STEP]),  # GSM8K
    Format({"problem": str}, lambda row: [row["problem"] + STEP_BY_STEP]),  # MATH-500, AIME
    Format({"prompt": str, "entry_point": str}, lambda row: [FUNCTION + row["prompt"] + "\n```"]),  # HumanEval
    Format({"prompt": str, "test_list": list}, lambda row: [row["prompt"]]),  # MBPP, sanitized
    Format({"text": str, "test_list": list}, lambda row: [row["text"]]),  # MBPP, full
    Format({"turns": list}, lambda row: row["turns"]),  # MT-Bench, as released
    Format({"prompt": list}, lambda row: row["prompt"]),  # MT-Bench, as datasets has it
    Format({"instruction": str}, lambda row: [with_input(row["instruction"], row.get("input"))]),  # Alpaca
    Format({"prompt": str}, lambda row: [row["prompt"]]),  # as for `python -m infer --prompts`
)


def with_input(instruction: str, more: str | None) -> str:
    """An instruction of Alpaca with its input, which is often empty."""
    return f"{instruction}\n\nInput:\n{more}" if more else instruction


def parse_questions(row: Any, where: str) -> Question:
    """A row of a file.

    Raises:
        DominoError: it is no object, or no format has its fields.
    """
    if not isinstance(row, dict):
        raise DominoError(f"{where} is not a JSON object but {json_kind(row)}.")
    limit = max_new_tokens(row, where)
    if row.get("input_ids") is not None:
        try:
            ids = tuple(token_ids(row["input_ids"]))
        except ValueError as error:
            raise DominoError(f"{where}: {error}.") from None
        if not ids:
            raise DominoError(f"{where} has no token in its input_ids.")
        return Question(where, ids=ids, limit=limit)
    conversation = conversation_in_row(row, where)
    if conversation is not None:
        return Question(where, messages=tuple(conversation[0]), tools=conversation[1], limit=limit)
    for kind in FORMATS:
        if all(isinstance(row.get(name), held) for name, held in kind.fields.items()):
            if not isinstance(row.get("input"), str | None):
                break
            turns = kind.turns(row)
            if turns and all(isinstance(turn, str) and turn.strip() for turn in turns):
                return Question(where, turns=tuple(turns), limit=limit)
    raise DominoError(
        f"{where} is a question of no known format (GSM8K, MATH, HumanEval, MBPP, MT-Bench, Alpaca, or prompt, "
        f"messages, input_ids): its fields are {fields_of(row)}."
    )


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one file."""

    name: str
    path: Path
    questions: list[Question]


def read_sets(words: tuple[str, ...], limit: int | None) -> list[QuestionSet]:
    """The sets of --quality: each word is NAME=FILE, or FILE, whose stem is then the name.

    Args:
        limit: questions of each, from the file's beginning; all when None.

    Raises:
        DominoError: two have one name, a file can't be read or is empty, or a row has no known format.
    """
    sets: list[QuestionSet] = []
    for word in words:
        name, equals, file = word.partition("=")
        path = Path(file) if equals else Path(word)
        name = name if equals else path.stem
        if not name or name in [one.name for one in sets]:
            raise DominoError(f"--quality {word} needs a name of its own: write NAME=FILE.")
        rows = islice(read_jsonl(path, "questions"), limit)
        sets.append(QuestionSet(name, path, [parse_questions(line.value, line.where) for line in rows]))
    return sets


def prompt(question: Question, answers: list[str], tokenizer: Any) -> list[int]:
    """The ids that the model is given for the turn that follows `answers`.

    With a chat template the turns are the user's messages. Without one, raw text: the answers continue what stands
    before them, and an empty line precedes each later turn.

    Raises:
        DominoError: there is no tokenizer, or no template for messages, or the template refuses.
    """
    try:
        if question.ids:
            return list(question.ids)
        if question.messages:
            return encode_chat(tokenizer, question.messages, tools=question.tools)
        turns = question.turns[: len(answers) + 1]
        if has_template(tokenizer):
            messages: list[Message] = []
            for turn, answer in zip(turns, [*answers, None], strict=True):
                messages.append({"role": "user", "content": turn})
                if answer is not None:
                    messages.append({"role": "assistant", "content": answer})
            return encode_chat(tokenizer, messages)
        said = [turn + answer for turn, answer in zip(turns, [*answers, ""], strict=True)]
        return encode(tokenizer, "\n\n".join(said))
    except DominoError as error:
        raise DominoError(f"{question.where}: {error}") from None
