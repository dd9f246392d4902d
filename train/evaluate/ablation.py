"""Does the head help, and the curriculum? The same recipe, data and budget with and without them, over several seeds.

    python -m train ablation --config demo --data answers.jsonl --prompts heldout.jsonl --out runs/ablation

    dflash      no head: the backbone alone
    joint       head and backbone on the corrected loss from the first step on (λ = 0)
    curriculum  λ as the recipe has it

What is finished is not run again, and what was begun goes on. The table (ablation.md), every figure (ablation.json) and
the curves (ablation.png) are written when all drafters are measured.
"""

import json
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.options import DraftingOptions, absolute, check_count, local_sources
from domino_jax.runtime.command import UsageError, own_command, own_environment, run_command
from domino_jax.runtime.extras import require
from domino_jax.runtime.files import lock_folder, write_atomic, write_text
from domino_jax.runtime.plotting import line_style
from train.begun import keep_settings
from train.loading import PairOptions
from train.monitor import curves
from train.monitor.log import METRICS
from train.options import SETTINGS, read_recipe, recipe_path
from train.run import NEWEST

if TYPE_CHECKING:  # brings in JAX, which training's own processes need first
    from train.evaluate.validate import Validate

# Without the head, the rows that propose are the same: it alone makes the difference.
KINDS = {
    "dflash": ["--no-head", "--shift-label"],
    "joint": ["--lambda-base-start", "0", "--lambda-base-floor", "0"],
    "curriculum": [],
}


@dataclass(frozen=True)
class Ablation:
    """Train without the head, without the curriculum and with both, and compare what is accepted."""

    data: tuple[str, ...]
    """as for python -m train"""
    prompts: Path
    """JSONL of held-out prompts to measure with"""
    out: Path
    """folder for the runs, one each, and for what they come to"""
    config: str = "demo"
    """recipe, as for python -m train"""
    target: str | None = None
    """the recipe's own when not given"""
    steps: int = 400
    """of each run"""
    seeds: tuple[int, ...] = (0, 1, 2)
    num_prompts: int | None = 64
    prompt_tokens: int | None = 48
    new_tokens: int = 64
    min_distinct: float = 0.8
    """leave out prompts that the target answers in loops"""


def runs(options: Ablation) -> Iterator[tuple[str, int, Path]]:
    """Kind, seed and folder of each run; a seed is finished for all kinds before the next."""
    for seed in options.seeds:
        for kind in KINDS:
            yield kind, seed, options.out / f"{kind}-{seed}"


def run_missing(options: Ablation) -> int:
    """Run what is missing; the first exit status that is not 0."""
    o = options
    for kind, seed, folder in runs(o):
        if (folder / NEWEST / "config.json").exists() and not unfinished(folder, o.steps):
            continue
        if (folder / SETTINGS).exists():
            words = ["--resume", "--out", str(folder)]
        else:
            words = ["--config", o.config, *(["--target", o.target] if o.target else []), "--data", *o.data]
            words += ["--steps", str(o.steps), "--seed", str(seed), *KINDS[kind], "--out", str(folder)]
        print("\n$ python -m train " + " ".join(words), flush=True)
        status = subprocess.run(own_command(["train", *words]), env=own_environment()).returncode
        if status:
            return status
    return 0


def unfinished(folder: Path, steps: int) -> bool:
    """Whether a run stopped before its last step: an interrupted one has written its drafter as well."""
    rows = curves.read_metrics(folder / METRICS)
    return not rows or rows[-1]["step"] < steps


def measurement(options: Ablation, target: str, folder: Path) -> "Validate":
    """How one run's drafter is measured."""
    from train.evaluate.validate import Validate

    o = options
    pair = PairOptions(target, drafting=DraftingOptions(str(folder / NEWEST)))
    return Validate(
        o.prompts,
        pair=pair,
        num_prompts=o.num_prompts,
        prompt_tokens=o.prompt_tokens,
        new_tokens=o.new_tokens,
        min_distinct=o.min_distinct,
    )


