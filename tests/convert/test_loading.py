"""Weights on their way from disk: each device's part and no more, from either form, onto any mesh, bit for bit."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import factory
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factory import make_draft, make_target
from gguf_files import write_gguf
from jax.sharding import NamedSharding

from convert import hf, loading, safetensors
from convert.__main__ import main as convert_main
from convert.folders import convert_folder, load_weights
from convert.gguf.folder import as_folder
from convert.registry import read_configs
from convert.safetensors import TensorFiles
from convert.tensors import tensor_files
from domino_jax import matrix, prepare
from domino_jax.config import DecoderConfig, MoeConfig
from domino_jax.errors import DominoError
from domino_jax.runtime import precision
from domino_jax.sharding import fit_to_mesh, make_mesh, mesh_context, spec
from domino_jax.weights import JoinedLayer, axes, flatten, weight_shapes
from infer.bench.checkpoints import STEPS
from infer.bench.checkpoints import main as checkpoints_main
from infer.engine import Engine

JAX_CONFIG: Any = jax.config  # its flags are attributes that no type checker sees

# An odd vocabulary, which every mesh has to pad, and two KV heads, of which larger ones need copies.
TARGET = dataclasses.replace(factory.TARGET, num_hidden_layers=2, num_attention_heads=8)
MODELS: dict[str, Any] = {
    "target": TARGET,
    "untied": dataclasses.replace(TARGET, tie_word_embeddings=False),
    "vocabulary of few": dataclasses.replace(TARGET, vocab_size=10),
    "drafter": factory.draft_config(
        TARGET,
        num_hidden_layers=1,
        target_layer_ids=(0, 1),
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=40,
    ),
}


def expected(leaf: np.ndarray, letters: str, config: DecoderConfig, model: int) -> np.ndarray:
    """A weight as a mesh has it, by whole arrays."""
    for axis, letter in enumerate(letters.split()):
        if letter == "K":
            copies = fit_to_mesh(config, model).num_key_value_heads // config.num_key_value_heads
            leaf = np.repeat(leaf, copies, axis=axis)
        if letter in ("V", "DV"):
            leaf = np.pad(leaf, [(0, -leaf.shape[i] % model if i == axis else 0) for i in range(leaf.ndim)])
    return leaf


@pytest.mark.parametrize("form", ["Hugging Face", "Orbax"])
@pytest.mark.parametrize(("data", "model"), [(2, 4), *(pytest.param(1, n, marks=pytest.mark.slow) for n in (2, 8))])
@pytest.mark.parametrize("kind", MODELS)
def test_a_mesh_holds_what_one_device_holds_each_device_its_part(tmp_path, kind, data, model, form):
    config = MODELS[kind]
    module = factory.random_weights(config, 0)
    hf.save_hf(tmp_path / "hf", module, config, config.to_hf(), jnp.bfloat16)
    folder = tmp_path / "hf"
    if form == "Orbax":
        convert_folder(folder, tmp_path / "orbax")
        folder = tmp_path / "orbax"
    mesh = make_mesh(data, model)
    placed, letters = flatten(load_weights(folder, config, jnp.float32, mesh=mesh)), flatten(axes(config))
    for path, leaf in flatten(module).items():
        stored = np.asarray(leaf).astype(jnp.bfloat16).astype(np.float32)
        whole, found = expected(stored, letters[path], config, model), placed[path]
        assert found.dtype == jnp.float32
        assert found.sharding.is_equivalent_to(NamedSharding(mesh, spec(letters[path])), found.ndim)
        assert np.array_equal(found, whole), path
        if set(letters[path].split()) & {"N", "K", "F", "V", "DV"}:
            assert {part.data.nbytes for part in found.addressable_shards} == {whole.nbytes // model}


@pytest.mark.parametrize("form", ["Hugging Face", pytest.param("Orbax", marks=pytest.mark.slow)])
def test_matrices_that_are_stored_in_bfloat16_may_stay_so(tmp_path, form):
    """In float32 runs; what comes out is the same text."""
    folders = [tmp_path / "target", tmp_path / "draft"]
    for folder, make in zip(folders[::-1], (make_draft, make_target), strict=True):
        config = make(tmp_path / "float32")
        hf.save_hf(folder, hf.load_hf(tmp_path / "float32", config), config, config.to_hf(), jnp.bfloat16)
    if form == "Orbax":
        folders = [tmp_path / "orbax", tmp_path / "orbax-draft"]
        for name, folder in zip(("target", "draft"), folders, strict=True):
            convert_folder(tmp_path / name, folder)

    def tokens(loaded: loading.LoadedModel) -> list[int]:
        engine = Engine(loaded)
        sequence, _ = engine.sequence([5, 6, 7], 20)
        engine.generate([sequence])
        return sequence.tokens

    whole = loading.load_model(folders[0], folders[1], "float32", matrices="float32")
    narrow = loading.load_model(folders[0], folders[1], "float32", matrices="bfloat16")
    assert narrow.narrow and not whole.narrow
    held = [sum(x.nbytes for x in jax.tree.leaves(one.params)) for one in (narrow, whole)]
    assert held[0] < 0.7 * held[1]
    assert tokens(narrow) == tokens(whole)
    assert not loading.load_model(tmp_path / "float32", dtype="float32", matrices="bfloat16").narrow, (
        "it would be rounded"
    )
    hf.save_hf(tmp_path / "float16", hf.load_hf(tmp_path / "float32", config), config, config.to_hf(), jnp.float16)
    half = loading.load_model(tmp_path / "float16", dtype="float32", matrices="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.float32)}, "16 bits of another kind"


def test_where_matrices_stay_narrow(tmp_path, monkeypatch):
    """Where it is asked for, or the CPU has units for it; never in other runs than float32's."""
    for flags, expected in (("fpu amx_bf16 amx_tile", True), ("fpu avx512_bf16", False), (None, False)):
        cpus = tmp_path / f"{expected} {flags}"
        if flags:
            cpus.write_text(f"processor : 0\nflags\t\t: {flags}\n")
        monkeypatch.setattr(precision, "CPUS", cpus)
        assert precision.keeps_bfloat16("auto", jnp.float32, "cpu") == expected
        for platform in ("cpu", "gpu", "tpu"):
            assert precision.keeps_bfloat16("bfloat16", jnp.float32, platform)
            assert not precision.keeps_bfloat16("float32", jnp.float32, platform)
            assert not precision.keeps_bfloat16("auto", jnp.bfloat16, platform)
            assert platform == "cpu" or not precision.keeps_bfloat16("auto", jnp.float32, platform)
    with pytest.raises(DominoError, match="a choice of float32 runs: this one's are bfloat16"):
        precision.keeps_bfloat16("bfloat16", jnp.dtype(jnp.bfloat16), "cpu")
    monkeypatch.setattr(precision, "CPUS", tmp_path / "True fpu amx_bf16 amx_tile")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert not precision.keeps_bfloat16("auto", jnp.float32, "cpu"), "all processes run the same program"


