"""A target in 8 bits is a model of its own: its values restated, and Domino's output over it that of plain decoding."""

import dataclasses
from functools import partial
from typing import Any

import factory
import jax
import jax.numpy as jnp
import loops
import ml_dtypes
import numpy as np
import pytest
from factory import Pair

from domino_jax import matrix, moe, prepare, sharding, target
from domino_jax.config import MoeConfig, TargetConfig
from domino_jax.decode import DecodeConfig
from domino_jax.drafters.block import BlockDrafter
from domino_jax.errors import DominoError
from domino_jax.matrix import Scaled
from domino_jax.runtime.memory import smallest_mesh
from domino_jax.runtime.weight_forms import resolve_weights
from domino_jax.weights import Params, flatten, weight_shapes

MOE = MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20, norm_topk_prob=True)
DENSE = dataclasses.replace(factory.TARGET, num_hidden_layers=2)
TARGETS = {"dense": DENSE, "experts, tied": dataclasses.replace(DENSE, moe=MOE, tie_word_embeddings=True)}
PROMPTS = [[1, 2, 3], [40, 7] * 4]
good = partial(factory.good_pair, seed=1, num_hidden_layers=1, num_attention_heads=4)  # heads that two devices share


def restated_scale(weight: Any, kind: str) -> np.ndarray:
    """By NumPy: the largest of an output lies at the end of the range; any is right for zeros."""
    largest = np.abs(np.asarray(weight, np.float32)).max(axis=-1)
    scale = np.maximum(largest / np.float32(127 if kind == "int8" else 448), np.finfo(np.float32).tiny)
    return np.where(largest > 0, scale, 1).astype(weight.dtype)


def restated_values(weight: Any, scale: Any, kind: str) -> np.ndarray:
    """By NumPy: to the nearest number that there is, halves to the even one, none beyond the end of the range."""
    values = np.asarray(weight, np.float32) / np.asarray(scale, np.float32)[..., None]
    if kind == "int8":
        return np.rint(np.clip(values, -127, 127)).astype(np.int8)
    return np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", matrix.QUANTIZED)
def test_values_and_scales_are_those_of_the_restatement(kind, dtype):
    """Values bit for bit: of ordinary outputs, zeros, tiny and huge ones, ties, and one whose scale is rounded down."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(9, 40)).astype(np.float32)
    w[1], w[2], w[3] = 0, w[2] * 1e-30, w[3] * 1e30
    w[4] = np.resize([127, 0.5, 1.5, -2.5, 63.5], 40)
    w[5], w[5, 7] = 0, -3.0
    weight = jnp.asarray(w).astype(dtype)
    small = jax.jit(matrix.quantize, static_argnums=1)(weight, kind)
    # XLA divides by a constant by multiplying with its inverse: a scale may differ in its last bit.
    last = 2**-23 if dtype == jnp.float32 else 0
    np.testing.assert_allclose(np.float64(small.scale), np.float64(restated_scale(weight, kind)), rtol=last)
    scale = np.asarray(small.scale)
    values = restated_values(weight, scale, kind)
    assert small.values.dtype == values.dtype and small.scale.dtype == dtype
    np.testing.assert_array_equal(np.asarray(small.values).astype(np.float32), values.astype(np.float32))
    assert np.isfinite(np.asarray(small.values, np.float32)).all() and not np.asarray(small.values[1], bool).any()
    if dtype == jnp.float32:
        ids, x = [0, 2, 4, 5], rng.normal(size=(3, 40)).astype(np.float32)
        true = x.astype(np.float64) @ values.astype(np.float64).T * scale
        found = matrix.dot(jnp.asarray(x), small)
        np.testing.assert_allclose(found[:, ids], true[:, ids], rtol=1e-4, atol=1e-5)
        assert not np.asarray(found[:, 1]).any()
        whole = values.astype(np.float32) * scale[:, None]
        np.testing.assert_array_equal(matrix.take(small, jnp.array(ids)), whole[ids])


@pytest.mark.parametrize("odd", [np.nan, -np.inf])
@pytest.mark.parametrize("kind", matrix.QUANTIZED)
def test_weights_that_are_not_finite_stay_so(kind, odd):
    """So that decoding says so: an integer can't be NaN."""
    small = matrix.quantize(jnp.ones((3, 4)).at[1, 2].set(odd), kind)
    for form in (small, matrix.for_cpu(small)):
        assert np.isfinite(matrix.dot(jnp.ones((2, 4)), form)).all(axis=0).tolist() == [True, False, True]
        assert np.isfinite(matrix.take(form, jnp.arange(3))).all(axis=1).tolist() == [True, False, True]