def measure_ablation(options: Ablation, target: str) -> list[dict[str, Any]]:
    """τ of each drafter, as `train.validate` finds it."""
    from train.evaluate.validate import measure_acceptance as validate

    o, found = options, []
    for kind, seed, folder in runs(o):
        row = validate(measurement(o, target, folder))
        found.append({"kind": kind, "seed": seed, "steps": o.steps, **row})
        print(f"{kind}, seed {seed}: τ {row['final_tau']:.3f} ± {row['final_tau_error']:.3f}", flush=True)
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: τ of each seed, their mean and standard deviation, and the mean without the causal head."""

    def about(values: Sequence[float]) -> str:
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}"

    seeds = sorted({row["seed"] for row in rows})
    lines = [
        "| | "
        + " | ".join(f"seed {seed}" for seed in seeds)
        + " | τ, mean ± sd over seeds | without the causal head |",
        "|---" * (len(seeds) + 3) + "|",
    ]
    for kind in KINDS:
        mine = {row["seed"]: row for row in rows if row["kind"] == kind}
        taus = [mine[seed]["final_tau"] for seed in seeds]
        bases = [mine[seed]["base_tau"] for seed in seeds if mine[seed].get("base_tau") is not None]
        cells = [kind, *(f"{tau:.3f}" for tau in taus), f"**{about(taus)}**", about(bases) if bases else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot_ablation(options: Ablation, path: Path) -> None:
    """Cross-entropy and estimated acceptance of the final branch over the runs, a style for each kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    loss, acceptance = figure.subplots(1, 2)
    for kind, seed, folder in runs(options):
        rows = curves.read_metrics(folder / METRICS)
        steps = [row["step"] for row in rows if "final_loss" in row]
        for axis, key in ((loss, "final_loss"), (acceptance, "final_acceptance")):
            values = [row[key] for row in rows if key in row]
            label = kind if seed == options.seeds[0] else None
            axis.plot(steps, values, label=label, linewidth=1, **line_style(list(KINDS).index(kind)))
    for axis, title in ((loss, "cross-entropy of the final logits, nats"), (acceptance, "estimated acceptance length")):
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110, format="png")


def run_ablation(options: Ablation) -> int:
    """Train, measure, and write what came out; an exit status.

    Raises:
        DominoError: a run or a measurement is not possible.
    """
    from train.evaluate.validate import check_validate

    if not options.seeds:
        raise UsageError("give at least one of --seeds.")
    check_count("steps", options.steps)
    for seed in options.seeds:
        check_count("seeds", seed, least=0, limit=2**32)
    require("matplotlib")  # imported when all is trained and measured
    target = options.target or read_recipe(recipe_path(options.config)).target
    if target is None:
        raise UsageError(f"--config {options.config} names no target: give one with --target.")
    check_validate(measurement(options, target, options.out))
    with lock_folder(options.out, "runs of an ablation", local_sources(target, *options.data, options.prompts)):
        keep_settings(options.out / "ablation.settings.json", options.out, common_settings(options, target))
        return _run(options, target)


def common_settings(options: Ablation, target: str) -> dict[str, Any]:
    """What the runs in a folder have in common."""
    config, data = absolute(options.config), [absolute(given) for given in options.data]
    return {"config": config, "target": absolute(target), "data": data, "steps": options.steps}


def _run(options: Ablation, target: str) -> int:
    status = run_missing(options)
    if status:
        return status
    rows = measure_ablation(options, target)
    write_text(options.out / "ablation.json", json.dumps(rows, indent=1) + "\n")
    text = table(rows)
    write_text(options.out / "ablation.md", text)
    with write_atomic(options.out / "ablation.png") as temporary:
        plot_ablation(options, temporary)
    print("\n" + text)
    return 0


def main(argv: Sequence[str] | None = None, prog: str = "python -m train ablation") -> int:
    """Run the command line; returns the exit code."""
    return run_command(Ablation, run_ablation, argv, prog=prog)
