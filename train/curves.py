"""Curves of a run, drawn from its metrics.jsonl."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, without a line that was cut off; an empty list where there is no file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().split("\n"):
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the rows as a metrics file, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(r) + "\n" for r in rows))
    temporary.replace(path)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Losses, estimated acceptance lengths, accuracies, and the gradient norm with λ, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [row["step"] for row in rows]
    panels = (
        ("cross-entropy, nats", {"final": "final_loss", "base": "base_loss", "λ-weighted": "loss"}),
        ("estimated acceptance length, tokens", {"final": "final_acceptance", "base": "base_acceptance"}),
        ("accuracy", {"final": "final_accuracy", "base": "base_accuracy"}),
        ("gradient norm", {"norm": "gradient_norm"}),
    )
    figure, grid = plt.subplots(2, 2, figsize=(11, 7), sharex=True, constrained_layout=True)
    for axis, (title, lines) in zip(grid.flat, panels, strict=True):
        for label, key in lines.items():
            axis.plot(steps, [row[key] for row in rows], label=label, linewidth=1.2)
        axis.set_title(title)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(loc="best")
    twin = grid[1, 1].twinx()
    twin.plot(steps, [row["lambda"] for row in rows], color="tab:green", label="λ")
    twin.set_ylabel("λ", color="tab:green")
    grid[1, 1].set_yscale("log")
    for axis in grid[1]:
        axis.set_xlabel("step")
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    temporary.replace(path)
