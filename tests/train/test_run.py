"""What a run settles before it reads data and weights: its drafter; and how soon it stops."""

import dataclasses
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import factory
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import hf
from domino_jax import layers
from domino_jax.drafters import block
from domino_jax.drafters.convolution import Convolution
from domino_jax.errors import DominoError
from domino_jax.weights import axes, flatten, unflatten
from train import run
from train.config import DrafterOptions, TrainConfig
from train.init import check_target_layers, from_target, read_first_drafter
from train.run import settle_drafter
from train.stopping import agreed_stop

TARGET = dataclasses.replace(factory.TARGET, num_hidden_layers=9)


def settled(out: Path, resume: bool = False, **drafter: object) -> tuple[TrainConfig, dict]:
    options = DrafterOptions(layers=2, mask_token_id=3, **drafter)  # type: ignore[arg-type]
    found, draft = settle_drafter(TrainConfig(out=out, resume=resume, drafter=options), TARGET)
    return found, draft.to_hf()


def test_what_is_chosen_by_default_is_saved_with_the_run(tmp_path):
    """A later version may choose otherwise, and a resumed run must not."""
    found, raw = settled(tmp_path, head="none")
    assert (found.drafter.target_layer_ids, found.drafter.shift_label) == ((1, 6), False)
    assert raw["dflash_config"]["target_layer_ids"] == [1, 6]


def test_a_resumed_run_keeps_the_layers_that_its_drafter_reads(tmp_path):
    _, raw = settled(tmp_path, target_layer_ids=(2, 8))
    hf.write_json(tmp_path / "config.json", raw)
    found, again = settled(tmp_path, resume=True)  # its settings do not say which
    assert found.drafter.target_layer_ids == (2, 8) and again == raw


@pytest.mark.parametrize(
    "change", [{"block_size": 9}, {"shift_label": False}, {"head": "none"}, {"target_layer_ids": (2, 7)}], ids=str
)
def test_a_resumed_run_whose_drafter_would_be_another_is_refused(tmp_path, change):
    hf.write_json(tmp_path / "config.json", settled(tmp_path, target_layer_ids=(2, 8))[1])
    with pytest.raises(DominoError, match=r"config\.json is of another drafter than .*settings\.toml"):
        settled(tmp_path, resume=True, **change)


def test_the_drafter_to_begin_with_is_read_with_the_settings_and_not_with_the_weights(tmp_path):
    draft = factory.draft_config(TARGET)
    unshifted = dataclasses.replace(draft, shift_label=False)

    def folder(name: str, raw: dict) -> Path:
        (tmp_path / name).mkdir()
        hf.write_json(tmp_path / name / "config.json", raw)
        return tmp_path / name

    assert read_first_drafter(folder("same", draft.to_hf()), draft).warnings == []
    assert read_first_drafter(folder("plain", dataclasses.replace(draft, head=None).to_hf()), draft).warnings == []
    calibrated = dataclasses.replace(draft, confidence_temperatures=(2.0,) * draft.num_proposals)
    assert read_first_drafter(folder("calibrated", calibrated.to_hf()), draft).warnings == []
    raw = unshifted.to_hf()
    del raw["dflash_config"]["shift_label"]
    guessed = folder("guessed", raw)
    (warning,) = read_first_drafter(guessed, unshifted).warnings
    assert "no shift_label" in warning
    for place, words in (
        (guessed, "has shift_label False, this one True"),
        (folder("target", TARGET.to_hf()), "is not a drafter"),
        (tmp_path / "none", "none is not a folder"),
    ):
        with pytest.raises(DominoError, match=words):
            read_first_drafter(place, draft)


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": 10, "windows": ()}, {"intermediate_size": 41}, {"target_layer_ids": (8,)}],
    ids=["more layers", "another width", "the last layer alone"],
)
def test_a_drafter_that_can_not_begin_as_the_targets_last_layers_is_refused(change):
    same = factory.draft_config(TARGET, **TARGET.geometry(num_hidden_layers=2))
    check_target_layers(same, TARGET)
    with pytest.raises(DominoError, match="can begin as the target's last layers only if"):
        check_target_layers(dataclasses.replace(same, **change), TARGET)


