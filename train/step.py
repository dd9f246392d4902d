"""The training state and its one jitted step."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from domino_jax.drafters.heads import head_of
from domino_jax.drafters.heads.base import under
from domino_jax.errors import DominoError
from domino_jax.runtime.devices import own_devices
from domino_jax.sharding import row_shards, shard_array, stored_spec
from domino_jax.weights import Target, axes, flatten, unflatten
from train import anchors
from train.config import Recipe
from train.loss import (
    Inputs,
    StepMetrics,
    Sums,
    loss_denominator,
    partial_loss,
    step_metrics,
    supervision,
)
from train.optimizer import learning_rate, make_optimizer


class TrainState(NamedTuple):
    """Everything a checkpoint holds; with the data a pure function of `step`, resuming is bit-equal."""

    step: Array  # [] int32
    weights: dict[str, Array]  # the drafter's float32 masters, by path
    optimizer: Any  # optax state, of the weights that are trained
    key: Array  # raw key data: anchors of step s are drawn from fold_in(key, s)
    average: dict[str, Array] | None = None  # of the weights that are trained, where the recipe has an EMA


class Metrics(NamedTuple):
    """What a step reports."""

    report: StepMetrics
    lam: Array
    lr: Array
    gradient_norm: Array
    finite: Array  # [] bool; if False the update was not applied


def lambda_base(recipe: Recipe, step: Array) -> Array:
    """λ: `lambda_base_start` all along, or from it to `lambda_base_floor` over `lambda_base_decay_ratio` of the run."""
    objective = recipe.objective
    if objective.lambda_schedule == "constant":
        return jnp.full((), objective.lambda_base_start, jnp.float32)
    span = objective.lambda_base_decay_ratio * recipe.steps
    left = jnp.maximum(0.0, 1.0 - step.astype(jnp.float32) / span) if span else jnp.zeros((), jnp.float32)
    if objective.lambda_schedule == "cosine":
        left = 0.5 * (1 - jnp.cos(jnp.pi * left))
    floor = objective.lambda_base_floor
    return floor + (objective.lambda_base_start - floor) * left


def trained(recipe: Recipe, weights: dict[str, Any]) -> dict[str, Any]:
    """Those of the drafter's weights (or of what stands in their place) that the recipe trains."""
    return {
        path: w
        for path, w in weights.items()
        if (not recipe.freeze_backbone or path.startswith("head."))
        and not (recipe.freeze_output and path.endswith(".o"))
    }


def drafter_of(recipe: Recipe, weights: dict[str, Any]) -> Any:
    """The drafter of the masters `weights`, in the recipe's dtype but for what a loop of the loss casts itself."""
    looped = under("head", head_of(recipe.draft).looped)
    cast = {path: w if path in looped else w.astype(recipe.dtype) for path, w in weights.items()}
    return unflatten(recipe.draft, cast)


def recipe_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """The optimizer of the weights that the recipe trains."""
    letters = trained(recipe, flatten(axes(recipe.draft)))
    return make_optimizer(recipe.optimizer, recipe.steps, letters)


def init_state(recipe: Recipe, weights: dict[str, Array], seed: int) -> TrainState:
    """The state before the first step; copies of `weights` become float32 masters, which steps may consume.

    With a mesh in context it is made there, each device its part; each process must have the same `weights`.

    Raises:
        DominoError: there is nothing to train.
    """
    if not trained(recipe, weights):
        raise DominoError("this drafter has no causal head: train all of it.")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _state(recipe, {path: jnp.array(w, jnp.float32, copy=True) for path, w in weights.items()}, seed)
    letters = flatten(axes(recipe.draft))
    mesh = jax.sharding.get_mesh()
    placed = {}
    for path, w in weights.items():
        host = np.array(jax.device_get(w), np.float32)  # a copy, for steps may consume it
        placed[path] = shard_array(host, NamedSharding(mesh, stored_spec(letters[path], mesh)))
    where = state_shardings(recipe, mesh)
    return jax.jit(partial(_state, recipe, seed=seed), out_shardings=where)(placed)


def _state(recipe: Recipe, weights: dict[str, Array], seed: int) -> TrainState:
    ours = trained(recipe, weights)
    return TrainState(
        jnp.zeros((), jnp.int32),
        weights,
        recipe_optimizer(recipe).init(ours),
        jax.random.key_data(jax.random.key(seed)),
        jax.tree.map(jnp.copy, ours) if recipe.optimizer.ema else None,
    )


def state_shapes(recipe: Recipe) -> TrainState:
    """The form of the recipe's state: jax.ShapeDtypeStruct in the place of each array."""
    sizes = recipe.draft.sizes
    weights = {
        path: jax.ShapeDtypeStruct(tuple(sizes[letter] for letter in letters.split()), jnp.float32)
        for path, letters in flatten(axes(recipe.draft)).items()
    }
    return jax.eval_shape(partial(_state, recipe, seed=0), weights)


