"""The options of the benchmarks, and what of them makes no sense together."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import DisallowNone

from convert.options import (
    GROUP,
    UNSET,
    Flag,
    ModelOptions,
    SamplingOptions,
    check_count,
    check_file,
    check_not_source,
    check_real,
)
from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.command import UsageError
from domino_jax.runtime.extras import require
from domino_jax.runtime.files import check_output
from domino_jax.runtime.weight_forms import resolve_weights
from infer.options import NUM_DRAFT_TOKENS, NumDraftTokens


@dataclass(frozen=True)
class QualityOptions:
    """Acceptance on sets of questions."""

    quality: Annotated[tuple[str, ...], UNSET] = ()
    """measure acceptance, not speed, on JSONL files of questions: NAME=FILE, or FILE, whose stem is then the name"""
    limit_prompts: Annotated[int | None, DisallowNone, UNSET] = None
    """first questions of each --quality file; the default is all"""
    lean: Flag = False
    """with --quality: also run the autoregressive baseline on the same questions, for the speed ratio"""
    forms: Annotated[tuple[str, ...], UNSET] = ()
    """with --quality: the target in other forms of --weights too, or other folders of it, each beside the one of
    --model: τ, answers that are the same, perplexity"""
    perplexity: Annotated[Path | None, DisallowNone, UNSET] = None
    """with --quality: a text file, whose perplexity is stated of each form"""


@dataclass(frozen=True)
class Bench:
    """Measure decoding with and without speculation, in one alternating run."""

    model: Annotated[ModelOptions, GROUP] = field(default_factory=ModelOptions)
    shapes: Annotated[str | None, DisallowNone, UNSET] = None
    """instead of --model, a public shape such as qwen3-8b, with a drafter as the public ones; needs --random-weights"""
    random_weights: Flag = False
    """with --shapes: use random weights. The figures are of speed only, and every row says so"""
    simulate_tau: Annotated[float | None, DisallowNone, UNSET] = None
    """commit as many drafts as give this mean acceptance length, whatever the target says; every row says so"""
    batch_sizes: tuple[int, ...] = (1,)
    """sequences that run together, each size in turn"""
    drafts: Annotated[tuple[NumDraftTokens, ...], UNSET, NUM_DRAFT_TOKENS] = ()
    """draft tokens verified per cycle, or auto; each is a mode of its own (default: all of a block)"""
    new_tokens: int = 64
    """tokens to generate for each prompt"""
    prompts: Annotated[Path | None, DisallowNone, UNSET] = None
    """JSONL of prompts ("input_ids", "prompt", "messages"); the default is the demo's held-out ones, or random ids"""
    prompt_tokens: int = 48
    """tokens of each prompt; longer ones are cut, shorter ones left out"""
    contexts: Annotated[tuple[int, ...], UNSET] = ()
    """prompt lengths to sweep over instead of --prompt-tokens; random ids where the prompts are shorter"""
    num_prompts: int = 8
    """prompts a round runs, batch after batch"""
    min_distinct: float = 0.0
    """leave out prompts whose greedy answer has a smaller share of distinct 4-grams: loops are easy to draft"""
    rounds: int = 3
    """rounds; figures are medians over them"""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    head_off: bool = True
    """also run the drafter without its head"""
    phases: bool = True
    """also time the parts of a cycle, each alone"""
    transformers: bool = True
    """also run transformers' generate (greedy) on the same weights, where torch is installed"""
    roofline: Flag = False
    """measure the device's memory bandwidth and product rate, and compare each phase with its floor"""
    json: Annotated[Path | None, DisallowNone, UNSET] = None
    """file for the figures: a list of flat objects, one for each context, batch size and mode"""
    plot: Annotated[Path | None, DisallowNone, UNSET] = None
    """folder for curves over contexts, batch sizes and drafts; with --quality for bars and histograms"""
    profile: Annotated[Path | None, DisallowNone, UNSET] = None
    """folder for a profiler's trace of one more short round of each mode"""
    questions: QualityOptions = field(default_factory=QualityOptions)


# Options of Bench that --quality does not read.
SPEED_ONLY = (
    *("prompts", "prompt_tokens", "num_prompts", "min_distinct", "rounds", "transformers", "contexts", "shapes"),
    *("simulate_tau", "roofline", "profile", "phases"),
)


