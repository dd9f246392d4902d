"""Training over a frozen target in 8 bits, or in another quantized form: gradients, meshes, settings, whole runs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import factory
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf_files import byte_tokenizer, write_gguf
from jax.sharding import NamedSharding
from quantized_files import FORMS, quantized_model
from safetensors.numpy import save_file
from training import curriculum

from convert import folders, hf
from convert.options import DeviceOptions
from domino_jax import prepare
from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.drafters.dual_view import DualViewConfig
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.errors import DominoError
from domino_jax.matrix import Scaled
from domino_jax.runtime.command import UsageError
from domino_jax.sharding import gathered, spec, stored_spec
from domino_jax.weights import axes, flatten, init_weights, unflatten
from train import mesh, run, train
from train.__main__ import main
from train.config import Objective, OptimizerConfig, Recipe, RunConfig, TrainConfig
from train.evaluate.validate import Validate, check_validate
from train.init import copied_view, dequantized
from train.loss import Inputs, chunked_scores
from train.monitor import curves
from train.options import read_recipe, write_recipe
from train.step import init_state, train_step

TARGET = TargetConfig(96, 16, 2, 8, 4, 6, 24, 1e-6, 1e4, 64, True)
DRAFT = DraftConfig(96, 16, 1, 4, 4, 6, 40, 1e-6, 1e4, 64, 4, 95, (0,), 2, True, DominoHead(8, 8, 1))
VIEW = DualViewConfig(**TARGET.geometry(), block_size=4, mask_token_id=95)
UNTIED = dataclasses.replace(TARGET, tie_word_embeddings=False)
ALL_AXES = "data=2,fsdp=2,model=2"


@pytest.fixture(autouse=True)
def optax_mixes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def frozen(config: TargetConfig = TARGET) -> Any:
    return init_weights(config, jax.random.key(1), std=0.3)


def in_8_bits(config: TargetConfig, kind: str) -> Any:
    return prepare.quantize_target(frozen(config), config, kind)


def restated(target: Any, config: TargetConfig) -> Any:
    """The target that codes and scales mean, in plain float32 arrays, by NumPy."""

    def plain(leaf: Any) -> Any:
        if not isinstance(leaf, Scaled):
            return leaf
        return jnp.asarray(np.asarray(leaf.values).astype(np.float32) * np.asarray(leaf.scale)[..., None])

    return unflatten(config, {path: plain(leaf) for path, leaf in leaves(target, config).items()})


def leaves(target: Any, config: TargetConfig) -> dict[str, Any]:
    """By path; what is in 8 bits whole."""
    return dict(zip(flatten(axes(config)), jax.tree.structure(axes(config)).flatten_up_to(target), strict=True))


# --- Gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_the_gradient_through_the_lm_head_is_the_restatements(kind):
    """dCE/dz = (softmax(z·Wᵀ) - label)·W in float64, W codes times scales; so that of what the head adds, without W."""
    rng = np.random.default_rng(0)
    z, labels = rng.normal(size=(2, 5, 16)).astype(np.float32), rng.integers(0, 96, (2, 5))
    output = leaves(in_8_bits(UNTIED, kind), UNTIED)["lm_head"]
    assert isinstance(output, Scaled)

    def loss(z: Any) -> Any:
        final, base = chunked_scores(None, output, z, jnp.asarray(labels), None, 3)
        return (final.ce + 0 * base.ce).sum()

    found = jax.jit(jax.grad(loss))(jnp.asarray(z))
    w = np.asarray(output.values).astype(np.float64) * np.asarray(output.scale, np.float64)[:, None]
    scores = z.astype(np.float64) @ w.T
    likely = np.exp(scores - scores.max(-1, keepdims=True))
    expected = (likely / likely.sum(-1, keepdims=True) - np.eye(96)[labels]) @ w
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


CASES = [
    pytest.param(TARGET, DRAFT, "int8", {"loss": "ce"}, id="tied, int8"),
    pytest.param(UNTIED, DRAFT, "float8", {"loss": "kl"}, id="untied, float8, KL"),
    pytest.param(UNTIED, VIEW, "int8", {"loss": "kl", "position_weights": "uniform"}, id="a second view"),
    pytest.param(
        TARGET, DRAFT, "float8", {"position_weights": "d-pace", "remat": True}, id="d-pace", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("config", "draft", "kind", "objective"), CASES)
def test_loss_and_gradients_are_those_over_the_values_in_plain_float32(
    config, draft, kind, objective, quick_compilation
):
    rng = np.random.default_rng(0)
    ids, mask = jnp.asarray(rng.integers(0, 95, (2, 18)), jnp.int32), jnp.asarray(rng.random((2, 18)) < 0.9)
    anchors, valid = jnp.asarray([[0, 4, 9], [2, 11, 15]]), jnp.asarray([[True, True, True], [True, True, False]])
    drafter = flatten(init_weights(draft, jax.random.key(2), std=0.3))

    @jax.jit
    def both(drafter: Any, target: Any) -> Any:
        def loss(leaves: Any) -> Any:
            given, lam = (ids, mask, anchors, valid), jnp.float32(0.4)
            return curriculum(unflatten(draft, leaves), target, (config, draft), *given, lam=lam, chunk=7, **objective)[
                0
            ]

        return jax.value_and_grad(loss)(drafter)

    target = in_8_bits(config, kind)
    value, gradient = both(drafter, target)
    wanted, expected = both(drafter, restated(target, config))
    assert float(value) == pytest.approx(float(wanted), rel=1e-5)
    other = float(both(drafter, frozen(config))[0])
    assert abs(float(value) - other) > 1e-4, "the exact target gives another loss"
    for path, found in gradient.items():
        np.testing.assert_allclose(
            found, expected[path], atol=2e-5 * float(jnp.abs(expected[path]).max()), err_msg=path
        )


def test_what_begins_as_a_copy_of_the_target_has_the_values_that_run():
    target = in_8_bits(TARGET, "int8")
    plain, view = dequantized(target), flatten(init_weights(VIEW, jax.random.key(3)))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), plain, restated(target, TARGET)))
    copied = copied_view(view, plain)
    assert all((copied[path] == flatten(plain)[path]).all() for path in view) and copied.keys() == view.keys()


# --- Meshes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Hugging Face", "Orbax"])
def test_a_target_in_8_bits_is_divided_while_it_is_read(kind, tmp_path):
    """Codes and scales lie as the weight would, and are those of one device."""
    if kind == "Orbax":
        from convert import orbax

        hf.write_json(tmp_path / "config.json", UNTIED.to_hf())
        orbax.save_orbax(tmp_path, frozen(UNTIED))
    else:
        hf.save_hf(tmp_path, frozen(UNTIED), UNTIED, UNTIED.to_hf())
    made = mesh.make_training_mesh(ALL_AXES, [UNTIED])
    form = prepare.target_form(UNTIED, "int8")
    read = folders.load_weights(tmp_path, UNTIED, jnp.float32, None, made, form=form)
    letters, alone = flatten(axes(UNTIED)), leaves(in_8_bits(UNTIED, "int8"), UNTIED)
    placed = leaves(mesh.place_module(read, UNTIED, made), UNTIED)
    count = 0
    for path, weight in leaves(read, UNTIED).items():
        names = [letters[path]]
        if isinstance(weight, Scaled):
            count, names = count + 1, [letters[path], letters[path].rsplit(" ", 1)[0]]
        parts = zip(jax.tree.leaves(weight), jax.tree.leaves(placed[path]), jax.tree.leaves(alone[path]), strict=True)
        for axis_letters, (one, other, whole) in zip(names, parts, strict=True):
            assert one.sharding.is_equivalent_to(NamedSharding(made, stored_spec(axis_letters, made)), one.ndim), path
            assert other is one
            np.testing.assert_array_equal(one, whole, err_msg=path)
    assert count == 1 + 5 * 2


def test_what_is_gathered_is_whole_over_fsdp_and_still_in_8_bits():
    made, letters = mesh.make_training_mesh(ALL_AXES, [UNTIED]), axes(UNTIED).layers[0]
    layer = mesh.place_module(in_8_bits(UNTIED, "int8"), UNTIED, made).layers[0]
    with jax.set_mesh(made):
        found = jax.jit(lambda layer: gathered(layer, letters))(layer)
    for name in ("q", "down"):
        matrix, axis_letters = getattr(found, name), getattr(letters, name)
        assert matrix.values.dtype == jnp.int8
        assert matrix.values.sharding.is_equivalent_to(
            NamedSharding(made, spec(axis_letters, made)), matrix.values.ndim
        )
        np.testing.assert_array_equal(matrix.values, getattr(layer, name).values)
        np.testing.assert_array_equal(matrix.scale, getattr(layer, name).scale)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("text", ["fsdp=8", ALL_AXES])
@pytest.mark.parametrize("draft", [DRAFT, VIEW], ids=["block", "view"])
def test_a_step_on_a_mesh_is_that_of_one_device(kind, text, draft, quick_compilation):
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 95, (8, 16)).astype(np.int32), rng.random((8, 16)) < 0.8
    recipe = Recipe(
        TARGET,
        draft,
        Objective(loss="kl", position_weights="uniform", gamma=4.0, anchors=4, chunk=7, lambda_base_start=0.5),
        OptimizerConfig(lr=1e-2, warmup=0.0),
        steps=20,
        dtype="float32",
    )
    given = Inputs(jnp.asarray(ids), jnp.asarray(mask))
    weights = flatten(init_weights(draft, jax.random.key(2), std=0.3))
    told = []
    for made in (None, mesh.make_training_mesh(text, [TARGET, draft])):
        with jax.set_mesh(made) if made else jax.set_mesh(jax.make_mesh((), ())):
            target = mesh.place_module(in_8_bits(TARGET, kind), TARGET, made)
            state = init_state(recipe, weights, 0)
            state, metrics = train_step(recipe, state, target, mesh.laid_rows(given, made))
            told.append(jax.tree.map(np.asarray, (metrics, state.optimizer[1][0].mu)))
    (one, gradient), (spread, other) = told
    assert float(spread.report.loss) == pytest.approx(float(one.report.loss), rel=1e-5)
    for path, expected in gradient.items():
        np.testing.assert_allclose(other[path], expected, atol=1e-5 * np.abs(expected).max(), err_msg=path)


# --- Settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "capture", "bench", "regenerate", "validate"])
def test_every_command_refuses_forms_that_run_nowhere_in_one_sentence(tmp_path, capsys, command):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a"}\n')
    folder = ["--target", str(factory.make_target(tmp_path / "target"))]
    words = {
        "train": [*folder, "--data", str(data), "--out", str(tmp_path / "run")],
        "capture": ["capture", *folder, "--data", str(data), "--out", str(tmp_path / "features")],
        "bench": ["bench"],
        "regenerate": ["regenerate", *folder, "--data", str(data), "--out", str(tmp_path / "out.jsonl")],
        "validate": ["validate", *folder, "--draft", str(tmp_path), "--prompts", str(data)],
    }[command]
    assert main([*words, "--weights", "int4"]) == 2
    said = capsys.readouterr().err
    assert "--weights int4: 4 bits need scales for groups of inputs" in said and "take int8 or float8" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "target"]


@pytest.mark.parametrize("weights", ["int8", "float8", "exact"])
def test_the_form_is_saved_kept_by_a_resumed_run_and_that_of_its_validation(tmp_path, weights):
    folder = tmp_path / "run"
    folder.mkdir()
    options = TrainConfig(target="demo", out=folder, run=RunConfig(weights=weights))
    write_recipe(options, folder)
    assert read_recipe(folder / "settings.toml").run.weights == weights
    pair = check_validate(Validate(tmp_path / "held.jsonl", run=folder))
    assert pair.device.weights == weights
    asked = check_validate(
        Validate(
            tmp_path / "held.jsonl",
            run=folder,
            pair=dataclasses.replace(
                pair, target=None, drafting=type(pair.drafting)(), device=DeviceOptions(weights="int8")
            ),
        )
    )
    assert asked.device.weights == "int8"


def test_a_resumed_run_keeps_its_form(tmp_path):
    options = TrainConfig(target="demo", out=tmp_path, run=RunConfig(weights="int8"))
    write_recipe(dataclasses.replace(options, data=dataclasses.replace(options.data, data=("a.jsonl",))), tmp_path)
    with pytest.raises(UsageError, match="a resumed run keeps its settings; leave out --weights"):
        train(out=tmp_path, resume=True, weights="exact")


# --- Whole runs ---------------------------------------------------------------------------------------------------


def write_rows(file: Path) -> Path:
    rows = []
    for i in range(16):
        prompt = [10 + i, 20 + 3 * i, 30 + 5 * i]
        rows.append({"input_ids": prompt, "tokens": [(prompt[-1] + 2 * k) % 200 + 10 for k in range(1, 22)]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


SIZES = {
    **{"layers": 1, "block_size": 4, "target_layer_ids": (0,), "gru_hidden_dim": 8, "emb_dim": 6, "length": 24},
    **{"batch": 4, "anchors": 4, "save_every": 10, "log_every": 2, "lr": 1e-2, "steps": 6, "tensorboard": False},
}


def quantized_folder(folder: Path, name: str) -> Any:
    """A target in a form that others write, and the plain folder of its values."""
    factory.make_target(folder / "plain")
    if name == "GGUF":
        config = dataclasses.replace(factory.BYTE_TARGET, vocab_size=261)  # a token more than the tokenizer's
        tensors = factory.hf_weights(factory.random_weights(config, 0), config)
        return write_gguf(folder / "m.gguf", config, tensors, lambda name: GGMLQuantizationType.Q8_0, byte_tokenizer())
    form, config = FORMS[name], factory.BYTE_TARGET
    tensors = factory.hf_weights(factory.random_weights(config, 0), config)
    stored, plain = quantized_model(form, tensors, 0)
    for kind, raw, given in (("plain", {}, plain), ("q", {"quantization_config": form.settings}, stored)):
        if kind == "q":
            factory.make_target(folder / kind)
        save_file({key: np.ascontiguousarray(x) for key, x in given.items()}, folder / kind / "model.safetensors")
        hf.write_json(folder / kind / "config.json", config.to_hf() | raw)
    return folder / "q"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["FP8, blocks", "compressed, int8 channel", "compressed, 4 bits group, zero points", "AWQ", "GPTQ v2", "GGUF"],
)
def test_a_run_over_a_quantized_folder_is_that_over_its_values(tmp_path, name, quick_compilation):
    data, target = write_rows(tmp_path / "data.jsonl"), quantized_folder(tmp_path, name)
    losses = []
    for number, one in enumerate((target, tmp_path / "plain")):
        if name == "GGUF" and number:
            folders.convert_folder(run.find(str(target)), tmp_path / "hf")
            one = tmp_path / "hf"
        made = train(target=str(one), data=(str(data),), out=tmp_path / f"run{number}", mask_token_id=3, **SIZES)
        losses.append([row["loss"] for row in curves.read_metrics(made.folder / "metrics.jsonl") if "loss" in row])
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "float8"])
def test_a_run_in_8_bits_says_so_and_reads_features_of_that_form_alone(tmp_path, weights, quick_compilation, capsys):
    factory.make_target(tmp_path / "target")
    data = write_rows(tmp_path / "data.jsonl")
    held = tmp_path / "held.jsonl"
    held.write_text('{"input_ids": [12, 14, 16]}\n{"input_ids": [50, 60]}\n')
    given: dict[str, Any] = {"target": str(tmp_path / "target"), "data": (str(data),), "mask_token_id": 3, **SIZES}
    whole = train(out=tmp_path / "whole", weights=weights, validation=held, validation_tokens=6, **given)
    assert read_recipe(whole.folder / "settings.toml").run.weights == weights
    exact = train(out=tmp_path / "exact", **given)
    assert whole.metrics["loss"] != exact.metrics["loss"] and whole.metrics["validation_tau"] >= 1
    captured = ["capture", "--target", given["target"], "--data", str(data), "--out", str(tmp_path / "features")]
    captured += ["--length", "24", "--target-layer-ids", "0", "--weights", weights]
    assert main(captured) == 0
    with pytest.raises(
        DominoError, match=f"of the target with --weights {weights}, and the training is over --weights ex"
    ):
        train(out=tmp_path / "wrong", features=tmp_path / "features", **given)
    read = train(out=tmp_path / "read", weights=weights, features=tmp_path / "features", **given)
    assert read.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=0.02)  # features are kept in bfloat16
