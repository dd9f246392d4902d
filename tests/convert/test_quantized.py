"""Quantized folders: every layout by an independent writer, wrong readings, models through the loader, refusals."""

import dataclasses
import json
import tracemalloc
from functools import cache
from pathlib import Path
from typing import Any

import factory
import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import quantized_files
from gguf_files import write_gguf
from quantized_files import AWQ, FLOAT, FORMS, FP8, GPTQ, INT, PACK, QuantizedForm, compressed, quantized_model
from safetensors.numpy import save_file

from convert import hf
from convert.__main__ import main
from convert.check import check_folder
from convert.folders import convert_folder
from convert.gguf import as_folder
from convert.identity import model_fingerprint
from convert.loading import load_model
from convert.quantized.writing import quantize_weight
from convert.registry import read_configs
from convert.safetensors import TensorFiles
from convert.tensors import INDEX, open_tensors
from domino_jax import target
from domino_jax.config import MoeConfig, TargetConfig
from domino_jax.errors import DominoError
from domino_jax.sharding import make_mesh
from domino_jax.weights import flatten
from infer.bench.rounds import transformers_model

MODULE = "model.layers.0.mlp.down_proj"
make = dataclasses.replace
DENSE = make(factory.BYTE_TARGET, num_hidden_layers=1)
MODELS: dict[str, TargetConfig] = {
    "Qwen3": DENSE,
    "Qwen3 MoE": make(DENSE, moe=MoeConfig(4, 2, 32, True), intermediate_size=32, tie_word_embeddings=False),
    "Llama": make(DENSE, qk_norm=False, tie_word_embeddings=False, attention_bias=True),
    "Qwen2": make(DENSE, qk_norm=False, qkv_bias=True),
}
# One of each kind of layout, for what takes longer.
SOME = [
    *("FP8, blocks", "compressed, FP8 channel", "compressed, int8 channel, zero points", "compressed, 4 bits group"),
    *("compressed, act-order, zero points", "AWQ", "GPTQ", "GPTQ v2"),
]


def write(folder: Path, settings: Any, tensors: dict[str, np.ndarray], config: TargetConfig = DENSE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "model.safetensors")
    raw = config.to_hf() if settings is None else config.to_hf() | {"quantization_config": settings}
    hf.write_json(folder / "config.json", raw)
    return folder


def write_model(folder: Path, name: str, config: TargetConfig = DENSE, seed: int = 0) -> dict[str, np.ndarray]:
    """A random model of a form in `folder / "quantized"`, and its values plain in `folder / "plain"`, given back."""
    form, tensors = FORMS[name], factory.hf_weights(factory.random_weights(config, seed), config)
    stored, plain = quantized_model(form, tensors, seed)
    write(folder / "quantized", form.settings, stored, config)
    write(folder / "plain", None, plain, config)
    return plain


def one_module(folder: Path, form: QuantizedForm, changes: Any = None, seed: int = 0) -> tuple[Any, np.ndarray]:
    """The weight that is read of a module in a form, and its exact values."""
    parts, values = form.pack(form.shape, np.random.default_rng(seed))
    parts = changes(parts) if changes else parts
    write(folder, form.settings, {f"{MODULE}.{ending}": part for ending, part in parts.items()})
    files = open_tensors(folder)
    (weight,) = files.stored.values()
    assert weight.name == f"{MODULE}.weight"
    return weight, values


ALL = (slice(None), slice(None))


@pytest.mark.parametrize("name", FORMS)
def test_every_layout_gives_its_exact_values_whole_and_in_parts(tmp_path, monkeypatch, name):
    monkeypatch.setattr("convert.quantized.modules.BLOCK_VALUES", 200)  # several blocks, of odd sizes
    weight, values = one_module(tmp_path, FORMS[name])
    assert weight.shape == values.shape and weight.dtype == "F32"
    np.testing.assert_array_equal(weight.read(ALL), values)
    for rows, columns in ((slice(3, 8), slice(5, 41)), (slice(8, 9), slice(0, 1)), (slice(2, 2), slice(0, 4))):
        np.testing.assert_array_equal(weight.read((rows, columns)), values[rows, columns])
    assert weight.bytes == sum(part.bytes for part in weight.sources) > 0