def test_a_plan_follows_the_devices_that_it_is_for(tmp_path, monkeypatch):
    """On a CPU with units for bfloat16 matrices, of a TPU that is described: nothing is asked of this process's."""
    (tmp_path / "cpus").write_text("processor : 0\nflags\t\t: fpu amx_bf16\n")
    monkeypatch.setattr(precision, "CPUS", tmp_path / "cpus")
    config = dataclasses.replace(TARGET, moe=MoeConfig(8, 3, 20, norm_topk_prob=True))
    tpu = SimpleNamespace(platform="tpu", device_kind="TPU v6 lite")
    here = loading.plan_load(config, None, mesh=(1, 1))
    there = loading.plan_load(config, None, mesh=(1, 1), attention="pallas", devices=[tpu])
    assert here.configs.target.moe and there.configs.target.moe
    assert (here.dtype, here.narrow, here.configs.target.moe.backend) == (jnp.float32, True, "one by one")
    assert (there.dtype, there.narrow, there.configs.target.moe.backend) == (jnp.bfloat16, False, "grouped")
    assert there.backends == ("pallas",)
    assert not loading.plan_load(config, None, "float32", mesh=(1, 1), devices=[tpu]).narrow
    with pytest.raises(DominoError, match="needs an NVIDIA GPU, found TPU v6 lite"):
        loading.plan_load(config, None, mesh=(1, 1), attention="cudnn", devices=[tpu])
    with pytest.raises(DominoError, match="needs 4 devices; found 1"):
        loading.plan_load(config, None, mesh=(1, 4), devices=[tpu])


