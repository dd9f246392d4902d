"""The step: accumulation, what is trained, averages, schedules, and the same on a mesh as on one device."""

import dataclasses
import os
import re
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import change_recipe

from convert import hf
from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.drafters.heads.markov import MarkovHead
from domino_jax.drafters.heads.selector import SelectorHead
from domino_jax.errors import DominoError
from domino_jax.sharding import parse_training_mesh
from domino_jax.weights import flatten, init_weights
from train import anchors, mesh
from train.config import Objective, OptimizerConfig, Recipe
from train.loss import Inputs
from train.step import TrainState, exported_weights, init_state, lambda_base, state_shapes, state_shardings, train_step

# Every mesh of eight devices divides these; the MLP widths differ so that axes can't be mistaken.
TARGET = TargetConfig(96, 16, 1, 8, 4, 6, 24, 1e-6, 1e4, 64, True)
DRAFT = DraftConfig(96, 16, 1, 4, 4, 6, 40, 1e-6, 1e4, 64, 4, 95, (0,), 1, True, DominoHead(8, 8, 1))
ROWS, LENGTH = 8, 20
RECIPE = Recipe(
    TARGET,
    DRAFT,
    Objective(gamma=4.0, anchors=5, lambda_base_start=0.5, lambda_base_decay_ratio=0.5, chunk=7),
    OptimizerConfig(lr=1e-2, warmup=0.0, weight_decay=0.1),
    steps=20,
    dtype="float32",
)


class Rows(NamedTuple):
    ids: np.ndarray
    mask: np.ndarray
    starts: np.ndarray


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def optax_mixes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def rows(seed: int = 0, count: int = ROWS) -> Rows:
    """Packed rows, some tokens off the mask: the parts of a batch have unequal numbers of supervised proposals."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 95, (count, LENGTH)).astype(np.int32)
    mask = rng.random((count, LENGTH)) < np.linspace(0.4, 1, count)[:, None]
    starts = np.where(np.arange(LENGTH) < 9, 0, 9) * (np.arange(count) % 2)[:, None]
    return Rows(ids, mask, starts.astype(np.int32))


def inputs(seed: int = 0, count: int = ROWS) -> Inputs:
    return mesh.put_batch(rows(seed, count), None)


def frozen() -> Any:
    return init_weights(TARGET, jax.random.key(1), std=0.3)


def begin(recipe: Recipe) -> TrainState:
    return init_state(recipe, flatten(init_weights(recipe.draft, jax.random.key(2), std=0.3)), 0)


def host(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)


def close(found: Any, expected: Any, relative: float = 1e-5) -> None:
    """Each array within `relative` of its own largest number."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(found)[0], jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= relative * max(np.abs(b).max(), 1e-6), jax.tree_util.keystr(path)


def run(recipe: Recipe, steps: int = 2) -> tuple[Any, Any]:
    """State and metrics after some steps on one device, on the host."""
    state, metrics = begin(recipe), None
    for step in range(steps):
        state, metrics = train_step(recipe, state, frozen(), inputs(step))
    return host((state, metrics))


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["exponential", "d-pace"])
def test_accumulating_gives_the_step_of_the_whole_batch(weights):
    """The parts differ in how much of them is supervised: a mean of their means would be another loss."""
    recipe = change_recipe(RECIPE, position_weights=weights)
    (whole, told), (parts, told_of_parts) = (run(change_recipe(recipe, accumulate=n), 1) for n in (1, 4))
    close(told_of_parts, told)
    # Adam's first moment is the gradient.
    close(parts.optimizer[1][0].mu, whole.optimizer[1][0].mu)
    with pytest.raises(DominoError, match="8 rows can't be divided into --accumulate 3"):
        run(change_recipe(recipe, accumulate=3), 1)


