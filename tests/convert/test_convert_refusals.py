"""What is refused, and in which words: damaged folders, drafters for another target, configs that are not supported."""

import dataclasses
import json
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import factory
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from convert import hf
from convert.draft_configs import read_draft_config
from convert.tensors import tensor_files
from domino_jax.config import DecoderConfig, DraftConfig, TargetConfig, check_pair
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.errors import DominoError
from domino_jax.weights import flatten

TARGET = dataclasses.replace(factory.TARGET, num_hidden_layers=2)
DRAFT = factory.draft_config(TARGET, num_hidden_layers=1, target_layer_ids=(0, 1))
CONFIGS: dict[str, DecoderConfig] = {
    "target": TARGET,
    "tied": dataclasses.replace(TARGET, tie_word_embeddings=True),
    "Domino": DRAFT,
    "DFlash": dataclasses.replace(DRAFT, head=None),
}


def refused(*words: str) -> Any:
    """Expects a DominoError with these words in this order, in one sentence."""
    return pytest.raises(DominoError, match=".*".join(re.escape(word) for word in words))


def write(folder: Path, config: Any, **raw: Any) -> Path:
    hf.save_hf(folder, factory.random_weights(config, 0), config, config.to_hf() | raw)
    return folder


@pytest.fixture
def target(tmp_path) -> Path:
    return write(tmp_path / "target", TARGET)


@pytest.fixture
def draft(tmp_path) -> Path:
    return write(tmp_path / "draft", DRAFT)


def change(folder: Path, **tensors: np.ndarray | None) -> None:
    """Replace, add or (None) remove tensors of a folder; "__" stands for a dot."""
    held = load_file(folder / hf.SINGLE) | {name.replace("__", "."): t for name, t in tensors.items()}
    save_file({name: t for name, t in held.items() if t is not None}, folder / hf.SINGLE)


def load(folder: Path) -> Any:
    config = hf.parse_config(hf.read_json(folder / "config.json"))
    return hf.load_hf(folder, config)


# --- Good folders, bit for bit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**9, 3000, 1], ids=["one file", "shards", "a tensor a shard"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, monkeypatch, kind, shard_bytes):
    config: Any = CONFIGS[kind]
    monkeypatch.setattr(hf, "SHARD_BYTES", shard_bytes)
    module = factory.random_weights(config, 1)
    hf.save_hf(tmp_path, module, config, config.to_hf())
    files = tensor_files(tmp_path)
    assert (len(files) > 1) == (shard_bytes < 10**9) == (tmp_path / hf.INDEX).exists()
    if len(files) > 1:
        index = json.loads((tmp_path / hf.INDEX).read_text())
        held = {name: file.name for file in files for name in load_file(file)}
        tensors = factory.hf_weights(module, config)
        assert index["weight_map"] == held and held.keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert hf.parse_config(hf.read_json(tmp_path / "config.json")) == config
    ours, theirs = flatten(module), flatten(load(tmp_path))
    assert ours.keys() == theirs.keys()
    for path, tensor in ours.items():
        assert theirs[path].dtype == np.float32
        np.testing.assert_array_equal(np.asarray(tensor), theirs[path], err_msg=path)
    assert not list(tmp_path.glob(".*")), "a temporary file was left"


def test_layouts_are_hugging_faces(draft, target):
    """Matrices on disk are [out, in]; a transposed table would still round-trip."""
    d, t = load_file(draft / hf.SINGLE), load_file(target / hf.SINGLE)
    ours = load(target)
    layer = ours.layers[1]
    for name, own in (("gate", layer.gate_up[0]), ("up", layer.gate_up[1]), ("down", layer.down)):
        np.testing.assert_array_equal(t[f"model.layers.1.mlp.{name}_proj.weight"], own)
    for name, own in (("q", layer.q), ("k", layer.kv[0]), ("v", layer.kv[1])):
        stored = t[f"model.layers.1.self_attn.{name}_proj.weight"].reshape(-1, 6, 32)
        np.testing.assert_array_equal(stored, own)
    np.testing.assert_array_equal(t["model.layers.0.self_attn.o_proj.weight"], ours.layers[0].o)
    head = load(draft).head
    np.testing.assert_array_equal(d["embed_proj.0.weight"], np.concatenate([head.proj_block, head.proj_state], axis=1))
    assert d["fc.weight"].shape == (32, 64)
    assert d["prefix_gru.weight_ih_l0"].shape == (42, 32)
    assert d["prefix_gru.weight_hh_l0"].shape == (42, 14)
    assert d["embed_proj.0.weight"].shape == (7, 46)
    assert d["embed_proj.2.weight"].shape == (89, 7)


