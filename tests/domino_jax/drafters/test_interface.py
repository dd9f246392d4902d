"""Every drafter behind the one interface: the output is the target's, whatever is proposed, and by whom."""

import dataclasses
from functools import partial
from typing import Any

import factory
import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
from factory import Pair
from loops import Output

from domino_jax import decode, sharding
from domino_jax.config import DraftConfig
from domino_jax.decode import DecodeConfig
from domino_jax.drafters.assistant import AssistantDrafter
from domino_jax.drafters.base import Drafter, View
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.combined import CombinedDrafter
from domino_jax.drafters.dual_view import DualView, DualViewConfig, DualViewDrafter
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.drafters.ngram import NgramDrafter, NgramState
from domino_jax.drafters.tree import TreeDrafter
from domino_jax.drafters.view_tree import DualViewTreeDrafter
from domino_jax.errors import DominoError
from domino_jax.sampling import settings
from domino_jax.weights import Params, Target, axes, flatten, unflatten

TARGET = dataclasses.replace(factory.TARGET, num_hidden_layers=2)
COUNT = 24
LOOKUP = NgramDrafter(4, 3, 1)
VIEW = DualViewConfig(**TARGET.geometry(), block_size=5, mask_token_id=88)
HEADED = dataclasses.replace(VIEW, head=DominoHead(14, 7, 1))


@pytest.fixture(scope="module")
def pair() -> Pair:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 40}  # for a mesh of 4
    return factory.good_pair(TARGET, 1, num_hidden_layers=1, **heads)


def prompts(rows: int) -> list[list[int]]:
    """Of different lengths, some of which repeat themselves."""
    rng = np.random.default_rng(0)
    some = [[1, 2, 3], [40, 7] * 4, [11], [5, 28, 30, 44, 18, 88, 4, 33, 2, 24, 41, 82] * 2]
    return (some + [rng.integers(0, 89, 1 + i).tolist() * 2 for i in range(rows)])[:rows]


@pytest.fixture(scope="module")
def plain(pair) -> dict[int, list[list[int]]]:
    """The target's own greedy tokens, by the number of rows."""
    alone = pair.params.without_drafter, pair.configs.without_drafter
    return {
        rows: [o.tokens for o in loops.autoregress(*alone, loops.begin(*alone, prompts(rows), COUNT))]
        for rows in (1, 4, 17)
    }


def copied_view(target: Target) -> DualView:
    """A second view that is the first."""
    return unflatten(VIEW, {path: flatten(target)[path] for path in flatten(axes(VIEW))})


def make(name: str, pair: Pair, rows: int = 4) -> Pair:
    """The target with one of the drafters."""
    other = factory.random_weights(TARGET, 5)
    block = pair.configs.drafter
    assert isinstance(block, BlockDrafter) and isinstance(pair.configs.draft, DraftConfig)
    drafters: dict[str, tuple[Drafter, Any]] = {
        "block": (block, pair.params.draft),
        "block, random": (block, factory.random_weights(pair.configs.draft, 9)),
        "tree": (TreeDrafter(pair.configs.draft, nodes=7), pair.params.draft),
        "tree, random": (TreeDrafter(pair.configs.draft, nodes=4), factory.random_weights(pair.configs.draft, 9)),
        "tree, cheap": (TreeDrafter(pair.configs.draft, 6, 9, 3, "depth"), pair.params.draft),
        "n-gram": (LOOKUP, None),
        "block and n-gram": (CombinedDrafter(block, LOOKUP), pair.params.draft),
        "assistant": (AssistantDrafter(TARGET, 3), pair.params.target),
        "assistant, random": (AssistantDrafter(TARGET, 3), other),
        "assistant and n-gram": (CombinedDrafter(AssistantDrafter(TARGET, 3), LOOKUP), pair.params.target),
        "dual view": (DualViewDrafter(VIEW), copied_view(pair.params.target)),
        "dual view, random": (DualViewDrafter(VIEW), factory.random_weights(VIEW, 3)),
        "dual view, tree": (DualViewTreeDrafter(VIEW, nodes=7), copied_view(pair.params.target)),
        "dual view, head": (DualViewDrafter(HEADED), factory.random_weights(HEADED, 3)),
        "dual view, head, tree": (DualViewTreeDrafter(HEADED, nodes=6, lanes=3), factory.random_weights(HEADED, 3)),
        "always wrong": (loops.TableDrafter(4), jnp.full((rows, 128), -1)),
        "always the same": (loops.TableDrafter(4), jnp.full((rows, 128), 7)),
    }
    drafter, weights = drafters[name]
    return Pair(Params(pair.params.target, weights), DecodeConfig(TARGET, drafter))


