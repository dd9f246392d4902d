"""Acceptance on the usual question sets, next to what others published for the same checkpoints.

    python -m infer.bench --model qwen3-4b --quality gsm8k=gsm8k.jsonl mt-bench=mt.jsonl --new-tokens 2048 --json q.json

Unlike the speed benchmark this honours stop tokens, asks through the model's chat template (thinking off), and counts
acceptance. Every way of decoding answers the same prompts, in turn.
"""

import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from convert.loading import LoadedModel
from convert.options import in_8_bits
from convert.registry import locate
from convert.tokenizer import decode, has_template
from domino_jax.errors import DominoError
from domino_jax.runtime.plotting import bar_style
from infer.bench import plots
from infer.bench.modes import drafting
from infer.bench.options import Bench
from infer.bench.questions import Question, QuestionSet, prompt, read_sets
from infer.bench.rows import DFLASH, LEAN
from infer.bench.target_forms import perplexity, text_ids
from infer.engine import Decoding, Engine, Sequence, tau

BARS = "▁▂▃▄▅▆▇█"


# What others measured, by (target, drafter) on the Hub. A row belongs to that drafter as it is: DFlash's own is another
# one than Domino's without its head.
SOURCE = (
    "github.com/slin-zhq/Domino-Tree, results/tables/table1.md (4B) and results/tables_gpunative/table1_8b.md (8B): "
    "greedy, 50 questions a set, 2048 new tokens, mean over answers of each answer's own τ"
)
COLUMNS: tuple[str, ...] = ("gsm8k", "math500", "aime25", "humaneval", "mbpp", "livecodebench", "mtbench", "alpaca")
PUBLISHED = {
    ("Qwen/Qwen3-4B", "z-lab/Qwen3-4B-DFlash-b16"): (6.59, 8.11, 7.37, 6.77, 6.25, 7.42, 4.56, 2.96),
    ("Qwen/Qwen3-4B", "Huang2020/Qwen3-4B-Domino-b16"): (10.23, 9.06, 7.46, 7.05, 7.26, 7.04, 5.30, 3.88),
    ("Qwen/Qwen3-8B", "z-lab/Qwen3-8B-DFlash-b16"): (6.45, 7.58, 7.16, 6.49, 5.73, 7.31, 3.34, 2.88),
    ("Qwen/Qwen3-8B", "Huang2020/Qwen3-8B-Domino-b16"): (10.13, 9.20, 7.61, 7.67, 7.17, 7.53, 5.14, 4.07),
}


def published(model: str, draft: str | None, name: str) -> float | None:
    """The published τ of a pair, by the names on the command line, on the set `name`; None where there is none."""
    target, drafter = locate(model, draft)
    row = PUBLISHED.get((target, drafter or ""))
    figures = dict(zip(COLUMNS, row, strict=True)) if row else {}
    return figures.get(re.sub("[^a-z0-9]", "", name.lower()))


def read_answers(options: Bench) -> list[QuestionSet]:
    """The sets to measure, none without --quality.

    Raises:
        DominoError: a file holds no questions of a known format.
    """
    questions = options.questions
    return read_sets(questions.quality, questions.limit_prompts) if questions.quality else []


class Mode(NamedTuple):
    """A way of decoding."""

    name: str
    drafts: int  # proposals that a cycle verifies; 0 for the autoregressive baseline
    form: str  # of the target


class QuestionAnswer(NamedTuple):
    """What one way of decoding did for one prompt."""

    turn: int  # from 0
    tokens: list[int]
    accepted: list[int]  # drafts accepted, cycle by cycle; empty for the autoregressive baseline
    stopped: bool  # at a stop token, not at the limit


