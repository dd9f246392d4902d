"""What a target can be beside dense Qwen3: against transformers and tests/support/reference.py, in float32."""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import factory
import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
import reference
import torch
from factory import make_draft, make_target
from safetensors.numpy import load_file
from training import curriculum

from convert import hf
from convert.folders import convert_folder
from domino_jax import cache as kv
from domino_jax import layers, moe, prepare, sharding, target
from domino_jax.config import DecoderConfig, Llama3, MoeConfig, TargetConfig, Yarn, check_pair
from domino_jax.decode import DecodeConfig
from domino_jax.drafters import block
from domino_jax.errors import DominoError
from domino_jax.weights import Params, flatten, init_weights
from infer.__main__ import main

TOLERANCE = 1e-4

MOE = MoeConfig(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=20, norm_topk_prob=True)
YARN = Yarn(factor=4.0, original_max_position_embeddings=16, attention_factor=0.1 * math.log(4) + 1)
LLAMA3 = Llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
RAMP = Yarn(2.5, 64, 0.8, beta_fast=4.0, beta_slow=1.5, truncate=False)
MIXED = dataclasses.replace(MOE, norm_topk_prob=False, mlp_only_layers=(1,))

make = partial(dataclasses.replace, factory.TARGET)
TARGETS = {
    "experts": make(moe=MOE),
    "experts, not normalised, a dense layer among them": make(moe=MIXED),
    "experts in every second layer, one each": make(
        moe=dataclasses.replace(MOE, num_experts_per_tok=1, decoder_sparse_step=2)
    ),
    "all experts at once": make(moe=dataclasses.replace(MOE, num_experts_per_tok=8), num_hidden_layers=1),
    "YaRN": make(rope_scaling=YARN, head_dim=16),
    "YaRN, its ramp and factor stated": make(rope_scaling=RAMP, head_dim=16, rope_theta=1e4),
    "biases": make(attention_bias=True),
    "everything": make(attention_bias=True, moe=MIXED, rope_scaling=YARN, head_dim=16),
    "Llama": make(qk_norm=False, head_dim=8, tie_word_embeddings=True, num_key_value_heads=4),
    "Llama 3.1": make(qk_norm=False, rope_scaling=LLAMA3, head_dim=16, attention_bias=True),
    "Qwen2": make(qk_norm=False, qkv_bias=True, head_dim=8),
}
SMALL = dataclasses.replace(TARGETS["everything"], num_hidden_layers=2)
WITHIN = {"experts, not normalised, a dense layer among them", "YaRN", "biases", "Llama"}  # "everything" has these too
every = pytest.mark.parametrize(
    "config", [pytest.param(c, id=n, marks=[pytest.mark.slow] if n in WITHIN else []) for n, c in TARGETS.items()]
)

forward = jax.jit(target.forward, static_argnums=(1, 5))
logits = jax.jit(target.logits, static_argnums=1)


def ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, factory.TARGET.vocab_size, (rows, length)).astype(np.int32)


def transformers_model(folder: Path, params: Any, config: TargetConfig) -> Any:
    """What transformers makes of the folder that we write."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    hf.save_hf(folder, params, config, config.to_hf())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def ours(params: Any, config: TargetConfig, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(logits(params, config, forward(params, config, tokens)[0]))


@every
def test_transformers_reads_what_we_write_and_says_the_same(tmp_path, config):
    """Over 40 positions, of which YaRN's original ones are the first 16; and the NumPy restatement agrees."""
    params, tokens = factory.random_weights(config, 1), ids(2, 40)
    model = transformers_model(tmp_path, params, config)
    with torch.no_grad():
        out = model(torch.from_numpy(tokens).long(), output_hidden_states=True)
    found = ours(params, config, tokens)
    assert out.logits.numpy().std() > 0.3, "flat logits would agree with anything"
    np.testing.assert_allclose(found, out.logits.numpy(), atol=TOLERANCE, rtol=0)
    features = forward(params, config, tokens, None, None, (0,))[1]
    np.testing.assert_allclose(features, out.hidden_states[1].numpy(), atol=TOLERANCE, rtol=0)
    again, _ = reference.target_forward(factory.hf_weights(params, config), config.to_hf(), tokens[0], [])
    np.testing.assert_allclose(found[0], again, atol=TOLERANCE, rtol=0)


