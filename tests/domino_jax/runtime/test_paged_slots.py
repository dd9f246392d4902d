"""Slots over pages: the same answers in less memory, beginnings that are run once, and nothing lost for want of it."""

from dataclasses import replace
from typing import Any

import factory
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_slots
from factory import Pair
from test_slots import FLOAT32, HOT, MIX, Changing, afresh, alone, arriving, drafters, ids, requests, result

from domino_jax import decode, sharding
from domino_jax.errors import DominoError
from domino_jax.paged import is_paged
from domino_jax.runtime.paged_slots import PagedSlots, Pages, plan_pages
from domino_jax.runtime.pages import PagePool
from domino_jax.runtime.slots import Completion, FixedDrafts, Request
from domino_jax.sampling import SamplingParams

pytestmark = pytest.mark.usefixtures("quick_compilation")
pair, small = test_slots.pair, test_slots.small  # fixtures


def paged(pair: Pair, size: int, tokens: int = 4000, share: bool = True, **how: Any) -> PagedSlots:
    """A batch with pages for so many tokens in all."""
    pages = Pages(-(-(tokens + pair.configs.lookahead) // 8), 8, share)
    return PagedSlots(pair.params, pair.configs, size, FLOAT32, pages=pages, **how)


def begin(batch: PagedSlots, *completions: Completion) -> None:
    """Admit requests, and step until none of them waits."""
    for completion in completions:
        batch.admit(completion)
    while batch.waiting:
        batch.step()


def check_all_free(batch: PagedSlots) -> None:
    """Nothing is held once all requests are at their ends."""
    assert batch._pool.held == 0 and not batch._pages and batch.usage == 0


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("sizes", "memory", "share"),
    [
        ((2, 4), 1.5, True),
        pytest.param((1, 2, 3), 40, True, marks=pytest.mark.slow),
        pytest.param((1, 2, 5), 1.5, False, marks=pytest.mark.slow),
    ],
)
def test_every_answer_is_the_one_that_the_request_has_alone_in_slots_of_its_own(pair, small, sizes, memory, share):
    """Greedy and sampled rows of any settings; memory for 1.5 requests sets some aside, which changes nothing."""
    rng = np.random.default_rng(5)
    kinds = [
        Completion(Request(ids(int(rng.integers(1, 30)), i), replace(how, max_tokens=int(rng.integers(40, 50))), (i,)))
        for i, how in enumerate(MIX)
    ]
    longest = max(len(c.request.prompt) + c.request.params.max_tokens for c in kinds)
    expected, found = [result(alone(pair, c)) for c in kinds], [afresh(c) for c in kinds]
    queue = [found[i] for i in rng.permutation(len(found))]
    batch = paged(pair, sizes[-1], int(memory * longest), share=share, cycles=2, sizes=sizes)
    arriving(batch, [queue[i : i + 4] for i in range(0, len(queue), 4)])
    assert [result(c) for c in found] == expected
    assert (sum(c.preemptions for c in found) > 1) == (memory < 2)
    check_all_free(batch)


@pytest.mark.e2e
@pytest.mark.parametrize(
    "name",
    [
        "Domino and n-gram",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("tree", "n-gram", "assistant", "random", "Orthrus")),
    ],
)
def test_every_drafter_goes_on_from_pages_that_another_request_has_filled(pair, small, name):
    """Its state of what is not run again is what it would be; drafts and plain steps alternate meanwhile."""
    other = drafters(pair)[name]
    prompt = ids(50, 3)
    kinds = [Completion(Request([*prompt[:cut], *ids(5, cut)], SamplingParams(max_tokens=30))) for cut in (50, 41, 20)]
    expected = [alone(other, c) for c in kinds]
    batch = paged(other, 2, policy=FixedDrafts(other.configs.proposals))
    found = [afresh(c) for c in kinds]
    for c in found:
        list(batch.run([c]))
    assert [result(c) for c in found] == [result(c) for c in expected]
    assert [c.reused for c in found] == [0, 40, 16]
    assert [c.accepted for c in found] == [c.accepted for c in expected], "the drafter knows what it would know"
    mixed = paged(other, 2, policy=Changing(other.configs.proposals), cycles=3)
    again = [afresh(c) for c in kinds]
    arriving(mixed, [again])
    assert [result(c) for c in again] == [result(c) for c in expected]


