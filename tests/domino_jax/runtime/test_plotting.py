"""Whatever a plot shows can be told apart without colours."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from domino_jax.runtime import plotting
from infer.bench import plots, quality
from train.evaluate import ablation
from train.monitor import curves


@pytest.mark.parametrize(
    ("style", "names", "different"),
    [
        (lambda i: plotting.line_style(i, marker=True), ("linestyle", "marker"), 35),
        (plotting.line_style, ("linestyle",), 5),
        (plotting.bar_style, ("hatch",), 10),
    ],
    ids=["lines with markers", "lines", "bars"],
)
def test_styles_differ_without_their_colours(style, names, different):
    assert len({tuple(style(i)[name] for name in names) for i in range(different)}) == different
    assert all(style(i) != style(i + 1) for i in range(50))


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are written."""
    figures: list[Figure] = []

    def savefig(figure: Figure, file: Any, **_: Any) -> None:
        figures.append(figure)
        Path(file).write_bytes(b"")

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def looks(axes: Axes) -> list[Any]:
    """What each curve, and each kind of bar, looks like in grey."""
    lines = [(line.get_linestyle(), str(line._dash_pattern), line.get_marker()) for line in axes.get_lines()]  # type: ignore[attr-defined]
    bars = [held.patches[0].get_hatch() for held in axes.containers if isinstance(held, BarContainer)]
    return [*lines, *bars]


def training(folder: Path) -> None:
    keys = [key for _, lines, points in curves.PANELS for key in (*lines.values(), *points.values())]
    rows: list[dict[str, Any]] = [{"step": s} | dict.fromkeys(keys, s / 10) for s in (1, 2, 3)]
    rows[-1] |= {name: [0.5, 0.25] for name in curves.BY_POSITION.values()}
    curves.plot_curves(rows, folder / "curves.png")


def ablations(folder: Path) -> None:
    options = ablation.Ablation(data=(), prompts=folder, out=folder, seeds=(0,))
    for _, _, run in ablation.runs(options):
        run.mkdir()
        rows = [{"step": s, "final_loss": 1 / s, "final_acceptance": float(s)} for s in (1, 2)]
        curves.write_metrics(rows, run / ablation.METRICS)
    ablation.plot_ablation(options, folder / "ablation.png")


def sweep(folder: Path) -> None:
    figures = dict.fromkeys(("ms_per_cycle", "speed_over_lean", "tokens_per_second"), 1.0)
    about = {"simulated_tau": None, "model": "m", "weights": "real", "dtype": "float32", "device": "cpu", **figures}
    plots.plot_sweep(
        [
            {"mode": mode, "drafts": drafts, "batch": batch, "context": context, **about}
            for mode, drafts in (("lean", 0), ("domino", 2), ("domino", 4), ("domino", 8), ("dflash", 4))
            for batch in (1, 2, 4)
            for context in (64, 128)
        ],
        folder,
    )


def question_sets(folder: Path) -> None:
    about = {
        "model": "m",
        "target_weights": "exact",
        "temperature": 0.0,
        "cycles": 10,
        "tau": 2.0,
        "tau_per_answer": 2.0,
    }
    shares = {f"length_{n}": 1 for n in range(1, 10)}
    rows = [
        {"set": name, "mode": mode, "drafts": drafts, "published_tau_per_answer": 2.5, **about, **shares}
        for name in ("gsm8k", "mbpp")
        for mode, drafts in (("domino", 4), ("domino", 8), ("dflash", 4), ("dflash", 8))
    ]
    quality.plot(rows, folder)


@pytest.mark.parametrize("draw", [training, ablations, sweep, question_sets])
def test_curves_and_bars_of_a_panel_differ_without_their_colours(draw, tmp_path, drawn):
    draw(tmp_path)
    found = [looks(axes) for figure in drawn for axes in figure.axes]
    assert max(map(len, found)) >= 3
    for panel in found:
        assert max(Counter(map(str, panel)).values(), default=1) == 1, panel