NAMES = {
    "block": "Domino",
    "tree": "Domino, in trees of",
    "n-gram": "n-grams",
    "block and n-gram": "Domino and n-grams",
    "assistant": "an assistant model",
    "assistant and n-gram": "an assistant model and n-grams",
    "dual view": "Orthrus",
    "always wrong": "a table",
    "always the same": "a table",
}
DRAFTERS = (
    "block",
    "block, random",
    "tree",
    "tree, random",
    "tree, cheap",
    "n-gram",
    "block and n-gram",
    "assistant",
    "assistant, random",
    "assistant and n-gram",
    pytest.param("dual view", marks=pytest.mark.slow),
    "dual view, random",
    pytest.param("dual view, tree", marks=pytest.mark.slow),
    pytest.param("dual view, head", marks=pytest.mark.slow),
    pytest.param("dual view, head, tree", marks=pytest.mark.slow),
    "always wrong",
    "always the same",
)


VIEW_RARELY = pytest.param("dual view", marks=pytest.mark.slow)
# Of whose proposals some are accepted, and not all.
BOTH = ("block", "tree", "tree, cheap", "n-gram", "block and n-gram", "assistant and n-gram", "dual view")


@pytest.mark.parametrize("rows", [1, 4, pytest.param(17, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_output_is_the_targets(pair, plain, name, rows):
    ours = make(name, pair, rows)
    assert isinstance(ours.configs.drafter, Drafter) and NAMES[name.split(",")[0]] in ours.configs.drafter.name
    outputs = loops.speculate(*ours, loops.begin(*ours, prompts(rows), COUNT))
    assert [o.tokens for o in outputs] == plain[rows]
    accepted = {m for o in outputs for m in o.accepted}
    if name == "assistant":  # it is the target itself
        assert accepted == {3}
    if name == "always wrong":
        assert accepted == {0}
    if rows > 1 and name in BOTH:
        assert accepted >= {0, 1}


@pytest.mark.parametrize("name", ["block", "tree", "n-gram", "block and n-gram", "assistant", VIEW_RARELY])
def test_rows_may_change_between_drafts_and_plain_steps(pair, plain, name):
    """Cycles after plain steps propose what they would have proposed without them."""
    ours = make(name, pair)
    alone = loops.speculate(*ours, loops.begin(*ours, prompts(4), COUNT))
    state, numbers = loops.begin(*ours, prompts(4), COUNT), iter([0, 1, 0, 0] * COUNT)
    length, drafted = [], []

    def dispatch(state: decode.DecodeState) -> tuple[decode.DecodeState, decode.Emitted]:
        if next(numbers):
            state, emitted = decode.speculate(*ours, state, 1, True)
            length.append(jax.device_get(state.emitted - emitted.counts[0]))
            drafted.append(jax.device_get((emitted.drafts[0], emitted.counts[0])))
        else:
            state, emitted = decode.autoregress(*ours, state, 1, True)
        return state, emitted

    outputs = loops.finish(ours.configs, state, dispatch)
    assert [o.tokens for o in outputs] == [o.tokens for o in alone] == plain[4]
    if name == "assistant":
        assert all((drafts[b, 0] == plain[4][b][at[b]]) for at, (drafts, counts) in zip(length, drafted, strict=True)
                   for b in range(4) if counts[b])  # fmt: skip


@pytest.mark.parametrize("name", ["tree", "tree, cheap", "n-gram", "block and n-gram", "assistant", VIEW_RARELY])
def test_a_mesh_gives_the_tokens_of_one_device(pair, plain, name):
    mesh = sharding.make_mesh(2, 4)
    expected = loops.speculate(*make(name, pair), loops.begin(*make(name, pair), prompts(4), COUNT))
    with jax.set_mesh(mesh):
        target = factory.place(pair.params.target, TARGET, mesh)
        ours = make(name, pair)
        draft, drafter = ours.params.draft, ours.configs.drafter
        fitted = sharding.fit_to_mesh(TARGET, 4)
        if name == "assistant":
            draft, drafter = target, AssistantDrafter(fitted, 3)
        elif draft is not None:
            draft = factory.place(draft, ours.configs.draft, mesh)
            config = sharding.fit_to_mesh(ours.configs.draft, 4)
            drafter = CombinedDrafter(BlockDrafter(config), LOOKUP)
            if isinstance(ours.configs.drafter, TreeDrafter | DualViewDrafter):
                drafter = dataclasses.replace(ours.configs.drafter, config=config)
        params, configs = Params(target, draft), DecodeConfig(fitted, drafter)
        assert loops.speculate(params, configs, loops.begin(params, configs, prompts(4), COUNT)) == expected
    assert [o.tokens for o in expected] == plain[4]


def naive(text: list[int], drafter: NgramDrafter) -> list[int]:
    """The proposal by a search in Python."""
    for size in range(drafter.prompt_lookup_max, drafter.prompt_lookup_min - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):  # the latest first
            if size < len(text) and text[end - size : end] == text[-size:]:
                followed = text[end:]
                return [followed[i % len(followed)] for i in range(drafter.most)]
    return [text[-1]] * drafter.most


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 3, 1), (7, 5, 2), (3, 6, 6)])
def test_the_search_is_the_naive_one(sizes):
    drafter, rng = NgramDrafter(*sizes), np.random.default_rng(sum(sizes))
    texts = [rng.integers(0, 3, rng.integers(1, 60)).tolist() for _ in range(200)]
    tokens = np.full((len(texts), 64), 1, np.int32)  # what lies beyond a row's text must not be found
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text) - 1] = text[:-1]
    length = jnp.array([len(text) - 1 for text in texts], jnp.int32)
    none: Any = None
    view = View(none, TARGET, none, "xla", none, jnp.array([text[-1] for text in texts], jnp.int32), length, none)
    found, matched = jax.jit(partial(drafter.lookup, view=view, proposals=drafter.most))(
        NgramState(jnp.asarray(tokens))
    )
    assert np.asarray(found).tolist() == [naive(text, drafter) for text in texts]
    assert 0 < np.mean(np.asarray(matched) > 0) <= 1


def test_of_an_assistant_that_is_the_target_every_sample_is_accepted(pair):
    ours = make("assistant", pair)
    state = loops.begin(*ours, prompts(4), COUNT, sampling=settings(4, temperature=1.0, top_p=0.9))
    outputs: list[Output] = loops.speculate(*ours, state, greedy=False)
    assert {m for o in outputs for m in o.accepted} == {3}
    assert len({tuple(o.tokens) for o in outputs}) == 4


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: NgramDrafter(0), "at least 1 token"),
        (lambda: NgramDrafter(3, 2, 3), "prompt_lookup_min must be from 1 to prompt_lookup_max, found 3 and 2"),
        (lambda: NgramDrafter(3, 2, 0), "prompt_lookup_min must be from 1"),
        (lambda: AssistantDrafter(TARGET, 0), "at least 1 token"),
        (lambda: CombinedDrafter(LOOKUP), "a drafter that has weights"),
    ],
)
def test_settings_that_make_no_sense(build, said):
    with pytest.raises(DominoError, match=said):
        build()
