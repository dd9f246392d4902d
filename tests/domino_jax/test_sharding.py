"""Meshes: the same tokens as on one device, and no more traffic between devices than the algorithm needs."""

import dataclasses
import json
import re
from typing import Any

import factory
import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
from factory import Pair, make_draft, make_target, with_candidates
from loops import Output

from domino_jax import decode, prepare, sharding
from domino_jax.config import MoeConfig
from domino_jax.decode import DecodeConfig, DecodeState
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.tree import TreeDrafter
from domino_jax.errors import DominoError
from domino_jax.sampling import Sampling
from domino_jax.weights import Params, flatten
from infer.__main__ import main

# An odd vocabulary, which every mesh has to pad, and two KV heads, of which larger ones need copies.
TARGET = dataclasses.replace(factory.TARGET, num_hidden_layers=2, num_attention_heads=8)
PROMPTS = [[1, 2, 3], [40, 7] * 4, [11], [5, 28, 30, 44]]
COUNT = 20
MESHES = [(2, 4), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((2, 1), (1, 2), (2, 2), (1, 4), (1, 8)))]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return factory.good_pair(
        TARGET, 1, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4, intermediate_size=40
    )


@pytest.fixture(scope="module")
def moe_pair() -> Pair:
    """Experts and biases in the target, a dense layer among its two; biases in the drafter too."""
    experts = MoeConfig(8, 3, 20, norm_topk_prob=True, mlp_only_layers=(0,))
    target = dataclasses.replace(TARGET, moe=experts, attention_bias=True)
    return factory.good_pair(
        target, 1, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4, intermediate_size=40
    )


@pytest.fixture(scope="module")
def moe_alone(moe_pair) -> list[Output]:
    outputs = run(moe_pair)
    assert len({m for o in outputs for m in o.accepted}) > 3
    return outputs


def spread(pair: Pair, mesh: jax.sharding.Mesh) -> Pair:
    """The pair on a mesh."""
    target, draft = pair.configs.target, pair.configs.draft
    assert draft is not None
    model = mesh.shape["model"]
    params = Params(factory.place(pair.params.target, target, mesh), factory.place(pair.params.draft, draft, mesh))
    return Pair(
        params, DecodeConfig(sharding.fit_to_mesh(target, model), BlockDrafter(sharding.fit_to_mesh(draft, model)))
    )


def start(pair: Pair, sampling: Sampling | None = None) -> DecodeState:
    return loops.begin(pair.params, pair.configs, PROMPTS, COUNT, sampling=sampling)


def run(pair: Pair, sampling: Sampling | None = None) -> list[Output]:
    return loops.speculate(pair.params, pair.configs, start(pair, sampling), greedy=sampling is None)


@pytest.fixture(scope="module")
def alone(pair) -> list[Output]:
    outputs = run(pair)
    assert {m for o in outputs for m in o.accepted} >= {0, 1, 5}
    return outputs


def cheap(pair: Pair) -> Pair:
    """The other form of the head, which scores candidates, and an 8-bit drafter."""
    assert pair.configs.draft is not None
    small = prepare.quantize_drafter(pair.params, pair.configs.draft, "int8")
    return Pair(small, with_candidates(pair, 5).configs)


@pytest.fixture(scope="module")
def alone_cheaply(pair, alone) -> list[Output]:
    outputs = run(cheap(pair))
    assert [o.tokens for o in outputs] == [o.tokens for o in alone]
    assert outputs != alone, "other drafts were to be expected"
    return outputs


