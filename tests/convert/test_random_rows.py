"""Rows of data at random, for every command that reads them: each is read without a loss, or refused in a sentence."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from factory import make_tokenizer

from convert.messages import CALL, LeftOut, conversation_of
from domino_jax.errors import DominoError
from infer.bench.questions import prompt as encode_question
from infer.bench.questions import read_sets
from infer.prompts import Encoder, read_prompts
from train.data.conversations import Template
from train.data.examples import sequences_of
from train.evaluate.prompts import read_heldout_prompts
from train.regenerate.prompts import Lines, encode_turn

TEMPLATE = """
{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + ':' + (m.content.split('</think>')[-1] if m.role == 'assistant' else m.content) }}
    {%- for call in m.tool_calls or [] %}{{- '[' + call.function.name + ']' }}{%- endfor %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant:' }}{%- endif %}"""
VOCABULARY = 260

SCALARS = [
    None,
    True,
    False,
    0,
    1,
    -1,
    -100,
    2,
    259,
    260,
    2**31,
    2**70,
    0.0,
    1.0,
    0.5,
    1e300,
    "",
    "1",
    "a",
    "ab c",
    "\n",
]
SCALARS += ["user", "assistant", "system", "tool", "human", "gpt", "Narrator", CALL, "text", "image", "<think>hm"]
SCALARS += [
    "<think>\nhm\n</think>\n\nyes",
    "\ud800",
    "{}",
    "[",
    '[{"name": "look"}]',
    "<|im_end|>",
    "e\u0301\u2028 ",
    "{{ m }}",
]
KEYS = ["messages", "conversations", "prompt", "completion", "text", "input_ids", "tokens", "loss_mask", "tools"]
KEYS += ["max_new_tokens", "temperature", "stop", "turns", "question", "answer", "instruction", "input", "labels"]
IN_MESSAGES = ["role", "content", "from", "value", "weight", "name", "tool_calls", CALL, "reasoning_content", "type"]


def anything(chance: random.Random, depth: int = 3) -> Any:
    how = chance.random()
    if depth == 0 or how < 0.5:
        return chance.choice(SCALARS)
    if how < 0.7:
        return [anything(chance, depth - 1) for _ in range(chance.randint(0, 3))]
    names = chance.sample([*KEYS, *IN_MESSAGES, "function", "arguments"], chance.randint(0, 3))
    return {name: anything(chance, depth - 1) for name in names}


def message(chance: random.Random) -> Any:
    if chance.random() < 0.03:
        return anything(chance)
    keys = ("role", "content") if chance.random() < 0.8 else ("from", "value")
    role = chance.choice(["user", "assistant", "system", "tool", "human", "gpt", "developer", "Narrator", "User"])
    texts = [
        "a",
        "hi there",
        "e",
        "",
        "so\nwhat",
        "yes <|im_end|>",
        "<think>\nhm\n</think>\n\nyes",
        ["a", {"text": "b"}],
    ]
    made: dict[str, Any] = {keys[0]: role, keys[1]: chance.choice(texts)}
    if chance.random() < 0.1:
        made["tool_calls"] = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    if chance.random() < 0.1:
        made[chance.choice(IN_MESSAGES)] = anything(chance)
    return made


def row(chance: random.Random) -> Any:
    def conversation() -> list[Any]:
        return [message(chance) for _ in range(chance.randint(0, 4))]

    def ids() -> list[int]:
        return [chance.randrange(VOCABULARY) for _ in range(chance.randint(0, 4))]

    forms: list[Any] = [
        lambda: {"messages": conversation()},
        lambda: {"conversations": conversation()},
        lambda: {"prompt": conversation(), "completion": conversation()},
        lambda: {"prompt": "ab", "completion": "cd"},
        lambda: {"prompt": "ab"},
        lambda: {"text": "abc"},
        lambda: {"input_ids": ids(), "tokens": ids()},
        lambda: {
            "input_ids": [1, 2, 3],
            "loss_mask": [chance.randint(0, 1) for _ in range(chance.choice([3, 3, 3, 2]))],
        },
        lambda: anything(chance),
    ]
    made = chance.choice(forms)()
    if isinstance(made, dict) and chance.random() < 0.3:
        made[chance.choice(KEYS)] = anything(chance)
    return made


def texts_of(row: Any) -> list[str]:
    """What a row's messages say, as a faithful template shows it, by the parser that all commands share."""
    found = conversation_of(row)
    messages = found[0] if found else []
    return [m["content"].rpartition("</think>")[2] if m["role"] == "assistant" else m["content"] for m in messages]


def check(path: Path, row: Any, tokenizer: Any, counts: Counter[str]) -> None:
    """Give a row to every command: what is read is whole, and what is not is a sentence with its place."""
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    parsed = json.loads(path.read_text(encoding="utf-8"))

    def train() -> list[list[int]]:
        return [ids for ids, _ in sequences_of(parsed, Template(tokenizer))]

    def regenerate() -> list[list[int]]:
        lines = Lines(path, VOCABULARY)
        return [
            encode_turn(source, turn, ["x"] * turn, tokenizer, False)
            for _, source in lines.sources(0, 1)
            for turn in range(source.turns)
        ][:1]

    def generate() -> list[list[int]]:
        return [Encoder(tokenizer).ids(prompt) for prompt in read_prompts(path)]

    def measure() -> list[list[int]]:
        return [encode_question(q, [], tokenizer) for q in read_sets((f"a={path}",), None)[0].questions]

    def validate() -> list[list[int]]:
        return read_heldout_prompts(path, VOCABULARY, 10**6, tokenizer, 4)

    for command in (train, regenerate, generate, measure, validate):
        try:
            made = command()
        except (DominoError, LeftOut) as error:
            counts[f"{command.__name__} refused"] += 1
            assert str(error).strip() and "\n" not in str(error) and len(str(error)) < 600
            continue
        except ValueError as error:
            assert command is train and "\n" not in str(error)  # read_part adds the place
            counts["train refused"] += 1
            continue
        counts[f"{command.__name__} read"] += 1
        assert made or command is train
        if command is generate and isinstance(parsed, dict) and parsed.get("input_ids") is None:
            said = tokenizer.decode(made[0])
            assert all(text.strip() in said for text in texts_of(parsed)), (parsed, said)


def run(tmp_path: Path, seed: int, rows: int) -> Counter[str]:
    chance, tokenizer, counts = random.Random(seed), make_tokenizer(TEMPLATE), Counter[str]()
    for _ in range(rows):
        check(tmp_path / "a.jsonl", row(chance), tokenizer, counts)
    return counts


def test_rows_at_random_are_read_whole_or_refused_in_a_sentence(tmp_path, capsys):
    counts = run(tmp_path, 0, 300)
    assert len(counts) == 10 and min(counts.values()) > 20, counts


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_rows_at_random_are_read_whole_or_refused_in_a_sentence(tmp_path, capsys, seed):
    run(tmp_path, seed, 2500)
