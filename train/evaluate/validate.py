"""The acceptance length that a drafter really has: held-out prompts, decoded greedily by its target.

    python -m train validate --run runs/drafter --prompts held.jsonl
    python -m train validate --target target --draft drafter --prompts held.jsonl --min-distinct 0.8 --json

τ = tokens a cycle, its bonus included, over all cycles of all answers (docs/algorithm.md, section 5), with the causal
head and without it. A training run does the same with `Validation` every some steps, beside the acceptance that its
loss estimates.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from jax import Array
from tyro.conf import DisallowNone

from convert import registry
from convert.loading import load_model, without_head
from convert.options import GROUP, UNSET, Flag, ProcessOptions
from convert.progress import progress_bars
from domino_jax.decode import DecodeConfig
from domino_jax.drafters.block import BlockDrafter
from domino_jax.errors import DominoError
from domino_jax.runtime.command import UsageError, run_command
from domino_jax.runtime.compile_cache import enable_compile_cache
from domino_jax.runtime.processes import join_processes
from domino_jax.runtime.slots import Completion, Request
from domino_jax.sampling import SamplingParams
from domino_jax.weights import Params, Target, unflatten
from train import options as settings
from train.evaluate.prompts import HeldOutOptions, answered, chosen_prompts
from train.loading import PairOptions, notes


@dataclass(frozen=True)
class MeasuredAcceptance:
    """What was accepted of one drafter's proposals."""

    accepted: tuple[tuple[int, ...], ...]  # for each prompt the drafts accepted, cycle by cycle

    @classmethod
    def of(cls, answers: Sequence[Completion]) -> "MeasuredAcceptance":
        """What the cycles of these answers accepted."""
        return cls(tuple(tuple(answer.accepted) for answer in answers))

    @property
    def cycles(self) -> int:
        """Of all prompts."""
        return sum(map(len, self.accepted))

    @property
    def tau(self) -> float | None:
        """τ over all cycles, so that long answers weigh more; None without any."""
        return sum(map(sum, self.accepted)) / self.cycles + 1 if self.cycles else None

    @property
    def per_prompt(self) -> list[float | None]:
        """Each prompt's own τ; None where the answer had no cycle (its first token ended it)."""
        return [sum(row) / len(row) + 1 if row else None for row in self.accepted]

    @property
    def error(self) -> float | None:
        """The standard error of τ over prompts: that of a ratio of two sums. None with fewer than two prompts."""
        count, tau = sum(bool(row) for row in self.accepted), self.tau
        if count < 2 or tau is None:
            return None
        rest = [sum(row) + len(row) - tau * len(row) for row in self.accepted]
        return math.sqrt(sum(r * r for r in rest) * count / (count - 1)) / self.cycles

    @property
    def spread(self) -> float | None:
        """The standard deviation of the prompts' own τ; None with fewer than two."""
        each = [t for t in self.per_prompt if t is not None]
        return float(np.std(each, ddof=1)) if len(each) > 1 else None


class ValidationReport(NamedTuple):
    """One validation."""

    final: MeasuredAcceptance  # of the drafter as it is
    base: MeasuredAcceptance | None  # of its base logits alone, without the causal head; None where it has none
    seconds: float

    def row(self) -> dict[str, float | int | None]:
        """The figures by flat names, as a line of metrics.jsonl has them."""
        found: dict[str, float | int | None] = {}
        for name, one in (("final", self.final), ("base", self.base)):
            if one is not None:
                found |= {f"{name}_tau": one.tau, f"{name}_tau_error": one.error, f"{name}_tau_spread": one.spread}
                found[f"{name}_cycles"] = one.cycles
        return found | {"validation_seconds": self.seconds}


class Stopped(Exception):
    """A validation was not finished."""


class Validation:
    """Prompts to decode again and again with changing drafters: what the first time compiles serves every later one."""

    def __init__(
        self,
        target: Target,
        configs: DecodeConfig,
        prompts: Sequence[Sequence[int]],
        stop_ids: Sequence[int],
        dtype: Any,
        *,
        new_tokens: int = 64,
        batch: int = 16,
    ):
        """Args:
        target: its weights, in the dtype of the computation.
        configs: with a drafter.
        prompts: ids, each with room for the new tokens (see `read_heldout_prompts`).
        stop_ids: end an answer.
        dtype: what the drafter's weights are rounded to, and of the caches.
        new_tokens: of an answer, at most.
        batch: prompts that run together.
        """
        assert configs.draft is not None, "without a drafter nothing is accepted"
        self.target, self.configs, self.dtype = target, configs, dtype
        how = SamplingParams(max_tokens=new_tokens, stop_token_ids=tuple(stop_ids))
        self.prompts = [Request(ids, how, (row,)) for row, ids in enumerate(prompts)]
        self.batch = min(batch, len(prompts))
        self._rounded = jax.jit(partial(jax.tree.map, lambda w: w.astype(dtype)))

    def run(self, weights: Mapping[str, Array], stopping: Callable[[], bool] | None = None) -> ValidationReport:
        """Decode all prompts with the drafter of these weights, by their paths; runs in the mesh that is in context.

        The same weights give the same report, and the weights stay as they are.

        Args:
            stopping: asked now and then.

        Raises:
            Stopped: `stopping` said so.
        """
        assert self.configs.draft is not None
        draft = unflatten(self.configs.draft, self._rounded(dict(weights)))
        return self.measure(Params(self.target, draft), stopping)

    def measure(
        self, params: Params, stopping: Callable[[], bool] | None = None, quiet: bool = True
    ) -> ValidationReport:
        """Decode all prompts with the drafter of these parameters, in whatever form they are; see `run`.

        Args:
            quiet: show no progress.
        """
        began = time.perf_counter()
        assert self.configs.draft is not None
        whole = self.configs, params
        final = self._decoded(*whole, stopping, "prompts", quiet)
        headed = isinstance(self.configs.drafter, BlockDrafter) and self.configs.draft.head
        without = "prompts without the head"
        base = self._decoded(*without_head(*whole), stopping, without, quiet) if headed else None
        if stopping and stopping():
            raise Stopped
        return ValidationReport(final, base, time.perf_counter() - began)

    def _decoded(
        self, configs: DecodeConfig, params: Params, stopping: Callable[[], bool] | None, what: str, quiet: bool
    ) -> MeasuredAcceptance:
        whole = params, configs, self.dtype, self.prompts, self.batch, what
        answers = answered(*whole, quiet=quiet, stopping=stopping)
        return MeasuredAcceptance.of(answers)


