"""What makes a cycle cheaper and must not change the output: the forms of a matrix, 8 bits, candidates."""

import dataclasses
import re
from functools import partial
from typing import Any

import factory
import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
from factory import Pair, with_candidates
from flax import nnx
from loops import Output

from domino_jax import decode, layers, matrix, prepare, sharding
from domino_jax.config import DecoderConfig, MoeConfig
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.heads.base import under
from domino_jax.drafters.heads.choosing import likeliest
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.errors import DominoError
from domino_jax.matrix import CpuBfloat16, CpuFloat32, ForTpu, Scaled, Separate, Tabulated
from domino_jax.sampling import settings
from domino_jax.weights import JoinedLayer, Params, axes, flatten, is_matrix

TARGET = dataclasses.replace(factory.TARGET, num_hidden_layers=2)
PROMPTS = [[1, 2, 3], [40, 7] * 4, [11], [5, 28, 30, 44]]
COUNT = 24
good = partial(factory.good_pair, TARGET, 1, num_hidden_layers=1)
UNQUANTIZED = under("head", DominoHead.unquantized)


def in_dtype(pair: Pair, dtype) -> Pair:
    return Pair(jax.tree.map(lambda w: w.astype(dtype), pair.params), pair.configs)


def run(pair: Pair, **more) -> list[Output]:
    return loops.speculate(pair.params, pair.configs, loops.begin(pair.params, pair.configs, PROMPTS, COUNT), **more)


def tau(outputs: list[Output]) -> float:
    accepted = [m for o in outputs for m in o.accepted]
    return sum(accepted) / len(accepted) + 1


def eight_bits(pair: Pair, kind: str) -> Pair:
    assert pair.configs.draft is not None
    return Pair(prepare.quantize_drafter(pair.params, pair.configs.draft, kind), pair.configs)


# --- 8-bit drafters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.5 / 127), ("float8", 2**-4)])
@pytest.mark.parametrize("config", [TARGET, good().configs.draft], ids=["target", "drafter"])
def test_every_matrix_comes_back_to_within_its_columns_step(config: DecoderConfig, kind, bound):
    """Each kind of weight there is: the error of a value is at most `bound` of the largest of its output's column."""
    sizes = config.sizes
    seen = set()
    for path, letters in flatten(axes(config)).items():
        if not is_matrix(path, letters) or path in UNQUANTIZED or letters in seen:
            continue
        seen.add(letters)
        weight = jax.random.normal(jax.random.key(len(seen)), tuple(sizes[a] for a in letters.split()))
        small = matrix.quantize(weight, kind)
        assert small.values.dtype == matrix.QUANTIZED[kind] and small.shape == weight.shape
        assert small.scale.shape == weight.shape[:-1]
        whole = small.values.astype(jnp.float32) * small.scale[..., None]
        x = jax.random.normal(jax.random.key(0), (3, weight.shape[-1]))
        np.testing.assert_allclose(matrix.dot(x, small), matrix.dot(x, whole), atol=1e-4)
        if letters[0] == "V":  # in the product and in the gather
            np.testing.assert_array_equal(layers.embed(small, jnp.arange(sizes["V"])), whole)
            np.testing.assert_allclose(layers.unembed(x, small), x @ whole.T, atol=1e-4)
        column = jnp.abs(weight).max(axis=-1, keepdims=True)
        assert (jnp.abs(whole - weight) <= bound * column * 1.01).all()
        assert (jnp.abs(whole - weight) > bound * column / 10).any(), "nothing was rounded"
    assert len(seen) >= 5


@pytest.mark.parametrize("kind", matrix.QUANTIZED)
def test_an_output_of_zeros_stays_zero(kind):
    """As in a head that has learned nothing yet, and in rows that only pad a vocabulary."""
    weight = jnp.zeros((6, 4)).at[1].set(jnp.arange(4.0)).at[2].set(1e-38)
    small = matrix.quantize(weight, kind)
    whole = np.asarray(layers.embed(small, jnp.arange(6)))
    assert np.isfinite(np.asarray(small.scale)).all()
    np.testing.assert_allclose(whole, weight, atol=0.2)
    assert (whole[3:] == 0).all()