def test_an_older_drafters_head_is_nested(draft):
    plain = flatten(load(draft))
    tensors = load_file(draft / hf.SINGLE)
    nested = {f"logit_head.{n}" if n.startswith(("prefix_gru", "embed_proj")) else n: t for n, t in tensors.items()}
    assert len(set(nested) - set(tensors)) == 4
    save_file(nested, draft / hf.SINGLE)
    for path, tensor in flatten(load(draft)).items():
        np.testing.assert_array_equal(tensor, plain[path])


def test_a_tied_model_may_carry_its_output_projection_twice(tmp_path):
    folder = write(tmp_path / "tied", CONFIGS["tied"])
    change(folder, lm_head__weight=load_file(folder / hf.SINGLE)["model.embed_tokens.weight"])
    assert load(folder).lm_head is None


# --- Tensors and files --------------------------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_tensors_are_reported_together(target):
    change(
        target,
        model__norm__weight=None,
        model__layers__1__self_attn__q_norm__weight=None,
        model__layers__0__mlp__up_proj__weight=np.zeros((32, 40), np.float32),  # transposed
        model__layers__2__input_layernorm__weight=np.zeros(32, np.float32),
    )
    with refused("target", "does not hold the model of its config.json") as error:
        load(target)
    for problem in (
        "missing model.norm.weight",
        "missing model.layers.1.self_attn.q_norm.weight",
        "unexpected model.layers.2.input_layernorm.weight",
        "model.layers.0.mlp.up_proj.weight has shape [32, 40], expected [40, 32]",
    ):
        assert problem in str(error.value)


def test_many_problems_are_counted(target):
    missing = len(factory.hf_weights(factory.random_weights(TARGET, 0), TARGET)) - 1
    kept = load_file(target / hf.SINGLE)["model.norm.weight"]
    save_file({"other": np.zeros(1, np.float32), "model.norm.weight": kept}, target / hf.SINGLE)
    with refused(f"and {missing + 1 - 8} more"):
        load(target)


def test_an_untied_model_needs_its_output_projection(target):
    change(target, lm_head__weight=None)
    with refused("missing lm_head.weight"):
        load(target)


def test_a_drafters_head_is_neither_left_out_nor_ignored(draft):
    raw = hf.read_json(draft / "config.json")
    del raw["dflash_config"]["projector_type"]
    hf.write_json(draft / "config.json", raw)
    with refused("unexpected embed_proj.0.weight", "unexpected prefix_gru.weight_ih_l0"):
        load(draft)
    raw["dflash_config"]["projector_type"] = "domino"
    hf.write_json(draft / "config.json", raw)
    load(draft)
    change(draft, prefix_gru__weight_hh_l0=None)
    with refused("missing prefix_gru.weight_hh_l0"):
        load(draft)


def header_length(file: Path) -> int:
    return struct.unpack("<Q", file.read_bytes()[:8])[0]


@pytest.mark.parametrize("keep", ["nothing", "a few bytes", "half the header", "the header", "all but the last byte"])
def test_a_truncated_file_is_refused(target, keep):
    file = target / hf.SINGLE
    whole, header = file.read_bytes(), header_length(file)
    sizes = {"nothing": 0, "a few bytes": 5, "half the header": header // 2, "the header": 8 + header}
    file.write_bytes(whole[: sizes.get(keep, len(whole) - 1)])
    with refused(str(file), "truncated"):
        load(target)


def test_a_truncated_shard_is_refused_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 9000)
    folder = write(tmp_path / "sharded", TARGET)
    file = tensor_files(folder)[1]
    file.write_bytes(file.read_bytes()[:-1])
    with refused(file.name, "truncated"):
        load(folder)


def test_a_pickle_is_refused_and_never_opened(target):
    ran = []

    class Trap:
        def __reduce__(self):
            return ran.append, (1,)

    (target / hf.SINGLE).rename(target / "pytorch_model.bin")
    (target / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with refused("only pickles (pytorch_model.bin)", "safetensors"):
        load(target)
    # Nor when it goes by another name.
    (target / "pytorch_model.bin").rename(target / hf.SINGLE)
    with refused("is not a whole safetensors file"):
        load(target)
    assert not ran


def test_a_missing_shard_is_refused_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 9000)
    folder = write(tmp_path / "sharded", TARGET)
    lost = tensor_files(folder)[2]
    lost.unlink()
    with refused(hf.INDEX, lost.name, "not in the folder"):
        load(folder)