@dataclass
class AcceptanceTally:
    """What one way of decoding did on a set so far."""

    answers: list[QuestionAnswer] = field(default_factory=list)
    seconds: float = 0.0  # of decoding: without compiling, and without prefill and the token that it gives

    @property
    def accepted(self) -> list[int]:
        """Drafts accepted, over the cycles of all answers."""
        return [m for answer in self.answers for m in answer.accepted]

    @property
    def tau(self) -> float | None:
        """The mean acceptance length over all cycles, so that long answers weigh more."""
        return tau(self.accepted)

    @property
    def tau_per_answer(self) -> float | None:
        """The mean of the answers' own τ, as published tables have it; an answer without a cycle has none."""
        each = [tau(answer.accepted) for answer in self.answers if answer.accepted]
        return mean(t for t in each if t is not None) if each else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding, all rows of a batch together."""
        return sum(len(a.tokens) - 1 for a in self.answers) / self.seconds if self.seconds else None

    def add(self, other: "AcceptanceTally") -> None:
        """Take in what another one holds."""
        self.answers += other.answers
        self.seconds += other.seconds


@dataclass
class Measured:
    """One set: how far it came, and a tally for each way of decoding."""

    set: QuestionSet
    tallies: dict[Mode, AcceptanceTally]
    done: int = 0  # questions of which at least the first turn was answered, in every way
    too_long: int = 0  # questions of which a prompt exceeds the model's positions
    short: int = 0  # answers with less room than --new-tokens


def measure_quality(one: Measured, engines: Mapping[Mode, Engine], options: Bench, tokenizer: Any) -> Iterator[int]:
    """Answer the questions of one set in every way; `one` grows by whole batches, and their ends are yielded.

    The prompts of a second turn follow the first way's answers, in every way: all decode the same prompts.

    Raises:
        DominoError: a question can't be encoded, or memory is exhausted.
        KeyboardInterrupt: the user cancelled; `one` holds the batches before.
    """
    questions, size, sampling = one.set.questions, options.batch_sizes[0], options.sampling
    for start in range(0, len(questions), size):
        batch = range(start, min(start + size, len(questions)))
        answered: dict[int, list[str]] = {number: [] for number in batch}
        tallies = {mode: AcceptanceTally() for mode in engines}
        too_long: set[int] = set()
        short = 0
        for turn in range(max(questions[number].answers for number in batch)):
            prompts: dict[int, list[int]] = {}
            for number in batch:
                if turn < questions[number].answers and number not in too_long:
                    prompts[number] = prompt(questions[number], answered[number], tokenizer)
                    if len(prompts[number]) > positions_of(engines):
                        del prompts[number]
                        too_long.add(number)
            if not prompts:
                break
            for mode, engine in engines.items():
                rows, warned = _sequences(questions, engine, prompts, turn, options.new_tokens)
                engine.generate(rows, Decoding(sampling.params(), mode.name != LEAN, size))
                tallies[mode].seconds += max(s.seconds["decode"] for s in rows)
                tallies[mode].answers += [
                    QuestionAnswer(turn, s.tokens, s.accepted, s.finish_reason == "stop") for s in rows
                ]
                if mode == next(iter(engines)):
                    short += warned
                    for number, s in zip(prompts, rows, strict=True):
                        answered[number].append(decode(tokenizer, s.tokens) if tokenizer is not None else "")
        for mode, tally in tallies.items():
            one.tallies[mode].add(tally)
        one.done += sum(bool(answers) for answers in answered.values())
        one.too_long += len(too_long)
        one.short += short
        yield batch.stop


def positions_of(engines: Mapping[Mode, Engine]) -> int:
    """The longest prompt, in tokens, that the model takes."""
    return next(iter(engines.values())).loaded.configs.target.positions


def _sequences(
    questions: list[Question], engine: Engine, prompts: dict[int, list[int]], turn: int, new_tokens: int
) -> tuple[list[Sequence], int]:
    """What to generate for prompts by their question's number, and how many of them have too little room."""
    rows, short = [], 0
    for number, ids in prompts.items():
        # Each prompt of a set has its own random key, whatever the batch size.
        row = turn * len(questions) + number
        try:
            sequence, warnings = engine.sequence(ids, questions[number].limit or new_tokens, row)
        except DominoError as error:
            raise DominoError(f"{questions[number].where}: {error}") from None
        rows.append(sequence)
        short += bool(warnings)
    return rows, short