ALL_AXES = "data=2,fsdp=2,model=2"
ON_MESHES = [
    ("adamw", "data=2,model=4"),
    pytest.param("adamw", ALL_AXES, marks=pytest.mark.slow),
    pytest.param("adamw", "fsdp=8", marks=pytest.mark.slow),
    pytest.param("muon", "data=2,model=4", marks=pytest.mark.slow),
    pytest.param("muon", ALL_AXES, marks=pytest.mark.slow),
    pytest.param("muon", "fsdp=8", marks=pytest.mark.slow),
    pytest.param("dspark", ALL_AXES, marks=pytest.mark.slow),
    pytest.param("rnn", "data=2,model=4", marks=pytest.mark.slow),
    pytest.param("selector", ALL_AXES, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def alone() -> Any:
    """The steps of one device, by kind."""

    @cache
    def of(kind: str) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return run(changed(kind))

    return of


# Between them: both optimizers, attention in groups, recomputing, accumulating, KL and D-PACE, an average.
KINDS = {
    "adamw": {"remat": True, "ema": 0.9, "block_attention": "dense"},
    "muon": {"optimizer": "muon", "loss": "kl", "position_weights": "d-pace"},
    "dspark": {"draft": dataclasses.replace(DRAFT, head=MarkovHead(8, "gated", True)), "loss": "dspark"},
    "selector": {"draft": dataclasses.replace(DRAFT, head=SelectorHead(8, 6))},
    "rnn": {
        "draft": dataclasses.replace(DRAFT, head=MarkovHead(8, "rnn"), causal=True),
        "loss": "acceptance",
        "position_weights": "uniform",
    },
}


def changed(kind: str) -> Recipe:
    return change_recipe(RECIPE, **KINDS[kind])


def on_mesh(recipe: Recipe, text: str, steps: int = 2) -> tuple[TrainState, Any]:
    made = mesh.make_training_mesh(text, (TARGET, DRAFT))
    with jax.set_mesh(made):
        target, state, metrics = mesh.place_module(frozen(), TARGET, made), begin(recipe), None
        for step in range(steps):
            state, metrics = train_step(recipe, state, target, mesh.put_batch(rows(step), made))
        return state, metrics


@pytest.mark.parametrize(("kind", "text"), ON_MESHES)
def test_a_mesh_gives_the_steps_of_one_device(alone, kind, text):
    """Loss, gradient (Adam's and Muon's moments, its norm), and what becomes of the weights after two steps."""
    recipe = changed(kind)
    state, metrics = on_mesh(recipe, text)
    expected, told = alone(kind)
    close(host(metrics), told)
    close(host(state.weights), expected.weights, 2e-4 if kind == "muon" else 1e-4)
    moments = [leaf for leaf in jax.tree.leaves(host(state.optimizer)) if leaf.ndim > 1]
    assert moments
    close(host(state.optimizer), expected.optimizer)
    sizes = dict(zip(("data", "fsdp", "model"), parse_training_mesh(text), strict=True))
    for tree in (state.weights, state.average or {}):
        for path in set(tree) & {"layers.0.q", "head.proj_out"}:
            w = tree[path]
            divided = (4 // sizes["model"], 6, 16 // sizes["fsdp"])  # N H D
            if path == "head.proj_out":
                divided = (96 // sizes["model"], 8 // sizes["fsdp"])
            assert w.sharding.shard_shape(w.shape) == divided, path


@pytest.mark.slow
def test_accumulating_on_a_mesh_too(alone):
    state, metrics = on_mesh(change_recipe(changed("adamw"), accumulate=2), ALL_AXES)
    close(host(metrics), alone("adamw")[1])
    close(host(state.optimizer), alone("adamw")[0].optimizer)


COLLECTIVE = re.compile(r"= (.+?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(-start)?\(")


def test_no_logits_cross_between_devices():
    """Of a vocabulary larger than everything else, only the weights that are as long are moved whole, over fsdp."""
    vocab = 4096
    target = TargetConfig(vocab, 16, 1, 4, 2, 8, 16, 1e-6, 1e4, 64, False)
    draft = DraftConfig(vocab, 16, 1, 4, 2, 8, 16, 1e-6, 1e4, 64, 4, 3, (0,), 1, True, DominoHead(8, 8, 1))
    recipe = change_recipe(RECIPE, target=target, draft=draft, chunk=20, anchors=8)
    made = mesh.make_training_mesh("data=2,fsdp=2,model=2", (target, draft))
    with jax.set_mesh(made):
        state = begin(recipe)
        model = mesh.place_module(init_weights(target, jax.random.key(1)), target, made)
        text = train_step.lower(recipe, state, model, mesh.put_batch(rows(), made)).compile().as_text() or ""
    moved = []
    for shapes_, kind, _ in COLLECTIVE.findall(text):
        for shape in re.findall(r"\w+\[([\d,]*)\]", shapes_):
            moved.append((kind, [int(n) for n in shape.split(",") if n]))
    assert moved
    # Logits of a chunk are [1, 20, V / 2] here; weights as long as the vocabulary are at most 16 wide.
    large = [(kind, shape) for kind, shape in moved if np.prod(shape) > 1024 and max(shape) >= vocab // 2]
    for kind, shape in large:
        assert 20 not in shape and min(n for n in shape if n > 1) <= 16, (kind, shape)
    assert any(kind == "all-gather" for kind, _ in large), "the LM head is gathered over fsdp"


PROCESS = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
from tests.train import test_step as here
from train import mesh
recipe = here.changed("adamw")
made = mesh.make_training_mesh(sys.argv[3], (here.TARGET, here.DRAFT))
first, count = mesh.piece(made)
with jax.set_mesh(made):
    target, state = mesh.place_module(here.frozen(), here.TARGET, made), here.begin(recipe)
    for step in range(2):
        whole, size = here.rows(step), here.ROWS // count
        mine = here.Rows(*(x[first * size : (first + 1) * size] for x in whole))
        state, metrics = here.train_step(recipe, state, target, mesh.put_batch(mine, made))
print("piece", first, count, float(metrics.report.loss), float(metrics.gradient_norm), flush=True)
"""


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize(("text", "pieces"), [("fsdp=4", [(0, 2), (1, 2)]), ("model=4", [(0, 1), (0, 1)])])
def test_two_processes_give_the_steps_of_one(alone, text, pieces):
    """Each reads its own rows; where `model` lies across both, they read the same."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests' / 'support'}", "XLA_FLAGS": ""}
    words = [sys.executable, "-c", PROCESS, str(port)]
    running = [
        subprocess.Popen([*words, str(i), text], cwd=root, env=environment, text=True, stdout=-1, stderr=-1)
        for i in range(2)
    ]
    said = [process.communicate(timeout=240) for process in running]
    told = alone("adamw")[1]
    for (out, err), piece in zip(said, pieces, strict=True):
        assert "piece" in out, err
        first, count, loss, norm = out.split("piece")[1].split()
        assert (int(first), int(count)) == piece
        assert float(loss) == pytest.approx(float(told.report.loss), rel=1e-5)
        assert float(norm) == pytest.approx(float(told.gradient_norm), rel=1e-5)


def test_a_restored_state_knows_its_mesh():
    """`shardings` and `shapes` are of the state that `start` makes, so that a checkpoint can be read into them."""
    for recipe in (changed("adamw"), changed("muon"), change_recipe(RECIPE, freeze_backbone=True)):
        made = mesh.make_training_mesh("data=2,fsdp=2,model=2", (TARGET, DRAFT))
        where, form = state_shardings(recipe, made), state_shapes(recipe)
        with jax.set_mesh(made):
            state = begin(recipe)
        assert jax.tree.structure(where) == jax.tree.structure(state) == jax.tree.structure(form)
        for place, leaf, shape in zip(*(jax.tree.leaves(t) for t in (where, state, form)), strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
            assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
        close(host(state), host(begin(recipe)))
        whole = [
            leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim > 1 and leaf.sharding.is_fully_replicated
        ]
        assert not whole, "what has a matrix's shape is divided as it is"


def test_a_target_is_read_onto_the_mesh_as_it_is_stored(tmp_path):
    hf.save_hf(tmp_path, frozen(), TARGET, TARGET.to_hf())
    made = mesh.make_training_mesh(ALL_AXES, (TARGET, DRAFT))
    target = mesh.place_module(hf.load_hf(tmp_path, TARGET, jnp.float32, mesh=made), TARGET, made)
    parts = {path: w.sharding.shard_shape(w.shape) for path, w in flatten(target).items()}
    assert parts["embed"] == (48, 8) and parts["layers.0.o"] == (8, 24) and parts["layers.0.down"] == (8, 12)
    assert parts["norm"] == (16,)
    close(host(flatten(target)), host(flatten(frozen())), 0)


def test_meshes_that_do_not_fit_are_refused():
    for text, message in (
        ("model=8", "model=8 does not divide num_key_value_heads 4"),
        ("fsdp=3", "fsdp=3 does not divide the 16 of embed's axis D"),
        ("data=16", "needs 16 devices; found 8"),
        ("rows=2", "data=1,fsdp=4,model=2"),
    ):
        with pytest.raises(DominoError, match=message):
            mesh.make_training_mesh(text, (TARGET, DRAFT))
    odd = dataclasses.replace(TARGET, vocab_size=97)
    with pytest.raises(DominoError, match="model=2 does not divide vocab_size 97"):
        mesh.make_training_mesh("model=2", (odd,))
    made = mesh.make_training_mesh("data=4", (TARGET,))
    assert mesh.piece(made) == (0, 1) == mesh.piece(None)
    with pytest.raises(DominoError, match="6 rows can't be divided over data x fsdp = 4"):
        mesh.put_batch(rows(0, 6), made)


def test_head_only_training_leaves_the_backbone_as_it_is():
    recipe = change_recipe(RECIPE, freeze_backbone=True, lambda_base_start=0.0, ema=0.5)
    before = host(begin(recipe).weights)
    state, metrics = run(recipe)
    moved = {path for path, w in state.weights.items() if np.abs(w - before[path]).max() > 1e-6}
    head = {path for path in before if path.startswith("head.")}
    assert moved == head == set(state.average)
    of_optimizer = {
        path[-1].key for path, _ in jax.tree_util.tree_flatten_with_path(state.optimizer)[0] if hasattr(path[-1], "key")
    }
    assert of_optimizer == head, "no state for what is not trained"
    assert metrics.gradient_norm > 0
    assert (state_shapes(change_recipe(recipe, optimizer="muon")).average or {}).keys() == head
    bare = dataclasses.replace(DRAFT, head=None)
    with pytest.raises(DominoError, match="no causal head"):
        begin(change_recipe(recipe, draft=bare))


def test_the_average_follows_the_weights():
    recipe = changed("adamw")
    state = begin(recipe)
    mean = host(state.weights)
    for step in range(3):
        state, _ = train_step(recipe, state, frozen(), inputs(step))
        mean = {path: 0.9 * mean[path] + 0.1 * np.asarray(w) for path, w in state.weights.items()}
    close(host(state.average), mean)
    assert np.abs(mean["fc"] - np.asarray(state.weights["fc"])).max() > 1e-3
    assert state.average is not None and exported_weights(state)["fc"] is state.average["fc"]
    assert exported_weights(begin(RECIPE)).keys() == mean.keys() and begin(RECIPE).average is None


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_changes_nothing(accumulate):
    recipe = change_recipe(changed("adamw"), accumulate=accumulate)
    state = begin(recipe)
    state, _ = train_step(recipe, state, frozen(), inputs())
    before = host(state)
    poisoned = frozen()
    poisoned.embed = poisoned.embed.at[3].set(jnp.nan)
    given = inputs()
    state, metrics = train_step(recipe, state, poisoned, given._replace(ids=given.ids.at[3].set(3)))
    assert not metrics.finite
    for a, b in zip(jax.tree.leaves(state._replace(step=before.step)), jax.tree.leaves(before), strict=True):
        assert np.array_equal(a, b)
    assert int(state.step) == 2


def test_lambda_follows_its_schedule():
    steps = [0, 5, 10, 15]
    made = change_recipe(RECIPE, lambda_base_start=0.8)

    def values(**changes) -> list[float]:
        return [float(lambda_base(change_recipe(made, **changes), jnp.int32(s))) for s in steps]

    assert values() == pytest.approx([0.8, 0.4, 0.0, 0.0])
    assert values(lambda_schedule="cosine", lambda_base_decay_ratio=1.0) == pytest.approx(
        [0.8, 0.4 * (1 + 0.5**0.5), 0.4, 0.4 * (1 - 0.5**0.5)], abs=1e-6
    )
    assert values(lambda_schedule="constant") == pytest.approx([0.8] * 4)
    assert values(lambda_base_decay_ratio=0.0) == [0, 0, 0, 0]
    assert values(lambda_base_floor=0.2) == pytest.approx([0.8, 0.5, 0.2, 0.2])
    assert values(lambda_base_floor=0.2, lambda_base_decay_ratio=0.0) == pytest.approx([0.2] * 4)
    assert values(lambda_base_floor=0.2, lambda_schedule="cosine", lambda_base_decay_ratio=1.0) == pytest.approx(
        [0.8, 0.2 + 0.3 * (1 + 0.5**0.5), 0.5, 0.2 + 0.3 * (1 - 0.5**0.5)], abs=1e-6
    )
    assert values(lambda_base_floor=0.8) == pytest.approx([0.8] * 4)


@pytest.mark.parametrize("lam", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_only_the_branch_that_counts_learns(lam):
    """At λ = 1 the head gets no gradient; at λ = 0 it does."""
    recipe = change_recipe(RECIPE, lambda_base_start=lam, lambda_schedule="constant", weight_decay=0.0)
    before = host(begin(recipe).weights)
    state, metrics = run(recipe)
    assert metrics.lam == lam
    moved = {k for k, v in state.weights.items() if np.abs(v - before[k]).max() > 1e-6}
    head = {k for k in before if k.startswith("head.")}
    assert ("fc" in moved) and (head <= moved if lam == 0 else not head & moved)


@pytest.mark.slow
def test_computing_in_bfloat16_keeps_float32_masters():
    state, metrics = run(change_recipe(RECIPE, dtype="bfloat16", accumulate=2, remat=True, block_attention="chunked"))
    _, exact = run(RECIPE)
    assert {w.dtype for w in jax.tree.leaves(state.weights)} == {np.dtype("float32")}
    assert metrics.report.loss == pytest.approx(exact.report.loss, rel=0.03) and metrics.finite


@pytest.mark.e2e
def test_anchors_are_a_uniform_draw_without_replacement():
    mask = jnp.asarray([[True, True, False, True, True, True, False], [False] * 7])
    counts = np.zeros(7)
    drawn, valid = jax.jit(jax.vmap(lambda k: anchors.draw_anchors(k, mask, 2)))(
        jax.random.split(jax.random.key(0), 3000)
    )
    drawn, valid = np.asarray(drawn), np.asarray(valid)
    assert not valid[:, 1].any()  # a sequence with no legal place has no anchor
    assert valid[:, 0].all()
    assert (drawn[:, 0, 0] != drawn[:, 0, 1]).all()
    np.add.at(counts, drawn[:, 0].ravel(), 1)
    assert set(np.flatnonzero(counts)) == {0, 3, 4}  # on at a and at a + 1
    assert np.ptp(counts[[0, 3, 4]]) < 250  # 2000 each; the standard deviation is 26
