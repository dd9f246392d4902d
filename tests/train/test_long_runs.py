"""What a long run decides from what is on disk: the best drafter, the usual gradient, where a state is restored to."""

from threading import Event
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from training import change_recipe

from convert import folders, hf, orbax
from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.errors import DominoError
from domino_jax.sharding import stored_spec
from domino_jax.weights import axes, flatten, init_weights
from train import mesh, run, step
from train.checkpoint import Checkpoints
from train.config import Objective, OptimizerConfig, Recipe
from train.demo import command
from train.monitor import curves, progress
from train.monitor.divergence import DivergenceMonitor
from train.options import parse_options

TARGET = TargetConfig(40, 32, 3, 4, 2, 8, 48, 1e-6, 1e4, 64, True)
DRAFT = DraftConfig(
    **TARGET.geometry(num_hidden_layers=1),
    block_size=4,
    mask_token_id=39,
    target_layer_ids=(0, 2),
    num_target_layers=3,
    shift_label=True,
    head=DominoHead(8, 6, 1),
)


RECIPE = Recipe(TARGET, DRAFT, Objective(), OptimizerConfig(), steps=20, dtype="float32")


def test_a_checkpoint_is_restored_without_a_second_state(tmp_path):
    """What it is read into holds no arrays, and lies where a state that `start` makes does."""
    asked = change_recipe(RECIPE, ema=0.5)
    state = step.init_state(asked, flatten(init_weights(DRAFT, jax.random.key(2))), 0)
    saved = Checkpoints(tmp_path)
    saved.save(state)
    saved.finish()
    options = SimpleNamespace(resume=True)
    setup = SimpleNamespace(options=options, recipe=asked)
    with jax.set_mesh(mesh.make_training_mesh("data=2,fsdp=2,model=2", [TARGET, DRAFT])):
        found = run.initial_state(setup, saved)  # type: ignore[arg-type]
        fresh = step.init_state(asked, flatten(init_weights(DRAFT, jax.random.key(2))), 0)
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(step.checkpoint_form(asked)))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for ours, theirs, place in zip(*map(jax.tree.leaves, (found, state, fresh)), strict=True):
        assert np.array_equal(ours, theirs) and ours.sharding.is_equivalent_to(place.sharding, ours.ndim)


def test_the_best_is_known_while_its_checkpoint_is_still_being_written():
    exported = []
    loop = SimpleNamespace(
        setup=SimpleNamespace(validation=SimpleNamespace(run=lambda *_: report)),
        checkpoints=SimpleNamespace(best=lambda: None),  # as Orbax has it until the files have their names
        state=SimpleNamespace(weights={}, average=None),
        log=None,
        best=(10, 2.0),
        export=lambda name: exported.append((loop.done, name)),
    )
    for loop.done, tau in ((20, 1.9), (30, 3.0), (40, 2.5)):
        report = SimpleNamespace(final=SimpleNamespace(tau=tau))
        assert run.Loop.validate(loop, None, Event().is_set) == tau  # type: ignore[arg-type]
    assert exported == [(30, "best")]


def test_a_resumed_run_knows_which_gradients_are_usual(tmp_path):
    """It would else accept the very step that it stopped at, if that is soon after the checkpoint."""
    rows = [{"step": s, "gradient_norm": 1.0 + s / 1000} for s in range(10, 610, 10)]
    curves.write_metrics([*rows, {"step": 400, "validation_tau": 2.0}], tmp_path / "metrics.jsonl")
    norms = run.Loop.norms(SimpleNamespace(folder=tmp_path, done=400))  # type: ignore[arg-type]
    assert len(norms) == 40 and norms[-1] == pytest.approx(1.4)
    assert "exploded" in str(DivergenceMonitor(10.0, norms).problem(True, 1.0, 50.0))
    assert DivergenceMonitor(10.0).problem(True, 1.0, 50.0) is None


def test_a_gradient_that_begins_at_zero_does_not_explode():
    """The head alone, at λ = 1: a cosine keeps λ at 1 for some steps of a long run, to the rounding of float32."""
    watch = DivergenceMonitor(1000.0)
    assert not any(watch.problem(True, 1.0, 0.0) for _ in range(30))
    assert watch.problem(True, 1.0, 1e-6) is None


def test_a_head_alone_needs_a_backbone():
    words = ["--target", "x", "--data", "y", "--freeze-backbone"]
    with pytest.raises(DominoError, match="give --init-from a drafter"):
        parse_options(words)
    assert parse_options([*words, "--init-from", "z"]).drafter.freeze_backbone


def test_the_demo_goes_on_with_a_training_that_was_interrupted(tmp_path, monkeypatch):
    began = []

    def begin(words, env):
        began.append(words[3])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(command.subprocess, "run", begin)
    options = command.Demo(tmp_path, "demo", steps=20)
    assert command.run_demo(options) == 0
    began.clear()
    for name in ("prompts0.jsonl", "prompts1.jsonl", "heldout.jsonl"):
        (tmp_path / name).touch()
    drafter = tmp_path / "run" / "drafter"
    drafter.mkdir(parents=True)
    (drafter / "config.json").touch()  # which an interruption writes too
    (tmp_path / "run" / "checkpoints" / "7").mkdir(parents=True)
    assert command.run_demo(options) == 0
    rest = ["train.prompts", "train", "train.validate"]
    assert began == ["train.regenerate", "train.regenerate", "train", *rest]
    (tmp_path / "run" / "checkpoints" / "20").mkdir()
    began.clear()
    assert command.run_demo(options) == 0 and began == rest


def test_a_drafter_that_is_written_again_is_never_missing(tmp_path, monkeypatch):
    """Somebody may read it, or the process die, at any moment."""
    hf.save_hf(tmp_path, init_weights(DRAFT, jax.random.key(0)), DRAFT, DRAFT.to_hf())
    seen, real = [], hf.Path.replace

    def replace(path, other):
        seen.append((tmp_path / "model.safetensors").exists())
        return real(path, other)

    monkeypatch.setattr(hf.Path, "replace", replace)
    hf.save_hf(tmp_path, init_weights(DRAFT, jax.random.key(1)), DRAFT, DRAFT.to_hf())
    assert seen and all(seen)


@pytest.mark.parametrize("kind", ["Hugging Face", "Orbax"])
def test_a_target_is_divided_while_it_is_read(kind, tmp_path):
    """A model that fits its devices only in parts never lies whole on one of them."""
    module = init_weights(TARGET, jax.random.key(0))
    hf.save_hf(tmp_path, module, TARGET, TARGET.to_hf())
    if kind == "Orbax":
        orbax.save_orbax(tmp_path, module)
        (tmp_path / "model.safetensors").unlink()
    made = mesh.make_training_mesh("data=2,fsdp=2,model=2", [TARGET])
    read = folders.load_weights(tmp_path, TARGET, None, None, made)
    placed = flatten(mesh.place_module(read, TARGET, made))
    letters = flatten(axes(TARGET))
    for path, weight in flatten(read).items():
        assert weight.sharding.is_equivalent_to(NamedSharding(made, stored_spec(letters[path], made)), weight.ndim), (
            path
        )
        assert placed[path] is weight
        assert np.array_equal(weight, flatten(module)[path])


def test_reading_says_how_far_it_is_where_it_takes_long(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    count = progress.counting("lines read", said.append)
    for lines in range(1000, 6000, 1000):
        now[0] += 4
        count(lines)
    assert said == ["3,000 lines read"]