def run_quality(
    options: Bench, sets: list[QuestionSet], forms: Mapping[str, LoadedModel], about: dict[str, Any]
) -> int:
    """Measure the sets, print, and write JSON and plots, also of what there is when the user cancels or a run fails.

    Args:
        forms: the model in each form of its target; the first is what the others are compared with.
        about: what every row of figures says of the run.

    Returns:
        The exit status: 0, or 130 after Ctrl-C.

    Raises:
        DominoError: there is no drafter, no prompt of a set fits the model, or one can't be encoded.
        OSError: a file can't be written.
    """
    loaded, engines = next(iter(forms.values())), form_engines(options, forms)
    first = next(iter(engines))
    room = positions_of(engines)
    for one in sets:  # before anything runs
        if all(len(prompt(question, [], loaded.tokenizer)) > room for question in one.questions):
            raise DominoError(f"{one.path} has no prompt that fits the model's {room} positions.")

    text = options.questions.perplexity
    ids = text_ids(text, loaded) if text else []
    said = {form: perplexity(one, ids) if ids else None for form, one in forms.items()}
    measured: list[Measured] = []
    status = 0
    try:
        with question_bars() as progress:
            for one in sets:
                measured.append(Measured(one, {mode: AcceptanceTally() for mode in engines}))
                task = progress.add_task(one.name, total=len(one.questions), tau="")
                for seen in measure_quality(measured[-1], engines, options, loaded.tokenizer):
                    running = measured[-1].tallies[first].tau
                    progress.update(task, completed=seen, tau=f"τ {running:.2f}" if running else "")
    except KeyboardInterrupt:
        status = 130
        done = ", ".join(f"{m.done} of {len(m.set.questions)} questions of {m.set.name}" for m in measured)
        print(f"interrupted after {done}", file=sys.stderr)
    finally:  # a sweep takes hours: what it measured is kept, whatever ended it
        for m in measured:
            warn_quality(m)
        rows = [row for m in measured if m.done for row in quality_figures(m, options, first, about)]
        for row in rows:
            row |= {"perplexity": said[row["target_weights"]], "perplexity_tokens": len(ids) or None}
        try:
            if rows:
                console = Console()  # in a log or a pipe, rich would cut the table to 80 columns
                show_quality(
                    rows, console if console.is_terminal else Console(width=200), has_template(loaded.tokenizer)
                )
        finally:  # neither a full disk nor a closed pipe loses both
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
        if options.plot and rows:
            plot(rows, options.plot)
    return status


def form_engines(options: Bench, forms: Mapping[str, LoadedModel]) -> dict[Mode, Engine]:
    """An engine for each way of decoding and each form; the first one's answers are what second turns follow.

    Raises:
        DominoError: there is no drafter.
    """
    engines = {}
    for form, loaded in forms.items():
        modes = drafting(loaded, options.drafts, options.head_off)
        if not modes:
            raise DominoError("--quality measures a drafter, and there is none: give one with --draft DIR.")
        views = {Mode(name, int(drafts), form): view for (name, drafts), view in modes.items()}
        if options.questions.lean:
            views[Mode(LEAN, 0, form)] = loaded
        for mode in sorted(views, key=lambda mode: (mode.name == LEAN, mode.name == DFLASH)):
            engines[mode] = Engine(dataclasses.replace(views[mode], tokenizer=None))
    return engines