def test_a_page_that_is_shared_is_never_written(pair, small):
    """What is in it when it is shared stays there, while all who hold it decode."""
    prompt, batch = ids(40, 1), paged(pair, 3, cycles=1)
    list(batch.run([Completion(Request(prompt, SamplingParams(max_tokens=2)))]))
    found = [Completion(Request([*prompt, *ids(3, i)], replace(HOT, max_tokens=25), (i,))) for i in range(3)]
    begin(batch, *found)
    shared = batch._pages[found[0]][:5]
    assert all(batch._pages[c][:5] == shared for c in found) and [c.reused for c in found] == [40] * 3

    def contents() -> list[np.ndarray]:
        held = [n for n in jax.tree.leaves(batch._state, is_leaf=is_paged) if is_paged(n)]
        assert len(held) == 2, "the target's pages and the drafter's"
        return [np.asarray(layer)[[0, *shared]] for node in held for layer in node.pages]

    before = contents()
    for _ in range(4):
        batch.step()
    assert batch.running
    for old, new in zip(before, contents(), strict=True):
        np.testing.assert_array_equal(old, new)
        assert not new[0].any() and new[1:].any(), "the page of rows without one stays zero"


def test_requests_that_run_at_the_same_time_share_their_prompts(pair, small):
    """A beginning is known as soon as it has run, not only when its request ends."""
    prompt, batch = ids(33, 2), paged(pair, 2, cycles=1)
    first, second = (Completion(Request([*prompt, n], SamplingParams(max_tokens=30))) for n in (4, 5))
    begin(batch, first)
    held = batch._pool.held
    begin(batch, second)
    assert batch.running == 2 and second.reused == 32
    assert batch._pool.held - held < held, "four pages are held once"
    batch.evict(first)
    batch.evict(second)
    check_all_free(batch)


def test_one_broken_row_harms_no_other_not_even_those_that_get_its_pages(pair, small):
    """NaN in a page would reach whoever has it next: attention multiplies what it does not see by zero."""
    poison, target = 250, jax.tree.map(lambda x: x, pair.params.target)
    target.embed = target.embed.at[poison].set(np.nan)
    other = Pair(pair.params._replace(target=target), pair.configs)
    healthy = [
        Completion(Request([t for t in ids(20, i) if t != poison], SamplingParams(max_tokens=12))) for i in (1, 2)
    ]
    expected = [result(alone(pair, c)) for c in healthy]
    batch = paged(other, 2, tokens=60, cycles=1)
    bad = Completion(Request([*ids(20, 9), poison], SamplingParams(max_tokens=30)))
    found = [afresh(c) for c in healthy]
    begin(batch, found[0], bad)
    assert not bad.finite and bad.finish_reason is None
    list(batch.run([found[1]]))
    while batch.busy:
        batch.step()
    assert [result(c) for c in found] == expected
    state = batch._state
    assert all(jnp.isfinite(x).all() for n in jax.tree.leaves(state, is_leaf=is_paged) if is_paged(n) for x in n.pages)
    again = afresh(bad)
    list(batch.run([again]))
    assert not again.finite and again.reused == 0, "what is broken is not shared"


@pytest.mark.parametrize(("size", "said"), [(3, "power of two"), (0, "power of two"), (256, "power of two")])
def test_sizes_of_pages_that_can_not_be_had_are_refused(pair, size, said):
    with pytest.raises(DominoError, match=said):
        PagedSlots(pair.params, pair.configs, 1, FLOAT32, pages=Pages(100, size))


def test_a_request_that_the_pages_can_never_hold_is_refused_with_the_numbers(pair, small):
    batch = paged(pair, 2, tokens=60)
    assert 60 <= batch.longest < 60 + 8
    with pytest.raises(DominoError, match=rf"30 tokens and {batch.longest} new ones .* pages for {batch.longest}"):
        batch.admit(Completion(Request(ids(30, 0), SamplingParams(max_tokens=batch.longest))))
    fits = Completion(Request(ids(30, 0), SamplingParams(max_tokens=batch.longest - 30)))
    assert result(fits) != result(alone(pair, fits)) and list(batch.run([fits])) == [fits]
    assert result(fits) == result(alone(pair, fits)) and fits.preemptions == 0
    with pytest.raises(DominoError, match="too few for any request"):
        PagedSlots(pair.params, pair.configs, 1, FLOAT32, pages=Pages(0, 8))