# --- Wrong readings -----------------------------------------------------------------------------------------------


def alike(one: np.ndarray, other: np.ndarray) -> float:
    return float((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))


def test_awq_in_another_order_of_nibbles_is_another_weight(tmp_path, monkeypatch):
    monkeypatch.setattr(quantized_files, "AWQ_COLUMNS", (0, 1, 2, 3, 4, 5, 6, 7))  # as GPTQ's zero points lie
    weight, values = one_module(tmp_path, FORMS["AWQ"])
    assert alike(weight.read(ALL), values) < 0.9


@pytest.mark.parametrize(("name", "settings"), [("AWQ", GPTQ), ("GPTQ", AWQ)], ids=["AWQ as GPTQ", "GPTQ as AWQ"])
def test_awq_and_gptq_are_not_taken_for_each_other(tmp_path, name, settings):
    with pytest.raises(DominoError, match=rf"{MODULE}.scales of shape \[3, 24\], expected"):
        one_module(tmp_path, FORMS[name]._replace(settings=settings))


@pytest.mark.parametrize(
    ("name", "version", "shift"), [("GPTQ", "gptq_v2", 1), ("GPTQ v2", "gptq", -1)], ids=["1 as 2", "2 as 1"]
)
def test_gptqs_versions_differ_by_one_in_zero_points(tmp_path, name, version, shift):
    form = FORMS[name]
    weight, values = one_module(tmp_path, form._replace(settings={**form.settings, "checkpoint_format": version}))
    difference = weight.read(ALL) - values
    assert np.all(np.sign(difference) == shift)  # of a step each


@pytest.mark.parametrize("name", ["GPTQ", "AWQ", "compressed, 4 bits group, zero points"])
def test_transposed_zero_points_are_another_weight(tmp_path, name):
    """Four groups and four words of outputs: the shape does not tell."""
    ending = "weight_zero_point" if name.startswith("compressed") else "qzeros"
    form = FORMS[name]._replace(shape=(32, 64))
    weight, values = one_module(tmp_path, form, lambda parts: parts | {ending: parts[ending].T})
    assert alike(weight.read(ALL), values) < 0.98
    weight, values = one_module(tmp_path, form)
    np.testing.assert_array_equal(weight.read(ALL), values)


def test_the_order_of_inputs_is_that_of_g_idx_whatever_desc_act_says(tmp_path):
    form = FORMS["GPTQ, g_idx"]
    weight, values = one_module(tmp_path, form._replace(settings={**form.settings, "desc_act": False}))
    np.testing.assert_array_equal(weight.read(ALL), values)
    with pytest.raises(DominoError, match=rf"there is no {MODULE}.g_idx beside it"):
        one_module(tmp_path, form, lambda parts: {k: v for k, v in parts.items() if k != "g_idx"})


def test_which_of_several_schemes_a_module_has_its_tensors_tell(tmp_path):
    schemes = [FORMS[name] for name in ("compressed, 4 bits group", "compressed, 8 bits group, zero points")]
    schemes.append(FORMS["compressed, FP8 channel"])
    groups = {
        str(number): {**form.settings["config_groups"]["group_0"], "format": form.settings["format"]}
        for number, form in enumerate(schemes)
    }
    settings = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    for form in schemes:
        weight, values = one_module(tmp_path, form._replace(settings=settings))
        np.testing.assert_array_equal(weight.read(ALL), values)
    with pytest.raises(DominoError, match=r"none of the 3 config_groups of .*config.json fits the tensors of model"):
        one_module(tmp_path, FORMS["compressed, int8 channel"]._replace(settings=settings))
    double = {**settings, "config_groups": groups | {"3": json.loads(json.dumps(groups["0"]).replace("16", "17"))}}
    with pytest.raises(DominoError, match="fits several config_groups"):
        one_module(tmp_path, FORMS["compressed, 4 bits group"]._replace(settings=double, shape=(8, 16)))