@every
def test_we_read_what_transformers_writes_and_give_it_back_bit_for_bit(tmp_path, config):
    model = transformers_model(tmp_path / "ours", factory.random_weights(config, 2), config)
    model.save_pretrained(tmp_path / "theirs")
    read = hf.parse_config(hf.read_json(tmp_path / "theirs" / "config.json"))
    assert read == config == hf.parse_config(config.to_hf())
    module = hf.load_hf(tmp_path / "theirs", read)
    hf.save_hf(tmp_path / "again", module, read, config.to_hf())
    before, after = (load_file(tmp_path / name / hf.SINGLE) for name in ("theirs", "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.tobytes() == after[name].tobytes(), name
    np.testing.assert_array_equal(
        ours(module, config, ids(1, 9)), ours(factory.random_weights(config, 2), config, ids(1, 9))
    )


@pytest.mark.parametrize(
    "name",
    [
        "everything",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("experts, not normalised, a dense layer among them", "Llama 3.1", "Qwen2")
        ),
    ],
)
def test_decoding_with_a_cache_is_transformers_greedy_decoding(tmp_path, name):
    """The lean loop and Domino's cycles (the drafter's layers have biases and YaRN where the target's do)."""
    pair = factory.good_pair(TARGETS[name], 1)
    prompts = [[1, 2, 3], [40, 7] * 4, ids(1, 21)[0].tolist()]
    model = transformers_model(tmp_path, pair.params.target, pair.configs.target)
    expected = [loops.hf_greedy(model, prompt, 24) for prompt in prompts]
    lean = Params(pair.params.target), DecodeConfig(pair.configs.target)
    assert [o.tokens for o in loops.autoregress(*lean, loops.begin(*lean, prompts, 24))] == expected
    outputs = loops.speculate(pair.params, pair.configs, loops.begin(pair.params, pair.configs, prompts, 24))
    assert [o.tokens for o in outputs] == expected
    accepted = {m for o in outputs for m in o.accepted}
    assert len(accepted) > 2, "cycles of one kind alone test little"
    for prompt, output in zip(prompts, outputs, strict=True):
        assert reference.decode_greedy(*pair.reference(), prompt, 24, [])["accepted"] == output.accepted


# --- Experts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("norm", [True, False])
def test_both_forms_of_the_experts_are_the_reference(norm, tokens):
    config = make(moe=dataclasses.replace(MOE, norm_topk_prob=norm), num_hidden_layers=1)
    assert config.moe is not None
    params = factory.random_weights(config, 3)
    y = np.random.default_rng(0).normal(size=(2, tokens, 32)).astype(np.float32)
    named = factory.hf_weights(params, config)
    expected = [reference.layer_mlp(named, "model.layers.0.", config.to_hf(), row.astype(np.float64)) for row in y]
    for form in ("grouped", "one by one"):
        experts = dataclasses.replace(config.moe, backend=form)
        found = jax.jit(moe.mlp, static_argnums=1)(params.layers[0], experts, y)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0, err_msg=form)


@pytest.mark.parametrize("form", ["grouped", "one by one"])
def test_a_token_does_not_feel_the_experts_of_others(form):
    """Bit for bit, whatever they say."""
    experts = dataclasses.replace(MOE, backend=form)
    layer = factory.random_weights(make(moe=MOE, num_hidden_layers=1), 3).layers[0]
    run = jax.jit(moe.mlp, static_argnums=1)
    y = np.random.default_rng(0).normal(size=(1, 2, 32)).astype(np.float32)
    _, chosen = moe.route(layer.router, MOE, jnp.asarray(y))
    (other, *_) = sorted(set(chosen[0, 1].tolist()) - set(chosen[0, 0].tolist()))
    before = np.asarray(run(layer, experts, y))
    layer.down = layer.down.at[other].set(1e9)
    after = np.asarray(run(layer, experts, y))
    np.testing.assert_array_equal(before[0, 0], after[0, 0])
    assert np.abs(after[0, 1]).max() > 1e6