@pytest.mark.e2e
@pytest.mark.parametrize(("data", "model"), MESHES, ids=lambda n: str(n))
def test_a_mesh_gives_the_tokens_of_one_device_with_candidates_too(pair, alone_cheaply, data, model):
    mesh = sharding.make_mesh(data, model)
    with jax.set_mesh(mesh):
        ours = cheap(spread(pair, mesh))
        assert run(ours) == alone_cheaply
    parts = {path: leaf.sharding.shard_shape(leaf.shape) for path, leaf in flatten(ours.params).items()}
    assert parts["draft.layers.0.kv.values"][1] == max(4, model) // model
    assert parts["draft.layers.0.gate_up.scale"] == (2, 40 // model)
    assert parts["output.values"][0] == -(-89 // model)


@pytest.mark.e2e
@pytest.mark.parametrize(
    "form",
    [
        pytest.param(factory.turned, id="float32"),
        pytest.param(factory.narrow, id="bfloat16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("data", "model"), [(2, 4), pytest.param(1, 8, marks=pytest.mark.slow)])
def test_a_mesh_gives_the_tokens_of_one_device_with_a_cpus_matrices_too(pair, alone, data, model, form):
    """As a CPU holds matrices, in either dtype: each device has its part of every one."""
    expected = run(form(pair))
    assert form is factory.narrow or expected == alone
    mesh = sharding.make_mesh(data, model)
    with jax.set_mesh(mesh):
        ours = form(spread(pair, mesh))
        assert run(ours) == expected
    parts = {path: leaf.sharding.shard_shape(leaf.shape) for path, leaf in flatten(ours.params).items()}
    assert parts["target.layers.0.q.values"] == (8 // model, 6, 32)
    assert parts["target.layers.0.down.values"] == (32, 40 // model)
    assert parts["target.embed.values"][0] == -(-89 // model)


@pytest.mark.parametrize(("data", "model"), MESHES, ids=lambda n: str(n))
def test_a_mesh_gives_the_tokens_of_one_device(pair, alone, data, model):
    """In float32, with what was accepted; weights, caches and vocabulary lie where the table says."""
    mesh = sharding.make_mesh(data, model)
    with jax.set_mesh(mesh):
        ours = spread(pair, mesh)
        assert run(ours) == alone
        state, _ = decode.speculate(ours.params, ours.configs, start(ours), 2, True)
    part = state.cache.layer(0)[0].sharding.shard_shape(state.cache.layer(0)[0].shape)
    assert part[:2] == (4 // data, max(1, 2 // model))
    embed = ours.params.target.embed
    assert embed.shape[0] == -(-89 // model) * model
    assert embed.sharding.shard_shape(embed.shape)[0] == embed.shape[0] // model
    assert ours.params.target.layers[0].q.sharding.shard_shape((8, 6, 32)) == (8 // model, 6, 32)


@pytest.mark.parametrize(("data", "model"), [(1, 2), (2, 1), (2, 4)], ids=lambda n: str(n))
def test_caches_grow_on_a_mesh_and_stay_where_they_belong(pair, alone, data, model):
    """In mid generation, as a run does whose rows get longer than their bucket."""
    mesh = sharding.make_mesh(data, model)
    with jax.set_mesh(mesh):
        ours = spread(pair, mesh)
        state = start(ours)
        before = state.cache.layer(0)[0].sharding
        state, _ = decode.speculate(ours.params, ours.configs, state, 1, True)
        old = jax.tree.leaves((state.cache, state.drafter))
        state = decode.grow_caches(ours.configs, state, 2 * state.cache.capacity)
        assert state.cache.layer(0)[0].sharding.is_equivalent_to(before, 4)
        assert all(buffer.is_deleted() for buffer in old)
        _, emitted = decode.speculate(ours.params, ours.configs, state, 40, True)
    tokens, counts = sharding.fetch((emitted.tokens, emitted.counts))
    cycles, batch = range(len(counts)), range(tokens.shape[1])
    rows = [[token for c in cycles for token in tokens[c, b, : counts[c, b]].tolist()] for b in batch]
    assert all(output.tokens[-len(row) :] == row for output, row in zip(alone, rows, strict=True) if row)


def with_backend(pair: Pair, backend: Any) -> Pair:
    """The pair with its experts computed by `backend`."""
    assert pair.configs.target.moe is not None
    experts = dataclasses.replace(pair.configs.target.moe, backend=backend)
    target = dataclasses.replace(pair.configs.target, moe=experts)
    return Pair(pair.params, dataclasses.replace(pair.configs, target=target))


LESS_USUAL = [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((2, 1), (1, 2), (1, 8))]


@pytest.mark.e2e
@pytest.mark.parametrize("form", [pytest.param("one by one", marks=pytest.mark.slow), "grouped"])
@pytest.mark.parametrize(("data", "model"), [(2, 4), *LESS_USUAL], ids=lambda n: str(n))
def test_experts_on_a_mesh_give_the_tokens_of_one_device(moe_pair, moe_alone, form, data, model):
    """Each device holds its part of the experts and whole routers; biases lie with their heads."""
    mesh = sharding.make_mesh(data, model)
    with jax.set_mesh(mesh):
        ours = with_backend(spread(moe_pair, mesh), form)
        assert run(ours) == moe_alone
    parts = {path: leaf.sharding.shard_shape(leaf.shape) for path, leaf in flatten(ours.params.target).items()}
    assert parts["layers.1.gate_up"] == (8 // model, 2, 20, 32) and parts["layers.1.down"] == (8 // model, 32, 20)
    assert parts["layers.1.router"] == (8, 32) and parts["layers.0.gate_up"] == (2, 40 // model, 32)
    assert parts["layers.0.o"] == (32, 48 // model)
    assert parts["layers.0.q_bias"] == (8 // model, 6) and parts["layers.0.o_bias"] == (32,)


SAMPLING = Sampling(
    temperature=jnp.array([1.0, 0.7, 0.0, 1.3], jnp.float32),
    top_k=jnp.array([0, 20, 0, 0], jnp.int32),
    top_p=jnp.array([1.0, 0.9, 1.0, 1.0], jnp.float32),
    min_p=jnp.array([0.0, 0.0, 0.0, 0.02], jnp.float32),
)


@pytest.mark.slow
def test_samples_on_a_mesh_are_those_of_one_device():
    """With a vocabulary that needs no padding the random numbers are the same, and so are the draws."""
    target = dataclasses.replace(TARGET, vocab_size=88)
    pair = factory.good_pair(
        target, 1, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4, intermediate_size=40
    )
    expected = run(pair, SAMPLING)
    mesh = sharding.make_mesh(2, 2)
    with jax.set_mesh(mesh):
        assert run(spread(pair, mesh), SAMPLING) == expected


COLLECTIVE = re.compile(r"= (.+?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(-start)?\(")


def traffic(pair: Pair, state: DecodeState, greedy: bool) -> dict[str, list[int]]:
    """Elements of what a cycle's program moves between devices, by kind."""
    text = decode.speculate.lower(pair.params, pair.configs, state, 8, greedy).compile().as_text()
    moved: dict[str, list[int]] = {}
    for shapes, kind, _ in COLLECTIVE.findall(text or ""):
        for shape in re.findall(r"\w+\[([\d,]*)\]", shapes):
            moved.setdefault(kind, []).append(int(np.prod([int(n) for n in shape.split(",") if n])))
    return moved


@pytest.mark.parametrize(
    ("model", "candidates", "form", "sampling"),
    [
        pytest.param("pair", None, None, None, id="whole head"),
        pytest.param("pair", None, None, SAMPLING, id="samples"),
        pytest.param("pair", 1, None, None, id="candidates"),
        pytest.param("moe_pair", None, "one by one", None, id="experts", marks=pytest.mark.slow),
        pytest.param("moe_pair", None, "grouped", None, id="experts, grouped"),
    ],
)
def test_nothing_large_crosses_between_devices(request, model, candidates, form, sampling):
    """A cycle moves hidden states and, for each argmax or draw, one candidate a device: no weight, no whole logits.

    A head over candidates moves those as well, and their rows of its projection. Top-k and top-p move sums over the
    vocabulary. Experts add nothing: what they say is summed where an MLP's parts are.
    """
    jax.clear_caches()
    mesh = sharding.make_mesh(2, 4)
    with jax.set_mesh(mesh):
        ours = spread(request.getfixturevalue(model), mesh)
        ours = with_candidates(ours, candidates)
        ours = with_backend(ours, form) if form else ours
        state = start(ours, sampling)
        moved = traffic(ours, state, sampling is None)
    rows, positions = len(PROMPTS) // 2, 6  # J + 1
    assert set(moved) <= {"all-gather", "all-reduce"}
    # One candidate of each of 4 devices for an argmax; for candidates the best of each of 20 buckets.
    assert max(moved["all-gather"]) <= rows * positions * (4 if candidates is None else 20)
    assert max(moved["all-reduce"]) <= rows * positions * TARGET.hidden_size
    assert len(moved["all-reduce"]) >= 2 * 2 + 2, "two a layer of the target, at least"


@pytest.mark.e2e
@pytest.mark.parametrize("sampling", [None, pytest.param(SAMPLING, marks=pytest.mark.slow)], ids=["greedy", "samples"])
def test_a_tree_moves_the_best_of_each_device_alone(pair, sampling):
    """Of each path the children that each of 4 devices finds likeliest; no logits of a path."""
    jax.clear_caches()
    mesh, nodes = sharding.make_mesh(2, 4), 8
    with jax.set_mesh(mesh):
        ours = spread(pair, mesh)
        assert ours.configs.draft is not None
        drafter = TreeDrafter(ours.configs.draft, nodes=nodes)
        ours = ours._replace(configs=dataclasses.replace(ours.configs, drafter=drafter))
        moved = traffic(ours, start(ours, sampling), sampling is None)
    rows, lanes = len(PROMPTS) // 2, nodes - 1
    assert set(moved) <= {"all-gather", "all-reduce"}
    assert max(moved["all-gather"]) <= rows * lanes * 4 * (nodes - 1) < rows * lanes * TARGET.vocab_size
    assert max(moved["all-reduce"]) <= rows * (nodes + 1) * TARGET.hidden_size


def test_a_mesh_that_does_not_fit_is_refused(pair):
    with pytest.raises(DominoError, match=r"model=3 does not divide num_attention_heads 8"):
        sharding.fit_to_mesh(TARGET, 3)
    with pytest.raises(DominoError, match=r"neither divides num_key_value_heads 3"):
        sharding.fit_to_mesh(dataclasses.replace(TARGET, num_attention_heads=12, num_key_value_heads=3), 2)
    with pytest.raises(DominoError, match="needs 32 devices; found 8"):
        sharding.make_mesh(4, 8)
    assert sharding.parse_mesh("model=4,data=2") == (2, 4)
    for text in (
        "",
        "model",
        "model=0",
        "rows=2",
        "data=2;model=4",
        "data=2,data=4",
        "data=\u0662",
        "data=" + "9" * 5000,
    ):
        with pytest.raises(DominoError, match="data=2,model=4"):
            sharding.parse_mesh(text)


@pytest.mark.slow
def test_the_command_line_takes_a_mesh(tmp_path, capsys):
    """Also where the last batch does not fill the mesh's data axis."""
    make_target(tmp_path / "target")
    make_draft(tmp_path / "draft")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("one", "two", "three")))
    words = ["--prompts", str(tmp_path / "prompts.jsonl"), "--json", "--max-new-tokens", "9", "--batch-size", "2"]
    words += ["--model", str(tmp_path / "target"), "--draft", str(tmp_path / "draft")]

    def tokens(*more: str) -> list[list[int]]:
        assert main([*words, *more]) == 0
        return [json.loads(line)["tokens"] for line in capsys.readouterr().out.splitlines()]

    assert tokens("--mesh", "data=2,model=2") == tokens()
    assert main([*words, "--mesh", "data=2,model=3"]) == 1
    assert "model=3 does not divide num_attention_heads 4" in capsys.readouterr().err
    assert main([*words, "--mesh", "everything"]) == 2
