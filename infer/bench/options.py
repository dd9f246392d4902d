"""What the benchmark can be asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Bench:
    """Measure decoding with and without speculation, in one alternating run."""

    model: str = "demo"
    """name, folder or org/repo of the target"""
    draft: str | None = None
    """name, folder or org/repo of the drafter; by default the one that belongs to --model's name"""
    batch_sizes: tuple[int, ...] = (1,)
    drafts: tuple[int, ...] = ()
    """proposals that a cycle verifies, each a mode of its own; all that the drafter makes when not given"""
    new_tokens: int = 64
    """tokens to generate for each prompt"""
    prompts: Path | None = None
    """JSONL of prompts ("input_ids" or "prompt"); the demo's held-out ones, or random ids, when not given"""
    prompt_tokens: int = 48
    """tokens of each prompt: longer ones are cut, shorter ones refused"""
    num_prompts: int = 8
    """prompts a round runs, batch after batch"""
    min_distinct: float = 0.0
    """leave out prompts that the target answers (greedily) with a smaller share of distinct 4-grams: small models fall
    into loops, which are easy to draft and would flatter the acceptance"""
    rounds: int = 3
    temperature: float = 0.0
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] | None = None
    """of weights and caches; by default float32 on CPU, bfloat16 elsewhere"""
    mesh: str | None = None
    """devices to spread over, "data=2,model=4"; by default those found (one CPU)"""
    transformers: bool = True
    """also run transformers' generate (greedy) on the same weights, where torch is installed"""
    json: Path | None = None
    """file for the figures: a list of flat objects, one for each batch size and mode"""