def test_a_cpu_reads_no_expert_that_nobody_chose():
    """NaN in all of the others changes nothing, and no expert's weights are held a second time."""
    config = moe.resolve_moe_backend(make(moe=dataclasses.replace(MOE, num_experts=64)), "cpu")
    many = config.moe
    assert many is not None
    layer = factory.random_weights(make(moe=many, num_hidden_layers=1), 3).layers[0]
    run = jax.jit(moe.mlp, static_argnums=1)
    y = np.random.default_rng(0).normal(size=(1, 1, 32)).astype(np.float32)
    _, chosen = moe.route(layer.router, many, jnp.asarray(y))
    before = np.asarray(run(layer, many, y))
    for name in ("gate_up", "down"):
        weight = getattr(layer, name)
        setattr(layer, name, jnp.full_like(weight, jnp.nan).at[chosen].set(weight[chosen]))
    assert many.backend == "one by one"
    np.testing.assert_array_equal(run(layer, many, y), before)
    memory = run.lower(layer, many, y).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < layer.gate_up.nbytes / 4


def test_programs_compiled_for_a_tpu_have_its_experts_backend():
    """Also where this process runs on a CPU."""
    y = jnp.zeros((1, 4, 32))
    texts = {}
    for platform in ("cpu", "tpu"):
        config = moe.resolve_moe_backend(make(moe=MOE, num_hidden_layers=1), platform)
        layer = factory.random_weights(config, 3).layers[0]
        traced = jax.jit(moe.mlp, static_argnums=1).trace(layer, config.moe, y)
        texts[platform] = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.while" in texts["cpu"] and "stablehlo.while" not in texts["tpu"]
    assert moe.resolve_moe_backend(make(num_hidden_layers=1), "tpu") == make(num_hidden_layers=1)


@pytest.mark.slow
def test_an_8_bit_drafter_keeps_its_biases():
    pair = factory.good_pair(SMALL, 1, num_hidden_layers=1)
    assert pair.configs.draft is not None and pair.params.draft is not None
    small = prepare.quantize_drafter(pair.params, pair.configs.draft, "int8")
    before, after = flatten(pair.params.draft), flatten(small.draft)
    assert after["layers.0.q_bias"] is before["layers.0.q_bias"] and "layers.0.q.values" in after

    def run(params: Params) -> Any:
        return loops.speculate(params, pair.configs, loops.begin(params, pair.configs, [[1, 2, 3]], 24))

    (whole,), (eight,) = run(pair.params), run(small)
    assert whole.tokens == eight.tokens


@pytest.mark.parametrize("form", ["grouped", "one by one"])
def test_experts_in_bfloat16_are_those_in_float32_to_its_rounding(form):
    layer = factory.random_weights(make(moe=MOE, num_hidden_layers=1), 3).layers[0]
    small = jax.tree.map(lambda w: w.astype(jnp.bfloat16), layer)
    y = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(jnp.bfloat16)
    experts, run = dataclasses.replace(MOE, backend=form), jax.jit(moe.mlp, static_argnums=1)
    whole = np.asarray(run(jax.tree.map(lambda w: w.astype(jnp.float32), small), experts, y.astype(np.float32)))
    found = run(small, experts, y)
    assert found.dtype == jnp.bfloat16
    assert np.abs(np.asarray(found, np.float32) - whole).max() < 0.03 * np.abs(whole).max()