def test_what_of_a_target_is_in_8_bits():
    """Layers, experts and the LM head; a router, norms, and embeddings that are a table of their own stay."""
    for config in TARGETS.values():
        module = factory.random_weights(config, 0)
        before, after = flatten(module), flatten(prepare.quantize_target(module, config, "int8"))
        stay = {path for path in before if path in after}
        assert all(after[path] is before[path] for path in stay)
        names = {path.rpartition(".")[2] for path in stay}
        assert names == {"input_norm", "q_norm", "k_norm", "mlp_norm", "norm"} | (
            {"router"} if config.moe else {"embed"}
        )
        assert all(after[f"{path}.values"].dtype == jnp.int8 for path in before.keys() - stay)


def in_8_bits(config: TargetConfig, kind: str) -> Pair:
    pair = good(config)
    return pair._replace(params=pair.params._replace(target=prepare.quantize_target(pair.params.target, config, kind)))


@pytest.mark.parametrize("kind", ["int8", pytest.param("float8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TARGETS)
def test_domino_over_an_8_bit_target_gives_what_that_target_gives(name, kind):
    pair = in_8_bits(TARGETS[name], kind)
    assert pair.configs.draft is not None
    draft = pair.configs.draft
    plain, configs = pair.params.without_drafter, pair.configs.without_drafter
    expected = loops.autoregress(plain, configs, loops.begin(plain, configs, PROMPTS, 24))
    small = prepare.quantize_drafter(pair.params, draft, kind)
    assert small.output is None, "the target's own LM head has 8 bits already"
    found = loops.speculate(small, pair.configs, loops.begin(small, pair.configs, PROMPTS, 24))
    assert [o.tokens for o in found] == [o.tokens for o in expected]
    accepted = [m for o in found for m in o.accepted]
    assert sum(accepted) / len(accepted) > 0.4


def test_experts_in_8_bits_are_the_same_by_both_backends():
    """Grouped products scale each row by its own expert's scales."""
    config = dataclasses.replace(TARGETS["experts, tied"], num_hidden_layers=1)
    module = prepare.quantize_target(factory.random_weights(config, 3), config, "int8")
    layer = module.layers[0]
    assert isinstance(layer.gate_up, Scaled) and layer.gate_up.scale.shape == (4, 2, 20)
    wide = jax.tree.map(lambda leaf: leaf, layer)
    for name in ("gate_up", "down"):
        held = getattr(layer, name)
        setattr(wide, name, held.values.astype(jnp.float32) * held.scale[..., None])
    y = jax.random.normal(jax.random.key(0), (2, 3, 32))
    run = jax.jit(moe.mlp, static_argnums=1)
    outputs = [
        run(form, dataclasses.replace(MOE, backend=backend), y)
        for form in (layer, wide)
        for backend in ("one by one", "grouped")
    ]
    for found in outputs[:-1]:
        np.testing.assert_allclose(found, outputs[-1], atol=1e-4)


@pytest.mark.parametrize("name", ["experts, tied", pytest.param("dense", marks=pytest.mark.slow)])
def test_a_mesh_of_two_devices_gives_one_devices_logits(name):
    """Scales are the same bits, also of matrices whose sums lie on both devices."""
    config = TARGETS[name]
    module, tokens = factory.random_weights(config, 0), jnp.arange(12, dtype=jnp.int32).reshape(2, 6)

    @jax.jit
    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        return target.logits(params, config, target.forward(params, config, tokens)[0])

    alone = prepare.quantize_target(module, config, "int8")
    mesh = sharding.make_mesh(1, 2)
    with jax.set_mesh(mesh):
        spread = prepare.quantize_target(factory.place(module, config, mesh), config, "int8")
        found = logits(spread, tokens)[..., : config.vocab_size]
    parts = flatten(spread)
    for path, leaf in flatten(alone).items():
        np.testing.assert_array_equal(np.asarray(parts[path])[: leaf.shape[0]], leaf)
    assert parts["layers.0.o.values"].sharding.shard_shape((32, 24)) == (32, 12)
    assert parts["layers.0.q.scale"].sharding.shard_shape((4, 6)) == (2, 6)
    np.testing.assert_allclose(found, logits(alone, tokens), atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)])
def test_a_mesh_of_two_devices_gives_one_devices_tokens(sizes):
    pair = in_8_bits(DENSE, "int8")
    expected = loops.speculate(pair.params, pair.configs, loops.begin(pair.params, pair.configs, PROMPTS, 24))
    whole, draft = good(DENSE), pair.configs.draft
    assert draft is not None
    mesh = sharding.make_mesh(*sizes)
    fitted = DecodeConfig(sharding.fit_to_mesh(DENSE, sizes[1]), BlockDrafter(sharding.fit_to_mesh(draft, sizes[1])))
    with jax.set_mesh(mesh):
        placed = prepare.quantize_target(factory.place(whole.params.target, DENSE, mesh), DENSE, "int8")
        params = Params(placed, factory.place(whole.params.draft, draft, mesh))
        found = loops.speculate(params, fitted, loops.begin(params, fitted, PROMPTS, 24))
    assert found == expected


@pytest.mark.parametrize("sizes", [(1, 2), pytest.param(None, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", TARGETS)
def test_a_tpus_form_of_an_8_bit_target_computes_the_same(name, sizes):
    """Queries and key joined, gate and up apart: values and scales alike."""
    config = dataclasses.replace(TARGETS[name], num_hidden_layers=1)
    module, tokens = factory.random_weights(config, 0), jnp.arange(6, dtype=jnp.int32).reshape(2, 3)

    def hidden(params: Any) -> jax.Array:
        return jax.jit(lambda params, tokens: target.forward(params, config, tokens)[0])(params, tokens)

    expected = hidden(prepare.quantize_target(module, config, "int8"))
    with sharding.mesh_context(sharding.make_mesh(*sizes) if sizes else None):
        small = prepare.quantize_target(module, config, "int8")
        made = prepare.prepare_for_tpu(Params(small), config, None).target
        held = jax.tree.leaves(made, is_leaf=lambda leaf: isinstance(leaf, matrix.ForTpu))
        kinds = {type(leaf.values) for leaf in held if isinstance(leaf, matrix.ForTpu)}
        assert Scaled in kinds
        np.testing.assert_allclose(hidden(made), expected, atol=1e-5)


def test_a_smaller_form_needs_fewer_devices():
    config = dataclasses.replace(DENSE, hidden_size=256, intermediate_size=512, num_key_value_heads=4)
    held = sum(leaf.size * 2 for leaf in jax.tree.leaves(weight_shapes(config)))
    limit = held / 0.85  # nothing is left for a cache
    assert smallest_mesh([config], jnp.bfloat16, 2, limit) == (1, 2)
    assert smallest_mesh([config], jnp.bfloat16, 2, limit, "int8") == (1, 1)


def test_the_form_that_is_asked_for():
    assert [resolve_weights(asked) for asked in ("auto", "exact", "int8", "float8")] == [
        "exact",
        "exact",
        "int8",
        "float8",
    ]
    for asked in ("int4", "fp8", "bfloat16", "", None, 8):
        with pytest.raises(DominoError, match=r"^--weights (int4: 4 bits need|must be auto, exact, int8 or float8)"):
            resolve_weights(asked)


def test_a_cpus_products_of_integers_are_as_exact_as_float32s():
    """Against float64, as shares of both factors' lengths; and the same bits at any number of rows."""
    rng = np.random.default_rng(2)
    weight = jnp.asarray(rng.normal(size=(7, 11, 300)).astype(np.float32))
    small = matrix.quantize(weight, "int8")
    held = matrix.for_cpu(small)
    assert isinstance(held, matrix.CpuInt8) and held.values is small.values
    x = (rng.normal(size=(80, 1, 300)) * 10.0 ** rng.integers(-20, 20, (80, 1, 1))).astype(np.float32)
    x[3], x[4, 0, 5], x[5] = 0, 1e4 * np.abs(x[4]).max(), np.resize([1, 0.5, -1.5], 300)
    values, scale = np.asarray(small.values, np.float64), np.asarray(small.scale, np.float64)
    true = np.einsum("bti,aci->btac", x.astype(np.float64), values) * scale
    size = np.linalg.norm(x.astype(np.float64), axis=-1)[..., None, None] * np.linalg.norm(values, axis=-1) * scale
    run = jax.jit(matrix.dot)
    error = (np.asarray(run(jnp.asarray(x), held), np.float64) - true)[size[..., 0, 0] > 0] / size[size[..., 0, 0] > 0]
    assert np.sqrt(np.mean(error**2)) < 2**-24 and np.abs(error).max() < 2**-22
    assert not np.asarray(run(jnp.zeros((2, 300)), held)).any()
    many = np.asarray(run(jnp.asarray(x), held))  # more rows than are few
    for rows in (1, 2, 17):
        np.testing.assert_array_equal(run(jnp.asarray(x[:rows]), held), many[:rows])
    odd = jnp.asarray([[1.0, np.nan], [np.inf, 1.0], [1.0, 2.0]], jnp.float32)
    found = np.asarray(run(odd, matrix.for_cpu(matrix.quantize(jnp.ones((2, 2)), "int8"))))
    assert np.isfinite(found).all(axis=1).tolist() == [False, False, True]


def test_a_cpus_program_of_an_8_bit_target_has_no_wide_copy_of_a_matrix():
    """Of experts neither, one of which is taken out for a turn of the loop."""
    config = dataclasses.replace(TARGETS["experts, tied"], num_hidden_layers=1, vocab_size=4096)
    small = prepare.quantize_target(factory.random_weights(config, 0), config, "int8")
    tokens, wide = jnp.zeros((1, 1), jnp.int32), 4096 * 32 * 4

    def program(params: Params) -> int:
        def logits(params: Any, tokens: jax.Array) -> jax.Array:
            return target.logits(params, config, target.forward(params, config, tokens)[0])

        compiled = jax.jit(logits).lower(params.target, tokens).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert program(prepare.quantized_for_cpu(Params(small))) < wide / 3 < wide <= program(Params(small))