def test_the_recurrent_part_and_the_norms_stay_as_they_are():
    pair = good()
    small = eight_bits(pair, "int8")
    before, after = flatten(pair.params.draft), flatten(small.params.draft)
    for path, weight in before.items():
        stays = weight.ndim == 1 or path in UNQUANTIZED
        assert (path in after) == stays
        assert not stays or after[path] is weight
    assert isinstance(small.params.output, Scaled)
    assert small.params.target is pair.params.target


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param("int8", jnp.float32, id="int8-float32"),
        pytest.param("int8", jnp.bfloat16, id="int8-bfloat16", marks=pytest.mark.slow),
        pytest.param("float8", jnp.float32, id="float8-float32", marks=pytest.mark.slow),
        pytest.param("float8", jnp.bfloat16, id="float8-bfloat16", marks=pytest.mark.slow),
    ],
)
def test_an_8_bit_drafter_changes_no_token(kind, dtype):
    pair = in_dtype(good(), dtype)
    whole, small = run(pair), run(eight_bits(pair, kind))
    assert [o.tokens for o in small] == [o.tokens for o in whole]
    assert tau(small) > 0.8 * tau(whole) > 1.4, "an 8-bit drafter should propose nearly as well"


# --- Turned and narrow matrices -----------------------------------------------------------------------------------


def test_a_float32_is_the_sum_of_its_pieces():
    """Times one, and nothing else, every float32 comes back as it was, bit for bit."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(64, 16)) * 10.0 ** rng.integers(-25, 30, (64, 16))).astype(np.float32)
    x[0, :4] = 0, 1, -(2**24 - 1), np.float32(1) / 3
    one = jnp.eye(16, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(jax.jit(matrix.dot)(x, CpuBfloat16(one)), x)


@pytest.mark.parametrize("shape", [(1, 300), (8, 300), (3, 5, 300)], ids=str)
def test_narrow_products_are_as_exact_as_float32s(shape):
    """Against float64: no worse than the float32 product; x rounded to bfloat16 would be 50 times as far off."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=shape).astype(np.float32)
    w = jnp.asarray(rng.normal(size=(7, 11, 300)), jnp.bfloat16)
    true = np.einsum("...D,abD->...ab", x.astype(np.float64), np.asarray(w, np.float64))

    def error(y) -> float:
        assert y.dtype == jnp.float32 and y.shape == true.shape
        return float(np.abs(np.asarray(y, np.float64) - true).max())

    plain = error(jnp.einsum("...D,abD->...ab", x, w.astype(jnp.float32)))
    assert error(jax.jit(matrix.dot)(x, CpuBfloat16(w))) < 2 * plain
    rounded = jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)
    assert error(jnp.einsum("...D,abD->...ab", rounded, w.astype(jnp.float32))) > 50 * plain


def test_an_infinity_times_a_narrow_matrix_is_what_float32_says():
    """Its pieces are infinity and zeros; infinity less infinity would make the sum NaN."""
    x = jnp.asarray([[jnp.inf, 1.0], [-jnp.inf, 2.0]])
    w = jnp.asarray([[1.0, 2.0], [-3.0, 0.5]], jnp.bfloat16)
    np.testing.assert_array_equal(jax.jit(matrix.dot)(x, CpuBfloat16(w)), matrix.dot(x, w.astype(jnp.float32)))


def narrowed(pair: Pair) -> tuple[Pair, Pair]:
    """A pair of bfloat16 weights: in float32, and with narrow matrices."""
    return in_dtype(in_dtype(pair, jnp.bfloat16), jnp.float32), factory.narrow(pair)


