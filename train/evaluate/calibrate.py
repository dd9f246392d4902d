"""Calibrate how sure a drafter is of its proposals, by what its target accepts of them in decoding.

    python -m train calibrate --target target --draft drafter --prompts held.jsonl --out calibrated

The held-out prompts are decoded in whole cycles, greedily unless --temperature says otherwise, and each cycle's
confidences are compared with what was accepted: see `train.evaluate.calibration`. OUT gets a copy of the drafter whose
config.json has `confidence_temperatures`; calibration.json, with SGLang's names for the figures; and
reliability.png. The figures of "after" are of each half of the prompts, by the temperatures of the other half.

The same prompts are decoded in trees whose nodes are made of few of the base logits. The fewest with which they lose
less than a hundredth of τ become the config's `tree_candidates`.
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import DisallowNone

from convert import hf, registry
from convert.draft_configs import with_overrides
from convert.loading import LoadedModel, load_model
from convert.options import (
    GROUP,
    UNSET,
    Flag,
    ProcessOptions,
    SamplingOptions,
    check_count,
    check_not_source,
)
from convert.progress import progress_bars
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.heads.selector import SelectorHead
from domino_jax.drafters.tree import TreeDrafter
from domino_jax.errors import DominoError
from domino_jax.runtime.command import UsageError, run_command
from domino_jax.runtime.compile_cache import enable_compile_cache
from domino_jax.runtime.extras import explain_missing_extra
from domino_jax.runtime.files import check_output, write_atomic, write_text
from domino_jax.runtime.processes import join_processes
from domino_jax.runtime.slots import Request
from train.evaluate.calibration import Calibration, Cycles, calibrate, plot_reliability
from train.evaluate.prompts import HeldOutOptions, answered, chosen_prompts
from train.evaluate.validate import MeasuredAcceptance
from train.loading import PairOptions, notes

CANDIDATES, LOSS = (64, 256), 0.01  # of trees, and the share of τ that they may lose by them
FEW = 500  # cycles with fewer of which temperatures are noise
TEMPERATURES = "confidence_temperatures"


@dataclass(frozen=True)
class Calibrate(HeldOutOptions):
    """Fit temperatures to a drafter's confidences, so that --confidence-threshold X means a chance of X."""

    out: Annotated[Path | None, DisallowNone, UNSET] = None
    """folder for a copy of the drafter with the temperatures in its config.json, the figures and a diagram"""
    pair: Annotated[PairOptions, GROUP] = field(default_factory=PairOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    tree_nodes: int = 16
    """drafts of the trees with few candidates; 0 to leave them out"""
    json: Flag = False
    """one JSON object on standard output, and nothing else there"""
    processes: ProcessOptions = field(default_factory=ProcessOptions)


def check_calibrate(options: Calibrate) -> None:
    """Refuse values that make no sense.

    Raises:
        UsageError: one does not.
    """
    o, drafting = options, options.pair.drafting
    o.check_numbers()
    o.sampling.check()
    check_count("tree_nodes", o.tree_nodes, least=0)
    model = o.pair.model()
    if model.ngram or registry.locate(model.model, model.draft)[1] is None:
        raise UsageError("this calibrates a block drafter alone: give it with --draft DIR.")
    for flag, given in (("--tree", drafting.tree), ("--confidence-threshold", drafting.confidence_threshold)):
        if given is not None:
            raise UsageError(f"chains are calibrated that are verified whole: leave {flag} out.")
    if o.out is not None:
        check_not_source("out", o.out, o.prompts, o.pair.target, drafting.draft)


def observe_cycles(
    pair: LoadedModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingOptions,
    new_tokens: int,
    batch: int,
    quiet: bool = False,
) -> Cycles:
    """What is accepted of whole chains, and how sure the drafter was of them without temperatures.

    Args:
        pair: with a block drafter; runs in its context.
        prompts: ids, of two at least: the second, fourth ... are the other half.
        new_tokens: of an answer, at most.
        batch: prompts that run together.
        quiet: show no progress.
    """
    drafter = pair.configs.drafter
    assert isinstance(drafter, BlockDrafter)
    plain = dataclasses.replace(drafter.config, confidence_temperatures=())
    drafter = dataclasses.replace(drafter, config=plain, confidence_threshold=None)
    configs = dataclasses.replace(pair.configs, drafter=drafter, confidence=True)
    requests = requests_of(pair, prompts, sampling, new_tokens)
    answers = answered(pair.params, configs, pair.dtype, requests, batch, "prompts", quiet=quiet)
    seen = [(cycle, row % 2 == 1) for row, answer in enumerate(answers) for cycle in answer.cycles]
    logits = np.array([cycle.confidence for cycle, _ in seen]).reshape(len(seen), configs.proposals)
    finite = np.asarray(np.isfinite(logits).all(axis=1))  # not what a broken drafter says, of which users are warned
    cycles = Cycles(logits, np.array([cycle.accepted for cycle, _ in seen]), np.array([half for _, half in seen]))
    return cycles.where(finite)


def tree_taus(
    pair: LoadedModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingOptions,
    new_tokens: int,
    batch: int,
    nodes: int,
    quiet: bool = False,
) -> dict[int | None, float]:
    """τ of trees whose nodes are made of so many of the highest base logits; None is all of them.

    Args:
        nodes: drafts of a tree; the others are those of `observe_cycles`.
    """
    drafter = pair.configs.drafter
    assert isinstance(drafter, BlockDrafter)
    requests, config = requests_of(pair, prompts, sampling, new_tokens), drafter.config
    proposed = config.draft_vocab_size or pair.configs.target.vocab_size
    scored = 0 if config.head is None or isinstance(config.head, SelectorHead) else proposed
    few = [count for count in CANDIDATES if count < scored]
    found: dict[int | None, float] = {}
    for candidates in (None, *few) if few else ():
        tree = TreeDrafter(config, candidates, nodes)
        configs = dataclasses.replace(pair.configs, drafter=tree, drafts=None, attention="xla")  # others make no trees
        what = f"prompts, trees of {'all' if candidates is None else candidates} candidates"
        answers = answered(pair.params, configs, pair.dtype, requests, batch, what, quiet=quiet)
        found[candidates] = MeasuredAcceptance.of(answers).tau or 1.0
    return found


def requests_of(
    pair: LoadedModel, prompts: Sequence[Sequence[int]], sampling: SamplingOptions, new_tokens: int
) -> list[Request]:
    """One for each prompt, of so many new tokens at most."""
    how = dataclasses.replace(sampling.params(), max_tokens=new_tokens, stop_token_ids=tuple(pair.stop_ids))
    return [Request(ids, how, (row,)) for row, ids in enumerate(prompts)]


def fewest(taus: Mapping[int | None, float]) -> int | None:
    """The fewest candidates that lose little; None where trees need all."""
    return min((n for n, tau in taus.items() if n is not None and tau >= (1 - LOSS) * taus[None]), default=None)


def run_calibrate(options: Calibrate) -> None:
    """Calibrate, write what came out, and print the figures; of several processes, the first one does.

    Raises:
        UsageError: the words make no sense.
        DominoError: the models or the prompts are wrong, there are too few cycles, or OUT can't be written.
    """
    o = options
    check_calibrate(o)
    first = join_processes(o.processes.resolve())
    enable_compile_cache()
    console = notes()
    target, draft = o.pair.folders(console)
    assert draft is not None
    if o.out is not None and first:
        check_output(o.out, sources=[target, draft])
    with progress_bars(console) as loading:
        pair = load_model(target, draft, o.pair.device.dtype, loading, **o.pair.model().plan())
    if first:
        for warning in pair.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    drafter = pair.configs.drafter
    if not isinstance(drafter, BlockDrafter) or isinstance(drafter, TreeDrafter):
        raise DominoError(f"{draft} holds no block drafter, and none but those has confidences here; see --draft.")
    with pair.context():
        prompts = chosen_prompts(o, pair)
        how = o.sampling, o.new_tokens, o.batch_size
        cycles = observe_cycles(pair, prompts, *how, quiet=not first)
    if not cycles.second.any() or cycles.second.all():
        raise DominoError(
            f"{len(prompts)} prompts of {o.prompts} gave {len(cycles.second)} cycles, expected some of both halves of "
            "the prompts: give more prompts, or a larger --new-tokens."
        )
    if len(cycles.second) < FEW and first:
        few = f"{len(cycles.second)} cycles are few, and temperatures of fewer than {FEW} are mostly noise"
        print(f"warning: {few}: give more prompts.", file=sys.stderr)
    calibration = calibrate(cycles)
    with pair.context():
        taus = tree_taus(pair, prompts, *how, o.tree_nodes, quiet=not first) if o.tree_nodes else {}
    found = {
        "temperatures": calibration.temperatures.tolist(),
        "dataset": str(o.prompts.absolute()),
        "num_samples": len(cycles.second),
        "ece_before": float(np.mean([row["ece_before"] for row in calibration.rows()])),
        "ece_after": float(np.mean([row["ece_after"] for row in calibration.rows()])),
        "target": str(target.absolute()),
        "draft": str(draft.absolute()),
        "num_prompts": len(prompts),
        **{name: getattr(o, name) for name in ("prompt_tokens", "new_tokens", "min_distinct", "batch_size")},
        **{name: getattr(o.sampling.params(), name) for name in ("temperature", "top_k", "top_p", "min_p")},
        "sampler": "coupled" if o.sampling.params().coupled else "rejection",
        "dtype": pair.dtype.name,
        "head_candidates": o.pair.drafting.head_candidates,
        "positions": calibration.rows(),
        "tree_nodes": o.tree_nodes,
        "tree_tau": {"all" if n is None else str(n): tau for n, tau in taus.items()},
    }
    if taus:
        found["tree_candidates"] = fewest(taus)
    if first:
        if o.out is not None:
            write_calibrated(o.out, draft, calibration, found)
        print(json.dumps(found) if o.json else describe_calibration(found, o.out))


def write_calibrated(out: Path, draft: Path, calibration: Calibration, found: Mapping[str, Any]) -> None:
    """Write a copy of the drafter with the temperatures, its tensors byte for byte; the figures and the diagram.

    Raises:
        DominoError: OUT is in the way or can't be written.
    """
    with explain_missing_extra():
        from convert import folders  # brings in Orbax, an extra

    changed = {TEMPERATURES: found["temperatures"]}
    if "tree_candidates" in found:
        changed |= {"tree_candidates": found["tree_candidates"]}
    if folders.folder_format(draft) in (folders.HF, folders.ORBAX):
        with folders.appearing(out, [draft]) as partial:
            shutil.copytree(draft, partial, ignore=shutil.ignore_patterns(".*", "config.json"), dirs_exist_ok=True)
            hf.write_json(partial / "config.json", with_overrides(hf.read_json(draft / "config.json"), changed))
    else:
        folders.convert_folder(draft, out, overrides=changed)
    write_text(out / "calibration.json", json.dumps(found, indent=1) + "\n")
    with explain_missing_extra(), write_atomic(out / "reliability.png") as temporary:
        plot_reliability(calibration, temporary)


def describe_calibration(found: Mapping[str, Any], out: Path | None) -> str:
    """The figures, for people."""
    how = f"temperature {found['temperature']:g}, {found['sampler']}" if found["temperature"] else "greedy"
    text = f"{found['num_samples']} cycles of {found['num_prompts']} prompts, {how}, {found['dtype']}\n\n"
    text += "| position | reached | accepted | temperature | ECE before | after | Brier before | after |\n"
    text += "|---|---|---|---|---|---|---|---|\n"
    for row in found["positions"]:
        accepted = "" if row["accepted"] is None else f"{row['accepted']:.3f}"
        scores = " | ".join(f"{row[name]:.3f}" for name in ("ece_before", "ece_after", "brier_before", "brier_after"))
        text += f"| {row['position']} | {row['cycles']} | {accepted} | {row['temperature']:.3f} | {scores} |\n"
    if found["tree_tau"]:
        taus = ", ".join(f"{tau:.2f} with {n} candidates" for n, tau in found["tree_tau"].items())
        text += f"\nτ of trees of {found['tree_nodes']}: {taus}; so they have {found['tree_candidates'] or 'all'}.\n"
    return text + (f"\n{out} holds the drafter with these temperatures." if out else "")


def main(argv: Sequence[str] | None = None, prog: str = "python -m train calibrate") -> int:
    """Run the command line; returns the exit code."""
    return run_command(Calibrate, run_calibrate, argv, prog=prog)