def question_bars() -> Progress:
    """Questions done, and the running τ of the checkpoint as it is, on standard error if that is a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tau]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def warn_quality(one: Measured) -> None:
    """Say what of a set could not be asked, or not answered at length."""
    for what, count in (
        ("questions with a prompt too long for the model, left out", one.too_long),
        ("answers with less room than --new-tokens", one.short),
    ):
        if count:
            print(f"warning: {one.set.name}: {what}: {count}.", file=sys.stderr)


def quality_figures(one: Measured, options: Bench, whole: Mode, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A flat row for each way of decoding a set. `whole` is the checkpoint as it is, which published figures are of."""
    for key, tally in one.tallies.items():
        lean = one.tallies.get(Mode(LEAN, 0, key.form))
        lengths = Counter(m + 1 for m in tally.accepted)
        asked, drafting = options.model, options.model.drafting
        as_it_is = drafting.head_candidates == "all" and not in_8_bits(drafting.draft_weights) and not options.drafts
        as_it_is &= not in_8_bits(asked.device.weights)
        as_it_is &= drafting.tree is None and asked.revision is None and drafting.draft_revision is None
        comparable = key == whole and options.sampling.greedy and as_it_is
        theirs = published(asked.model, asked.draft, one.set.name) if comparable else None
        ours, rate = tally.tau_per_answer, tally.tokens_per_second
        base = lean.tokens_per_second if lean else None
        same, first = (
            equal_answers(tally, other) if other and options.sampling.greedy else None
            for other in (lean, one.tallies[whole] if key.form != whole.form else None)
        )
        yield {
            **about,
            "target_weights": key.form,
            "batch": options.batch_sizes[0],
            "set": one.set.name,
            "file": str(one.set.path),
            "mode": key.name,
            "drafts": key.drafts,
            "questions": len(one.set.questions),
            "prompts": one.done,
            "too_long": one.too_long,
            "answers": len(tally.answers),
            "stopped": sum(answer.stopped for answer in tally.answers),
            "tokens": sum(len(answer.tokens) for answer in tally.answers),
            "cycles": len(tally.accepted),
            "tau": tally.tau,
            "tau_per_answer": ours,
            "tau_first_turn": tau([m for answer in tally.answers if answer.turn == 0 for m in answer.accepted]),
            "published_tau_per_answer": theirs,
            "difference": ours - theirs if ours is not None and theirs is not None else None,
            "tokens_per_second": rate,
            "speed_over_lean": rate / base if rate and base else None,
            "same_answers_as_lean": same,
            "same_answers_as_first_form": first,
            **({f"length_{n}": lengths[n] for n in range(1, key.drafts + 2)} if key.drafts else {}),
        }


def equal_answers(tally: AcceptanceTally, other: AcceptanceTally) -> int:
    """How many answers are the same to the last token."""
    return sum(a.tokens == b.tokens for a, b in zip(tally.answers, other.answers, strict=True))


def show_quality(rows: list[dict[str, Any]], console: Console, chat: bool) -> None:
    """The figures as a table for people, with the shares of the acceptance lengths below."""
    first = rows[0]
    choice = f"temperature {first['temperature']:g}" if first["temperature"] else "greedy"
    console.print(
        f"{first['model']}, {first['dtype']}, {first['device']}; {choice}, batch {first['batch']}, at most "
        f"{first['new_tokens']} new tokens, stop tokens honoured, "
        + ("chat template" if chat else "raw prompts (no chat template)")
    )
    columns = {
        "prompts": ("prompts", "{}"),
        "tokens": ("tokens", "{:,}"),
        "τ": ("tau", "{:.2f}"),
        "τ per answer": ("tau_per_answer", "{:.2f}"),
        "published": ("published_tau_per_answer", "{:.2f}"),
        "difference": ("difference", "{:+.2f}"),
        "tokens/s": ("tokens_per_second", "{:,.0f}"),
        "× baseline": ("speed_over_lean", "{:.2f}"),
        f"as {first['target_weights']}": ("same_answers_as_first_form", "{}"),
        "perplexity": ("perplexity", "{:.3f}"),
    }
    columns = {title: column for title, column in columns.items() if any(r[column[0]] is not None for r in rows)}
    several = len({row["target_weights"] for row in rows}) > 1
    table = Table("set", *(["target"] if several else []), "mode", "J", title="Acceptance", title_justify="left")
    for title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for row in [*rows, *average(rows)]:
        cells = [form.format(row[key]) if row.get(key) is not None else "" for key, form in columns.values()]
        where = [row["set"], *([row["target_weights"]] if several else []), row["mode"]]
        table.add_row(*where, str(row["drafts"] or ""), *cells)
    console.print(table)
    drafted = [row for row in rows if row["cycles"]]
    most = max((row["drafts"] + 1 for row in drafted), default=0)
    if drafted:
        wide = max(len(quality_label(row)) for row in drafted)
        console.print("\nAcceptance lengths, % of cycles")
        console.print(" " * wide + "".join(f"{n:4}" for n in range(1, most + 1)))
    for row in drafted:
        shares = [row[f"length_{n}"] / row["cycles"] for n in range(1, row["drafts"] + 2)]
        bars = "".join(BARS[round(share / max(shares) * (len(BARS) - 1))] for share in shares)
        numbers = "".join(f"{100 * share:4.0f}" for share in shares) + "    " * (most - len(shares))
        console.print(f"{quality_label(row):<{wide}}{numbers}  {bars}")
    if any(row["published_tau_per_answer"] is not None for row in rows):
        console.print(f"\npublished: {SOURCE}; compared with our τ per answer")
    for row in rows:
        same = row["same_answers_as_lean"]
        if row["mode"] != LEAN and same is not None and same < row["answers"]:
            other = row["answers"] - same
            console.print(f"{quality_label(row)}: {other} of {row['answers']} answers differ from the baseline's")


