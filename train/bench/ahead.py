"""A training step compiled ahead of time for TPUs that are not here: no weights are made, and nothing is run."""

import time
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from convert.shapes import described_weights
from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.prepare import quantize_target
from domino_jax.runtime.ahead import Place, circumstances_ahead, compile_ahead, program_figures
from domino_jax.runtime.precision import matmul_precision
from domino_jax.runtime.weight_forms import WeightForm
from train.bench.flops import flops
from train.config import Recipe
from train.loss import Inputs
from train.step import TrainState, state_partitions, state_shapes, train_step


def describe_step(
    recipe: Recipe, inputs: Inputs, place: Place, weights: WeightForm = "exact"
) -> tuple[TrainState, Any, Inputs]:
    """The arguments of a step: state, frozen target and batch, described and not made.

    Args:
        inputs: their shapes.
        weights: form of the target's matrices.
    """
    with place.context():
        where = state_partitions(recipe)
    state = jax.tree.map(place.array, state_shapes(recipe), where, is_leaf=lambda x: isinstance(x, PartitionSpec))
    frozen = described_weights(recipe.target, jnp.dtype(recipe.dtype), place.mesh, place.device)
    frozen = quantize_target(frozen, recipe.target, weights, cache(place.outputs))
    return state, frozen, jax.tree.map(place.rows, inputs)


def compile_step(
    recipe: Recipe, inputs: Inputs, place: Place, captured: bool = False, weights: WeightForm = "exact"
) -> dict[str, Any]:
    """The figures of a step, for one device.

    Args:
        inputs: their shapes.
        captured: the target does not run.
        weights: form of the target's matrices.

    Raises:
        DominoError: the compiler refuses it.
    """
    given = describe_step(recipe, inputs, place, weights)
    began = time.perf_counter()
    with matmul_precision(recipe.dtype):
        compiled, text = compile_ahead("the step", place, lambda: train_step.lower(recipe, *given))
    seconds = time.perf_counter() - began
    assert isinstance(recipe.draft, DraftConfig)
    counted = step_flops(recipe.target, recipe.draft, inputs, recipe.objective.anchors, captured)
    devices = place.mesh.size if place.mesh else 1
    floor = counted / devices / place.stated.flops * 1e3
    figures = program_figures(compiled, text, place.stated, {}, looped=False)
    figures |= {"floor_ms": floor, "larger_ms": max(floor, figures["estimated_ms"])}
    figures["state_copies"] = figures.pop("cache_copies")
    del figures["cache_write_backs"]
    rows = inputs.ids.shape[0]
    return circumstances_ahead(place.device) | {
        "devices": devices,
        "compile_seconds": seconds,
        **figures,
        "tflop": counted / 1e12,
        "estimated_samples_per_second": rows / figures["estimated_ms"] * 1e3 if figures["estimated_ms"] else None,
        "floor_samples_per_second": rows / floor * 1e3,
    }


def step_flops(target: TargetConfig, draft: DraftConfig, inputs: Inputs, anchors: int, captured: bool) -> float:
    """Of all devices, of the model and not of the program."""
    rows, length = inputs.ids.shape
    counted = flops(target, draft, rows, length, anchors)
    return counted["forward"] + counted["backward"] + (0.0 if captured else counted["target"])
