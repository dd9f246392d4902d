"""Cut prompts out of text, for a target to continue: on-policy training data, or held-out measurements.

python -m train prompts --tokenizer target --out prompts.jsonl --count 4000
python -m infer --model target --draft none --raw --prompts prompts.jsonl --json --temperature 0.7 > data.jsonl
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.options import check_count, check_file
from convert.tokenizer import load_tokenizer
from domino_jax.errors import DominoError
from domino_jax.runtime.command import run_command
from domino_jax.runtime.files import write_text
from train.demo.corpus import read_texts
from train.loading import find


@dataclass(frozen=True)
class PromptOptions:
    """Cut prompts out of text, each from the start of a line."""

    tokenizer: str
    """model whose tokenizer counts the tokens: a name such as qwen3-4b, a folder, or org/repo on the Hub"""
    out: Path
    """JSONL file to write, one {"input_ids": [...]} a line"""
    text: Path | None = None
    """folder of text files; transformers' own model code when not given"""
    files: str = "modeling_*.py"
    """pattern for the names of the files to read in it"""
    count: int = 100
    tokens: int = 48
    """tokens of each prompt"""
    held_out: bool = False
    """take the files that no training command reads"""
    seed: int = 0


def cut(texts: list[str], tokenizer, count: int, tokens: int, seed: int) -> list[list[int]]:
    """`count` prompts of `tokens` ids, each from the start of a random line of a random place."""
    rng = np.random.default_rng(seed)
    sizes = np.array([len(t) for t in texts], float)
    prompts: list[list[int]] = []
    for _ in range(100 * count):
        text = texts[rng.choice(len(texts), p=sizes / sizes.sum())]
        start = text.find("\n", rng.integers(0, len(text) + 1)) + 1
        # A token is a dozen characters at most on average; anything longer than needed is cut.
        ids = tokenizer(text[start : start + 12 * tokens], add_special_tokens=False)["input_ids"][:tokens]
        if len(ids) == tokens:
            prompts.append(ids)
        if len(prompts) == count:
            return prompts
    raise DominoError(f"the text is too short for {count} prompts of {tokens} tokens.")


def write_prompts(options: PromptOptions) -> None:
    """Cut the prompts and write them.

    Raises:
        DominoError: there is no tokenizer, or too little text.
    """
    for name in ("count", "tokens"):
        check_count(name, getattr(options, name))
    check_count("seed", options.seed, least=0, limit=2**32)
    check_file("out", options.out, options.tokenizer, options.text)
    train, held_out = read_texts(options.text, options.files)
    tokenizer = load_tokenizer(find(options.tokenizer, "--tokenizer"))
    if tokenizer is None:
        raise DominoError(f"{options.tokenizer} has no tokenizer.")
    prompts = cut(held_out if options.held_out else train, tokenizer, options.count, options.tokens, options.seed)
    # Whole or not at all, since train demo skips a file that is there.
    write_text(options.out, "".join(json.dumps({"input_ids": ids}) + "\n" for ids in prompts))
    print(f"wrote {len(prompts)} prompts to {options.out}")


def main(argv: Sequence[str] | None = None, prog: str = "python -m train prompts") -> int:
    """Run the command line; returns the exit code."""
    return run_command(PromptOptions, write_prompts, argv, prog=prog)