def test_folders_without_weights_or_config_are_refused(target, tmp_path):
    (target / hf.SINGLE).unlink()
    with refused("target", "has no model.safetensors"):
        load(target)
    with refused("elsewhere", "config.json does not exist"):
        load(tmp_path / "elsewhere")
    (target / "config.json").write_text("{half")
    with refused("config.json can't be read as JSON"):
        load(target)
    (target / "config.json").write_text("[1]")
    with refused("holds a list, expected a JSON object"):
        load(target)
    hf.write_json(target / "config.json", TARGET.to_hf())
    hf.write_json(target / hf.INDEX, {"metadata": {}})
    with refused(hf.INDEX, "no weight_map"):
        load(target)


# --- Configs ------------------------------------------------------------------------------------------------------

PROPORTIONAL = {"rope_type": "proportional", "factor": 4.0}
BOTH = {
    "rope_scaling": ({"rope_scaling": PROPORTIONAL}, 'rope type "proportional"'),
    "rope_scaling, old spelling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope type "linear"'),
    "rope_parameters": ({"rope_parameters": {"rope_theta": 1e6} | PROPORTIONAL}, 'rope type "proportional"'),
    "dynamic rope": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 'rope type "dynamic"'),
    "long rope": ({"rope_scaling": {"rope_type": "longrope"}}, 'rope type "longrope"'),
    "unknown rope": ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "spiral"}}, 'rope type "spiral"'),
    "part of a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "part of a head, nested": (
        {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor 0.5",
    ),
    "MLP bias": ({"mlp_bias": True}, "mlp_bias true"),
    "hidden_act": ({"hidden_act": "gelu"}, 'hidden_act "gelu"'),
    "quantized": ({"quantization_config": {"quant_method": "hqq"}}, 'quantization_config.quant_method "hqq"'),
    "no theta": ({"rope_theta": ...}, "no rope_theta", "a number above 1"),
    "no head_dim": ({"head_dim": ...}, "no head_dim", "an integer of at least 1"),
    "odd head_dim": ({"head_dim": 7}, "head_dim must be even"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers 0; expected an integer from 1"),
    "heads": ({"num_attention_heads": 5, "num_key_value_heads": 2}, "must be a multiple"),
}
TARGETS = {
    "another architecture": ({"model_type": "gemma2"}, 'model_type "gemma2"'),
    "another MoE": ({"model_type": "qwen2_moe"}, 'model_type "qwen2_moe"'),
    "use_sliding_window": ({"use_sliding_window": True, "sliding_window": 64}, "sliding-window"),
    "sliding layer": ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
}
DRAFTERS = {
    "P = J": ({"dflash_config": {"pure_draft_prefix_len": 5}}, "pure_draft_prefix_len", "0 to 4", "found 5"),
    "P < 0": ({"dflash_config": {"pure_draft_prefix_len": -1}}, "pure_draft_prefix_len -1", "at least 0"),
    "P = J, unshifted": (
        {"dflash_config": {"pure_draft_prefix_len": 4, "shift_label": False}},
        "pure_draft_prefix_len must be from 0 to 3",
    ),
    "layer beyond the target": ({"dflash_config": {"target_layer_ids": [0, 2]}}, "target_layer_ids [0, 2]", "0 to 1"),
    "layer below": ({"dflash_config": {"target_layer_ids": [-1]}}, "target_layer_ids [-1]", "integers of at least 0"),
    "no layers": ({"dflash_config": {"target_layer_ids": []}}, "target_layer_ids []"),
    "mask token": ({"dflash_config": {"mask_token_id": 89}}, "mask_token_id 89", "89"),
    "no mask token": ({"dflash_config": {"mask_token_id": None}}, "no mask_token_id"),
    "projector": ({"dflash_config": {"projector_type": "medusa"}}, 'projector_type "medusa"'),
    "no rank": ({"emb_dim": None, "dflash_config": {"emb_dim": None}}, "no emb_dim"),
    "no GRU width": ({"dflash_config": {"gru_hidden_dim": None}}, "no gru_hidden_dim"),
    "no block": ({"block_size": None}, "no block_size"),
    "a block of nothing": ({"block_size": 1, "dflash_config": {"shift_label": False}}, "proposes nothing"),
    "depth unknown": ({"num_target_layers": None}, "no num_target_layers"),
    "unknown layer type": ({"layer_types": ["chunked_attention"]}, "chunked_attention"),
    "window unknown": ({"layer_types": ["sliding_attention"]}, "no sliding_window"),
    "layer types": ({"layer_types": ["full_attention"] * 2}, "layer_types names 2 layers"),
    "not a drafter": ({"dflash_config": 3}, "dflash_config 3; expected an object"),
}