@pytest.mark.slow
def test_a_drafter_for_experts_is_trained():
    """The loss is the restatement's, and every weight of the drafter has a gradient."""
    pair = factory.Pair.make(factory.draft_config(SMALL), SMALL)
    config = pair.configs.draft
    assert config is not None and config.attention_bias and config.rope_scaling == YARN
    row, anchors, lam = ids(1, 20)[0], [2, 6, 13], 0.3

    @jax.jit
    def run(trained: Any) -> Any:
        def loss(trained: Any) -> Any:
            places, valid = jnp.array([anchors], jnp.int32), jnp.ones((1, 3), bool)
            return curriculum(
                trained,
                pair.params.target,
                (SMALL, config),
                jnp.asarray(row)[None],
                jnp.ones((1, 20), bool),
                places,
                valid,
                lam=jnp.float32(lam),
                gamma=3.0,
                chunk=7,
            )[0]

        return jax.value_and_grad(loss)(trained)

    loss, gradient = run(pair.params.draft)
    expected = reference.training_loss(*pair.reference(), row, np.ones(20), anchors, 3.0, lam)["loss"]
    assert float(loss) == pytest.approx(expected, abs=5e-5)
    for path, leaf in flatten(gradient).items():
        # A softmax does not feel what is added to all of its scores, so keys' biases may do little, but not nothing.
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path


@pytest.mark.e2e
@pytest.mark.slow
def test_a_folder_with_experts_and_yarn_runs_from_the_command_line(tmp_path, capsys):
    """As Hugging Face files and as Orbax ones, beyond max_position_embeddings, with a drafter and without."""
    changes: dict[str, Any] = {"moe": MIXED, "rope_scaling": Yarn(4.0, 16, 1.1), "max_position_embeddings": 40}
    config = make_target(tmp_path / "target", **changes)
    make_draft(tmp_path / "draft", **{k: changes[k] for k in ("rope_scaling", "max_position_embeddings")})
    assert config.positions == 64
    assert convert_folder(tmp_path / "target", tmp_path / "orbax") == ("Hugging Face", "Orbax")
    found = []
    for target_folder, drafter in (("target", "draft"), ("target", "none"), ("orbax", "draft")):
        words = [
            "--model",
            str(tmp_path / target_folder),
            "--draft",
            drafter if drafter == "none" else str(tmp_path / drafter),
        ]
        assert main([*words, "The first forty tokens are", "--raw", "--json", "--max-new-tokens", "100"]) == 0
        captured = capsys.readouterr()
        assert "64 positions" in captured.err
        found.append(json.loads(captured.out)["tokens"])
    assert found[0] == found[1] == found[2]


def test_random_biases_begin_at_zero():
    module = init_weights(make(attention_bias=True), jax.random.key(0))
    for path, leaf in flatten(module).items():
        assert not leaf.any() if path.endswith("_bias") else leaf.any(), path


# --- Drafters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "windows", [(), (7, None), *(pytest.param(w, marks=pytest.mark.slow) for w in ((None, 2), (1, 1)))], ids=str
)
def test_a_drafter_with_yarn_biases_and_windows_is_the_specs(windows):
    """In decoding and in training, anchors beyond YaRN's original positions too."""
    config = factory.draft_config(attention_bias=True, rope_scaling=YARN, head_dim=16, windows=windows)
    pair = factory.Pair.make(config, seed=4)
    target_w, _, draft_w, draft_cfg = pair.reference()
    assert hf.parse_config(draft_cfg) == config
    embed, anchors = target_w["model.embed_tokens.weight"], np.array([0, 1, 12, 30], np.int32)
    given = jnp.asarray(np.random.default_rng(1).normal(size=(4, 30, config.sizes["LD"])), jnp.float32)
    tokens = np.array([3, 60, 7, 31], np.int32)
    expected = [
        reference.draft_block(draft_w, draft_cfg, embed, np.asarray(given)[row, :a], int(tokens[row]), int(a))
        for row, a in enumerate(anchors)
    ]

    @jax.jit
    def both(params: Any, embed: Any) -> tuple[Any, Any]:
        x = block.block_inputs(embed, config, jnp.asarray(tokens))
        cache = kv.init_cache(config, 4, 64, jnp.float32)
        cache = block.append_context(params, config, cache, given, jnp.zeros_like(anchors))
        trained = block.training_blocks(params, config, x[:, None], jnp.asarray(anchors)[:, None], given)
        return block.block(params, config, x, jnp.asarray(anchors), cache)[0], trained[:, 0]

    for found in both(pair.params.draft, pair.params.target.embed):
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def test_other_rope_scaling_in_the_drafter_is_a_warning():
    config = make(rope_scaling=YARN)
    assert check_pair(config, factory.draft_config(config)) == []
    (warning,) = check_pair(config, factory.draft_config())
    assert "rope_scaling" in warning and "none" in warning and "factor=4.0" in warning
    assert len(check_pair(factory.TARGET, factory.draft_config(rope_scaling=YARN, rope_theta=7.0))) == 2


