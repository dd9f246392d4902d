"""Training from Python: `from train import train`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config import TrainConfig
from train.options import configure


@dataclass(frozen=True)
class TrainedDrafter:
    """What a training run left in its folder."""

    folder: Path
    """the run's folder: settings, checkpoints, metrics.jsonl, report.md"""
    drafter: Path
    """folder of the newest drafter, as Hugging Face files"""
    best: Path | None
    """folder of the drafter with the highest validated acceptance length; None without a validation"""
    metrics: dict[str, Any]
    """newest value of each figure in metrics.jsonl: `step`, `final_loss`, `final_acceptance`, `validation_tau` ..."""


def train(options: TrainConfig | None = None, /, **settings: Any) -> TrainedDrafter:
    """Train a drafter for a frozen target, as `python -m train` does, and return where it is.

    Args:
        options: all settings. When None, they are the defaults, those of the recipe `config=...`, or with `resume=True`
            those of the run in `out=...`.
        settings: changes to them, by the flags' names with underscores, or whole groups (`objective=Objective(...)`).

    Returns:
        The run's folder, its drafters and its newest figures.

    Raises:
        DominoError: a setting is unknown or makes no sense, the data or the device don't allow it, or the training
            diverged.
        OSError: the disk is full; the checkpoints are as they were.
        KeyboardInterrupt: Ctrl-C or SIGTERM. The state is saved, and `train(out=..., resume=True)` goes on.

    Example:
        >>> from train import train
        >>> run = train(target="target", data="data.jsonl", out="run", layers=1, block_size=4, length=32, steps=2)
        >>> run.drafter
        PosixPath('run/drafter')
        >>> run.metrics["step"]
        2
    """
    given = configure(options, settings)
    from train.monitor.curves import read_metrics
    from train.monitor.log import METRICS
    from train.run import BEST, NEWEST, run_training  # brings in JAX, which wrong settings need not wait for

    run_training(given)
    metrics: dict[str, Any] = {}
    for row in read_metrics(given.out / METRICS):
        metrics |= row
    best = given.out / BEST
    return TrainedDrafter(given.out, given.out / NEWEST, best if best.exists() else None, metrics)
