"""One training run: from its settings to a drafter, through interruptions and bad luck.

The folder of a run holds settings.toml and config.json (the drafter's), checkpoints/, metrics.jsonl, report.md with its
curves, tensorboard/, and the drafter as Hugging Face files: drafter/ is the newest one, best/ the one with the highest
validated acceptance length.
"""

import dataclasses
import math
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from convert import folders, hf, public
from convert.hosts import agree
from convert.memory import enough_memory
from convert.precision import settle as settle_dtype
from convert.programs import keep_programs
from convert.progress import bars
from convert.tokenizer import load_tokenizer
from domino_jax.config import DraftConfig, TargetConfig, check_pair
from domino_jax.decode import Configs
from domino_jax.errors import DominoError
from domino_jax.sharding import fetch, make_mesh, parse_training
from domino_jax.weights import Target, flatten, init, unflatten
from train import config, data
from train.checkpoint import Checkpoints
from train.config import Train
from train.features import Features, identity
from train.heldout import read_prompts
from train.progress import Progress
from train.report import Log
from train.step import Metrics, Recipe, TrainState, exported, put_batch, start, train_step
from train.stopping import stop_signals
from train.validate import Validation
from train.warm import from_drafter, from_target
from train.watch import Watch

IDENTITY = "data.json"  # what a run's data are known by


@dataclass(frozen=True)
class Setup:
    """What a run is made of, ready to begin."""

    options: Train  # settled: nothing in it is left to be found out
    recipe: Recipe
    corpus: data.Corpus
    frozen: Target
    features: Features | None
    validation: Validation | None
    mesh: Mesh | None

    def context(self) -> AbstractContextManager[Any]:
        """What programs of this run are run in."""
        return jax.set_mesh(self.mesh) if self.mesh else nullcontext()