# --- YaRN ---------------------------------------------------------------------------------------------------------

RECIPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}  # of Qwen3's model cards
REAL = make(head_dim=128, rope_theta=1e6, max_position_embeddings=40960)
SCALINGS = {
    "Qwen3's": RECIPE,
    "older key": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "stated factor": RECIPE | {"attention_factor": 1.25},
    "mscale": RECIPE | {"mscale": 0.707, "mscale_all_dim": 1.3},
    "mscale alone": RECIPE | {"mscale": 0.707},
    "betas": RECIPE | {"beta_fast": 16, "beta_slow": 2.5},
    "not truncated": RECIPE | {"truncate": False},
    "original length unsaid": {"rope_type": "yarn", "factor": 2.0},
    "none at all": None,
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_cos_and_sin_are_transformers(spelling, scaling):
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    raw = REAL.to_hf()
    if spelling == "rope_scaling":
        raw |= {"rope_scaling": scaling}
    else:
        del raw["rope_theta"], raw["rope_scaling"]
        raw |= {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"} | (scaling or {})}
        if scaling and "type" in scaling:
            del raw["rope_parameters"]["rope_type"]
    config = hf.parse_config(raw)
    assert isinstance(config, TargetConfig)
    assert hf.parse_config(config.to_hf()) == config
    positions = np.concatenate([np.arange(0, 70), [4095, 32767, 32768, 40959, 131071]])
    theirs = Qwen3RotaryEmbedding(Qwen3Config.from_dict(dict(raw)))
    expected = [a.numpy()[0] for a in theirs(torch.zeros(1), torch.from_numpy(positions)[None])]
    for found, whole in zip(layers.rotary(jnp.asarray(positions, jnp.int32), config), expected, strict=True):
        # float32 angles of far positions are of 131071 · 2^-24 each.
        np.testing.assert_allclose(found, whole[:, :64], atol=0.02, rtol=0)
        np.testing.assert_allclose(found[:70], whole[:70, :64], atol=2e-5, rtol=0)


def test_llamas_cos_and_sin_are_transformers():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = make(qk_norm=False, head_dim=64, rope_theta=5e5, rope_scaling=dataclasses.replace(LLAMA3, factor=32.0))
    positions = np.concatenate([np.arange(0, 70), [4095, 8191, 32768]])
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_dict(config.to_hf()))
    expected = [a.numpy()[0] for a in theirs(torch.zeros(1), torch.from_numpy(positions)[None])]
    for found, whole in zip(layers.rotary(jnp.asarray(positions, jnp.int32), config), expected, strict=True):
        np.testing.assert_allclose(found, whole[:, :32], atol=0.01, rtol=0)
        np.testing.assert_allclose(found[:70], whole[:70, :32], atol=2e-5, rtol=0)


def test_qwens_recipe_gives_its_positions():
    """It adds rope_scaling to config.json, whose max_position_embeddings stays 40960."""
    config = hf.parse_config(REAL.to_hf() | {"rope_scaling": RECIPE})
    assert (config.max_position_embeddings, config.positions, REAL.positions) == (40960, 131072, 40960)
    assert isinstance(config.rope_scaling, Yarn)
    assert math.isclose(config.rope_scaling.attention_factor, 0.1 * math.log(4) + 1)
    assert make(rope_scaling=YARN, max_position_embeddings=1000).positions == 1000


# --- Refusals -----------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[DecoderConfig, dict[str, Any], str]] = {
    "no factor": (REAL, {"rope_scaling": {"rope_type": "yarn"}}, "no rope_scaling.factor"),
    "a small factor": (
        REAL,
        {"rope_scaling": RECIPE | {"factor": 0.5}},
        "rope_scaling.factor 0.5; expected a number of at least 1",
    ),
    "no positions": (
        REAL,
        {"rope_scaling": RECIPE | {"original_max_position_embeddings": -4}},
        "rope_scaling.original_max_position_embeddings -4",
    ),
    "unknown setting": (REAL, {"rope_scaling": RECIPE | {"mrope_section": [1]}}, "mrope_section"),
    "settings by layer type": (REAL, {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention"),
    "no experts": (TARGETS["experts"], {"num_experts": None}, "num_experts null"),
    "zero experts": (TARGETS["experts"], {"num_experts": 0}, "num_experts 0; expected an integer from 1"),
    "more than there are": (TARGETS["experts"], {"num_experts_per_tok": 9}, "num_experts_per_tok (9)"),
    "no width": (TARGETS["experts"], {"moe_intermediate_size": None}, "moe_intermediate_size null"),
    "no norm_topk_prob": (TARGETS["experts"], {"norm_topk_prob": None}, "norm_topk_prob null"),
    "a shared expert": (TARGETS["experts"], {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
    "another router": (TARGETS["experts"], {"scoring_func": "sigmoid"}, 'scoring_func "sigmoid"'),
    "a scaled router": (TARGETS["experts"], {"routed_scaling_factor": 2.5}, "routed_scaling_factor 2.5"),
    "soft caps": (REAL, {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    "MLP bias": (REAL, {"mlp_bias": True}, "mlp_bias true"),
    "linear attention": (REAL, {"layer_types": ["linear_attention"]}, "linear_attention"),
    "a drafter with experts": (factory.draft_config(), {"num_experts": 8}, "num_experts"),
    "a drafter of another type": (factory.draft_config(), {"model_type": "qwen3_moe"}, "num_experts"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_would_be_computed_wrongly_is_refused_by_name(case):
    config, change, words = case
    with pytest.raises(DominoError) as error:
        hf.parse_config(config.to_hf() | change)
    assert words in str(error.value)


def test_a_missing_experts_tensor_is_named(tmp_path):
    from safetensors.numpy import save_file

    config = TARGETS["experts"]
    hf.save_hf(tmp_path, factory.random_weights(config, 0), config, config.to_hf())
    tensors = load_file(tmp_path / hf.SINGLE)
    assert tensors["model.layers.0.mlp.experts.7.up_proj.weight"].shape == (20, 32)
    lost = tensors.pop("model.layers.2.mlp.experts.5.down_proj.weight")
    tensors["model.layers.0.mlp.experts.0.gate_proj.weight"] = lost
    save_file(tensors, tmp_path / hf.SINGLE)
    with pytest.raises(DominoError) as error:
        hf.load_hf(tmp_path, config)
    assert "missing model.layers.2.mlp.experts.5.down_proj.weight" in str(error.value)
    assert "experts.0.gate_proj.weight has shape [32, 20], expected [20, 32]" in str(error.value)


def test_experts_that_a_mesh_does_not_divide_are_refused():
    config = make(moe=dataclasses.replace(MOE, num_experts=6), num_attention_heads=4, intermediate_size=33)
    with pytest.raises(DominoError, match="model=4 does not divide num_experts 6"):
        sharding.fit_to_mesh(config, 4)  # no layer has one MLP of width 33, so that need not be divided
    with pytest.raises(DominoError, match="model=4 does not divide intermediate_size 33"):
        sharding.fit_to_mesh(dataclasses.replace(config, moe=None), 4)