def test_matrices_stay_narrow_and_the_rest_is_float32():
    whole, mixed = narrowed(good())
    for module, other in zip(whole.params[:2], mixed.params[:2], strict=True):
        before, after = flatten(module), flatten(other)
        for path, weight in before.items():
            narrow = weight.ndim > 1 and not path.startswith("head.")
            stacked = path.endswith((".kv", ".gate_up"))  # held one by one
            names = (
                [f"{path}.parts.{n}.values" for n in range(2)] if stacked else [f"{path}.values" if narrow else path]
            )
            shape = weight.shape[1:] if stacked else weight.shape
            for values in map(after.__getitem__, names):
                assert values.dtype == (jnp.bfloat16 if narrow else jnp.float32) and values.shape == shape
    for path, weight in flatten(factory.turned(good()).params.target).items():
        assert weight.dtype == jnp.float32, f"{path} would have been rounded"


def test_products_of_the_cpus_form_are_the_same_sums():
    """Of every kind of weight, and whole: logits, features and drafts are those of plain arrays."""
    pair = good()
    turned = factory.turned(pair)
    layer: Any = turned.params.target.layers[0]
    x = jax.random.normal(jax.random.key(0), (2, 3, TARGET.hidden_size))
    assert isinstance(layer.q, CpuFloat32) and isinstance(layer.kv, Separate) and isinstance(layer.gate_up, Separate)
    plain = pair.params.target.layers[0]
    np.testing.assert_allclose(matrix.dot(x, layer.q), matrix.dot(x, plain.q), atol=1e-5)
    for name in ("kv", "gate_up"):
        expected = matrix.dot_each(x, getattr(plain, name))
        for one, other in zip(matrix.dot_each(x, getattr(layer, name)), expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    ids = jnp.array([[3, 0], [1, 3]])
    embed = pair.params.target.embed
    np.testing.assert_array_equal(layers.embed(turned.params.target.embed, ids), embed[ids])
    np.testing.assert_allclose(layers.unembed(x, turned.params.target.embed), layers.unembed(x, embed), atol=1e-5)
    assert run(turned) == run(pair)


@pytest.mark.parametrize(
    ("form", "dtype", "columns", "summed"),
    [
        pytest.param(CpuFloat32, jnp.float32, 8, 0, id="float32"),
        pytest.param(CpuBfloat16, jnp.bfloat16, 24, 1, id="bfloat16"),
    ],
)
def test_a_product_in_a_loop_has_the_matrix_on_its_left(form, dtype, columns, summed):
    """As compiled: XLA would take x's columns for rows again, and have its kernels put the matrix in order instead.

    Or it would make a transposed copy of the matrix before each loop.
    """

    @jax.jit
    def run(x, weight, times):
        return jax.lax.fori_loop(0, times, lambda _, x: jnp.tanh(matrix.dot(x, weight))[:, :64], x)

    program = run.lower(jnp.zeros((8, 64)), form(jnp.zeros((96, 64), dtype)), 5).compile().as_text() or ""
    (line,) = [line for line in program.splitlines() if " dot(" in line]
    assert f"= f32[96,{columns}]" in line
    assert f"lhs_contracting_dims={{1}}, rhs_contracting_dims={{{summed}}}" in line
    assert "[64,96]" not in program


@pytest.mark.parametrize("more", ["alone", *(pytest.param(x, marks=pytest.mark.slow) for x in ("int8", "candidates"))])
def test_narrow_matrices_change_no_token(more):
    whole, narrow = narrowed(good())
    drafter = narrow.configs.draft
    assert drafter is not None
    if more == "int8":
        mixed = narrow.params._replace(draft=whole.params.draft)
        narrow = Pair(prepare.quantize_drafter(mixed, drafter, "int8"), narrow.configs)
    if more == "candidates":
        narrow = with_candidates(narrow, 7)
    expected, found = run(whole), run(narrow)
    assert [o.tokens for o in found] == [o.tokens for o in expected]
    assert tau(found) > 0.8 * tau(expected) > 1.4


@pytest.mark.slow
def test_experts_stay_float32_beside_narrow_matrices():
    target = dataclasses.replace(TARGET, moe=MoeConfig(4, 2, 20, norm_topk_prob=True))
    whole, narrow = narrowed(Pair.make(factory.draft_config(target), target))
    layer = narrow.params.target.layers[0]
    assert isinstance(layer.q, CpuBfloat16) and layer.router is not None
    assert layer.gate_up.dtype == layer.router.dtype == jnp.float32
    assert [o.tokens for o in run(narrow)] == [o.tokens for o in run(whole)]


# --- A TPU's form -----------------------------------------------------------------------------------------------


def multiplied(run: Any, x: jax.Array) -> list[int]:
    """The rows of each product of a traced function."""
    products = [e for e in jax.make_jaxpr(run)(x).eqns if e.primitive.name == "dot_general"]
    return [e.invars[0].aval.size // e.invars[0].aval.shape[-1] for e in products]


@pytest.mark.parametrize("kind", ["plain", "int8"])
@pytest.mark.parametrize(
    ("shape", "groups", "rows"),
    [((1, 20), 1, 2), ((1, 1, 20), 1, 2), ((20,), 1, 2), ((3, 20), 1, 3), ((1, 5, 20), 1, 5), ((4, 1, 20), 4, 8)],
)
def test_a_tpus_form_multiplies_one_row_as_several(shape, groups, rows, kind):
    """Also where each of several groups of devices has one."""
    weight = jax.random.normal(jax.random.key(0), (3, 7, 20))
    x = jax.random.normal(jax.random.key(1), shape)
    held = weight if kind == "plain" else matrix.quantize(weight, kind)
    form = ForTpu(held, groups)
    np.testing.assert_allclose(matrix.dot(x, form), matrix.dot(x, held), atol=1e-5)
    assert matrix.dot(x, form, jnp.float32).shape == (*shape[:-1], 3, 7) and form.shape == weight.shape
    assert multiplied(lambda x: matrix.dot(x, form), x) == [rows]
    for one, other in zip(matrix.dot_each(x, form), matrix.dot_each(x, held), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_matrices_beside_each_other_are_one_of_all_their_outputs():
    weights = [jax.random.normal(jax.random.key(i), (n, 6)) for i, n in enumerate((5, 3))]
    x = jax.random.normal(jax.random.key(9), (2, 6))
    for held in (weights, [ForTpu(w) for w in weights], [weights[0], matrix.quantize(weights[1], "int8")]):
        found = matrix.dot(x, matrix.beside(*held))
        expected = jnp.concatenate([matrix.dot(x, w) for w in held], axis=1)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert isinstance(matrix.beside(*weights), jax.Array)


def copied(params: Params) -> Params:
    """Other modules with the same arrays."""
    return jax.tree.map(lambda leaf: leaf, params)


FORMS_OF_DRAFTERS = ["alone", *(pytest.param(x, marks=pytest.mark.slow) for x in ("int8", "candidates", "no head"))]


@pytest.mark.parametrize("more", FORMS_OF_DRAFTERS)
def test_a_tpus_form_changes_no_token(more):
    pair = good(head=None, shift_label=False) if more == "no head" else good()
    pair = eight_bits(pair, "int8") if more == "int8" else with_candidates(pair, 7) if more == "candidates" else pair
    made = prepare.prepare_for_tpu(copied(pair.params), pair.configs.target, pair.configs.draft)
    forms = {path.removesuffix(".values") for path in flatten(made.target) if path.endswith(".values")}
    letters = flatten(axes(pair.configs.target))
    matrices = {path for path, names in letters.items() if is_matrix(path, names)}
    names = {"qk": "q", "v": "kv", "gate_up.parts.0": "gate_up", "gate_up.parts.1": "gate_up"}
    assert {re.sub(r"(?<=\d\.)\w+.*", lambda found: names.get(found[0], found[0]), path) for path in forms} == matrices
    state = loops.begin(made, pair.configs, PROMPTS[1:2], COUNT)
    plain = loops.begin(pair.params, pair.configs, PROMPTS[1:2], COUNT)
    expected = loops.speculate(pair.params, pair.configs, plain)
    assert loops.speculate(made, pair.configs, state) == expected


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 2), (6, 3), (4, 4)])
@pytest.mark.parametrize("sizes", [None, (1, 2)], ids=str)
def test_a_joined_layers_queries_keys_and_values_are_those_of_the_layer(heads, kv_heads, sizes):
    """Bit for bit, at any number of queries a KV head, alone and on a mesh."""
    if sizes and (heads % 2 or kv_heads % 2):
        pytest.skip("the mesh does not divide these heads")
    config = dataclasses.replace(TARGET, num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=kv_heads)
    params = Params(factory.random_weights(config, 0))
    norms = np.random.default_rng(0).normal(size=(2, config.head_dim)).astype(np.float32)
    layer = params.target.layers[0]
    layer.q_norm, layer.k_norm = nnx.data(jnp.asarray(norms[0])), nnx.data(jnp.asarray(norms[1]))
    x = jax.random.normal(jax.random.key(0), (2, 3, config.hidden_size))
    angles = layers.rotary(jnp.arange(6).reshape(2, 3), config)
    run = jax.jit(layers.queries_keys_values, static_argnums=3)
    expected = run(layer, x, angles, 1e-6)
    with sharding.mesh_context(sharding.make_mesh(*sizes) if sizes else None):
        joined = prepare.prepare_for_tpu(params, config, None).target.layers[0]
        assert isinstance(joined, JoinedLayer) and joined.q is None and joined.kv is None
        found = run(joined, x, angles, 1e-6)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=2e-6, rtol=0)