def quality_label(row: dict[str, Any]) -> str:
    """A row's set, form where it is none of the files' own, and way of decoding."""
    form = "" if row["target_weights"] == "exact" else f"{row['target_weights']}, "
    return f"{row['set']}, {form}{row['mode']} {row['drafts']}"


def average(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the sets, where there are several, of what is comparable: τ, per answer, ours and published."""
    found = []
    for key in dict.fromkeys(map(_mode, (row for row in rows if row["cycles"]))):
        mine = [row for row in rows if _mode(row) == key]
        if len(mine) > 1:
            means: dict[str, Any] = {"set": "mean of sets", "mode": key.name, "drafts": key.drafts}
            means["target_weights"] = key.form
            for column in ("tau", "tau_per_answer", "published_tau_per_answer", "difference"):
                values = [row[column] for row in mine]
                means[column] = mean(values) if None not in values else None
            found.append(means)
    return found


def _mode(row: dict[str, Any]) -> Mode:
    return Mode(row["mode"], row["drafts"], row["target_weights"])


def plot(rows: list[dict[str, Any]], folder: Path) -> None:
    """tau.png, bars for each set; acceptance_lengths.png, a panel for each set."""
    plt = plots.pyplot()
    drafted = [row for row in rows if row["cycles"]]
    if not drafted:
        return
    names = list(dict.fromkeys(row["set"] for row in drafted))
    modes = list(dict.fromkeys(map(_mode, drafted)))
    several = len({mode.form for mode in modes}) > 1
    bars = {
        f"{mode.name}, {mode.drafts} proposals{f', {mode.form}' if several else ''}": (mode, "tau_per_answer")
        for mode in modes
    }
    if any(row["published_tau_per_answer"] is not None for row in drafted):
        bars["published"] = (modes[0], "published_tau_per_answer")

    figure, axis = plt.subplots(figsize=(2 + 1.6 * len(names), 4.5), constrained_layout=True)
    for i, (title, (mode, column)) in enumerate(bars.items()):
        of = {row["set"]: row[column] for row in drafted if _mode(row) == mode}
        heights = {n: of[name] for n, name in enumerate(names) if of.get(name) is not None}
        places = [n + (i - (len(bars) - 1) / 2) * 0.8 / len(bars) for n in heights]
        drawn = axis.bar(places, list(heights.values()), 0.8 / len(bars), label=title, **bar_style(i))
        axis.bar_label(drawn, fmt="%.2f", fontsize=7)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("τ, tokens a cycle (mean of answers)")
    axis.set_title(f"{rows[0]['model']}, temperature {rows[0]['temperature']:g}")
    figure.legend(loc="outside lower center", ncols=len(bars), fontsize=8)
    plots.save_plots(figure, folder / "tau.png")

    across = min(3, len(names))
    down = -(-len(names) // across)
    figure, grid = plt.subplots(
        down, across, figsize=(4.5 * across, 3 * down), squeeze=False, sharey=True, constrained_layout=True
    )
    for axis in grid.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(grid.flat, names, strict=False):
        mine = [row for row in drafted if row["set"] == name]
        for i, row in enumerate(mine):
            lengths = range(1, row["drafts"] + 2)
            shares = [100 * row[f"length_{n}"] / row["cycles"] for n in lengths]
            places = [n + (i - (len(mine) - 1) / 2) * 0.8 / len(mine) for n in lengths]
            form = f"{row['target_weights']}, " if several else ""
            words = f"{form}{row['mode']} {row['drafts']}, τ {row['tau']:.2f}"
            axis.bar(places, shares, 0.8 / len(mine), label=words, **bar_style(i))
        axis.set_title(name)
        axis.set_xlabel("acceptance length, tokens")
        axis.set_ylabel("% of cycles")
        axis.legend(fontsize=8)
    plots.save_plots(figure, folder / "acceptance_lengths.png")
