"""A run for people: report.md with its curves, written anew as the run goes."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from domino_jax.errors import first_line
from domino_jax.runtime.files import write_text
from train.monitor import curves
from train.monitor.progress import clock

REPORT, CURVES, POSITIONS = "report.md", "curves.png", "positions.png"
VALIDATIONS = 10  # of the newest that are listed, with the best

# An estimate above this promises something, and decoding should keep at least this share of what it promises beyond the
# one token that every cycle gives.
PROMISING, KEPT = 1.5, 0.5
FALLEN = 0.95  # of the best validation


def write_report(
    folder: Path,
    rows: Sequence[curves.Row],
    settings: Mapping[str, Any],
    total: int,
    *,
    state: str = "running",
    seconds_left: float | None = None,
    notes: Sequence[str] = (),
) -> str | None:
    """Write report.md, curves.png and positions.png into a run's folder, each whole or not at all.

    Args:
        rows: of metrics.jsonl; what they lack is left out.
        settings: the run's, by name, or by group and name.
        total: steps of the run.
        state: "running", "finished", "interrupted", …
        notes: more sentences to put under the warnings.

    Returns:
        What went wrong, if it could not be written: a report is no reason to stop a training.
    """
    try:
        curves.plot_curves(rows, folder / CURVES)
        curves.draw_positions(rows, folder / POSITIONS)
        text = compose(
            rows,
            settings,
            total,
            state=state,
            seconds_left=seconds_left,
            notes=notes,
            pictures=[name for name in (CURVES, POSITIONS) if (folder / name).exists()],
        )
        write_text(folder / REPORT, text)
    except OSError as error:
        return f"the report in {folder} can't be written: {first_line(error)}"
    return None


def compose(
    rows: Sequence[curves.Row],
    settings: Mapping[str, Any],
    total: int,
    *,
    state: str = "running",
    seconds_left: float | None = None,
    notes: Sequence[str] = (),
    pictures: Sequence[str] = (),
) -> str:
    """The text of report.md; see `write_report`."""
    step = rows[-1]["step"] if rows else 0
    left = f", about {clock(seconds_left)} left" if seconds_left is not None and step < total else ""
    parts = ["# Training run", f"Step {step:,} of {total:,} ({step / max(total, 1):.0%}): {state}{left}."]
    warned = [*warnings(rows), *notes]
    if warned:
        parts += ["## Warnings", "\n".join(f"- {sentence}" for sentence in warned)]
    if rows:
        parts += ["## Last figures", _figures(rows)]
    validated = _validations(rows)
    if validated:
        parts += ["## Validation by decoding", validated]
    if pictures:
        parts += ["## Curves", "\n\n".join(f"![{name.removesuffix('.png')}]({name})" for name in pictures)]
    parts += ["## Settings", _table(("setting", "value"), _flat(settings))]
    return "\n\n".join(parts) + "\n"


def last(rows: Sequence[curves.Row], key: str) -> Any:
    """The newest value of a key, None if there is none."""
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)


def best(rows: Sequence[curves.Row]) -> curves.Row | None:
    """The row of the best validation: the largest true τ, the earliest of equals."""
    return max((row for row in rows if row.get("validation_tau") is not None), key=_tau, default=None)


def _tau(row: curves.Row) -> float:
    return row["validation_tau"]


def estimate(rows: Sequence[curves.Row], row: curves.Row) -> float | None:
    """The estimated acceptance length beside a validation: its own, else the newest of the training before it."""
    if row.get("validation_estimated") is not None:
        return row["validation_estimated"]
    return last([r for r in rows if r["step"] <= row["step"]], "final_acceptance")


def warnings(rows: Sequence[curves.Row]) -> list[str]:
    """What a person should look at, in sentences."""
    found = []
    validated = [row for row in rows if row.get("validation_tau") is not None]
    if validated:
        newest, top = validated[-1], best(rows)
        tau, base, estimated = newest["validation_tau"], newest.get("validation_tau_base"), estimate(rows, newest)
        if estimated is not None and estimated > PROMISING and tau - 1 < KEPT * (estimated - 1):
            found.append(
                f"Training estimates an acceptance length of {estimated:.2f}, decoding at step {newest['step']} has "
                f"{tau:.2f}. The usual reasons: labels that are aligned otherwise (shift_label), prompts in another "
                "template or with thinking on, another mask token, a tied LM head that was ignored, other RoPE "
                "settings; or the training data is unlike the prompts, or was not written by this target."
            )
        if base is not None and tau < base:
            found.append(
                f"With its head the drafter accepts less (τ {tau:.2f}) than without it ({base:.2f}): early in a run "
                "the head has hardly learned while λ is near 1; later it should not be so."
            )
        if top is not None and tau < FALLEN * top["validation_tau"]:
            found.append(
                f"The newest validation (τ {tau:.2f}) is below the best, {top['validation_tau']:.2f} at step "
                f"{top['step']}: the drafter may be overfitting, or its learning rate is too high."
            )
    return found


def _figures(rows: Sequence[curves.Row]) -> str:
    """The newest of each figure, for both branches and for the run."""
    both = (
        ("cross-entropy, nats", "final_loss", "base_loss", "{:.4f}"),
        ("estimated acceptance length", "final_acceptance", "base_acceptance", "{:.3f}"),
        ("true τ (decoding)", "validation_tau", "validation_tau_base", "{:.3f}"),
        ("accuracy", "final_accuracy", "base_accuracy", "{:.4f}"),
    )
    one = (
        ("loss, λ-weighted", "loss", "{:.4f}"),
        ("λ", "lambda", "{:.3f}"),
        ("learning rate", "lr", "{:.2e}"),
        ("gradient norm", "gradient_norm", "{:.3f}"),
        ("tokens/s", "tokens_per_second", "{:,.0f}"),
    )

    def shown(key: str, form: str) -> str:
        value = last(rows, key)
        return "" if value is None else form.format(value)

    branches = [(name, shown(final, form), shown(base, form)) for name, final, base, form in both]
    tables = [_table(("", "final", "base"), [line for line in branches if any(line[1:])])]
    run = [(name, shown(key, form)) for name, key, form in one]
    tables.append(_table(("", "value"), [line for line in run if line[1]]))
    accuracies = {label: last(rows, key) for label, key in curves.BY_POSITION.items()}
    if any(accuracies.values()):
        count = max(len(values or ()) for values in accuracies.values())
        lines = [
            (label, *("" if value is None else f"{value:.3f}" for value in values), *[""] * (count - len(values)))
            for label, values in accuracies.items()
            if values
        ]
        tables.append(_table(("accuracy of proposal", *map(str, range(1, count + 1))), lines))
    return "\n\n".join(filter(None, tables))


def _validations(rows: Sequence[curves.Row]) -> str:
    """The newest validations and the best."""
    validated = [row for row in rows if row.get("validation_tau") is not None]
    top = best(rows)
    if top is None:
        return ""

    def line(row: curves.Row) -> tuple[str, ...]:
        others = (row.get("validation_tau_base"), estimate(rows, row))
        return (
            f"{row['step']:,}" + (" (best)" if row is top else ""),
            f"{_tau(row):.3f}",
            *("" if value is None else f"{value:.3f}" for value in others),
        )

    listed = validated[-VALIDATIONS:]
    listed = listed if any(row is top for row in listed) else [top, *listed]
    sentence = f"Best: τ {_tau(top):.3f} at step {top['step']:,}."
    return sentence + "\n\n" + _table(("step", "true τ", "without the causal head", "estimated"), map(line, listed))


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Settings as rows of a table; those that are not given are left out."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        elif value is not None:
            shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            yield before + name, shown


def _table(head: Sequence[str], rows: Any) -> str:
    """A table of Markdown, empty without rows."""
    lines = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    if not lines:
        return ""
    return "\n".join("| " + " | ".join(line) + " |" for line in ([*head], ["---"] * len(head), *lines))