def check_bench(options: Bench) -> None:
    """Check the options before anything is loaded.

    Raises:
        UsageError: they contradict each other, or a value is out of range.
        DominoError: a folder can't be written, or a package is missing.
    """
    options.model.check()
    options.sampling.check()
    if not options.batch_sizes:
        raise UsageError("--batch-sizes needs at least one size.")
    for name in ("batch_sizes", "contexts"):
        for value in getattr(options, name):
            check_count(name, value)
    for name in ("rounds", "prompt_tokens", "num_prompts"):
        check_count(name, getattr(options, name))
    check_count("new_tokens", options.new_tokens, least=2)
    check_real("min_distinct", options.min_distinct, "from 0 to 1")
    if options.simulate_tau is not None:
        check_real("simulate_tau", options.simulate_tau, "1 or more")
    for drafts in options.drafts:
        if drafts != "auto":
            check_count("num_draft_tokens", drafts)
    if not options.questions.quality and max(options.batch_sizes) > options.num_prompts:
        raise UsageError(f"--num-prompts {options.num_prompts} is less than the largest of --batch-sizes.")
    if options.simulate_tau is not None and "auto" in options.drafts:
        raise UsageError("--drafts auto goes by what is accepted, which --simulate-tau makes up: give numbers.")
    if options.simulate_tau is not None and options.model.drafting.tree is not None:
        raise UsageError("--simulate-tau makes up how far a chain of drafts stands: leave --tree out.")
    if options.contexts and options.prompt_tokens != Bench.prompt_tokens:
        raise UsageError("--contexts and --prompt-tokens both say how long prompts are: leave one of them out.")
    if options.shapes and not options.random_weights:
        raise UsageError("--shapes has no weights to load: add --random-weights, for figures of speed only.")
    if options.random_weights and not options.shapes:
        raise UsageError("--random-weights needs a shape, such as --shapes qwen3-8b; --model loads real weights.")
    if options.roofline and not options.phases:
        raise UsageError("--roofline compares the parts of a cycle with their floors: leave out --no-phases.")
    if options.shapes and options.model.model != ModelOptions.model:
        raise UsageError("--shapes and --model name two models: leave one of them out.")
    if options.shapes and (options.model.revision or options.model.drafting.draft_revision):
        raise UsageError("--shapes has random weights, and no --revision or --draft-revision of them.")
    sets = [given.partition("=")[2] or given for given in options.questions.quality]
    sources = options.model.model, options.model.draft, options.prompts, *sets
    check_file("json", options.json, *sources)
    _check_quality(options)
    if options.plot:
        require("matplotlib")  # it is imported when all is measured
    for name, folder in (("plot", options.plot), ("profile", options.profile)):
        if folder:
            check_not_source(name, folder, *sources)
            check_writable(folder)


def _check_quality(options: Bench) -> None:
    """Raises: UsageError: an option does nothing with --quality, or needs it."""
    questions = options.questions
    if not questions.quality:
        if questions != QualityOptions():
            raise UsageError("--limit-prompts, --lean, --forms and --perplexity need --quality NAME=FILE.")
        return
    for each in dataclasses.fields(options):
        if each.name in SPEED_ONLY and getattr(options, each.name) != each.default:
            raise UsageError(f"--{each.name.replace('_', '-')} is for measuring speed and does nothing with --quality.")
    if questions.limit_prompts is not None:
        check_count("limit_prompts", questions.limit_prompts)
    if len(set(questions.forms)) < len(questions.forms):
        raise UsageError("--forms names one twice.")
    for form in questions.forms:
        if form in ("auto", "int4") or form == resolve_weights(options.model.device.weights):
            raise UsageError(f"--forms {form} is none beside --weights {options.model.device.weights}.")
    if len(options.batch_sizes) != 1:
        raise UsageError(f"--quality runs at one batch size, found {len(options.batch_sizes)} of --batch-sizes.")
    if "auto" in options.drafts:
        raise UsageError("--quality measures acceptance, which needs a number: --drafts auto goes by speed.")


def check_writable(folder: Path) -> None:
    """Make a folder for pictures or traces, which may lie among other files, and make sure that it takes files.

    Raises:
        DominoError: it can't be made, takes none, or is a model, a training run or another whole folder.
    """
    check_output(folder, "other files")
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DominoError(f"{folder} can't be written: {first_line(error)}.") from None