@pytest.mark.parametrize(
    ("form", "sizes"),
    [
        ("Hugging Face", (1, 2)),
        ("GGUF", None),
        *(pytest.param(form, None, marks=pytest.mark.slow) for form in ("Hugging Face", "Orbax")),
        *(pytest.param(form, (1, 2), marks=pytest.mark.slow) for form in ("Orbax", "GGUF")),
    ],
)
def test_a_target_is_put_into_8_bits_matrix_by_matrix(tmp_path, monkeypatch, form, sizes):
    """Of whatever source: the values are those of the exact weights, and at most one of them is wide at a time."""
    config = dataclasses.replace(TARGET, moe=MoeConfig(4, 2, 20, norm_topk_prob=True) if form == "Orbax" else None)
    module = factory.random_weights(config, 0)
    source = tmp_path / "target"
    hf.save_hf(source, module, config, config.to_hf(), jnp.bfloat16)
    if form == "Orbax":
        convert_folder(source, tmp_path / "orbax")
        source = tmp_path / "orbax"
    elif form == "GGUF":
        source = as_folder(write_gguf(tmp_path / "model.gguf", config, factory.hf_weights(module, config)))
    how: dict[str, Any] = {"mesh": sizes, "matrices": "float32"}
    exact = loading.load_model(source, **how)
    expected = exact.params.target
    with mesh_context(exact.mesh):
        wide = flatten(load_weights(source, config, jnp.float32, mesh=exact.mesh))
    widest = max(leaf.nbytes for leaf in wide.values())
    before = sum(leaf.nbytes for leaf in jax.live_arrays())
    most = 0
    plain = matrix.quantize

    def watched(path: str, weight: Any) -> Any:
        nonlocal most
        assert made_of is not None
        made = made_of(path, weight)
        most = max(most, sum(leaf.nbytes for leaf in jax.live_arrays()) - before)
        return made

    made_of = prepare.target_form(config, "int8")
    monkeypatch.setattr(prepare, "target_form", lambda *_: watched)
    loaded = loading.load_model(source, weights="int8", **how)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
    assert loaded.weights == "int8" and exact.weights == "exact" and expected is not None
    if form != "Orbax":  # which is read in groups of 256 MB
        assert most < held + widest + 4096
    found = flatten(loaded.params.target)
    for path, letters in flatten(axes(config)).items():
        if path in found:
            np.testing.assert_array_equal(found[path], wide[path])
            continue
        small = plain(wide[path], "int8")
        np.testing.assert_array_equal(found[f"{path}.values"], small.values)
        np.testing.assert_allclose(found[f"{path}.scale"], small.scale, rtol=2**-23)
        if sizes:
            where = NamedSharding(make_mesh(*sizes), spec(letters))
            assert found[f"{path}.values"].sharding.is_equivalent_to(where, small.values.ndim)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_weights_take_the_form_of_the_platform_that_the_plan_is_for(platform, plain, tmp_path, monkeypatch):
    make_target(tmp_path, tie_word_embeddings=False)
    pretended = SimpleNamespace(platform=platform, device_kind=platform)
    monkeypatch.setattr(loading, "own_devices", lambda: [pretended])
    loaded = loading.load_model(tmp_path, dtype="float32", mesh=(1, 1), plain=plain, matrices="float32")
    forms: dict[str, Any] = {"cpu": matrix.CpuFloat32, "gpu": jax.Array, "tpu": matrix.ForTpu}
    assert isinstance(loaded.params.target.lm_head, jax.Array if plain else forms[platform])
    assert isinstance(loaded.params.target.layers[0], JoinedLayer) == (platform == "tpu" and not plain)
    assert loaded.platform == "cpu", "where the weights are"


