"""Training in one call, for tests: the loss of a whole batch, and recipes that differ in some settings."""

import dataclasses
from typing import Any

from jax import Array

from domino_jax.config import TargetConfig
from domino_jax.weights import Target
from train.config import Objective, Recipe, TrainedConfig
from train.loss import Inputs, StepMetrics, loss_denominator, partial_loss, step_metrics, supervision


def curriculum(
    drafter: Any,
    frozen: Target,
    configs: tuple[TargetConfig, TrainedConfig],
    ids: Array,
    mask: Array,
    anchors: Array,
    valid: Array,
    *,
    lam: Any,
    starts: Array | None = None,
    features: Array | None = None,
    hidden: Array | None = None,
    **objective: Any,
) -> tuple[Array, StepMetrics]:
    """loss = (1 - λ)·loss(final) + λ·loss(base), and what the batch reports.

    Args:
        ids, mask, starts, features, hidden: those of `Inputs`.
        anchors, valid: [B, A] anchors and which of them count.
        lam: λ.
        objective: fields of `Objective`.
    """
    what, inputs = Objective(**objective), Inputs(ids, mask, starts, features, hidden)
    total = loss_denominator(what, supervision(configs[1], what.loss, inputs, anchors, valid))
    value, sums = partial_loss(drafter, frozen, configs, what, inputs, anchors, valid, lam, total)
    return value, step_metrics(sums, lam, total)


def change_recipe(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with some settings changed: its own, or by their names those of its objective and optimizer."""
    for name, value in changes.items():
        group = next((g for g in ("objective", "optimizer") if hasattr(getattr(recipe, g), name)), None)
        if group:
            changed: Any = {group: dataclasses.replace(getattr(recipe, group), **{name: value})}
            recipe = dataclasses.replace(recipe, **changed)
        else:
            recipe = dataclasses.replace(recipe, **{name: value})
    return recipe
