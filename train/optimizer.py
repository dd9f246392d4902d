"""Optimizers: AdamW, or Muon for the matrices with AdamW for the rest (optax.contrib.muon; Jordan et al. 2024)."""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import jax
import optax
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as optax_muon

from domino_jax.weights import is_matrix
from train.config import OptimizerConfig


def make_optimizer(config: OptimizerConfig, steps: int, letters: Mapping[str, str]) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW or Muon; norms and biases do not decay.

    Args:
        steps: of the whole run.
        letters: axis letters of each weight that is trained, by its path.
    """
    rate = learning_rate(config, steps, config.lr)
    if config.optimizer == "muon":
        muon_rate = learning_rate(config, steps, config.muon_lr)
        rule = muon(muon_rate, rate, config.weight_decay, letters)
    else:
        rule = optax.adamw(rate, weight_decay=config.weight_decay, mask=partial(decayed, letters))
    return optax.chain(optax.clip_by_global_norm(config.clip), rule)


def learning_rate(config: OptimizerConfig, steps: int, peak: float) -> optax.Schedule:
    """A linear rise to `peak` over the warm-up, then a cosine to zero at `steps`."""
    rise = max(1, round(config.warmup * steps))
    return optax.warmup_cosine_decay_schedule(0.0, peak, rise, max(steps, rise + 1))


def muon(
    lr: optax.Schedule, adam_lr: optax.Schedule, weight_decay: float, letters: Mapping[str, str]
) -> optax.GradientTransformation:
    """The rule over a flat dict of weights: Muon for matrices, AdamW for the rest.

    Args:
        letters: axis letters of each weight, by its path.
    """
    matrices = {path: dimensions(names) if is_matrix(path, names) else None for path, names in letters.items()}
    # optax's own division between the two lets everything that AdamW moves decay, norms too.
    rules: dict[Any, optax.GradientTransformation] = {
        "muon": optax_muon(lr, weight_decay=weight_decay, muon_weight_dimension_numbers=cast(Any, matrices)),
        "adamw": optax.adamw(adam_lr, weight_decay=weight_decay, mask=partial(decayed, letters), nesterov=True),
    }
    return optax.partition(rules, {path: "adamw" if matrix is None else "muon" for path, matrix in matrices.items()})


def dimensions(letters: str) -> MuonDimensionNumbers | None:
    """Which axes of a matrix are inputs and which outputs; None for what is as long as the vocabulary."""
    names = letters.split()
    if {"V", "DV"} & set(names):
        return None
    last = len(names) - 1  # the input; K with V, and gate with up, are two matrices of their own
    return MuonDimensionNumbers((last,), tuple(i for i in range(last) if names[i] != "2"))


def decayed(letters: Mapping[str, str], weights: Any) -> Any:
    """True in the place of each weight that decays: matrices do, norms, biases and filters do not."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path[-1].key, letters[path[-1].key]), weights)