def test_a_mesh_reads_each_value_once_and_copies_of_a_kv_head_once(tmp_path, monkeypatch):
    config = MODELS["untied"]
    hf.save_hf(tmp_path, factory.random_weights(config, 0), config, config.to_hf())
    read: dict[str, int] = {}
    plain = TensorFiles.read

    def counted(self: TensorFiles, tensor: safetensors.Stored, index: Any = None) -> np.ndarray:
        part = plain(self, tensor, index)
        read[tensor.name] = read.get(tensor.name, 0) + part.nbytes
        return part

    monkeypatch.setattr(TensorFiles, "read", counted)
    load_weights(tmp_path, config, mesh=make_mesh(2, 4))
    for name, stored in TensorFiles(tensor_files(tmp_path)).stored.items():
        # Four devices share two KV heads: two read each, and the tensor is read twice.
        assert read[name] == stored.bytes * (2 if "k_proj" in name or "v_proj" in name else 1), name


def test_each_step_of_a_checkpoints_way_through_every_form(tmp_path, capsys):
    make_target(folder := tmp_path / "tiny")
    words = ["--model", str(folder), "--mesh", "data=2,model=2", "--out", str(tmp_path), "--step"]
    figures = {}
    for step in STEPS:
        assert checkpoints_main([*words, step]) == 0
        figures[step] = json.loads(capsys.readouterr().out)
    assert figures["load"]["tokens"] == figures["load_mesh"]["tokens"] and len(figures["load"]["tokens"]) == 8
    assert figures["compare"]["identical"] == len(TensorFiles(tensor_files(folder)).stored)
    assert figures["load_mesh"]["device_bytes"] < figures["load"]["device_bytes"]
    change(tmp_path / "hf-again", model__norm__weight=np.ones(32, np.float32) * 2)
    assert checkpoints_main([*words, "compare"]) == 1
    assert "model.norm.weight came back different" in capsys.readouterr().err


@pytest.mark.e2e
@pytest.mark.slow
def test_the_command_sends_a_checkpoint_through_every_form(tmp_path, capsys):
    make_target(folder := tmp_path / "tiny")
    words = ["--model", str(folder), "--mesh", "data=2,model=2", "--json", str(tmp_path / "round.json")]
    assert checkpoints_main(words) == 0
    assert "came back bit for bit" in capsys.readouterr().out
    figures = json.loads((tmp_path / "round.json").read_text())
    assert figures["load"]["tokens"] == figures["load_mesh"]["tokens"] and len(figures["load"]["tokens"]) == 8
    assert figures["compare"]["identical"] == len(TensorFiles(tensor_files(folder)).stored)
    assert figures["load_mesh"]["device_bytes"] < figures["load"]["device_bytes"]


# --- python -m convert --check ----------------------------------------------------------------------------------


def checked(capsys, *words: Any) -> tuple[int, str]:
    code = convert_main(["--check", *map(str, words)])
    return code, capsys.readouterr().out


def change(folder, **changes: Any) -> None:
    """Replace tensors (None removes one), "__" standing for a dot."""
    from safetensors.numpy import load_file, save_file

    held = load_file(folder / hf.SINGLE) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in held.items() if value is not None}, folder / hf.SINGLE)


def test_a_sound_target_is_compared_with_transformers(tmp_path, capsys):
    make_target(folder := tmp_path / "target")
    code, out = checked(capsys, folder)
    assert code == 0 and out.splitlines()[-1] == "sound"
    line = next(line for line in out.splitlines() if line.startswith("transformers"))
    assert float(line.split("at most ")[1].split(",")[0]) < 1e-4
    assert "260 tokens" in out and "Hugging Face" in out and "all finite" in out


def test_both_forms_are_checked(tmp_path, capsys):
    make_target(folder := tmp_path / "target")
    convert_folder(folder, tmp_path / "orbax")
    code, out = checked(capsys, tmp_path / "orbax")
    assert code == 0 and "Orbax" in out and out.splitlines()[-1] == "sound"


def test_what_is_wrong_with_the_tensors_is_listed(tmp_path, capsys):
    make_target(folder := tmp_path / "target")
    nan = np.full(32, np.nan, np.float32)
    change(folder, model__norm__weight=nan, extra=nan, model__layers__0__input_layernorm__weight=nan[:5])
    change(folder, model__layers__1__mlp__up_proj__weight=None)
    code, out = checked(capsys, folder)
    assert code == 1 and out.splitlines()[-1] == "6 problems"
    for problem in (
        "missing model.layers.1.mlp.up_proj.weight",
        "unexpected extra",
        "model.layers.0.input_layernorm.weight has shape [5], expected [32]",
        "model.norm.weight has 32 non-finite values of 32",
    ):
        assert f"problem      {problem}" in out
    assert "transformers" not in out


