"""The training state and its one jitted step."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.weights import Target, unflatten
from train import anchors
from train.loss import Report, curriculum
from train.muon import muon

# Weights that a loop of the loss reads. It casts them itself, so that the gradients of its turns are summed in float32.
LOOPED = ("head.proj_out", "head.gru_state")


class Recipe(NamedTuple):
    """What shapes a run and is static to the compiled step (SPEC section 7 names the symbols)."""

    target: TargetConfig
    draft: DraftConfig
    steps: int
    optimizer: str  # "adamw", or "muon" for the matrices and AdamW for the rest
    lr: float  # of AdamW
    muon_lr: float
    warmup: float  # share of the steps
    weight_decay: float
    clip: float  # largest global gradient norm
    gamma: float  # γ
    anchors: int  # A
    lambda_base_start: float
    lambda_base_decay_ratio: float  # share of the steps over which λ falls to 0
    chunk: int  # proposals whose logits exist at a time
    dtype: str  # of the computation; masters are float32


class TrainState(NamedTuple):
    """Everything a checkpoint holds; with the data a pure function of `step`, resuming is bit-equal."""

    step: Array  # [] int32
    weights: dict[str, Array]  # the drafter's float32 masters, by path
    optimizer: Any  # optax state
    key: Array  # raw key data: anchors of step s are drawn from fold_in(key, s)


class Metrics(NamedTuple):
    """What a step reports."""

    report: Report
    lam: Array
    lr: Array
    gradient_norm: Array
    finite: Array  # [] bool; if False the update was not applied


def schedule(recipe: Recipe, peak: float) -> optax.Schedule:
    """Linear warm-up to `peak`, then cosine to zero."""
    rise = max(1, round(recipe.warmup * recipe.steps))
    return optax.warmup_cosine_decay_schedule(0.0, peak, rise, max(recipe.steps, rise + 1))


def lambda_base(recipe: Recipe, step: Array) -> Array:
    """λ: from `lambda_base_start` linearly to 0 over `lambda_base_decay_ratio` of the run, then 0."""
    span = max(recipe.lambda_base_decay_ratio * recipe.steps, 1e-9)
    return recipe.lambda_base_start * jnp.maximum(0.0, 1.0 - step.astype(jnp.float32) / span)


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW or Muon; norm weights do not decay."""
    lr = schedule(recipe, recipe.lr)
    if recipe.optimizer == "muon":
        rule = muon(recipe.draft, schedule(recipe, recipe.muon_lr), lr, recipe.weight_decay)
    else:
        rule = optax.adamw(
            lr, weight_decay=recipe.weight_decay, mask=lambda weights: jax.tree.map(lambda w: w.ndim > 1, weights)
        )
    return optax.chain(optax.clip_by_global_norm(recipe.clip), rule)


def start(recipe: Recipe, weights: dict[str, Array], seed: int) -> TrainState:
    """The state before the first step; copies of `weights` become float32 masters, which steps may consume."""
    weights = {path: jnp.array(w, jnp.float32, copy=True) for path, w in weights.items()}
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), weights, optimizer(recipe).init(weights), key)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(
    recipe: Recipe, state: TrainState, frozen: Target, ids: Array, mask: Array
) -> tuple[TrainState, Metrics]:
    """One update from ids and loss mask [B, S].

    A step whose loss or gradient is not finite leaves the weights and the optimizer as they were, and
    says so in its metrics.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    chosen, valid = anchors.draw(key, mask, recipe.anchors)
    lam = lambda_base(recipe, state.step)

    def loss(weights: dict[str, Array]) -> tuple[Array, Report]:
        drafter = unflatten(
            recipe.draft, {path: w if path in LOOPED else w.astype(recipe.dtype) for path, w in weights.items()}
        )
        configs = (recipe.target, recipe.draft)
        return curriculum(
            drafter, frozen, configs, ids, mask, chosen, valid, lam=lam, gamma=recipe.gamma, chunk=recipe.chunk
        )

    (value, report), gradient = jax.value_and_grad(loss, has_aux=True)(state.weights)
    norm = optax.tree.norm(gradient)
    updates, moments = optimizer(recipe).update(gradient, state.optimizer, state.weights)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)

    def keep(new: Array, old: Array) -> Array:
        return jnp.where(finite, new, old)

    updated = TrainState(
        step=state.step + 1,
        weights=jax.tree.map(keep, optax.apply_updates(state.weights, updates), state.weights),
        optimizer=jax.tree.map(keep, moments, state.optimizer),
        key=state.key,
    )
    return updated, Metrics(report, lam, jnp.asarray(schedule(recipe, recipe.lr)(state.step)), norm, finite)
