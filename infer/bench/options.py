"""What the benchmark can be asked for, and what of it makes no sense."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from convert import registry
from domino_jax.errors import DominoError
from infer.bench.quality import Sweep
from infer.bench.tracing import writable


@dataclass(frozen=True)
class Bench:
    """Measure decoding with and without speculation, in one alternating run."""

    model: Annotated[str, tyro.conf.arg(help=registry.MODEL_HELP)] = "demo"
    draft: Annotated[str | None, tyro.conf.arg(help=registry.DRAFT_HELP)] = None
    revision: Annotated[str | None, tyro.conf.arg(help=registry.REVISION_HELP)] = None
    draft_revision: Annotated[str | None, tyro.conf.arg(help=registry.DRAFT_REVISION_HELP)] = None
    shapes: str | None = None
    """instead of --model, a public shape such as qwen3-8b, with a drafter as the public ones: with --random-weights"""
    random_weights: bool = False
    """with --shapes: weights are random, so the figures are of speed only, and every row says so"""
    simulate_tau: float | None = None
    """commit as many drafts as give this mean acceptance length (bonus included), whatever the target says: for the
    speed of real cycles with weights that accept nothing; every row says so"""
    batch_sizes: tuple[int, ...] = (1,)
    drafts: tuple[int | Literal["auto"], ...] = ()
    """proposals that a cycle verifies, each a mode of its own, or "auto"; all that the drafter makes when not given"""
    new_tokens: int = 64
    """tokens to generate for each prompt"""
    prompts: Path | None = None
    """JSONL of prompts ("input_ids" or "prompt"); the demo's held-out ones, or random ids, when not given"""
    prompt_tokens: int = 48
    """tokens of each prompt: longer ones are cut, shorter ones refused"""
    contexts: tuple[int, ...] = ()
    """prompt lengths to sweep over instead of --prompt-tokens; random ids where the prompts are shorter"""
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
    attention: Literal["auto", "xla", "cudnn", "pallas"] = "auto"
    """its form, as for `python -m infer`"""
    head_candidates: int | Literal["all"] = "all"
    """tokens that the causal head scores: about so many of the highest base logits, or all of the vocabulary"""
    draft_dtype: Literal["int8", "float8"] | None = None
    """8 bits for the drafter's matrices: other drafts, the same output (of samples the distribution); --dtype when not
    given"""
    matrices: Literal["auto", "float32", "bfloat16"] = "auto"
    """of float32 runs: how matrices are held that are stored in bfloat16. So is half the memory, at the same precision;
    auto is bfloat16 where this CPU has units for it (AMX), and float32 elsewhere"""
    mesh: str | None = None
    """devices to spread over, "data=2,model=4"; by default those found (one CPU)"""
    head_off: bool = True
    """also run the drafter with its head off"""
    phases: bool = True
    """also time the parts of a cycle, each alone"""
    transformers: bool = True
    """also run transformers' generate (greedy) on the same weights, where torch is installed"""
    json: Path | None = None
    """file for the figures: a list of flat objects, one for each context, batch size and mode"""
    plot: Path | None = None
    """folder for curves over what is swept: contexts, batch sizes, drafts; with --quality for bars and histograms"""
    roofline: bool = False
    """measure the device's memory bandwidth and product rate, and hold each phase against its floor"""
    profile: Path | None = None
    """folder for a profiler's trace of one more short round of each mode"""
    sweep: Annotated[Sweep, tyro.conf.arg(name="")] = field(default_factory=Sweep)


def check_bench(options: Bench) -> None:
    """Refuse what makes no sense, before anything is loaded.

    Raises:
        DominoError: with the flag to change.
    """
    if not options.batch_sizes:
        raise DominoError("--batch-sizes needs at least one size.")
    least = min(*options.batch_sizes, *options.contexts, options.new_tokens - 1, options.rounds, options.prompt_tokens)
    if least < 1:
        raise DominoError(
            "--batch-sizes, --contexts, --rounds and --prompt-tokens must be at least 1, --new-tokens at least 2."
        )
    if not options.sweep.quality and max(options.batch_sizes) > options.num_prompts:
        raise DominoError(f"--num-prompts {options.num_prompts} is less than the largest of --batch-sizes.")
    if not 0 <= options.temperature < float("inf") or not 0 <= options.seed < 2**32:
        raise DominoError("--temperature must be 0 or more, --seed from 0 to 2^32 - 1.")
    if options.simulate_tau is not None and "auto" in options.drafts:
        raise DominoError("--drafts auto goes by what is accepted, which --simulate-tau makes up: give numbers.")
    if options.contexts and options.prompt_tokens != Bench.prompt_tokens:
        raise DominoError("--contexts and --prompt-tokens both say how long prompts are: leave one of them out.")
    if options.shapes and not options.random_weights:
        raise DominoError("--shapes has no weights to load: add --random-weights, for figures of speed only.")
    if options.random_weights and not options.shapes:
        raise DominoError("--random-weights needs a shape, such as --shapes qwen3-8b; --model loads real weights.")
    if options.roofline and not options.phases:
        raise DominoError("--roofline holds the parts of a cycle against their floors: leave out --no-phases.")
    if options.shapes and options.model != "demo":
        raise DominoError("--shapes and --model name two models: leave one of them out.")
    if options.shapes and (options.revision or options.draft_revision):
        raise DominoError("--shapes has random weights, and no --revision or --draft-revision of them.")
    if options.json and not options.json.absolute().parent.is_dir():
        raise DominoError(f"{options.json.absolute().parent} is not a folder; --json is to be written there.")
    for folder in filter(None, (options.plot, options.profile)):
        writable(folder)
