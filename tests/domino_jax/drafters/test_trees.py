"""Trees of drafts: the search against its restatement, the walk, what is moved in the caches, and what is refused."""

import dataclasses
from typing import Any

import factory
import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
import trees as restated
from factory import Pair

from domino_jax import cache as kv
from domino_jax import decode
from domino_jax import tree as trees
from domino_jax.attention import attend_xla
from domino_jax.drafters.base import DraftTokens
from domino_jax.drafters.dual_view import DualViewConfig
from domino_jax.drafters.heads.choosing import largest, likeliest
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.drafters.tree import TreeDrafter
from domino_jax.drafters.view_tree import DualViewTreeDrafter
from domino_jax.errors import DominoError
from domino_jax.kernels.attention_cudnn import attend_cudnn
from domino_jax.sampling import settings

PROMPTS = [[1, 2, 3], [40, 7] * 4, [11]]
COUNT = 24
# Of a pair with random weights: nodes, lanes, candidates, correction, the head's prefix (None: no head), temperature.
SEARCHES: dict[str, dict[str, Any]] = {
    "best first": {"nodes": 12},
    "no uncorrected proposal": {"nodes": 9, "prefix": 0},
    "deeper than it has nodes": {"nodes": 3},
    "one node": {"nodes": 1},
    "candidates": {"nodes": 11, "candidates": 4},
    "as few as there are candidates": {"nodes": 12, "candidates": 1, "prefix": 0},
    "two lanes": {"nodes": 12, "lanes": 2},
    "shared": {"nodes": 13, "correction": "depth"},
    "shared, candidates, lanes": {"nodes": 13, "correction": "depth", "candidates": 5, "lanes": 3},
    "no head": {"nodes": 14, "prefix": None},
    "temperature": {"nodes": 10, "temperature": (0.0, 0.5, 1.7), "coupled": False},
    "coupled": {"nodes": 10, "temperature": (0.0, 0.5, 1.7)},
    "coupled, candidates, shared": {"nodes": 8, "temperature": (1.0, 0.5, 0.9), "candidates": 6, "correction": "depth"},
}
QUICK = ("best first", "two lanes", "shared", "no head", "coupled", "as few as there are candidates")
TOP_K = 20


def grown(pair: Pair, drafter: TreeDrafter, temperature: tuple[float, ...] | None) -> Any:
    """The trees of three rows, and what they were grown from."""
    sampling = settings(3)
    if temperature:
        sampling = sampling._replace(temperature=jnp.array(temperature, jnp.float32), top_k=jnp.full(3, TOP_K))
    state = loops.begin(*pair, PROMPTS, 8, sampling=sampling)

    @jax.jit
    def run(params: Any, state: decode.DecodeState) -> Any:
        view = decode.view(params, pair.configs, state)
        z, base, _ = drafter.draft_block(params.draft, state.drafter, view, drafter.depth)
        few = likeliest(base, drafter.candidates)[1] if drafter.candidates else None
        keys = decode.position_keys(state, drafter.depth)[:, :-1, 0] if temperature else None
        return drafter.grow(params.draft, z, base, view, drafter.nodes, keys), z, base, few, state.token, keys

    return jax.device_get(run(pair.params, state))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in SEARCHES])
def test_the_search_is_its_restatement(name):
    how = dict(SEARCHES[name])
    prefix, temperature = how.pop("prefix", 1), how.pop("temperature", None)
    head = None if prefix is None else DominoHead(14, 7, prefix)
    config = factory.draft_config(head=head)
    pair = Pair.make(config)
    drafter = TreeDrafter(config, **how)
    tree, z, base, few, anchors, keys = grown(pair, drafter, temperature)
    _, _, draft_w, draft_cfg = pair.reference()
    embed = np.asarray(pair.params.target.embed)
    for row in range(3):
        noise = None
        if temperature and temperature[row] and drafter.coupled:
            noise = np.stack([jax.random.gumbel(key, base.shape[2:]) for key in keys[row]])
        following = restated.head_following(
            draft_w,
            draft_cfg,
            embed,
            z[row],
            base[row],
            int(anchors[row]),
            None if few is None else few[row].tolist(),
            drafter.correction == "depth",
            (temperature[row] or 1.0) if temperature else 1.0,
            TOP_K,
            noise,
        )
        lanes = drafter.lanes
        if lanes is None:
            expected = restated.best_first(following, drafter.nodes, drafter.depth)
        else:
            expected = restated.by_depth(following, drafter.nodes, drafter.depth, lanes)
        expected += [(-1, 0)] * (drafter.nodes - len(expected))  # places without a node
        assert list(zip(tree.tokens[row].tolist(), tree.parents[row].tolist(), strict=True)) == expected
    if name == "best first":
        assert len({tuple(row) for row in tree.parents.tolist()}) == 3, "the trees should differ in form"
    if name == "as few as there are candidates":
        assert (tree.tokens == -1).sum() == 3 * (12 - drafter.depth)