@dataclass(frozen=True)
class Validate(HeldOutOptions):
    """Measure a drafter's acceptance length τ on held-out prompts, with its causal head and without it."""

    run: Annotated[Path | None, DisallowNone, UNSET] = None
    """folder of a training run, of which the newest checkpoint is measured, with the run's own target in the form that
    the run had it in"""
    pair: Annotated[PairOptions, GROUP] = field(default_factory=PairOptions)
    json: Flag = False
    """one JSON object on standard output, and nothing else there"""
    processes: ProcessOptions = field(default_factory=ProcessOptions)


def check_validate(options: Validate) -> PairOptions:
    """The pair that the options mean, if their values make sense.

    Raises:
        UsageError: not enough was given, or too much, or a value makes no sense.
        DominoError: there is no such run.
    """
    o, pair = options, options.pair
    o.check_numbers()
    draft = pair.drafting.draft
    if o.run is not None and draft is not None:
        raise UsageError("give either --run (a training run's folder) or --draft (a drafter's), not both.")
    if o.run is None and pair.target is None:
        raise UsageError("give either --run (a training run's folder), or --target with its --draft.")
    if o.run is not None:
        recipe, device = settings.read_recipe(o.run / settings.SETTINGS), pair.device
        if device.weights == "auto":
            device = dataclasses.replace(device, weights=recipe.run.weights)
        drafting = dataclasses.replace(pair.drafting, draft=str(o.run))
        pair = dataclasses.replace(pair, target=pair.target or recipe.target, device=device, drafting=drafting)
    model = pair.model()
    if registry.locate(model.model, model.draft)[1] is None:
        raise UsageError("this measures a trained drafter, and there is none: give one with --draft.")
    if model.ngram:
        raise UsageError("this measures a trained drafter alone: leave +ngram out of --draft.")
    return pair


def measure_acceptance(options: Validate) -> dict[str, Any]:
    """What the command found, as --json prints it.

    Raises:
        DominoError: the words, the models or the prompts are wrong, or fewer prompts are left than were asked for.
    """
    o, wanted, console = options, check_validate(options), notes()
    target, draft = wanted.folders(console)
    with progress_bars(console) as loading:
        pair = load_model(target, draft, wanted.device.dtype, loading, **wanted.model().plan())
    if not pair.has_block_drafter:
        raise DominoError(f"{draft} is no drafter that was trained for this target; see --draft.")
    if jax.process_index() == 0:
        for warning in pair.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    with pair.context():
        prompts = chosen_prompts(o, pair)
        validation = Validation(
            pair.params.target,
            pair.configs,
            prompts,
            pair.stop_ids,
            pair.dtype,
            new_tokens=o.new_tokens,
            batch=o.batch_size,
        )
        report = validation.measure(pair.params, quiet=jax.process_index() > 0)
    read = {"prompts": o.prompts, "run": o.run, "target": target, "draft": draft}
    figures: dict[str, Any] = {name: str(path.absolute()) if path else None for name, path in read.items()}
    figures["num_prompts"] = len(prompts)
    figures |= {name: getattr(o, name) for name in ("prompt_tokens", "new_tokens", "min_distinct", "batch_size")}
    figures |= {"dtype": pair.dtype.name, "mesh": wanted.device.mesh}
    figures |= {"weights": wanted.device.weights, "draft_weights": wanted.drafting.draft_weights}
    figures |= {"head_candidates": wanted.drafting.head_candidates, "tree": wanted.drafting.tree}
    each = {
        f"{name}_tau_per_prompt": one.per_prompt
        for name, one in (("final", report.final), ("base", report.base))
        if one is not None
    }
    return {**figures, **report.row(), **each}


def describe_acceptance(found: Mapping[str, Any]) -> str:
    """The figures, for people."""
    text = f"{found['num_prompts']} prompts, {found['new_tokens']} new tokens, greedy, {found['dtype']}"
    for name, label in (("final", "τ"), ("base", "without the causal head")):
        if found.get(f"{name}_tau") is not None:
            error, spread = found[f"{name}_tau_error"], found[f"{name}_tau_spread"]
            about = f" ± {error:.2f}; prompts differ by {spread:.2f}" if error is not None else ""
            text += f"\n{label} {found[f'{name}_tau']:.2f}{about}; {found[f'{name}_cycles']} cycles"
    return text


def print_acceptance(options: Validate) -> None:
    """Measure, and print the figures; of several processes, the first one does."""
    check_validate(options)
    first = join_processes(options.processes.resolve())
    enable_compile_cache()
    found = measure_acceptance(options)
    if first:
        print(json.dumps(found) if options.json else describe_acceptance(found))


def main(argv: Sequence[str] | None = None, prog: str = "python -m train validate") -> int:
    """Run the command line; returns the exit code."""
    return run_command(Validate, print_acceptance, argv, prog=prog)