@pytest.mark.slow
def test_experts_and_routers_stay_as_they_are_on_a_tpu():
    pair = Pair.make(None, dataclasses.replace(TARGET, moe=MoeConfig(4, 2, 20, norm_topk_prob=True)))
    made = prepare.prepare_for_tpu(copied(pair.params), pair.configs.target, None)
    layer = made.target.layers[0]
    assert isinstance(layer, JoinedLayer) and isinstance(layer.qk, ForTpu) and isinstance(made.target.embed, ForTpu)
    assert layer.router is pair.params.target.layers[0].router
    assert layer.gate_up is pair.params.target.layers[0].gate_up


# --- A table of the GRU's inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [0, prepare.LARGEST_TABLE], ids=["computed", "looked up"])
@pytest.mark.parametrize("kind", ["whole", "narrow", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_tabulated_head_proposes_the_same(kind, largest):
    whole = factory.narrow(good()) if kind == "narrow" else eight_bits(good(), "int8") if kind == "int8" else good()
    expected = run(whole)
    prepare.tabulate_head(whole.params, whole.configs.draft, largest)
    head = whole.params.draft.head if whole.params.draft else None
    assert head is not None and isinstance(head.gru_in, Tabulated) == (largest > 0)
    assert run(whole) == expected
    assert tau(expected) > 1.4
    prepare.tabulate_head(
        whole.params, whole.configs.draft, largest
    )  # there is nothing left to do, nor is there without a head
    plain = good(head=None, shift_label=False)
    prepare.tabulate_head(plain.params, plain.configs.draft)
    prepare.tabulate_head(plain.params.without_drafter, None)
    assert plain.params.draft is not None and plain.params.draft.head is None


# --- Head candidates ----------------------------------------------------------------------------------------------


def test_candidates_are_the_highest_logits():
    """Exactly where the vocabulary is small; nearly, and always with the highest of all, where it is in buckets."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 96)).astype(np.float32)
    values, ids = jax.jit(likeliest, static_argnums=1)(logits, 10)
    np.testing.assert_array_equal(ids, np.argsort(-logits, axis=-1)[..., :10])
    np.testing.assert_array_equal(values, -np.sort(-logits, axis=-1)[..., :10])

    logits = rng.normal(size=(2, 3, 4096)).astype(np.float32)
    values, ids = jax.jit(likeliest, static_argnums=1)(logits, 16)
    np.testing.assert_array_equal(np.take_along_axis(logits, np.asarray(ids), axis=-1), values)
    np.testing.assert_array_equal(ids[..., 0], logits.argmax(axis=-1))
    best = np.argsort(-logits, axis=-1)[..., :16]
    kept = [len(set(a) & set(b)) for a, b in zip(best.reshape(-1, 16), np.asarray(ids).reshape(-1, 16), strict=True)]
    assert np.mean(kept) > 14.5 and min(kept) < 16, "buckets lose one now and then"


def block(params: Params, pair: Pair, state: decode.DecodeState) -> tuple[jax.Array, jax.Array]:
    """z and base logits of the proposals."""
    drafter, configs = pair.configs.drafter, pair.configs
    assert isinstance(drafter, BlockDrafter)
    view = decode.view(params, configs, state)
    return drafter.draft_block(params.draft, state.drafter, view, configs.proposals)[:2]


@pytest.mark.parametrize(
    "candidates",
    [
        pytest.param(1, marks=pytest.mark.slow),
        7,
        pytest.param(88, marks=pytest.mark.slow),
        pytest.param(89, marks=pytest.mark.slow),
        pytest.param(500, marks=pytest.mark.slow),
    ],
)
def test_the_head_scores_its_candidates_alone(candidates):
    """Proposal for proposal what a walk over the masked logits gives; the tokens do not change."""
    pair = good()
    head = pair.configs.draft.head
    few = with_candidates(pair, candidates)
    state = loops.begin(pair.params, pair.configs, PROMPTS, COUNT)

    @jax.jit
    def both(params: Params, state):
        _, base = block(params, pair, state)
        return base, decode.propose(params, few.configs, state, None)[0].tokens

    base, drafts = jax.device_get(both(pair.params, state))
    # All but the candidates' base logits at -inf: the head over the whole vocabulary then does the same.
    lowest = -np.sort(-base, axis=-1)[..., min(candidates, 89) - 1 :][..., :1]
    masked = np.where(base >= lowest, base, -np.inf)
    z = jax.jit(lambda p, s: block(p, pair, s)[0])(pair.params, state)
    masked[:, 0] = base[:, 0]  # P = 1
    plain = jax.jit(lambda p, s, *given: head.propose(p.draft.head, *given, decode.view(p, pair.configs, s), None))
    np.testing.assert_array_equal(drafts, plain(pair.params, state, z, masked).tokens)
    outputs, whole = run(few), run(pair)
    assert [o.tokens for o in outputs] == [o.tokens for o in whole]
    assert tau(outputs) <= tau(whole) and (candidates < 89 or outputs == whole)


def test_a_draw_from_candidates_says_what_it_was_drawn_from():
    """q is what the head over the whole vocabulary gives with all but the candidates at minus infinity."""
    pair = good()
    configs = with_candidates(pair, 6).configs
    state = loops.begin(pair.params, pair.configs, PROMPTS, COUNT, sampling=settings(4, temperature=8.0))
    keys = jax.random.split(jax.random.key(5), (4, 5))

    @jax.jit
    def both(params: Params, state):
        assert params.draft is not None and configs.draft is not None
        z, base = block(params, pair, state)
        kept = base >= -jnp.sort(-base, axis=-1)[..., 5:6]
        masked = jnp.where(kept | (jnp.arange(5) == 0)[:, None], base, -jnp.inf)  # P = 1
        return (
            kept,
            configs.draft.head.propose(params.draft.head, z, masked, decode.view(params, configs, state), keys),
            decode.propose(params, configs, state, keys)[0],
        )

    kept, expected, found = jax.device_get(both(pair.params, state))
    (whole, expected), (drafts, q) = ((draft.tokens, draft.probs) for draft in (expected, found))
    np.testing.assert_array_equal(drafts[:, 0], whole[:, 0])
    np.testing.assert_allclose(q[:, :2], expected[:, :2], atol=1e-5)  # what follows depends on what was drawn
    np.testing.assert_allclose(q.sum(axis=-1), 1, atol=1e-5)
    assert ((q > 0) == kept)[:, 1:].all()
    assert np.take_along_axis(kept, drafts[..., None], axis=-1)[:, 1:].all()
    assert len(set(drafts[:, 1:].ravel().tolist())) > 3


def test_what_candidates_need():
    configs = good().configs
    with pytest.raises(DominoError, match="at least 1, found 0"):
        BlockDrafter(configs.draft, 0)
    plain = good(head=None, shift_label=False).configs
    with pytest.raises(DominoError, match="need a drafter with a causal head"):
        BlockDrafter(plain.draft, 4)
