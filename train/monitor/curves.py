"""A run's metrics.jsonl, and the curves that are drawn from it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from domino_jax.runtime.files import read_jsonl, write_atomic, write_text
from domino_jax.runtime.plotting import line_style

Row = dict[str, Any]  # one line: "step", and whatever was measured there
Line = tuple[list[float], list[float]]  # x and y

COLUMNS = 2
SIZE = (6.0, 3.2)  # of a panel, inches


class Panel(NamedTuple):
    """One set of axes: what is drawn in it, by label."""

    title: str
    lines: dict[str, Line]
    points: dict[str, Line]  # measured seldom: dots on a thin line
    over: str = "step"  # what x is
    log: bool = False


class Positions(NamedTuple):
    """Accuracy of each of a block's J proposals over the run."""

    steps: list[int]
    branches: dict[str, list[list[float]]]  # "final" and "base": [steps][J], nan where a step lacks it


# Title, keys of the lines by label, keys of the points by label.
PANELS: tuple[tuple[str, dict[str, str], dict[str, str]], ...] = (
    ("cross-entropy, nats", {"final": "final_loss", "base": "base_loss", "λ-weighted": "loss"}, {}),
    (
        "acceptance length, tokens",
        {"final, estimated": "final_acceptance", "base, estimated": "base_acceptance"},
        {"final, decoding": "validation_tau", "base, decoding": "validation_tau_base"},
    ),
    ("accuracy", {"final": "final_accuracy", "base": "base_accuracy"}, {}),
    ("gradient norm", {"norm": "gradient_norm"}, {}),
    ("λ", {"λ": "lambda"}, {}),
    ("learning rate", {"learning rate": "lr"}, {}),
    ("tokens/s", {"tokens/s": "tokens_per_second"}, {}),
)
BY_POSITION = {"final": "final_accuracy_by_position", "base": "base_accuracy_by_position"}


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics file, without a line that was cut off; an empty list where there is no file."""
    if not path.exists():
        return []
    rows = [line.value for line in read_jsonl(path, lenient=True)]
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def write_metrics(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as a metrics file, whole or not at all."""
    write_text(path, "".join(json.dumps(r) + "\n" for r in rows))


def append_metrics(row: Row, path: Path) -> None:
    """Add one row to a metrics file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def resume_metrics(path: Path, done: int) -> list[Row]:
    """The rows of a metrics file up to step `done`; what was measured after it is taken out of the file."""
    rows = [row for row in read_metrics(path) if row["step"] <= done]
    write_metrics(rows, path)
    return rows


def series(rows: Sequence[Row], key: str) -> Line:
    """Steps and values of one key, from the rows that have it."""
    found = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    return [step for step, _ in found], [value for _, value in found]


def panels(rows: Sequence[Row]) -> list[Panel]:
    """What is drawn of these rows; what was never measured is left out."""

    def drawn(keys: Mapping[str, str]) -> dict[str, Line]:
        return {label: line for label, key in keys.items() if (line := series(rows, key))[0]}

    made = [Panel(title, drawn(lines), drawn(points), log=title == "gradient norm") for title, lines, points in PANELS]
    latest = {
        label: values
        for label, key in BY_POSITION.items()
        if (values := next((row[key] for row in reversed(rows) if row.get(key)), None))
    }
    lines = {label: ([float(j) for j in range(1, len(values) + 1)], values) for label, values in latest.items()}
    made.append(Panel("accuracy by proposal, latest", lines, {}, over="proposal"))
    return [panel for panel in made if panel.lines or panel.points]


def positions(rows: Sequence[Row]) -> Positions | None:
    """Accuracy by proposal over the run, None if it was never measured."""
    measured = [row for row in rows if any(row.get(key) for key in BY_POSITION.values())]
    if not measured:
        return None
    width = max(len(row.get(key) or ()) for row in measured for key in BY_POSITION.values())

    def filled(values: Sequence[float] | None) -> list[float]:
        held = [float("nan") if value is None else value for value in values or ()]
        return held + [float("nan")] * (width - len(held))

    branches = {label: [filled(row.get(key)) for row in measured] for label, key in BY_POSITION.items()}
    return Positions([row["step"] for row in measured], branches)


def plot_curves(rows: Sequence[Row], path: Path) -> None:
    """Draw `panels` as one PNG, whole or not at all."""
    from matplotlib.figure import Figure

    made = panels(rows)
    if not made:
        return
    height = -(-len(made) // COLUMNS)
    figure = Figure((SIZE[0] * COLUMNS, SIZE[1] * height), layout="constrained")
    axes = figure.subplots(height, COLUMNS, squeeze=False).flat
    for panel in made:
        axis = next(axes)
        for number, (label, (x, y)) in enumerate(panel.lines.items()):
            axis.plot(x, y, label=label, linewidth=1.2, markersize=3, **line_style(number, panel.over != "step"))
        for number, (label, (x, y)) in enumerate(panel.points.items()):
            style = line_style(number, marker=True) | {"linestyle": "dotted"}
            axis.plot(x, y, label=label, linewidth=0.6, markersize=5, **style)
        positive = any(value > 0 for _, y in panel.lines.values() for value in y)
        axis.set(title=panel.title, xlabel=panel.over, yscale="log" if panel.log and positive else "linear")
        axis.grid(alpha=0.3)
        if len(panel.lines) + len(panel.points) > 1:
            axis.legend(loc="best", fontsize="small")
    for axis in axes:
        axis.remove()
    _save(figure, path)


def draw_positions(rows: Sequence[Row], path: Path) -> None:
    """Draw `positions` as two heat maps in one PNG, whole or not at all; nothing where they were never measured."""
    from matplotlib.figure import Figure

    made = positions(rows)
    if made is None:
        return
    figure = Figure((SIZE[0] * 2, SIZE[1] * 1.2), layout="constrained")
    axes = figure.subplots(1, len(made.branches), sharey=True)
    proposals = range(1, len(made.branches["final"][0]) + 1)
    drawn: Any = None
    for axis, (label, values) in zip(axes, made.branches.items(), strict=True):
        columns = [list(column) for column in zip(*values, strict=True)]  # [J][steps]
        drawn = axis.pcolormesh(made.steps, proposals, columns, shading="nearest", vmin=0, vmax=1)
        axis.set(title=f"{label}: accuracy of each proposal", xlabel="step", ylabel="proposal")
    figure.colorbar(drawn, ax=axes)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with write_atomic(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