def test_an_interrupted_step_leaves_a_batch_that_goes_on(pair, small, monkeypatch):
    """What ran is lost with its caches; the pages are all free again, and known texts are forgotten."""
    batch = paged(pair, 2)
    first = Completion(Request(ids(20, 0), SamplingParams(max_tokens=20)))
    batch.admit(first)
    batch.step()

    def failing(*_: Any) -> Any:
        raise RuntimeError("the device")

    with monkeypatch.context() as patch:
        patch.setattr(batch, "_dispatch", failing)
        with pytest.raises(RuntimeError):
            batch.step()
    assert not batch.busy and not batch.holds(first)
    check_all_free(batch)
    again = afresh(first)
    list(batch.run([again]))
    assert again.reused == 0 and result(again) == result(alone(pair, again))


@pytest.mark.parametrize("seed", range(3))
def test_a_pool_never_gives_a_page_twice_and_finds_what_it_knows(seed):
    """Random texts of few tokens come and go; a plain list of what each page holds is kept beside."""
    rng, pool = np.random.default_rng(seed), PagePool(12, 4)
    texts: dict[int, tuple[list[int], list[int]]] = {}  # by number: text and pages
    content: dict[int, tuple[int, ...]] = {}  # by page: the text up to its end
    found = 0
    for number in range(400):
        if texts and (rng.random() < 0.4 or len(texts) > 4):
            text, pages = texts.pop(list(texts)[int(rng.integers(len(texts)))])
            pool.name(text, pages)
            pool.give(pages)
            continue
        text = rng.integers(0, 2, int(rng.integers(1, 16))).tolist()
        known = pool.find(text)
        found += len(known)
        for place, page in enumerate(known):
            assert content[page] == tuple(text[: 4 * (place + 1)])
        needed = pool.pages_for(len(text)) - len(known)
        if needed > pool.available:
            pool.give(known)
            continue
        new = pool.take(needed)
        held = {page for _, pages in texts.values() for page in pages} | set(known)
        assert len(set(new)) == len(new) and not held & set(new) and all(1 <= page <= 12 for page in new)
        for place, page in enumerate(new, len(known)):
            content[page] = tuple(text[: 4 * (place + 1)])
        texts[number] = text, known + new
        assert pool.held == len(held | set(new)) and pool.held + pool.available == 12
    assert found > 15
    for _, pages in texts.values():
        pool.give(pages)
    assert pool.held == 0


def test_pages_on_a_mesh_give_the_same_tokens(pair, small):
    """Heads over two devices; a mesh that divides the batch is refused."""
    kinds = requests([SamplingParams(), SamplingParams(), SamplingParams(0.8, seed=1)])
    expected = [result(alone(pair, c)) for c in kinds]
    mesh = sharding.make_mesh(1, 2)
    target, draft = (
        factory.place(weights, config, mesh)
        for weights, config in ((pair.params.target, pair.configs.target), (pair.params.draft, pair.configs.draft))
    )
    placed = Pair(pair.params._replace(target=target, draft=draft), pair.configs)
    with sharding.mesh_context(mesh):
        found = [afresh(c) for c in kinds]
        arriving(paged(placed, 2), [found])
    assert [result(c) for c in found] == expected
    with sharding.mesh_context(sharding.make_mesh(2, 1)), pytest.raises(DominoError, match="data=1"):
        paged(pair, 2)


def test_pages_are_planned_from_memory_rows_and_positions(pair):
    configs = pair.configs
    sizes = [(c.num_hidden_layers, c.num_key_value_heads, c.head_dim) for c in (configs.target, configs.draft)]
    values = sum(2 * layers * heads * width for layers, heads, width in sizes)
    assert decode.position_bytes(configs, FLOAT32) == 4 * values
    assert plan_pages(configs, FLOAT32, 1, 100, memory=1000 * 16 * 4 * values) == 999, "page 0 is memory too"
    most = plan_pages(configs, FLOAT32, 3, 100)
    assert most == 3 * -(-(100 + configs.lookahead) // 16), "no more than can be used"
    with pytest.raises(DominoError, match="too few for any request: give more --kv-memory"):
        plan_pages(configs, FLOAT32, 3, 100, memory=64 * values)


def test_what_a_drafter_needs_for_shared_beginnings(pair):
    assert all(decode.shares_prefixes(other.configs) for name, other in drafters(pair).items() if name != "one token")
