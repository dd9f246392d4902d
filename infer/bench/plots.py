"""Curves of a sweep as PNGs: over context, batch size and drafts, each where there is more than one."""

from pathlib import Path
from typing import Any

from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.files import write_atomic
from domino_jax.runtime.plotting import line_style
from infer.bench.report import label, title
from infer.bench.rows import LEAN, TRANSFORMERS, Row

AXES = {"context": "context, tokens", "batch": "batch size", "drafts": "drafts a cycle"}
# What is drawn over each axis: a field and its label, one panel each.
PANELS = {
    "context": {
        "ms_per_cycle": "ms per cycle (baseline: per step)",
        "speed_over_lean": "speed over the autoregressive baseline",
    },
    "batch": {"tokens_per_second": "tokens/s", "speed_over_lean": "speed over the baseline"},
    "drafts": {"ms_per_cycle": "ms per cycle", "speed_over_lean": "speed over the baseline"},
}

ONE, THREE = {"": "-"}, {"_p50": "-", "_p95": "--", "_p99": ":"}  # line styles of percentiles
# Of servers under load: a field without its percentile, its label, and the percentiles that are drawn.
LOAD_PANELS = {
    "tokens_per_second": ("tokens/s", ONE),
    "ttft_ms": ("time to first token, ms", THREE),
    "tpot_ms": ("time per output token, ms", THREE),
    "latency_ms": ("whole answer, ms", THREE),
}
MARKERS = "osD^vPX*"


def plot_sweep(rows: list[Row], folder: Path) -> list[Path]:
    """Write <axis>.png for each axis that the rows have several values of; returns the files.

    Raises:
        DominoError: the folder can't be written.
    """
    written = []
    for axis, panels in PANELS.items():
        # A baseline step has no drafts: it is the 1 of the ratio there.
        shown = [
            r for r in rows if axis != "drafts" or (r["mode"] not in (LEAN, TRANSFORMERS) and r["drafts"] != "auto")
        ]
        if len({row[axis] for row in shown}) > 1:
            written.append(_figure(shown, axis, panels, folder / f"{axis}.png"))
    return written


def curves(rows: list[Row], axis: str) -> dict[str, list[Row]]:
    """The rows of each curve over `axis`, by a label that names what else differs between the curves."""
    others = [name for name in AXES if name != axis and len({row[name] for row in rows if row[name]}) > 1]
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row[axis]):
        words = [label(row), *(f"{name} {row[name]}" for name in others if row[name])]
        found.setdefault(", ".join(words), []).append(row)
    return found


def _figure(rows: list[Row], axis: str, panels: dict[str, str], path: Path) -> Path:
    """One PNG with a panel for each field."""
    plt = pyplot()
    figure, places = plt.subplots(1, len(panels), figsize=(6 * len(panels) + 2, 4.5), constrained_layout=True)
    for place, (field, name) in zip(places.flat, panels.items(), strict=True):
        for number, (words, points) in enumerate(curves(rows, axis).items()):
            style = line_style(number, marker=True)
            place.plot([p[axis] for p in points], [p[field] for p in points], label=words, linewidth=1.2, **style)
        ticks = sorted({row[axis] for row in rows})
        if axis != "drafts":
            place.set_xscale("log", base=2)
        place.set_xticks(ticks, [str(tick) for tick in ticks])
        place.minorticks_off()
        place.set_xlabel(AXES[axis])
        place.set_ylabel(name)
        place.set_ylim(bottom=0)
        place.grid(alpha=0.3)
    figure.legend(*places.flat[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.suptitle(title(rows[0]), fontsize="small")
    save_plots(figure, path)
    return path


def plot_load(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write streams.png and rates.png of servers under load, each where there are rows of it; returns the files.

    Servers differ in marker and colour, percentiles in the style of their lines.

    Raises:
        DominoError: the folder can't be written.
    """
    written = []
    for axis, name in {"streams": "streams", "rate": "requests a second"}.items():
        shown = [row for row in rows if axis in row]
        if not shown:
            continue
        figure, places = pyplot().subplots(2, 2, figsize=(12, 8), constrained_layout=True)
        for place, (field, (words, percentiles)) in zip(places.flat, LOAD_PANELS.items(), strict=True):
            for number, server in enumerate(dict.fromkeys(row["server"] for row in shown)):
                for percentile, style in percentiles.items():
                    key = field + percentile
                    points = sorted((row[axis], row[key]) for row in shown if row["server"] == server and row[key])
                    look = {"marker": MARKERS[number % len(MARKERS)], "color": f"C{number}", "linestyle": style}
                    look |= {"label": f"{server} {percentile.strip('_')}".strip(), "linewidth": 1.2}
                    place.plot(*zip(*points, strict=True) if points else ((), ()), **look)
            ticks = sorted({row[axis] for row in shown})
            place.set_xscale("log", base=2)
            place.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            place.minorticks_off()
            place.set(xlabel=name, ylabel=words, ylim=(0, None))
            place.grid(alpha=0.3)
            place.legend(fontsize="small")
        figure.suptitle(f"{shown[0]['model']}, median of {shown[0]['rounds']} rounds", fontsize="small")
        written.append(folder / ("streams.png" if axis == "streams" else "rates.png"))
        save_plots(figure, written[-1])
    return written


def plot_memory(row: dict[str, Any], folder: Path) -> Path:
    """Write memory.png: what slots and pages hold for requests of mixed lengths, and what their tokens need.

    Args:
        row: of `infer.bench.mixed`, with `slots_memory` and `pages_memory`.

    Raises:
        DominoError: the folder can't be written.
    """
    figure, place = pyplot().subplots(figsize=(8, 4.5), constrained_layout=True)
    kinds = {"contiguous slots": ("slots", 1), "pages": ("pages", 1), "the tokens of what runs": ("pages", 2)}
    for number, (words, (way, column)) in enumerate(kinds.items()):
        points = row[f"{way}_memory"]
        place.plot(
            [p[0] for p in points], [p[column] for p in points], label=words, linewidth=1.2, **line_style(number)
        )
    place.set(xlabel="tokens generated", ylabel="keys and values, MiB", ylim=(0, None))
    place.grid(alpha=0.3)
    place.legend(fontsize="small")
    (least, most), count = row["new_tokens"], row["num_requests"]
    words = f"{count} requests of {least:,} to {most:,} new tokens, {row['batch_size']} at a time, plain steps"
    figure.suptitle(words, fontsize="small")
    path = folder / "memory.png"
    save_plots(figure, path)
    return path


def pyplot() -> Any:
    """matplotlib.pyplot without a display; slow to import, and most runs do without."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_plots(figure: Any, path: Path) -> None:
    """Write a figure so that the file is whole or absent, and close it.

    Raises:
        DominoError: it can't be written.
    """
    try:
        with write_atomic(path) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    except OSError as error:
        raise DominoError(f"{path} can't be written: {first_line(error)}.") from None
    finally:
        pyplot().close(figure)