@pytest.mark.parametrize("what", ["head", "backbone"])
def test_what_computes_nonsense_makes_no_nodes(what):
    """A score that is not a number is none: the first proposals, which the head does not touch, are what is left."""
    config = factory.draft_config()
    pair = Pair.make(config)
    if what == "head":
        pair.params.draft.head.proj_out = pair.params.draft.head.proj_out * jnp.nan
    else:
        pair.params.draft.norm = pair.params.draft.norm * jnp.nan
    tree = grown(pair, TreeDrafter(config, nodes=6), None)[0]
    assert (tree.parents == 0).all() and (tree.tokens >= 0).all() == (what == "head")
    assert (tree.tokens == -1).all() == (what == "backbone")


def test_the_largest_and_of_equal_ones_the_first():
    x = np.random.default_rng(0).integers(0, 5, (2, 3, 40)).astype(np.float32)
    x[0, 0, 7] = -np.inf
    order = np.argsort(-x, axis=-1, kind="stable")[..., :9]
    values, places = jax.jit(largest, static_argnums=1)(x, 9)
    np.testing.assert_array_equal(places, order)
    np.testing.assert_array_equal(values, np.take_along_axis(x, order, axis=-1))


def random_trees(rows: int, nodes: int, depth: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and parents [B, N], siblings of different tokens, some places without a node."""
    tokens, parents = np.full((rows, nodes), -1), np.zeros((rows, nodes), int)
    for row in range(rows):
        depths, children = [0], [set()]
        for i in range(rng.integers(0, nodes + 1) if row % 5 == 0 else nodes):
            free = [p for p in range(i + 1) if depths[p] < depth and len(children[p]) < 3]
            parent = int(rng.choice(free[-4:]))
            token = int(rng.choice(sorted({0, 1, 2} - children[parent])))
            children[parent].add(token)
            tokens[row, i], parents[row, i] = token, parent
            depths.append(depths[parent] + 1)
            children.append(set())
    return tokens, parents


@pytest.mark.parametrize(("nodes", "depth"), [(1, 1), (7, 3), (12, 12), (20, 5)])
def test_the_walk_and_the_mask_are_those_of_loops(nodes, depth):
    rng = np.random.default_rng(nodes)
    rows = 120
    tokens, parents = random_trees(rows, nodes, depth, rng)
    choices = rng.integers(0, 3, (rows, nodes + 1))
    choices[:40] = 1
    tree = trees.tree_of(jnp.asarray(parents, jnp.int32), depth)
    padded = jnp.asarray(np.concatenate([np.full((rows, 1), 2), tokens], axis=1), jnp.int32)
    path = jax.device_get(trees.walk(tree, padded, jnp.asarray(choices, jnp.int32), depth))
    lengths = set()
    for row in range(rows):
        expected = restated.walk(tokens[row].tolist(), parents[row].tolist(), choices[row].tolist())
        assert path.accepted[row] == len(expected) - 1
        assert path.nodes[row, : len(expected)].tolist() == expected
        assert np.flatnonzero(path.stands[row]).tolist() == expected
        lengths.add(len(expected))
        for node in range(nodes + 1):
            before, way = node, {node, 0}
            while before:
                before = int(parents[row, before - 1])
                way.add(before)
            assert set(np.flatnonzero(np.asarray(tree.sees[row, node])).tolist()) == way
            assert int(tree.depth[row, node]) == len(way) - 1
    assert len(lengths) > min(depth, 3)


def test_a_node_sees_the_cache_and_its_path():
    """Both backends that have a mask, against attention over the path alone."""
    rng = np.random.default_rng(0)
    parents = random_trees(3, 6, 4, rng)[1]
    tree = trees.tree_of(jnp.asarray(parents, jnp.int32), 4)
    q = rng.normal(size=(3, 7, 4, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 3, 2, 24, 8)).astype(np.float32)
    start = np.array([0, 5, 17], np.int32)
    ours = attend_xla(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(start), True, None, sees=tree.sees)
    theirs = attend_cudnn(
        jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(start), True, None, "xla", sees=tree.sees
    )
    for row in range(3):
        for node in range(7):
            way = np.flatnonzero(np.asarray(tree.sees[row, node]))
            places = [*range(start[row]), *(start[row] + way)]
            for head in range(4):
                scores = k[row, head // 2, places] @ q[row, node, head] / 8**0.5
                weights = np.exp(scores - scores.max())
                expected = weights @ v[row, head // 2, places] / weights.sum()
                np.testing.assert_allclose(ours[row, node, head], expected, atol=1e-5)
                np.testing.assert_allclose(theirs[row, node, head], expected, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_what_a_path_has_left_in_the_cache_is_put_in_its_order(rows):
    rng = np.random.default_rng(rows)
    held = kv.KVCache(*(tuple(jnp.asarray(rng.normal(size=(rows, 2, 32, 4))) for _ in range(2)) for _ in "kv"))
    start = np.array([0, 9, 20][:rows], np.int32)
    places = np.array([[0, 2, 5, 6], [0, 1, 2, 3], [0, 3, 4, 11]][:rows], np.int32)
    compact = jax.jit(kv.KVCache.compact, static_argnums=3)
    moved = compact(held, start, places, 12)
    for before, after in zip(jax.tree.leaves(held), jax.tree.leaves(moved), strict=True):
        expected = np.array(before)
        for row in range(rows):
            expected[row, :, start[row] : start[row] + 4] = expected[row][:, start[row] + places[row]]
        np.testing.assert_array_equal(after, expected)
    same = compact(held, start, np.broadcast_to(np.arange(4, dtype=np.int32), (rows, 4)), 12)
    jax.tree.map(np.testing.assert_array_equal, same, held)


@pytest.fixture(scope="module")
def pair() -> Pair:
    target = dataclasses.replace(factory.TARGET, num_hidden_layers=2)
    return factory.good_pair(target, 1, num_hidden_layers=1)


def with_tree(pair: Pair, **how: Any) -> Pair:
    assert pair.configs.draft is not None
    return pair._replace(configs=dataclasses.replace(pair.configs, drafter=TreeDrafter(pair.configs.draft, **how)))


TREE_OF = trees.tree_of


def in_a_row(parents: jax.Array, depth: int) -> trees.Tree:
    """Nodes at positions of their own, as if they followed each other."""
    tree = TREE_OF(parents, depth)
    return tree._replace(depth=jnp.broadcast_to(jnp.arange(tree.depth.shape[1], dtype=jnp.int32), tree.depth.shape))


def itself_alone(parents: jax.Array, depth: int) -> trees.Tree:
    """Each node sees no other; where it is, and whom it follows, stays."""
    tree = TREE_OF(parents, depth)
    return tree._replace(sees=jnp.broadcast_to(jnp.eye(tree.depth.shape[1], dtype=bool), tree.sees.shape))


WRONG: dict[str, dict[str, Any]] = {
    "nothing is moved": {"cache__KVCache__compact": lambda cache, start, places, span: cache},
    "positions": {"tree__tree_of": in_a_row},
    "mask": {"tree__tree_of": itself_alone},
}


@pytest.fixture(scope="module")
def expected(pair) -> list[list[int]]:
    alone = pair.params.without_drafter, pair.configs.without_drafter
    return [o.tokens for o in loops.autoregress(*alone, loops.begin(*alone, PROMPTS, COUNT))]


@pytest.mark.parametrize("broken", [pytest.param(n, marks=pytest.mark.slow if n == "mask" else []) for n in WRONG])
def test_the_output_needs_each_of_its_parts(pair, expected, broken):
    """With the caches not put in order, or nodes at wrong positions, or that see no other, other tokens come out."""
    ours = with_tree(pair, nodes=8)
    run = loops.retraced(**WRONG[broken])
    other = loops.finish(ours.configs, loops.begin(*ours, PROMPTS, COUNT), lambda s: run(*ours, s, 8, True))
    assert [o.tokens for o in other] != expected


def test_more_nodes_accept_more_and_the_output_stays(pair, expected):
    tau = {}
    for nodes in (2, 5, 12):
        ours = with_tree(pair, nodes=nodes)
        found = loops.speculate(*ours, loops.begin(*ours, PROMPTS, COUNT))
        assert [o.tokens for o in found] == expected
        tau[nodes] = np.mean([m for o in found for m in o.accepted])
    assert tau[2] < tau[5] <= tau[12], tau


def test_what_was_proposed_is_told_with_the_accepted_first(pair):
    ours = with_tree(pair, nodes=7)
    emitted = jax.device_get(decode.speculate(*ours, loops.begin(*ours, PROMPTS, COUNT), 4, True)[1])
    assert emitted.drafts.shape == (4, 3, 7) and emitted.tokens.shape == (4, 3, 6)
    for cycle in range(4):
        for row in range(3):
            stood = emitted.accepted[cycle, row]
            assert emitted.drafts[cycle, row, :stood].tolist() == emitted.tokens[cycle, row, :stood].tolist()


@pytest.mark.slow
def test_where_a_tree_ends_a_row_begins_again_in_a_larger_bucket(pair):
    """Rows grow beyond their bucket, and plain steps stand between cycles."""
    ours = with_tree(pair, nodes=9)
    longer = [[5, 6, 7] * 35, [11] * 100]
    alone = pair.params.without_drafter, pair.configs.without_drafter
    expected = [o.tokens for o in loops.autoregress(*alone, loops.begin(*alone, longer, 40))]
    numbers = iter([1, 0, 0, 1] * 40)

    def dispatch(state: decode.DecodeState) -> tuple[decode.DecodeState, decode.Emitted]:
        loop = decode.speculate if next(numbers) else decode.autoregress
        return loop(*ours, state, 2, True)

    found = loops.finish(ours.configs, loops.begin(*ours, longer, 40), dispatch)
    assert [o.tokens for o in found] == expected


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"nodes": 0}, "a tree has at least 1 of its nodes, found 0"),
        ({"lanes": 0}, "a tree has at least 1 of its lanes, found 0"),
        ({"candidates": 0}, "head candidates must be at least 1"),
        ({"config": factory.draft_config(head=None), "correction": "depth"}, "a causal head, and this one has none"),
    ],
)
def test_settings_that_make_no_tree(how, said):
    with pytest.raises(DominoError, match=said):
        TreeDrafter(**({"config": factory.draft_config()} | how))


def test_a_cycle_has_the_depth_of_a_path_and_room_for_all_nodes():
    drafter = TreeDrafter(factory.draft_config(), nodes=12)
    configs = decode.DecodeConfig(factory.TARGET, drafter)
    assert (configs.proposals, configs.depth, configs.lookahead, configs.branching) == (12, 5, 13, True)
    view = DualViewConfig(**factory.TARGET.geometry(), block_size=5, mask_token_id=88)
    configs = decode.DecodeConfig(factory.TARGET, DualViewTreeDrafter(view, nodes=12))
    assert (configs.proposals, configs.depth, configs.lookahead, configs.branching) == (12, 4, 13, True)
    few = dataclasses.replace(configs, drafts=3)  # which are a chain
    assert (few.proposals, few.depth, few.branching) == (3, 3, False)
    chain = Pair.make().configs
    assert (chain.proposals, chain.depth, chain.branching) == (5, 5, False)
    assert DraftTokens(jnp.zeros((1, 1)), None).parents is None


@pytest.mark.parametrize("nodes", [3, 9])
def test_the_caches_are_those_of_plain_steps(pair, nodes):
    """The target's and the drafter's, which no token of the output would tell."""
    ours = with_tree(pair, nodes=nodes)
    state, emitted = decode.speculate(*ours, loops.begin(*ours, PROMPTS, COUNT), 5, True)
    assert int(emitted.cycles) == 5 and int(emitted.accepted.max()) > 1
    plain, _ = decode.autoregress(*ours, loops.begin(*ours, PROMPTS, COUNT), COUNT, True)
    lengths = jax.device_get(state.length)
    for held, expected in zip(
        jax.tree.leaves((state.cache, state.drafter)), jax.tree.leaves((plain.cache, plain.drafter)), strict=True
    ):
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(held[row, :, :length], expected[row, :, :length], atol=2e-4)