# --- Models -------------------------------------------------------------------------------------------------------


@cache
def logits_of(config: TargetConfig) -> Any:
    ids = jnp.asarray(np.arange(1, 24)[None])
    return jax.jit(lambda params: target.logits(params, config, target.forward(params, config, ids)[0]))


@pytest.mark.parametrize("name", SOME)
def test_a_quantized_model_has_the_logits_of_its_values(tmp_path, name, quick_compilation):
    write_model(tmp_path, name)
    found, plain = (load_model(tmp_path / kind, dtype="float32", plain=True) for kind in ("quantized", "plain"))
    logits = logits_of(DENSE)
    np.testing.assert_array_equal(logits(found.params.target), logits(plain.params.target))
    assert np.isfinite(logits(found.params.target)).all()


def test_a_quantized_model_writes_what_its_values_write(tmp_path, quick_compilation):
    from infer import load

    write_model(tmp_path, "compressed, 4 bits group, zero points", make(DENSE, num_hidden_layers=2))
    answers = []
    for kind in ("quantized", "plain"):
        (answer,) = load(str(tmp_path / kind), draft="none", dtype="float32").generate([[5, 6, 7]], max_new_tokens=6)
        answers.append(answer.tokens)
    assert answers[0] == answers[1] and len(answers[0]) == 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("model", "name"), [*((model, "GPTQ") for model in MODELS), *(("Qwen3 MoE", name) for name in SOME[:4])]
)
def test_every_family_is_read_on_one_device_and_on_a_mesh(tmp_path, model, name, dtype):
    """Values are rounded once, to the dtype."""
    config = MODELS[model]
    plain = write_model(tmp_path, name, config)
    folder, kind = tmp_path / "quantized", jnp.dtype(dtype)
    assert read_configs(folder, None)[1] == config
    alone, spread = (hf.load_hf(folder, config, kind, mesh=mesh) for mesh in (None, make_mesh(1, 2)))
    for path, leaf in flatten(alone).items():
        np.testing.assert_array_equal(leaf, flatten(spread)[path][: len(leaf)], err_msg=path)
    for key, tensor in factory.hf_weights(alone, config).items():
        np.testing.assert_array_equal(tensor, plain[key].astype(kind), err_msg=key)


