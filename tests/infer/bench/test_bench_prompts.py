"""The prompts of a benchmark: what a file may hold, and what of it is refused with its line."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from factory import BYTE_TARGET, make_tokenizer

from domino_jax.errors import DominoError
from infer.bench.options import Bench
from infer.bench.prompts import read_bench_prompts

TEMPLATE = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"


def read(path: Path, *rows: Any, tokens: int = 2) -> list[list[int]]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded: Any = SimpleNamespace(tokenizer=make_tokenizer(TEMPLATE), configs=SimpleNamespace(target=BYTE_TARGET))
    return read_bench_prompts(Bench(prompts=path, prompt_tokens=tokens), loaded)


def test_prompts_are_ids_text_without_a_template_or_messages_with_it(tmp_path):
    tokenizer = make_tokenizer()
    found = read(
        tmp_path / "a.jsonl",
        {"input_ids": [5, 6, 7], "prompt": None},
        {"prompt": "ab"},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"input_ids": [5]},
    )
    assert found == [[5, 6], tokenizer("ab")["input_ids"], tokenizer("[user:hi]")["input_ids"][:2]]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"input_ids": ["5", "6"]}, "input_ids must be token ids"),
        ({"input_ids": [5.0, 6.0]}, "found 5.0 at 0"),
        ({"input_ids": [5, 260]}, "it has id 260, outside the target's vocabulary of 260"),
        ({"prompt": 5}, "prompt must be text, found a number"),
        ({"text": "ab"}, 'must have one of "prompt"'),
        ({"prompt": ""}, "the prompt is empty"),
        ([5, 6], "found a list"),
    ],
)
def test_what_is_no_prompt_is_named_with_its_line(tmp_path, row, says):
    with pytest.raises(DominoError) as error:
        read(tmp_path / "a.jsonl", {"prompt": "ab"}, row)
    assert f"{tmp_path / 'a.jsonl'}, line 2" in str(error.value) and says in str(error.value)
