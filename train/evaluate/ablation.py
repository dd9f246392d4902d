"""What helps a drafter: the same recipe, data and budget with and without its head, and so on, over several seeds.

    python -m train ablation --data answers.jsonl --prompts heldout.jsonl --out runs/ablation

    dflash      no head: the backbone alone
    joint       head and backbone on the corrected loss from the first step on (λ = 0)
    curriculum  λ as the recipe has it
    floor-0.1   λ falls to 0.1 and no lower; floor-0.3 alike
    markov      DSpark's head of the token before in the place of Domino's; markov-rnn the form that knows all before
    causal      Domino's head over blocks in which no row sees later ones (JetSpec's)
    causal-markov-rnn  markov-rnn over such blocks
    selector    DFlash 2's selector of the likeliest base logits, with its two losses of equal weight
    dspark      DSpark's head and its own loss, without the curriculum
    orthrus     a second view of the target, trained as it is usual for those (KL), by a recipe of its own
    orthrus-domino  the same with Domino's head over it, by Domino's loss and curriculum

What is finished is not run again, and what was begun goes on. The table (ablation.md), every figure (ablation.json) and
the curves (ablation.png) are written when all drafters are measured.
"""

import itertools
import json
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from convert.options import DeviceOptions, DraftingOptions, absolute, check_count, local_sources
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
    "dflash": ["--head", "none", "--shift-label"],
    "joint": ["--lambda-base-start", "0", "--lambda-base-floor", "0"],
    "curriculum": [],
    "floor-0.1": ["--lambda-base-floor", "0.1"],
    "floor-0.3": ["--lambda-base-floor", "0.3"],
    "markov": ["--head", "markov"],
    "markov-rnn": ["--head", "markov", "--markov-head-type", "rnn"],
    "causal": ["--causal"],
    "causal-markov-rnn": ["--causal", "--head", "markov", "--markov-head-type", "rnn"],
    "selector": [
        *("--head", "selector", "--shift-label", "--lambda-schedule", "constant", "--lambda-base-start", "0.5"),
    ],
    "dspark": ["--head", "markov", "--loss", "dspark", "--enable-confidence-head", "--lambda-base-start", "0"],
    "orthrus": [],
    "orthrus-domino": [
        *("--drafter", "orthrus-domino", "--loss", "ce", "--position-weights", "exponential", "--gamma", "4"),
        *("--lambda-base-decay-ratio", "0.3"),
    ],
}
OF_VIEWS = ("orthrus", "orthrus-domino")
Kind = Literal[
    "dflash",
    "joint",
    "curriculum",
    "floor-0.1",
    "floor-0.3",
    "markov",
    "markov-rnn",
    "causal",
    "causal-markov-rnn",
    "selector",
    "dspark",
    "orthrus",
    "orthrus-domino",
]


@dataclass(frozen=True)
class Ablation:
    """Train drafters that differ in one thing, and compare what is accepted of each."""

    data: tuple[str, ...]
    """as for python -m train"""
    prompts: Path
    """JSONL of held-out prompts to measure with"""
    out: Path
    """folder for the runs, one each, and for what they come to"""
    config: str = "ablation"
    """recipe, as for python -m train"""
    view_config: str = "demo-orthrus"
    """recipe of the kinds orthrus and orthrus-domino"""
    target: str | None = None
    """the recipe's own when not given"""
    steps: int = 400
    """of each run"""
    seeds: tuple[int, ...] = (0, 1, 2)
    kinds: tuple[Kind, ...] = ("dflash", "joint", "curriculum")
    """what is compared: no head, λ = 0, the recipe as it is, and others"""
    candidates: tuple[int, ...] = ()
    """also measure with so many of the highest base logits (--head-candidates, --tree-candidates)"""
    trees: tuple[int, ...] = ()
    """also measure with trees of so many drafts"""
    num_prompts: int | None = 64
    prompt_tokens: int | None = 48
    new_tokens: int = 64
    min_distinct: float = 0.8
    """leave out prompts that the target answers in loops"""


def runs(options: Ablation) -> Iterator[tuple[str, int, Path]]:
    """Kind, seed and folder of each run; a seed is finished for all kinds before the next."""
    for seed in options.seeds:
        for kind in options.kinds:
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
            recipe = o.view_config if kind in OF_VIEWS else o.config
            words = ["--config", recipe, *(["--target", o.target] if o.target else []), "--data", *o.data]
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