@pytest.mark.parametrize("changes", [{"qk_norm": False}, {"qk_norm": False, "qkv_bias": True}], ids=["Llama", "Qwen2"])
def test_a_drafter_of_a_target_without_norms_of_q_and_k_begins_with_their_size(changes):
    """Its layers have these norms, and queries and keys are about as large after them as the target's."""
    target = dataclasses.replace(TARGET, **changes)
    draft = factory.draft_config(target, **target.geometry(num_hidden_layers=2))
    theirs, ours = factory.random_weights(target, 0, scale=0.7), factory.random_weights(draft, 1)
    made = unflatten(draft, from_target(flatten(ours), draft, target, theirs))
    rng = np.random.default_rng(0)
    y = jnp.asarray(rng.normal(size=(1, 50, target.hidden_size)), jnp.float32)
    for mine, layer in zip(made.layers, theirs.layers[-2:], strict=True):
        np.testing.assert_array_equal(mine.kv, layer.kv)
        angles = layers.rotary(jnp.arange(50), target)
        for project in (layers.queries, lambda *given: layers.keys_values(*given)[0]):
            one, other = (
                float(jnp.sqrt(jnp.mean(jnp.square(project(of, y * layer.input_norm, angles, 1e-5)))))
                for of in (mine, without_bias(layer))
            )
            assert 0.9 < one / other < 1.1


def without_bias(layer):
    """The layer as the drafter's copy has it: Qwen2's biases are left out."""
    same = jax.tree.map(lambda leaf: leaf, layer)
    same.q_bias = same.kv_bias = nnx.data(None)
    return same


def test_few_steps_are_started_ahead_so_that_a_signal_is_heard_within_seconds(monkeypatch):
    """However long it is until the next step that is logged: all that were started would have to end first."""
    waited: list[object] = []
    inputs = SimpleNamespace(_replace=lambda **_: inputs)
    monkeypatch.setattr(run.meshes, "put_batch", lambda *_: inputs)
    monkeypatch.setattr(run, "train_step", lambda recipe, state, frozen, given: (state + 1, f"metrics {state}"))
    monkeypatch.setattr(run.jax, "block_until_ready", waited.append)
    loop = object.__new__(run.Loop)
    objective, data = SimpleNamespace(loss="ce"), SimpleNamespace(pack=False)
    loop.setup = SimpleNamespace(  # type: ignore[assignment]
        recipe=SimpleNamespace(objective=objective), options=SimpleNamespace(data=data), mesh=None, frozen=None
    )
    loop.state, loop.pending, loop.done, loop.first = 0, [], 0, -5  # type: ignore[assignment]
    for _ in range(6):
        loop.step(None, None)  # type: ignore[arg-type]
    assert waited == [f"metrics {number}" for number in range(6 - run.AHEAD)]


@pytest.mark.parametrize("asked", [1, 3, 50])
def test_processes_agree_by_counts_of_calls_that_never_come_twice(monkeypatch, asked):
    """Also where one process trains twice, and where validations ask between the steps."""
    seen: list[int] = []

    def reached(number: int) -> bool:
        seen.append(number)
        return len(seen) % asked == 0

    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.experimental.multihost_utils.reached_preemption_sync_point", reached)
    for _ in range(2):
        stopping = agreed_stop(Event())
        assert [stopping() for _ in range(asked + 3)] == [False] * (asked - 1) + [True] * 4
    assert seen == list(range(seen[0], seen[0] + 2 * asked))


def test_a_drafter_with_convolutions_begins_as_one_without():
    """Warm from the target's last layers: each row passes the filters as it is."""
    plain = factory.draft_config(TARGET, **TARGET.geometry(num_hidden_layers=2))
    draft = dataclasses.replace(plain, convolution=Convolution(3, 8))
    theirs, ours = factory.random_weights(TARGET, 0), flatten(factory.random_weights(draft, 1))
    assert draft.convolution
    made = from_target(ours | draft.convolution.at_first(ours), draft, TARGET, theirs)
    without = {path: made[path] for path in flatten(axes(plain))}
    assert len(made) == len(without) + 8
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 2, plain.block_size, plain.hidden_size)), jnp.float32)
    features = jnp.asarray(rng.normal(size=(1, 9, plain.sizes["LD"])), jnp.float32)
    anchors = jnp.asarray([[3, 7]], jnp.int32)
    expected = block.training_blocks(unflatten(plain, without), plain, x, anchors, features)
    np.testing.assert_allclose(
        block.training_blocks(unflatten(draft, made), draft, x, anchors, features), expected, atol=1e-6
    )