def test_tensors_of_a_module_may_lie_in_several_files(tmp_path):
    config, form = DENSE, FORMS["AWQ"]
    stored, plain = quantized_model(form, factory.hf_weights(factory.random_weights(config, 0), config))
    write(tmp_path, form.settings, {})
    (tmp_path / "model.safetensors").unlink()
    names, weight_map = sorted(stored), {}
    for number in range(3):
        part = {name: np.ascontiguousarray(stored[name]) for name in names[number::3]}
        save_file(part, tmp_path / f"m{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"m{number}.safetensors")
    hf.write_json(tmp_path / INDEX, {"weight_map": weight_map})
    for key, tensor in factory.hf_weights(hf.load_hf(tmp_path, config), config).items():
        np.testing.assert_array_equal(tensor, plain[key])
    files = open_tensors(tmp_path)
    weight = next(one for one in files.stored.values() if len({part.file for part in one.sources}) > 1)
    last = next(part.file for part in weight.sources if part.file != weight.file)
    last.write_bytes(last.read_bytes() + b" ")
    with pytest.raises(DominoError, match=f"{last.name} changed while it was read"):
        files.read(weight)


def random_parts(name: str, out: int, width: int) -> dict[str, np.ndarray]:
    """The tensors of a large module with anything in them."""
    rng, groups = np.random.default_rng(0), width // 128

    def words(*shape: int) -> np.ndarray:
        return rng.integers(-(2**31), 2**31, shape, np.int32)

    if name.endswith(("blocks", "channel")):
        codes = rng.integers(0, 64, (out, width), np.int8).view(np.int8 if "int8" in name else ml_dtypes.float8_e4m3fn)
        if name.endswith("blocks"):
            return {"weight": codes, "weight_scale_inv": np.full((out // 128, groups), 0.01, np.float32)}
        return {"weight": codes, "weight_scale": np.full((out, 1), 0.01, ml_dtypes.bfloat16)}
    scales = rng.uniform(0, 0.01, (groups, out)).astype(np.float16)
    if name == "GPTQ":
        return {"qweight": words(width // 8, out), "qzeros": words(groups, out // 8), "scales": scales}
    if name == "AWQ":
        return {"qweight": words(width, out // 8), "qzeros": words(groups, out // 8), "scales": scales}
    return {"weight_packed": words(out, width // 8), "weight_scale": scales.T, "weight_shape": np.array([out, width])}


LARGE = [
    "GPTQ",
    "AWQ",
    "compressed, 4 bits group",
    "FP8, blocks",
    "compressed, FP8 channel",
    "compressed, int8 channel",
]


@pytest.mark.parametrize("name", [*LARGE, "GGUF"])
def test_loading_holds_one_tensor_beside_what_stays(tmp_path, monkeypatch, name):
    """Of sixteen layers' matrices no two are on the host at once, and of what makes one a block."""
    monkeypatch.setattr("convert.quantized.modules.BLOCK_VALUES", 2**14)
    monkeypatch.setattr("convert.gguf.tensors.BLOCK_VALUES", 2**14)
    layers, width, inner = 16, 128, 2048
    config = make(DENSE, num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, num_attention_heads=16)
    tensors, layer = factory.hf_weights(factory.random_weights(config, 0), config), "model.layers.{}.mlp.{}_proj."
    shapes = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    if name == "GGUF":
        kind = gguf.GGMLQuantizationType.Q8_0
        folder = as_folder(write_gguf(tmp_path / "model.gguf", config, tensors, lambda name: kind))
    else:
        for number in range(layers):
            for which, shape in shapes.items():
                before = layer.format(number, which)
                del tensors[f"{before}weight"]
                tensors |= {before + ending: part for ending, part in random_parts(name, *shape).items()}
        settings = json.dumps(FORMS[name].settings).replace('"group_size": 16', '"group_size": 128')
        folder = write(tmp_path, json.loads(settings.replace("[10, 20]", "[128, 128]")), tensors, config)
    del tensors
    hf.load_hf(folder, config, jnp.bfloat16)  # what is imported and compiled stays
    tracemalloc.start()
    try:
        loaded = hf.load_hf(folder, config, jnp.bfloat16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    largest = 4 * 2 * width * inner  # gate and up, in float32; of all layers' together a twenty-fourth
    stays = sum(leaf.nbytes for leaf in flatten(loaded).values())
    # Both, one of them while it is put there, and half a megabyte of Python's own.
    assert largest < peak < 1.8 * largest, peak / largest
    assert stays + peak < 1.2 * stays, 1 + peak / stays


def test_a_folder_becomes_a_plain_one_and_is_sound(tmp_path):
    plain = write_model(tmp_path, "compressed, 4 bits group")
    folder, there, back = (tmp_path / name for name in ("quantized", "orbax", "back"))
    assert convert_folder(folder, there) == ("Hugging Face", "Orbax")
    assert convert_folder(there, back) == ("Orbax", "Hugging Face")
    assert "quantization_config" not in hf.read_json(back / "config.json") | hf.read_json(there / "config.json")
    for key, tensor in factory.hf_weights(hf.load_hf(back, DENSE), DENSE).items():
        np.testing.assert_array_equal(tensor, plain[key], err_msg=key)
    report = check_folder(folder)
    said = dict(report.lines)
    assert not report.problems, report.problems
    assert "4 bits in groups of 16 (compressed-tensors) (7 tensors)" in said["dtype"]
    assert said["values"] == "all finite"


def test_the_benchmark_gives_transformers_the_same_values(tmp_path):
    import torch

    plain = write_model(tmp_path, "GPTQ, g_idx")
    model = transformers_model(tmp_path / "quantized", "float32")
    for key, tensor in model.state_dict().items():
        if key in plain:
            np.testing.assert_array_equal(tensor.to(torch.float32).numpy(), plain[key], err_msg=key)


def test_a_fingerprint_is_of_all_that_makes_the_weights(tmp_path):
    write_model(tmp_path / "a", "AWQ")
    first = model_fingerprint(tmp_path / "a" / "quantized")
    form, tensors = FORMS["AWQ"], factory.hf_weights(factory.random_weights(DENSE, 0), DENSE)
    for ending in ("qweight", "qzeros", "scales"):
        stored, _ = quantized_model(form, tensors)
        name = f"model.layers.0.mlp.up_proj.{ending}"
        stored[name] = stored[name][::-1]
        assert model_fingerprint(write(tmp_path / ending, form.settings, stored)) != first


def test_a_drafter_may_be_quantized(tmp_path):
    config = factory.BYTE_DRAFT
    form, tensors = FORMS["compressed, FP8 channel"], factory.hf_weights(factory.random_weights(config, 0), config)
    stored, plain = quantized_model(form, tensors)
    save_file({name: np.ascontiguousarray(x) for name, x in stored.items()}, tmp_path / "model.safetensors")
    hf.write_json(tmp_path / "config.json", config.to_hf() | {"quantization_config": form.settings})
    assert hf.parse_config(hf.read_json(tmp_path / "config.json")) == config
    for key, tensor in factory.hf_weights(hf.load_hf(tmp_path, config), config).items():
        np.testing.assert_array_equal(tensor, plain[key], err_msg=key)


# --- Refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_a_tensor_that_is_missing_or_another_is_refused_by_its_name(tmp_path, name):
    """Each of a module's tensors in turn: left out, in another dtype, too long."""
    form = FORMS[name]
    parts, _ = form.pack(form.shape, np.random.default_rng(0))
    for ending, part in parts.items():
        rest = {key: value for key, value in parts.items() if key != ending}
        if ending != "g_idx" or form.settings["desc_act"]:  # else the order needs no tensor
            says = rf"has {MODULE}.\w+, and there is no {MODULE}.{ending}(_inv)? beside it\."
            with pytest.raises(DominoError, match=says):
                one_module(tmp_path, form, lambda _, rest=rest: rest)
        wrong = part.astype(np.float64)
        with pytest.raises(DominoError, match=rf"has {MODULE}.{ending} in F64, expected "):
            one_module(tmp_path, form, lambda parts, ending=ending, wrong=wrong: parts | {ending: wrong})
        if ending in ("weight", "qweight"):  # whose shape is compared with the model's
            continue
        cut = np.concatenate([part, part])
        with pytest.raises(DominoError, match=rf"has {MODULE}.\w+ of shape \[[\d, ]+\], (expected|which)"):
            one_module(tmp_path, form, lambda parts, ending=ending, cut=cut: parts | {ending: cut})


def test_values_that_make_no_sense_are_refused(tmp_path):
    def change(ending: str, values: Any) -> Any:
        return lambda parts: parts | {ending: np.array(values, parts[ending].dtype)}

    act_order = FORMS["compressed, act-order"]
    for form, ending in ((FORMS["GPTQ, g_idx"], "g_idx"), (act_order, "weight_g_idx")):
        for number in (-1, 3):
            weight, _ = one_module(tmp_path, form, change(ending, [number] * 48))
            with pytest.raises(DominoError, match=f"{MODULE}.{ending} with group {number}, and there are 3 groups"):
                weight.read(ALL)
    for shape in ([24, 0], [-24, 48], [24, 80]):
        with pytest.raises(DominoError, match=r"weight_packed of shape \[24, 6\], which does not hold the"):
            one_module(tmp_path, act_order, change("weight_shape", shape))


def scheme(**weights: Any) -> dict[str, Any]:
    base = compressed(PACK, 4, "int", "group", group_size=16)
    base["config_groups"]["group_0"]["weights"] |= weights
    return base


SETTINGS: dict[str, tuple[Any, str]] = {
    "no object": ("fp8", 'quantization_config "fp8"; expected an object'),
    "no method": ({"bits": 4}, "no quantization_config.quant_method; expected a string"),
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, 'quant_method "bitsandbytes", which is not supported'),
    "modelopt": ({"quant_method": "modelopt"}, "fp8, compressed-tensors, awq, gptq are, and GGUF files"),
    "E5M2": (FP8 | {"fmt": "e5m2"}, 'quantization_config.fmt "e5m2"; expected "e4m3"'),
    "blocks of one size": (FP8 | {"weight_block_size": [128]}, "weight_block_size of 1 sizes"),
    "blocks of nothing": (FP8 | {"weight_block_size": [0, 128]}, "weight_block_size"),
    "AWQ's gemv": (AWQ | {"version": "gemv"}, 'version "gemv" of AWQ; gemm alone is supported'),
    "AWQ's marlin": (AWQ | {"version": "marlin"}, 'version "marlin" of AWQ'),
    "AWQ of llm-awq": (AWQ | {"backend": "llm-awq"}, 'backend "llm-awq"'),
    "AWQ of 8 bits": (AWQ | {"bits": 8}, "8 bits of AWQ; 4 are supported"),
    "AWQ without zero points": (AWQ | {"zero_point": False}, "zero_point false"),
    "GPTQ of 3 bits": (GPTQ | {"bits": 3}, "3 bits of GPTQ; 2, 4 and 8 are supported"),
    "GPTQ of another format": (GPTQ | {"checkpoint_format": "marlin"}, 'checkpoint_format "marlin" of GPTQ'),
    "GPTQ in marlin's": (GPTQ | {"is_marlin_format": True}, "is_marlin_format true"),
    "GPTQ in smaller words": (GPTQ | {"pack_dtype": "int16"}, 'pack_dtype "int16"'),
    "GPTQ with rules": (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, r'dynamic settings of its own for "+:.*down'),
    "GPTQ in two formats": (GPTQ | {"checkpoint_format": "gptq", "format": "gptq_v2"}, "they are one setting"),
    "compressed, dense": (compressed("dense", 4, "int", "channel"), 'format "dense" of compressed-tensors'),
    "compressed, FP4": (compressed("nvfp4-pack-quantized", 4, "float", "tensor_group"), '"nvfp4-pack-quantized"'),
    "compressed, 2:4": (compressed("marlin-24", 4, "int", "channel"), 'format "marlin-24"'),
    "compressed, sparse": (
        compressed(INT, 8, "int", "channel") | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        'sparsity_config.format "sparse-24-bitmask"',
    ),
    "compressed, rotated": (compressed(INT, 8, "int", "channel") | {"transform_config": {"a": 1}}, "transform_config"),
    "compressed, keys and values": (
        compressed(INT, 8, "int", "channel") | {"kv_cache_scheme": {"num_bits": 8}},
        'kv_cache_scheme {"num_bits": 8}, which is not supported',
    ),
    "compressed, a preset": (scheme() | {"config_groups": {"W4A16": ["Linear"]}}, 'W4A16 ["Linear"]; expected an'),
    "compressed, 3 bits": (scheme(num_bits=3), "type int and 3 bits in pack-quantized"),
    "compressed, another strategy": (scheme(strategy="attn_head"), 'weights.strategy "attn_head"'),
    "compressed, no size": (scheme(group_size=None), "strategy group and no group_size"),
    "compressed, FP8 with zero points": (
        compressed(FLOAT, 8, "float", "channel", False),
        "symmetric false",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("config", [DENSE, factory.BYTE_DRAFT], ids=["target", "drafter"])
def test_settings_that_are_not_supported_are_refused_by_name(tmp_path, config, name):
    settings, says = SETTINGS[name]
    file = tmp_path / "config.json"
    with pytest.raises(DominoError) as caught:
        hf.parse_config(config.to_hf() | {"quantization_config": settings}, None, file)
    said = str(caught.value)
    assert said.startswith(f"{file} has ") and says in said and said.endswith(".") and "\n" not in said


def test_what_looks_quantized_is_not_guessed(tmp_path):
    """Tensors without settings, settings without tensors, and a module with tensors of two kinds."""
    parts, _ = FORMS["AWQ"].pack((24, 48), np.random.default_rng(0))
    tensors = {f"{MODULE}.{ending}": part for ending, part in parts.items()}
    write(tmp_path, None, tensors)
    with pytest.raises(DominoError, match=rf"has {MODULE}.qweight, which is quantized, and .* no quantization_config"):
        open_tensors(tmp_path)
    plain = {f"{MODULE}.weight": np.ones((24, 48), ml_dtypes.bfloat16)}
    write(tmp_path, FORMS["AWQ"].settings, plain)
    assert open_tensors(tmp_path).stored[f"{MODULE}.weight"].dtype == "BF16"
    write(tmp_path, FORMS["AWQ"].settings, tensors | plain)
    with pytest.raises(DominoError, match=r"down_proj.weight beside qweight, qzeros, scales"):
        open_tensors(tmp_path)
    symmetric = FORMS["compressed, int8 channel"]
    with pytest.raises(DominoError, match=r"weight_zero_point beside weight, weight_scale"):
        one_module(tmp_path, symmetric, lambda parts: parts | {"weight_zero_point": np.ones((24, 1), np.int8)})


def test_scales_of_activations_are_no_part_of_the_weights(tmp_path):
    for name in ("FP8, one scale", "compressed, FP8 tensor"):
        weight, values = one_module(
            tmp_path, FORMS[name], lambda parts: parts | {"input_scale": np.ones(1, np.float32)}
        )
        np.testing.assert_array_equal(weight.read(ALL), values)


# --- What is written -------------------------------------------------------------------------------------------------


def nibbles(words: np.ndarray) -> np.ndarray:
    """Rows of words as rows of their eight codes each, from the lowest bits."""
    return ((words.astype(np.int64)[:, :, None] >> (4 * np.arange(8))) & 15).reshape(len(words), -1)


def dequantized(form: str, parts: dict[str, np.ndarray]) -> np.ndarray:
    """The values of what was written."""
    scale = parts["weight_scale"].astype(np.float32)
    if form in ("fp8", "int8"):
        return parts["weight"].astype(np.float32) * scale
    out, width = parts["weight_shape"].tolist()
    zeros = nibbles(parts["weight_zero_point"].T).T[:out] if form == "awq-like" else np.full(scale.shape, 8)
    codes = nibbles(parts["weight_packed"])[:, :width] - np.repeat(zeros, 128, axis=1)
    return codes.astype(np.float32) * np.repeat(scale, 128, axis=1)


@pytest.mark.parametrize(("form", "most"), [("fp8", 0.037), ("int8", 0.0079), ("int4", 0.075), ("awq-like", 0.14)])
def test_what_is_written_is_near_and_read_again_exactly(tmp_path, form, most):
    """The reader gives the values of codes, scales and zero points; each is within a step of the weight's."""
    config = make(DENSE, hidden_size=128, num_attention_heads=5, num_key_value_heads=1, head_dim=16)
    config = make(config, moe=MoeConfig(2, 1, 256, True), intermediate_size=256, tie_word_embeddings=False)
    hf.save_hf(tmp_path / "plain", factory.random_weights(config, 3), config, config.to_hf(), jnp.bfloat16)
    assert main([str(tmp_path / "plain"), str(tmp_path / "q"), "--weights", form]) == 0
    settings = hf.read_json(tmp_path / "q" / "config.json")["quantization_config"]
    kept = {"lm_head", "model.layers.0.mlp.gate"}
    if form in ("int4", "awq-like"):
        kept.add("model.layers.0.self_attn.o_proj")  # 80 inputs are no multiple of 128
    assert set(settings["ignore"]) == kept
    raw = TensorFiles([tmp_path / "q" / "model.safetensors"])
    stored = {name: np.asarray(raw.read(tensor)) for name, tensor in raw.stored.items()}
    plain, read = open_tensors(tmp_path / "plain"), open_tensors(tmp_path / "q")
    assert set(read.stored) == set(plain.stored)
    changed = 0
    for name in plain.stored:
        before, after = (np.asarray(x.read(x.stored[name])).astype(np.float32) for x in (plain, read))
        module = name.removesuffix(".weight")
        parts = {key.rpartition(".")[2]: x for key, x in stored.items() if key.startswith(f"{module}.")}
        if "weight_scale" not in parts:
            np.testing.assert_array_equal(before, after)
            assert before.ndim < 2 or module in {*kept, "model.embed_tokens"}
            continue
        np.testing.assert_array_equal(after, dequantized(form, parts))
        width = 128 if "weight_packed" in parts else before.shape[1]
        largest = np.repeat(np.abs(before).reshape(len(before), -1, width).max(axis=2), width, axis=1)
        assert (np.abs(after - before) <= most * largest).all(), name
        changed += 1
    assert changed == 10 - (len(kept) == 3)  # q, k, v, o, and three of each expert
    assert check_folder(tmp_path / "q").problems == []


@pytest.mark.parametrize("form", ["fp8", "int8", "int4", "awq-like"])
def test_what_is_nothing_or_not_symmetric_is_written(form):
    weight = np.zeros((3, 256), ml_dtypes.bfloat16)
    weight[1] = 5
    weight[2, ::2] = -3
    found = dequantized(form, quantize_weight(form, weight))
    assert not found[0].any() and np.isfinite(found).all()
    np.testing.assert_allclose(found, weight.astype(np.float32), atol=0.36)
    if form == "awq-like":  # two values and zero: each is a step's end
        np.testing.assert_allclose(found, weight.astype(np.float32), rtol=0.01)


def test_what_can_not_be_quantized_is_refused(tmp_path, capsys):
    hf.save_hf(tmp_path / "plain", factory.random_weights(DENSE, 0), DENSE, DENSE.to_hf())
    assert main([str(tmp_path / "plain"), str(tmp_path / "q"), "--weights", "int4"]) == 1
    assert "nothing would be quantized" in capsys.readouterr().err and not (tmp_path / "q").exists()
    broken = factory.random_weights(DENSE, 0)
    broken.layers[0].o = broken.layers[0].o.at[0, 0].set(jnp.nan)
    hf.save_hf(tmp_path / "broken", broken, DENSE, DENSE.to_hf())
    assert main([str(tmp_path / "broken"), str(tmp_path / "q"), "--weights", "fp8"]) == 1
    assert "o_proj.weight has values that are not finite" in capsys.readouterr().err and not (tmp_path / "q").exists()
    assert main([str(tmp_path / "plain"), str(tmp_path / "q"), "--weights", "int8", "--format", "deepspec"]) == 2
    assert main(["--check", str(tmp_path / "plain"), "--weights", "int8"]) == 2