def state_partitions(recipe: Recipe) -> TrainState:
    """How the state lies on the mesh in context: jax.sharding.PartitionSpec in the place of each array.

    What has a weight's name and shape lies as the weight does, the rest is whole everywhere.
    """
    form = state_shapes(recipe)
    letters = flatten(axes(recipe.draft))

    def one(path: Any, leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
        name = getattr(path[-1], "key", None)
        if name in letters and leaf.shape == form.weights[name].shape:
            return stored_spec(letters[name])
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(one, form)


def state_shardings(recipe: Recipe, mesh: jax.sharding.Mesh) -> TrainState:
    """`state_partitions` on a mesh, for restoring a checkpoint: a NamedSharding in the place of each array."""
    with jax.set_mesh(mesh):
        where = state_partitions(recipe)
    return jax.tree.map(partial(NamedSharding, mesh), where, is_leaf=lambda x: isinstance(x, PartitionSpec))


def checkpoint_form(recipe: Recipe) -> TrainState:
    """What a checkpoint is restored as: jax.ShapeDtypeStruct in the place of each array, with its sharding.

    On the mesh in context, or else on the default device.
    """
    whole = state_shapes(recipe)
    if jax.sharding.get_abstract_mesh().empty:
        where = jax.tree.map(lambda _: SingleDeviceSharding(own_devices()[0]), whole)
    else:
        where = state_shardings(recipe, jax.sharding.get_mesh())
    return jax.tree.map(lambda x, laid: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=laid), whole, where)


def exported_weights(state: TrainState) -> dict[str, Array]:
    """The drafter that a run hands out, by path: the moving average where there is one."""
    return state.weights | (state.average or {})


def _laid(tree: Any, where: Any) -> Any:
    """The tree on the mesh in context, if there is one, by partitions."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, where)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(recipe: Recipe, state: TrainState, frozen: Target, inputs: Inputs) -> tuple[TrainState, Metrics]:
    """One update from a batch of `accumulate` parts, whose loss is that of the batch in one piece.

    A step whose loss or gradient is not finite leaves the weights, their average and the optimizer as they were, and
    says so in its metrics.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    chosen, valid = anchors.draw_anchors(key, inputs.mask, recipe.objective.anchors, inputs.starts)
    lam = lambda_base(recipe, state.step)
    objective = recipe.objective
    total = loss_denominator(objective, supervision(recipe.draft, objective.loss, inputs, chosen, valid))
    ours = trained(recipe, state.weights)
    where = state_partitions(recipe)

    def loss(ours: dict[str, Array], piece: tuple[Inputs, Array, Array]) -> tuple[Array, Sums]:
        weights = state.weights | ours
        drafter = drafter_of(recipe, weights)
        return partial_loss(drafter, frozen, (recipe.target, recipe.draft), objective, *piece, lam, total)

    def differentiate(piece: tuple[Inputs, Array, Array]) -> tuple[Array, Sums, dict[str, Array]]:
        (value, sums), gradient = jax.value_and_grad(loss, has_aux=True)(ours, piece)
        return value, sums, _laid(gradient, trained(recipe, where.weights))

    batch = (inputs, chosen, valid)
    if recipe.accumulate == 1:
        value, sums, gradient = differentiate(batch)
    else:
        pieces = jax.tree.map(partial(_parts, recipe.accumulate), batch)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(differentiate, jax.tree.map(lambda x: x[0], pieces))
        )

        def add(so_far: Any, piece: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, so_far, differentiate(piece)), None

        (value, sums, gradient), _ = jax.lax.scan(add, zeros, pieces)
    norm = optax.tree.norm(gradient)
    updates, moments = recipe_optimizer(recipe).update(gradient, state.optimizer, ours)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)

    def keep(new: Array, old: Array) -> Array:
        return jnp.where(finite, new, old)

    moved = jax.tree.map(keep, optax.apply_updates(ours, updates), ours)
    average = None
    if state.average is not None:
        # Where the weights stayed as they were, so does their average.
        decay = recipe.optimizer.ema
        average = jax.tree.map(lambda mean, w: keep(decay * mean + (1 - decay) * w, mean), state.average, moved)
    updated = TrainState(
        step=state.step + 1,
        weights=state.weights | moved,
        optimizer=jax.tree.map(keep, moments, state.optimizer),
        key=state.key,
        average=average,
    )
    lr = learning_rate(recipe.optimizer, recipe.steps, recipe.optimizer.lr)(state.step)
    metrics = Metrics(step_metrics(sums, lam, total), lam, jnp.asarray(lr), norm, finite)
    return _laid(updated, where), metrics


def _parts(count: int, x: Array) -> Array:
    """[B, ...] -> [count, B / count, ...]: part i has the rows i, i + count, ..., so that each device has some of each.

    Raises:
        DominoError: the rows of a part can't be divided over the devices.
    """
    rows = x.shape[0]
    if rows % (count * row_shards()):
        raise DominoError(
            f"a batch of {rows} rows can't be divided into --accumulate {count} parts over {row_shards()} devices: "
            f"give a multiple of {count * row_shards()}."
        )
    return x.reshape(rows // count, count, *x.shape[1:]).swapaxes(0, 1)