def measurement(
    options: Ablation, target: str, folder: Path, candidates: int | None = None, tree: int | None = None
) -> "Validate":
    """How one run's drafter is measured; with all candidates and a chain when none are given."""
    from train.evaluate.validate import Validate

    o = options
    drafting = DraftingOptions(
        str(folder / NEWEST),
        head_candidates=candidates if candidates and not tree else "all",
        tree=tree,
        tree_candidates=candidates or "all" if tree else None,
    )
    saved = folder / SETTINGS
    trained_over = read_recipe(saved if saved.exists() else recipe_path(o.config)).run.weights
    device = DeviceOptions(weights=trained_over)
    pair = PairOptions(target, drafting=drafting, device=device)
    return Validate(
        o.prompts,
        pair=pair,
        num_prompts=o.num_prompts,
        prompt_tokens=o.prompt_tokens,
        new_tokens=o.new_tokens,
        min_distinct=o.min_distinct,
    )


def measure_ablation(options: Ablation, target: str) -> list[dict[str, Any]]:
    """τ of each drafter, as `train.validate` finds it: by chains from all candidates, and as the options ask.

    A row's `ways` are τ of the other ways, by name.
    """
    from train.evaluate.validate import measure_acceptance as validate

    o, found = options, []
    for kind, seed, folder in runs(o):
        row = validate(measurement(o, target, folder))
        print(f"{kind}, seed {seed}: τ {row['final_tau']:.3f} ± {row['final_tau_error']:.3f}", flush=True)
        ways = {}
        headless = row.get("base_tau") is None
        for tree, candidates in itertools.product((None, *o.trees), (None, *o.candidates)):
            if (tree or candidates) and not (candidates and headless):  # without a head nothing is scored anew
                name = way_name(tree, candidates)
                ways[name] = validate(measurement(o, target, folder, candidates, tree))["final_tau"]
                print(f"    {name}: τ {ways[name]:.3f}", flush=True)
        found.append({"kind": kind, "seed": seed, "steps": o.steps, **row, "ways": ways})
    return found


def way_name(tree: int | None, candidates: int | None) -> str:
    """A way of drafting in words."""
    return (f"tree of {tree}" if tree else "chain") + (f", {candidates} candidates" if candidates else "")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: τ of each seed, their mean and standard deviation; the means without the head and of other ways."""

    def about(values: Sequence[float]) -> str:
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}"

    seeds = sorted({row["seed"] for row in rows})
    ways = list(dict.fromkeys(way for row in rows for way in row.get("ways", ())))
    titles = [*(f"seed {seed}" for seed in seeds), "τ, mean ± sd over seeds", "without the causal head", *ways]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = {row["seed"]: row for row in rows if row["kind"] == kind}
        taus = [mine[seed]["final_tau"] for seed in seeds]
        bases = [mine[seed]["base_tau"] for seed in seeds if mine[seed].get("base_tau") is not None]
        cells = [kind, *(f"{tau:.3f}" for tau in taus), f"**{about(taus)}**", about(bases) if bases else ""]
        for way in ways:
            of_way = [mine[seed]["ways"][way] for seed in seeds if way in mine[seed]["ways"]]
            cells.append(about(of_way) if of_way else "")
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
            axis.plot(steps, values, label=label, linewidth=1, **line_style(options.kinds.index(kind)))
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

    for name in ("seeds", "kinds"):
        if not getattr(options, name):
            raise UsageError(f"give at least one of --{name}.")
    for name in ("candidates", "trees"):
        for count in getattr(options, name):
            check_count(name, count)
    check_count("steps", options.steps)
    for seed in options.seeds:
        check_count("seeds", seed, least=0, limit=2**32)
    require("matplotlib")  # imported when all is trained and measured
    target = options.target or read_recipe(recipe_path(options.config)).target
    if set(options.kinds) & set(OF_VIEWS):
        recipe_path(options.view_config)
    if target is None:
        raise UsageError(f"--config {options.config} names no target: give one with --target.")
    check_validate(measurement(options, target, next(runs(options))[2]))
    with lock_folder(options.out, "runs of an ablation", local_sources(target, *options.data, options.prompts)):
        keep_settings(options.out / "ablation.settings.json", options.out, common_settings(options, target))
        return _run(options, target)


def common_settings(options: Ablation, target: str) -> dict[str, Any]:
    """What the runs in a folder have in common."""
    config, data = absolute(options.config), [absolute(given) for given in options.data]
    views = {"view_config": absolute(options.view_config)} if set(options.kinds) & set(OF_VIEWS) else {}
    return {"config": config, **views, "target": absolute(target), "data": data, "steps": options.steps}


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