def test_a_drafter_is_checked_against_its_target(tmp_path, capsys):
    make_target(target := tmp_path / "target")
    make_draft(draft := tmp_path / "draft")
    code, out = checked(capsys, draft, "--target", target)
    assert code == 0 and "Domino drafter" in out and "fits" in out
    other = hf.read_json(target / "config.json") | {"num_hidden_layers": 7}
    hf.write_json(target / "config.json", other)
    code, out = checked(capsys, draft, "--target", target)
    assert code == 1 and "made for another target" in out


def test_a_drafter_that_reads_the_last_layer_is_called_that_on_export_and_not_in_use(tmp_path, capsys):
    make_target(target := tmp_path / "target", num_hidden_layers=3)
    for name, target_layer_ids, words in (("last", (1, 2), "last layer, 2"), ("below", (0, 1), "")):
        make_draft(draft := tmp_path / name, num_target_layers=3, target_layer_ids=target_layer_ids)
        for given in ([draft], [draft, "--target", target]):
            code, out = checked(capsys, *given)
            assert code == 0 and ("warning" in out) == bool(words) and words in out
        assert convert_main([str(draft), str(tmp_path / f"{name}-orbax")]) == 0
        assert words in (error := capsys.readouterr().err) and ("warning" in error) == bool(words)
        assert read_configs(target, draft)[-1] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"initializer_range": None}, "initializer_range null; expected a number"),
        ({"use_cache": "yes"}, 'use_cache "yes"; expected true or false'),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers 2.0; expected an integer"),
        ({"pad_token_id": "<|endoftext|>"}, "pad_token_id"),
        ({"torch_dtype": "bf16"}, 'torch_dtype "bf16"'),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_targets_config_is_blamed_before_anything_is_read(tmp_path, capsys, change, words):
    """Not the tokenizer, which transformers can't load beside such a file."""
    from infer.__main__ import main

    make_target(folder := tmp_path / "target")
    hf.write_json(folder / "config.json", hf.read_json(folder / "config.json") | change)
    (folder / hf.SINGLE).unlink()
    assert main(["--model", str(folder), "--draft", "none", "--raw", "x"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder / 'config.json'} has ") and words in error and error.count("\n") == 1


def test_a_drafter_of_the_speculators_library_is_not_called_a_target(tmp_path, capsys):
    from infer.__main__ import main

    make_target(target := tmp_path / "target")
    (draft := tmp_path / "draft").mkdir()
    hf.write_json(draft / "config.json", {"speculators_model_type": "eagle3", "transformer_layer_config": {}})
    assert main(["--model", str(target), "--draft", str(draft), "--raw", "x"]) == 1
    assert f"{draft / 'config.json'} is of the speculators library" in capsys.readouterr().err
    assert main(["--model", str(draft), "--draft", "none", "--raw", "x"]) == 1
    assert "holds a drafter" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["a"], ["a", "b", "--check", "c"], ["a", "--target", "c"]])
def test_contradicting_words_are_refused(words, capsys):
    assert convert_main(words) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_drafter_that_does_not_state_its_targets_depth_is_checked_against_the_target(tmp_path, capsys):
    make_target(target := tmp_path / "target", num_hidden_layers=3)
    make_draft(draft := tmp_path / "draft", num_target_layers=3)
    raw = hf.read_json(draft / "config.json")
    del raw["num_target_layers"]
    hf.write_json(draft / "config.json", raw)
    code, out = checked(capsys, draft, "--target", target)
    assert code == 0 and "fits" in out