def edited(raw: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """The config with `change`, inside dflash_config too; ... takes a field away."""
    nested = change.get("dflash_config")
    if isinstance(nested, dict):
        change = change | {"dflash_config": raw["dflash_config"] | nested}
    return {name: value for name, value in (raw | change).items() if value is not ...}


@pytest.mark.parametrize("config", [TARGET, DRAFT], ids=["target", "draft"])
@pytest.mark.parametrize("case", BOTH.values(), ids=BOTH.keys())
def test_a_config_that_would_be_computed_wrongly_is_refused(config, case):
    change, *words = case
    with refused(*words):
        hf.parse_config(edited(config.to_hf(), change))


@pytest.mark.parametrize("case", TARGETS.values(), ids=TARGETS.keys())
def test_a_target_that_is_not_supported_is_refused(case):
    with refused(case[1]):
        hf.parse_config(edited(TARGET.to_hf(), case[0]))


@pytest.mark.parametrize("case", DRAFTERS.values(), ids=DRAFTERS.keys())
def test_a_drafter_that_makes_no_sense_is_refused(case):
    change, *words = case
    with refused(*words):
        hf.parse_config(edited(DRAFT.to_hf(), change))


@pytest.mark.parametrize(("given", "windows"), [({}, (None, None)), ({"max_window_layers": 1}, (None, 64))])
def test_sliding_windows_without_layer_types_are_those_of_transformers(given, windows):
    raw: dict[str, Any] = factory.draft_config().to_hf() | {"use_sliding_window": True, "sliding_window": 64} | given
    del raw["layer_types"]
    config = hf.parse_config(raw)
    assert isinstance(config, DraftConfig)
    assert config.windows == windows
    theirs = transformers.Qwen3Config(**{k: v for k, v in raw.items() if k != "architectures"})
    assert theirs.layer_types == ["sliding_attention" if w else "full_attention" for w in windows]


def test_absent_fields_have_the_specs_defaults():
    raw: dict[str, Any] = factory.draft_config(num_target_layers=36).to_hf()
    for key in ("target_layer_ids", "shift_label", "pure_draft_prefix_len"):
        del raw["dflash_config"][key]
    del raw["layer_types"], raw["num_target_layers"]
    config = hf.parse_config(raw, 36)
    assert isinstance(config, DraftConfig)
    assert config.target_layer_ids == (1, 33)
    assert config.shift_label is False and config.num_proposals == 4
    assert config.head == DominoHead(14, 7, 0)
    assert config.windows == (None, None)
    assert config.num_target_layers == 36
    raw = TARGET.to_hf()
    del raw["tie_word_embeddings"]
    assert hf.parse_config(raw) == TARGET


# --- Pairs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hidden_size": 48}, ("hidden_size is 48", "32")),
        ({"vocab_size": 97}, ("vocab_size is 97", "89")),
        ({"num_target_layers": 3}, ("number of layers is 3", "2")),
    ],
    ids=["width", "vocabulary", "layers"],
)
def test_a_draft_for_another_target_is_refused(change, words):
    assert check_pair(TARGET, DRAFT) == []
    with refused("another target", *words):
        check_pair(TARGET, dataclasses.replace(DRAFT, **change))


def test_other_rope_settings_are_a_warning():
    (warning,) = check_pair(TARGET, dataclasses.replace(DRAFT, rope_theta=1e6))
    assert "rope_theta" in warning and "1e+06" in warning and "500" in warning


def test_a_drafter_is_no_target_and_the_other_way_round(draft, target):
    assert isinstance(hf.parse_config(hf.read_json(draft / "config.json")), DraftConfig)
    assert isinstance(hf.parse_config(hf.read_json(target / "config.json")), TargetConfig)
    with refused("no dflash_config"):
        read_draft_config(hf.read_json(target / "config.json"))
    with refused("does not hold the model"):
        hf.load_hf(draft, TARGET)


def test_saving_where_nothing_can_be_written_is_said_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with refused("can't be written"):
        write(tmp_path / "file", TARGET)


def test_loading_reports_progress_and_converts(target):
    seen = []
    module = hf.load_hf(target, TARGET, jnp.bfloat16, lambda done, total: seen.append((done, total)))
    steps, totals = zip(*seen, strict=True)
    assert list(steps) == sorted(set(steps)) and len(steps) == len(flatten(module))
    assert set(totals) == {steps[-1]} == {sum(x.nbytes for x in load_file(target / hf.SINGLE).values())}
    assert {str(x.dtype) for x in flatten(module).values()} == {"bfloat16"}
