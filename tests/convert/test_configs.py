"""What a config.json may say: kinds of values, two places for a field, guesses, fields of other models and drafters.

Which settings make sense together is in test_convert_refusals.py.
"""

import copy
import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any

import factory
import pytest

from convert import hf
from convert.configs import NEUTRAL, OF_TRANSFORMERS
from convert.draft_configs import NEUTRAL_IN_A_DRAFTER, export_warnings, is_drafter, read_draft_config
from convert.quantized import QUANTIZATION
from convert.tokenizer import end_tokens
from domino_jax.config import DraftConfig, Llama3, MoeConfig, TargetConfig
from domino_jax.errors import DominoError

FILE = Path("models/some/config.json")
DENSE = factory.TARGET
EXPERTS = dataclasses.replace(DENSE, moe=MoeConfig(8, 3, 20, norm_topk_prob=True))
DOMINO = factory.draft_config()
PLAIN = factory.draft_config(head=None, shift_label=False)
SLIDING = dataclasses.replace(DOMINO, windows=(7, 7))
LLAMA = dataclasses.replace(DENSE, qk_norm=False, rope_scaling=Llama3(8.0, 1.0, 4.0, 64), head_dim=8)
QWEN2 = dataclasses.replace(DENSE, qk_norm=False, qkv_bias=True, head_dim=8)
CONFIGS: dict[str, TargetConfig | DraftConfig] = {
    "dense": DENSE,
    "experts": EXPERTS,
    "Llama": LLAMA,
    "Qwen2": QWEN2,
    "Domino": DOMINO,
    "DFlash": PLAIN,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def parse(raw: dict[str, Any]) -> Any:
    """The config, from what JSON would make of `raw`."""
    return hf.parse_config(json.loads(json.dumps(raw)), file=FILE)


def refused(*words: str) -> Any:
    """Expects one sentence of the file that has these words in this order."""
    return pytest.raises(DominoError, match=".*".join(re.escape(word) for word in (str(FILE), *words)))


def moved(raw: dict[str, Any], name: str, nested: bool = False, top: bool = False) -> dict[str, Any]:
    """A drafter's config with one field where it is wanted, and nowhere else."""
    inside = dict(raw["dflash_config"])
    value = inside.pop(name, raw.get(name))
    raw = {key: one for key, one in raw.items() if key != name}
    return raw | ({name: value} if top else {}) | {"dflash_config": inside | ({name: value} if nested else {})}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_survives_its_file(kind):
    assert parse(CONFIGS[kind].to_hf()) == CONFIGS[kind]
    assert is_drafter(CONFIGS[kind].to_hf()) == isinstance(CONFIGS[kind], DraftConfig)


# --- Kinds --------------------------------------------------------------------------------------------------------

NO_INTEGERS = ["12", "", True, False, 1.0, 3.7, -1, [4], {}, {"a": 1}, float("nan"), float("inf"), 10**30]
NO_NUMBERS = ["1e-6", True, [1.0], {}, float("nan"), float("-inf"), -1.0, 0]
NO_BOOLEANS = ["false", "true", 0, 1, 0.0, [], [True], {}]
INTEGERS = [
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "max_position_embeddings"),
]
SIZES = [(INTEGERS, NO_INTEGERS), (["rms_norm_eps", "rope_theta"], NO_NUMBERS)]
WRONG = {
    "dense": SIZES,
    "Domino": SIZES,
    "experts": [
        (["num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"], NO_INTEGERS),
        (["norm_topk_prob", "attention_bias", "tie_word_embeddings", "use_sliding_window"], [*NO_BOOLEANS, None]),
        (["mlp_only_layers"], ["1", 1, [1.0], ["1"], [True], [-1], {}]),
    ],
    "DFlash": [
        (["block_size", "mask_token_id", "num_target_layers"], NO_INTEGERS),
        (["shift_label", "sample_from_anchor", "is_causal", "causal", "use_swa", "attention_bias"], NO_BOOLEANS),
        (["target_layer_ids"], ["1", 1, "[0, 1]", [0.0, 1], ["0", 1], [True], [None], [-1], {}]),
        (["layer_types"], ["full_attention", [1], [None], {}, 3]),
        (["projector_type", "architectures", "dflash_config"], [3, True, ["a", 1], 1.5]),
    ],
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_value_of_another_kind_is_refused_by_file_and_field(kind):
    for names, values in WRONG[kind]:
        for name in names:
            for value in values:
                if name == "dflash_config" and isinstance(value, dict):
                    continue
                raw = CONFIGS[kind].to_hf()
                if name in raw.get("dflash_config", {}):
                    raw["dflash_config"][name] = value
                else:
                    raw[name] = value
                with refused(f"{name} {json.dumps(value)}; expected") as error:
                    hf.parse_config(raw, file=FILE)
                assert str(error.value).count(name) == 1 and "\n" not in str(error.value), (name, value)


@pytest.mark.parametrize(
    "name", ["factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "mscale"]
)
@pytest.mark.parametrize("value", ["4", [4], True, float("nan"), {}], ids=str)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_a_yarn_setting_of_another_kind_is_refused(spelling, name, value):
    raw = DENSE.to_hf() | {spelling: {"rope_theta": DENSE.rope_theta} | YARN | {name: value}}
    with refused(f"{spelling}.{name} {json.dumps(value)}; expected"):
        hf.parse_config(raw, file=FILE)


@pytest.mark.parametrize("kind", ["dense", "Domino"])
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_two_values_of_theta_are_refused_and_two_alike_are_one(kind, spelling):
    raw = CONFIGS[kind].to_hf()
    assert parse(raw | {spelling: {"rope_type": "default", "rope_theta": 500}}) == CONFIGS[kind]
    with refused(f"{spelling}.rope_theta 1000 and rope_theta 500.0", "one setting"):
        parse(raw | {spelling: {"rope_type": "default", "rope_theta": 1000}})


# --- Llama and Qwen2 ----------------------------------------------------------------------------------------------

COMMON = {"hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# As their makers publish them.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama 3.1": (
        COMMON
        | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False}
        | {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "pretraining_tp": 1}
        | {"hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072, "vocab_size": 128256}
        | {"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05}
        | {"rope_scaling": LLAMA31 | {"rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": False},
        {"head_dim": 128, "rope_scaling": Llama3(**LLAMA31), "qk_norm": False, "positions": 131072},
    ),
    "SmolLM2": (
        COMMON
        | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "is_llama_config": True, "pretraining_tp": 1}
        | {"hidden_size": 576, "intermediate_size": 1536, "max_position_embeddings": 8192, "vocab_size": 49152}
        | {"num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "rms_norm_eps": 1e-05}
        | {"rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True},
        {"head_dim": 64, "rope_theta": 1e5, "num_key_value_heads": 3, "tie_word_embeddings": True, "family": "llama"},
    ),
    "Llama 2, an early file": (
        COMMON
        | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}
        | {"hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096, "vocab_size": 32000}
        | {"num_attention_heads": 32, "num_hidden_layers": 32, "rms_norm_eps": 1e-05},
        {"num_key_value_heads": 32, "rope_theta": 1e4, "head_dim": 128, "tie_word_embeddings": False},
    ),
    "Qwen2.5": (
        COMMON
        | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "bos_token_id": 151643, "eos_token_id": 151645}
        | {"hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768, "vocab_size": 151936}
        | {"num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06}
        | {"max_window_layers": 21, "sliding_window": 32768, "use_sliding_window": False, "rope_theta": 1000000.0}
        | {"tie_word_embeddings": True},
        {"head_dim": 64, "qkv_bias": True, "attention_bias": False, "qk_norm": False, "family": "qwen2"},
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_public_files_of_other_families_are_read_and_written(name):
    raw, expected = FAMILIES[name]
    config = parse(raw)
    assert {field: getattr(config, field) for field in expected} == expected
    assert parse(config.to_hf()) == config and config.to_hf()["architectures"] == raw["architectures"]
    newer = {key: value for key, value in raw.items() if key not in ("rope_theta", "rope_scaling")}
    if "rope_theta" in raw:  # as transformers 5 writes it
        rope = {"rope_type": "default", **(raw.get("rope_scaling") or {}), "rope_theta": float(raw["rope_theta"])}
        assert parse(newer | {"rope_parameters": rope}) == config


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("Llama 3.1", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no rope_scaling.low_freq_factor"),
        ("Llama 3.1", {"rope_scaling": LLAMA31 | {"rope_type": "llama3", "factor": "8"}}, 'rope_scaling.factor "8"'),
        ("Llama 3.1", {"rope_scaling": LLAMA31 | {"rope_type": "llama3", "low_freq_factor": 4}}, "must be above"),
        ("Llama 3.1", {"rope_scaling": LLAMA31 | {"rope_type": "llama3", "beta_fast": 4}}, "beta_fast among"),
        ("Llama 3.1", {"mlp_bias": True}, "mlp_bias true"),
        ("Llama 3.1", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("Llama 3.1", {"use_qk_norm": True}, "use_qk_norm true"),
        ("SmolLM2", {"num_attention_heads": 7}, "num_attention_heads 7, which does not divide hidden_size 576"),
        ("SmolLM2", {"rope_interleaved": True}, "rope_interleaved true"),
        ("SmolLM2", {"num_key_value_heads": 2}, "multiple of num_key_value_heads"),
        ("Qwen2.5", {"use_sliding_window": True}, "sliding-window attention"),
        ("Qwen2.5", {"num_key_value_heads": None}, "num_key_value_heads null"),
        ("Qwen2.5", {"hidden_act": "gelu"}, 'hidden_act "gelu"'),
    ],
)
def test_what_is_not_supported_of_other_families_is_refused(name, change, words):
    with refused(words):
        parse(FAMILIES[name][0] | change)


@pytest.mark.parametrize("kind", ["dense", "experts", "Llama", "Qwen2"])
def test_what_transformers_refuses_is_refused_by_its_field(kind):
    """Its tokenizers read config.json as well: a file that it refuses would be called the tokenizer's fault."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

    forms = {"dense": Qwen3Config, "experts": Qwen3MoeConfig, "Llama": LlamaConfig, "Qwen2": Qwen2Config}
    form, raw = forms[kind], CONFIGS[kind].to_hf()
    names = [field.name for field in dataclasses.fields(form)]
    assert {"initializer_range", "use_cache", "bos_token_id"} <= set(names)
    count = 0
    for name in [*names, "torch_dtype", "rope_scaling", "num_labels"]:
        for value in (None, "x", "12", "", 0, 1, -1, 1.5, 2.0, True, [1], ["a"], [None], {"a": 1}):
            try:
                form.from_dict(json.loads(json.dumps(raw | {name: value})))
            except Exception as error:  # its errors are of many kinds
                count += 1
                with pytest.raises(DominoError, match=name):
                    parse(raw | {name: value})
                    print(name, value, error)
    assert count > 250


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["151645", [1, "2"], True, [True], 1.0, [None], {"id": 1}], ids=str)
def test_an_end_token_of_another_kind_is_refused_by_its_file(tmp_path, name, value):
    raw = {"eos_token_id": value} if name == "config.json" else {}
    if not raw:
        hf.write_json(tmp_path / name, {"eos_token_id": value})
    with pytest.raises(
        DominoError, match=re.escape(f"{tmp_path / name} has eos_token_id {json.dumps(value)}; expected")
    ):
        end_tokens(tmp_path, raw, None)


def test_end_tokens_are_the_generation_configs_else_the_configs(tmp_path):
    assert end_tokens(tmp_path, {}, None)[0] == () == end_tokens(tmp_path, {"eos_token_id": None}, None)[0]
    assert end_tokens(tmp_path, {"eos_token_id": 5}, None) == ((5,), [])
    hf.write_json(tmp_path / "generation_config.json", {"eos_token_id": None})
    assert end_tokens(tmp_path, {"eos_token_id": [5, 6]}, None) == ((5, 6), [])
    hf.write_json(tmp_path / "generation_config.json", {"eos_token_id": [7]})
    assert end_tokens(tmp_path, {"eos_token_id": 5}, None) == ((7,), [])


def test_a_null_is_no_value_in_a_drafters_file():
    raw: dict[str, Any] = DOMINO.to_hf() | dict.fromkeys(
        ("sliding_window", "use_sliding_window", "attention_bias", "layer_types")
    )
    raw["dflash_config"] |= {"block_size": None, "is_causal": None, "final_logit_softcapping": None}
    assert parse(raw) == DOMINO
    raw["dflash_config"]["mask_token_id"] = None
    with refused("no mask_token_id; expected an integer"):
        parse(raw)


@pytest.mark.parametrize("place", ["target", "drafter"])
def test_what_does_not_fit_together_is_said_of_its_file(place):
    raw = (DENSE if place == "target" else DOMINO).to_hf() | {"num_attention_heads": 5, "num_key_value_heads": 2}
    with refused("num_attention_heads (5) must be a multiple"):
        parse(raw)


# --- One order for all fields -------------------------------------------------------------------------------------

BOTH = [
    *("block_size", "mask_token_id", "target_layer_ids", "shift_label", "projector_type", "gru_hidden_dim", "emb_dim"),
    *("pure_draft_prefix_len", "num_target_layers", "hidden_size", "num_hidden_layers", "rope_theta"),
    *("rms_norm_eps", "attention_bias", "max_position_embeddings", "layer_types"),
]
OTHER = {"target_layer_ids": [0], "shift_label": False, "projector_type": "dflash", "attention_bias": True}


@pytest.mark.parametrize("name", BOTH)
def test_a_drafters_field_stands_in_dflash_config_or_at_top_level_or_in_both_alike(name):
    raw = DOMINO.to_hf()
    for nested, top in ((True, False), (False, True), (True, True)):
        config, warnings = read_draft_config(moved(raw, name, nested, top))
        assert config == DOMINO and warnings == []
    both = moved(raw, name, True, True)
    first = both[name]
    both[name] = OTHER.get(name, ["sliding_attention"] * 2 if name == "layer_types" else first * 2 if first else None)
    if name == "projector_type":
        both["dflash_config"][name], both[name] = "domino", "dflash"
    with refused(f"dflash_config.{name} {json.dumps(first)} and {name} {json.dumps(both[name])}", "one setting"):
        parse(both)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"shift_label": True}, {"sample_from_anchor": False}),
        ({"sample_from_anchor": True}, {"shift_label": False}),
        ({"target_layer_ids": [0, 1]}, {"layer_ids": [1, 0]}),
    ],
    ids=["shift_label", "sample_from_anchor", "target_layer_ids"],
)
@pytest.mark.parametrize("nested", [True, False])
def test_two_names_of_one_field_may_not_differ(one, other, nested):
    raw = PLAIN.to_hf()
    for name in (*one, *other):
        raw["dflash_config"].pop(name, None)
    ((name, value),) = one.items()
    level = raw["dflash_config"] if nested else raw
    level |= one
    assert parse(raw) == parse(raw | {next(iter(other)): value})  # either name, or both alike
    with refused(" and ", "one setting") as error:
        parse(raw | other)
    assert all(f"{key} {json.dumps(given)}" in str(error.value) for key, given in (one | other).items())


def test_layers_counted_from_one_must_be_the_same_layers():
    raw = DOMINO.to_hf()
    assert parse(raw | {"eagle_aux_hidden_state_layer_ids": [2, 1]}) == DOMINO
    with refused("eagle_aux_hidden_state_layer_ids [1, 2]", "target_layer_ids [1, 0]"):
        parse(raw | {"eagle_aux_hidden_state_layer_ids": [1, 2]})


# --- Guesses ------------------------------------------------------------------------------------------------------


def test_what_a_drafters_file_does_not_say_is_a_warning():
    raw = factory.draft_config(num_target_layers=36).to_hf()
    for name, word in (
        ("target_layer_ids", "the public formula gives 1, 33"),
        ("shift_label", "taken as false"),
        ("pure_draft_prefix_len", "taken as 0"),
    ):
        less = raw | {"dflash_config": {key: value for key, value in raw["dflash_config"].items() if key != name}}
        _, (warning,) = read_draft_config(less, file=FILE)
        assert str(FILE) in warning and f"no {name}" in warning and word in warning
    plain = PLAIN.to_hf()
    del plain["dflash_config"]["shift_label"]  # no public DFlash drafter says it
    assert read_draft_config(plain) == (PLAIN, [])


@pytest.mark.parametrize(
    "change",
    [
        {"num_target_layers": 2},  # the formula gives -1
        {"num_target_layers": 3, "num_hidden_layers": 5, "layer_types": None, "eagle_aux_hidden_state_layer_ids": [1]},
        {"eagle_aux_hidden_state_layer_ids": [1, 2]},
    ],
    ids=["shallow", "shallow, counted from one", "counted from one"],
)
def test_layers_that_can_not_be_told_are_refused(change):
    raw = factory.draft_config(num_target_layers=36).to_hf() | change
    del raw["dflash_config"]["target_layer_ids"]
    with refused("no target_layer_ids", "add the list"):
        parse(raw)


def test_a_guess_is_checked_against_the_tensors(tmp_path):
    """fc's width says how many layers a drafter reads."""
    config = factory.draft_config(num_target_layers=36, target_layer_ids=(1, 9, 17))
    raw = config.to_hf()
    del raw["dflash_config"]["target_layer_ids"]
    hf.save_hf(tmp_path, factory.random_weights(config, 0), config, raw)
    guessed = hf.parse_config(raw)
    assert isinstance(guessed, DraftConfig) and guessed.target_layer_ids == (1, 33)
    with pytest.raises(DominoError, match=r"fc\.weight takes 3 layers, target_layer_ids .* are \[1, 33\]"):
        hf.load_hf(tmp_path, guessed)


# --- Fields of other models and drafters --------------------------------------------------------------------------

CHANGING = {  # of each kind of value, one that changes the result
    "per_layer_config": {"0": {"head_dim": 8}},
    "quantization_config": {"quant_method": "fp8"},  # but at top level, where it is read
    "compression_config": {"format": "dense"},
    "scoring_func": "sigmoid",
}
BY_PATTERN = (
    *("attn_logit_softcapping", "final_logit_softcapping", "router_logit_soft_cap", "softcap"),
    *("dspark_block_size", "dspark_noise_token_id"),
)


@pytest.mark.parametrize("name", [*NEUTRAL, *BY_PATTERN])
@pytest.mark.parametrize("kind", ["dense", "Domino, nested", "Domino, at top level"])
def test_a_field_that_would_change_the_result_is_refused_at_any_level(kind, name):
    neutral = NEUTRAL.get(name, (False, 0, None))
    raw = CONFIGS[kind.split(",")[0]].to_hf()
    level = raw["dflash_config"] if "nested" in kind else raw
    if name == QUANTIZATION and level is raw:
        return
    last = neutral[-1]
    value = CHANGING.get(name, (not last) if type(last) is bool else 0.5)
    loose = [int(last)] if type(last) is bool and name not in BY_PATTERN else [True] if last == 1 else []
    for bad in (value, *loose):
        level[name] = bad
        with refused(f"{name} {json.dumps(bad)}, which is not supported"):
            parse(raw)
    for fine in neutral:
        level[name] = fine
        assert parse(raw) == CONFIGS[kind.split(",")[0]]


@pytest.mark.parametrize("name", NEUTRAL_IN_A_DRAFTER)
def test_a_field_of_another_drafter_is_refused(name):
    for change in ({name: 0.5}, {"dflash_config": DOMINO.to_hf()["dflash_config"] | {name: 0.5}}):
        with refused(f"{name} 0.5, which is not supported"):
            parse(DOMINO.to_hf() | change)
    for neutral in NEUTRAL_IN_A_DRAFTER[name]:
        if name == "dspark_bonus_anchor" and neutral:
            continue  # it is shift_label, the other way round
        assert read_draft_config(DOMINO.to_hf() | {name: neutral}) == (DOMINO, [])


@pytest.mark.parametrize("place", ["nested", "top"])
@pytest.mark.parametrize("name", ["is_causal", "causal", "causal_head", "sliding_window_non_causal"])
def test_which_rows_of_a_block_are_seen_is_read_or_refused(place, name):
    """Full attention may be causal, as JetSpec's is; a sliding window is, unless the file says that it is not."""
    mixed = dataclasses.replace(DOMINO, windows=(7, None))
    for config in (DOMINO, SLIDING, mixed):
        for value in (True, False):
            raw = config.to_hf()
            (raw["dflash_config"] if place == "nested" else raw)[name] = value
            both_ways = value if name == "sliding_window_non_causal" else not value and name != "causal_head"
            both_ways = both_ways and any(config.windows)
            causal = value and name != "sliding_window_non_causal" and None in config.windows
            expected = dataclasses.replace(config, causal=causal, sliding_window_non_causal=both_ways)
            assert read_draft_config(raw) == (expected, [])
            if name != "causal_head" and any(config.windows):
                other = "is_causal" if name == "sliding_window_non_causal" else "sliding_window_non_causal"
                with refused("sliding_window_non_causal", "give one of them"):
                    parse(raw | {other: value})


def test_windows_by_another_name():
    sliding = SLIDING.to_hf()
    assert parse(sliding | {"use_swa": True, "swa_window_size": 7}) == SLIDING
    with refused("sliding_window 7 and swa_window_size 8"):
        parse(sliding | {"swa_window_size": 8})
    with refused("no sliding_window"):
        parse(DOMINO.to_hf() | {"use_swa": True})
    everywhere = {"use_swa": True, "swa_window_size": 7}  # Model-Optimizer's and MiMo's: of every layer, both ways
    both_ways = dataclasses.replace(SLIDING, sliding_window_non_causal=True)
    for change in (everywhere, {"dflash_config": DOMINO.to_hf()["dflash_config"] | everywhere}):
        assert parse(DOMINO.to_hf() | change) == both_ways
        assert parse(DOMINO.to_hf() | change | {"causal": True}) == SLIDING
    assert parse(both_ways.to_hf()) == both_ways


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["DFlash2DraftModel"]}, "DFlash2DraftModel"),
        ({"architectures": ["Qwen3DSparkModel"], "markov_rank": 0}, "Qwen3DSparkModel"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "LlamaForCausalLMEagle3"),
        ({"model_type": "gemma3_text"}, 'model_type "gemma3_text"'),
        ({"target_hidden_size": 64}, "target_hidden_size 64"),
        ({"draft_vocab_size": 40}, "draft_vocab_size 40"),
        ({"dflash_config": PLAIN.to_hf()["dflash_config"], "architectures": ["DominoDraftModel"]}, "can't be told"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_another_kind_of_drafter_is_refused_by_name(change, words):
    with refused(words):
        parse(DOMINO.to_hf() | change)


@pytest.mark.parametrize("name", ["linear_position_ids", "noise_scale", "n_predict"])
def test_an_unknown_field_of_a_drafter_is_named(name):
    raw: dict[str, Any] = DOMINO.to_hf() | {name: 1}
    raw["dflash_config"] |= {f"{name}_too": True}
    config, (warning,) = read_draft_config(raw, file=FILE)
    assert config == DOMINO
    assert str(FILE) in warning and f"dflash_config.{name}_too, {name}." in warning


def test_a_head_that_is_not_asked_for_is_named():
    raw = DOMINO.to_hf()
    del raw["dflash_config"]["projector_type"]
    config, (warning,) = read_draft_config(raw)
    assert isinstance(config, DraftConfig) and config.head is None
    assert "dflash_config.gru_hidden_dim" in warning and "emb_dim" in warning


# --- What is written ----------------------------------------------------------------------------------------------

PUBLIC = {  # SpecForge's configs/qwen3-8b-domino.json, but for its sizes
    "emb_dim": 7, "architectures": ["DFlashDraftModel"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, "block_size": 5, "bos_token_id": 3,
    "dflash_config": {"mask_token_id": 88, "target_layer_ids": [1, 0], "projector_type": "domino",
                      "pure_draft_prefix_len": 1, "emb_dim": 7, "gru_hidden_dim": 14, "shift_label": True},
    "dtype": "bfloat16", "eos_token_id": 4, "head_dim": 10, "hidden_act": "silu", "hidden_size": 32,
    "initializer_range": 0.02, "intermediate_size": 28, "layer_types": ["full_attention", "full_attention"],
    "max_position_embeddings": 512, "max_window_layers": 5, "model_type": "qwen3", "num_attention_heads": 3,
    "num_hidden_layers": 2, "num_key_value_heads": 1, "num_target_layers": 3, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 500, "sliding_window": None, "tie_word_embeddings": False, "use_cache": True,
    "use_sliding_window": False, "vocab_size": 89,
}  # fmt: skip


# What differs from PUBLIC at top level (... is not there) and in dflash_config, and what ours then has.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "z-lab, January 2026": ({"dtype": ..., "torch_dtype": "bfloat16"}, {}, {}),
    "z-lab, June 2026": (
        {"block_size": ..., "rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 500},
         "layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 2048,
         "transformers_version": "5.2.0"},
        {"block_size": 5},
        {"windows": (2048, None)},
    ),
    "SGLang's own": ({}, {"block_size": 5, "use_qk_norm": True, "mask_token": "<|MASK|>"}, {}),
    "a copy of the target's": ({"target_layer_ids": [1, 0], "mask_token_id": 88, "draft_vocab_size": 89}, {}, {}),
    "ModelOpt's": ({"is_causal": False}, {"causal": False, "block_size": 5, "use_aux_hidden_state": True}, {}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head", [True, False], ids=["Domino", "DFlash"])
def test_the_layouts_of_public_files_are_read_without_a_word(layout, head):
    change, nested, ours = LAYOUTS[layout]
    raw: dict[str, Any] = {name: value for name, value in (PUBLIC | change).items() if value is not ...}
    raw["dflash_config"] = PUBLIC["dflash_config"] | nested
    if not head:  # with what every DFlash file has
        del raw["emb_dim"]
        few = ("mask_token_id", "target_layer_ids", *nested)
        raw["dflash_config"] = {name: raw["dflash_config"][name] for name in few}
    assert read_draft_config(raw) == (dataclasses.replace(DOMINO if head else PLAIN, **ours), [])


def test_a_drafter_is_written_as_the_public_ones_are():
    written = DOMINO.to_hf()
    assert read_draft_config(PUBLIC) == read_draft_config(written) == (DOMINO, [])
    for name in ("architectures", "emb_dim", "dflash_config", "block_size", "num_target_layers"):
        assert written[name] == PUBLIC[name]
    assert set(written) <= set(PUBLIC)
    earlier = written | {"architectures": ["DominoDraftModel"]}
    assert read_draft_config(earlier) == (DOMINO, [])
    assert "sample_from_anchor" not in written["dflash_config"]  # vLLM's class of these drafters refuses it


@pytest.mark.parametrize("shifted", [True, False])
def test_a_drafter_without_a_head_says_which_rows_propose_by_the_name_that_others_know(shifted):
    config = dataclasses.replace(PLAIN, shift_label=shifted)
    raw = config.to_hf()
    assert raw["architectures"] == ["DFlashDraftModel"] and "emb_dim" not in raw
    assert raw["dflash_config"].get("sample_from_anchor", False) is shifted
    del raw["dflash_config"]["shift_label"]
    assert read_draft_config(raw) == (config, [])
    raw["dflash_config"]["projector_type"] = "dflash"
    assert parse(raw) == config


# --- The target's last layer --------------------------------------------------------------------------------------


def test_a_drafter_that_reads_the_targets_last_layer_is_a_warning_where_it_is_given_away():
    last = factory.draft_config(target_layer_ids=(0, 2))
    assert read_draft_config(last.to_hf()) == (last, [])  # not where it runs
    (warning,) = export_warnings(last.to_hf())
    assert "[0, 2]" in warning and "last layer, 2" in warning
    assert export_warnings(DOMINO.to_hf()) == []
    unstated = {name: value for name, value in last.to_hf().items() if name != "num_target_layers"}
    assert export_warnings(unstated) == []  # which its last is, is not known
    assert len(export_warnings(unstated, 3)) == 1


# --- At random ----------------------------------------------------------------------------------------------------

ANYTHING = [
    *(None, True, False, 0, 1, 2, -1, 7, 151669, 2**31, 10**30, 0.0, 0.5, 1.0, 1e-6, 1e6, float("nan"), float("inf")),
    *(
        "",
        "1",
        "full_attention",
        "domino",
        "qwen3",
        "yarn",
        "\ud800",
        [],
        [0],
        [1, 0],
        ["full_attention"],
        [None],
        [[0]],
    ),
    *([[0]], {}, {"rope_type": "yarn", "factor": 2.0}, {"rope_theta": 500.0}, {"a": {"final_logit_softcapping": 5}}),
]
SAME = ("block_size", "mask_token_id", "target_layer_ids", "num_target_layers", "shift_label", *INTEGERS)


@pytest.mark.parametrize("kind", CONFIGS)
def test_any_change_of_a_config_is_read_as_it_stands_or_refused_in_a_sentence(kind):
    """Several changes at once: values of any kind, fields gone, new, moved, and given twice."""
    chance = random.Random(kind)
    base = CONFIGS[kind].to_hf()
    names = sorted({*base, *base.get("dflash_config", {}), *NEUTRAL, *NEUTRAL_IN_A_DRAFTER, *OF_TRANSFORMERS, *SAME})
    names += ["rope_parameters", "layer_ids", "sample_from_anchor", "is_causal", "use_swa", "sliding_window", "new"]
    counts = {"read": 0, "refused": 0}
    for _ in range(5000):
        raw = copy.deepcopy(base)
        for _ in range(chance.randint(1, 3)):
            nested = raw.get("dflash_config")
            level = nested if isinstance(nested, dict) and chance.random() < 0.5 else raw
            name, how = chance.choice(names), chance.random()
            if how < 0.25:
                level.pop(name, None)
            elif how < 0.45 and isinstance(nested, dict) and name in nested:
                raw[name] = nested[name] if chance.random() < 0.5 else nested.pop(name)
            else:
                level[name] = copy.deepcopy(chance.choice(ANYTHING))
        try:
            config = hf.parse_config(raw, file=FILE)
        except DominoError as error:
            counts["refused"] += 1
            assert str(error).startswith(str(FILE)) and "\n" not in str(error) and len(str(error)) < 1000
            continue
        counts["read"] += 1
        nested = raw.get("dflash_config")
        for level in (raw, nested if isinstance(nested, dict) else {}):
            for name in SAME:
                if level.get(name) is not None and hasattr(config, name):
                    found = getattr(config, name)
                    assert (list(found) if isinstance(found, tuple) else found) == level[name], (name, raw)
    assert min(counts.values()) > 500, counts