def test_what_infer_refuses_is_not_called_sound(tmp_path, capsys):
    make_target(folder := tmp_path / "target")
    (folder / "generation_config.json").write_text("{")
    code, out = checked(capsys, folder)
    assert code == 1 and "generation_config.json can't be read" in out
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer.json").write_text("{")
    code, out = checked(capsys, folder)
    assert code == 1 and "tokenizer.json can't be read as JSON" in out and "all finite" in out


@pytest.mark.parametrize("dtype", [np.int8, np.float64])
def test_weights_that_are_no_floats_of_16_or_32_bits_are_refused(tmp_path, dtype):
    make_target(folder := tmp_path / "target")
    change(folder, model__norm__weight=np.ones(32, dtype))
    config = hf.parse_config(hf.read_json(folder / "config.json"))
    with pytest.raises(DominoError, match=r"model.norm.weight holds \w+, expected F32, F16 or BF16"):
        hf.load_hf(folder, config)


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_an_empty_destination_is_filled(tmp_path, kind):
    make_draft(source := tmp_path / "draft")
    place = tmp_path / "elsewhere"
    place.mkdir()
    destination = tmp_path / "link" if kind == "link" else place
    if kind == "link":
        destination.symlink_to(place)
    assert convert_folder(source, destination) == ("Hugging Face", "Orbax")
    assert destination.is_symlink() == (kind == "link")
    assert {file.name for file in place.iterdir()} == {"config.json", "weights"}


def test_checkpoints_beside_weights_do_not_make_a_training_run(tmp_path, capsys):
    make_draft(folder := tmp_path / "draft")
    (folder / "checkpoints").mkdir()
    code, out = checked(capsys, folder)
    assert code == 0 and "Hugging Face" in out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rope_theta": 1}, "rope_theta 1;"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": float("inf")}}, "rope_scaling.factor Infinity;"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": -1}}, "rope_scaling.beta_fast -1;"),
    ],
)
def test_positions_that_can_not_be_computed_are_refused(change, says):
    with pytest.raises(DominoError, match=says):
        hf.parse_config(TARGET.to_hf() | change)


def test_one_model_replaces_another_whatever_their_number_of_files(tmp_path, monkeypatch):
    config = MODELS["drafter"]
    for seed, most in enumerate((10**9, 3000, 10**9)):
        monkeypatch.setattr(hf, "SHARD_BYTES", most)
        module = factory.random_weights(config, seed)
        hf.save_hf(tmp_path, module, config, config.to_hf())
        assert np.array_equal(hf.load_hf(tmp_path, config).fc, module.fc)


@pytest.mark.slow
def test_a_weight_above_a_gigabyte_goes_both_ways(tmp_path):
    """Orbax refuses an array that its limits of memory do not hold."""
    config = dataclasses.replace(TARGET, vocab_size=260_000, hidden_size=1024, num_hidden_layers=1)
    hf.save_hf(
        tmp_path / "hf", jax.tree.map(lambda s: jnp.zeros(s.shape), weight_shapes(config)), config, config.to_hf()
    )
    convert_folder(tmp_path / "hf", tmp_path / "orbax")
    convert_folder(tmp_path / "orbax", tmp_path / "back")
    files = TensorFiles(tensor_files(tmp_path / "back"))
    assert files.stored["model.embed_tokens.weight"].bytes > 10**9


def test_converting_can_change_the_dtype(tmp_path, capsys):
    make_draft(source := tmp_path / "draft")
    assert convert_main([str(source), str(tmp_path / "orbax"), "--dtype", "bfloat16"]) == 0
    assert convert_main([str(tmp_path / "orbax"), str(tmp_path / "back")]) == 0
    assert hf.read_json(tmp_path / "back" / "config.json")["torch_dtype"] == "bfloat16"
    _, out = checked(capsys, tmp_path / "back")
    assert "BF16" in out and "F32" not in out
    assert jax.default_backend() == "cpu"


def test_the_precision_of_products_is_the_models_and_no_other_programs(tmp_path):
    make_target(tmp_path)

    assert JAX_CONFIG.jax_default_matmul_precision is None
    for dtype, expected in (("float32", "highest"), ("bfloat16", None)):
        loaded = loading.load_model(tmp_path, dtype=dtype)
        assert JAX_CONFIG.jax_default_matmul_precision is None
        with loaded.context():
            assert JAX_CONFIG.jax_default_matmul_precision == expected
        assert JAX_CONFIG.jax_default_matmul_precision is None
