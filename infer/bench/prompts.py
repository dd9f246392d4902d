"""The prompts that are run, and which of them the target answers well enough to say something."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from convert.loading import LoadedModel
from convert.registry import DEMO_FOLDER
from convert.values import check_vocabulary
from domino_jax.errors import DominoError
from domino_jax.runtime.provenance import distinct_ngrams
from infer.bench.options import Bench
from infer.engine import Decoding, Engine
from infer.prompts import Encoder, read_prompts

RANDOM_IDS = "random ids"


class BenchPrompts(NamedTuple):
    """What is run, and how it was found."""

    prompts: list[list[int]]  # num_prompts lists of prompt_tokens ids
    looping: int  # passed over because the target's answer loops
    source: str  # a file's name, or that they are random ids


def collect_prompts(options: Bench, loaded: LoadedModel, engine: Engine) -> BenchPrompts:
    """The prompts of one context length.

    Where --contexts asks for longer prompts than the file has, they are random ids, and the rows say so.

    Args:
        engine: the target's, without stop tokens.

    Raises:
        DominoError: there are too few, or the file is missing or malformed.
    """
    found, path = read_bench_prompts(options, loaded), prompts_file(options)
    source = path.name if path else RANDOM_IDS
    if options.contexts and len(found) < options.num_prompts:
        found, source = random_prompts(options, loaded), RANDOM_IDS
    prompts, looping = choose(found, options, engine)
    return BenchPrompts(prompts, looping, source)


def prompts_file(options: Bench) -> Path | None:
    """The file that prompts are read from; None for random ids."""
    if options.prompts is None and options.model.model == "demo" and options.shapes is None:
        return DEMO_FOLDER / "prompts.jsonl"
    return options.prompts


def random_prompts(options: Bench, loaded: LoadedModel) -> list[list[int]]:
    """`num_prompts` lists of `prompt_tokens` random ids."""
    rng = np.random.default_rng(options.sampling.seed or 0)
    return rng.integers(0, loaded.configs.target.vocab_size, (options.num_prompts, options.prompt_tokens)).tolist()


def read_bench_prompts(options: Bench, loaded: LoadedModel) -> list[list[int]]:
    """Prompts of exactly `prompt_tokens` ids: all that the file has, or `num_prompts` random ones.

    Raises:
        DominoError: the file is missing or malformed.
    """
    path = prompts_file(options)
    if path is None:
        return random_prompts(options, loaded)
    found: list[list[int]] = []
    for prompt in read_prompts(path):
        try:
            ids = Encoder(loaded.tokenizer, raw=prompt.messages is None).ids(prompt)
            check_vocabulary(ids, loaded.configs.target.vocab_size)
        except (DominoError, ValueError) as error:
            raise DominoError(f"{prompt.where}: {str(error).rstrip('.')}.") from None
        if len(ids) >= options.prompt_tokens:
            found.append(ids[: options.prompt_tokens])
    return found


def choose(prompts: list[list[int]], options: Bench, engine: Engine) -> tuple[list[list[int]], int]:
    """The first `num_prompts` whose greedy answers are varied enough, and how many were passed over for loops.

    Raises:
        DominoError: there are too few.
    """
    chosen: list[list[int]] = []
    looping = 0
    for prompt in prompts:
        if len(chosen) == options.num_prompts:
            break
        if options.min_distinct > 0:
            sequence, _ = engine.sequence(prompt, options.new_tokens)
            engine.generate([sequence], Decoding(speculative=False))
            if distinct_ngrams(sequence.tokens) < options.min_distinct:
                looping += 1
                continue
        chosen.append(prompt)
    if len(chosen) < options.num_prompts:
        raise DominoError(
            f"only {len(chosen)} prompts have {options.prompt_tokens} tokens and an answer that varied "
            f"({looping} loop), {options.num_prompts} are wanted: lower --num-prompts or --prompt-tokens."
        )
    return chosen, looping
