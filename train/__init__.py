"""Train a drafter for a frozen target: `from train import train`, `python -m train` and its subcommands.

run = train(target="qwen3-4b", data="answers.jsonl", out="runs/mine")
print(run.drafter, run.metrics["final_acceptance"])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import domino_jax.runtime.module_path  # noqa: F401  (before what a working folder may hold, too)

if TYPE_CHECKING:
    from train.api import TrainedDrafter as TrainedDrafter
    from train.api import train as train
    from train.config import DataConfig as DataConfig
    from train.config import DrafterOptions as DrafterOptions
    from train.config import Objective as Objective
    from train.config import OptimizerConfig as OptimizerConfig
    from train.config import RunConfig as RunConfig
    from train.config import TrainConfig as TrainConfig

_HOMES = {
    "train": "train.api",
    "TrainedDrafter": "train.api",
    "TrainConfig": "train.config",
    "DataConfig": "train.config",
    "DrafterOptions": "train.config",
    "Objective": "train.config",
    "OptimizerConfig": "train.config",
    "RunConfig": "train.config",
}
__all__ = [
    "DataConfig",
    "DrafterOptions",
    "Objective",
    "OptimizerConfig",
    "RunConfig",
    "TrainConfig",
    "TrainedDrafter",
    "train",
]


def __getattr__(name: str) -> Any:
    """The public names, imported when they are asked for: JAX takes seconds to import."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
