"""Decoding: the fused Domino cycle against transformers' greedy output, and the promises of its loop."""

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
import reference
from factory import Pair
from loops import NO_STOP, Output

from domino_jax import cache as kv
from domino_jax import decode, target
from domino_jax.decode import DecodeConfig, DecodeState, Emitted
from domino_jax.drafters import block
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.sampling import Sampling, settings
from domino_jax.weights import Params

TARGET = dataclasses.replace(factory.TARGET, num_hidden_layers=2)
PROMPTS = [[1, 2, 3], [40, 7] * 4, [11], [5, 28, 30, 44, 18, 88, 4, 33, 2, 24, 41, 82]]
COUNT = 24
good = partial(factory.good_pair, TARGET, 1, num_hidden_layers=1)


@pytest.fixture(scope="module")
def pair() -> Pair:
    """M = J = 5, P = 1: the pair most tests share, so that its programs compile once."""
    return good()


@pytest.fixture(scope="module")
def truth(pair) -> list[list[int]]:
    """transformers' greedy continuations, long enough for drafts beyond the last token."""
    model = factory.torch_model(pair.params.target, pair.configs.target)
    rows = [loops.hf_greedy(model, prompt, COUNT + 20) for prompt in PROMPTS]
    assert all(len(set(row)) > 10 for row in rows), "looping output would hide errors"
    return rows


def start(pair: Pair, limits: Any = COUNT, stop=NO_STOP, prompts=PROMPTS, **more: Any) -> DecodeState:
    """The prompts are run, and the first tokens are there."""
    return loops.begin(pair.params, pair.configs, prompts, limits, stop, **more)


def speculate(pair: Pair, state: DecodeState, greedy: bool = True) -> tuple[DecodeState, Emitted]:
    """One dispatch of at most 8 cycles."""
    return decode.speculate(pair.params, pair.configs, state, 8, greedy)


def run(pair: Pair, *args: Any, greedy: bool = True, **more: Any) -> list[Output]:
    return loops.speculate(pair.params, pair.configs, start(pair, *args, **more), greedy=greedy)


def cut(tokens: list[int], limit: int, stop: int) -> list[int]:
    """docs/algorithm.md, section 5: up to the first stop token, kept, or exactly `limit`."""
    tokens = tokens[:limit]
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens


# --- Greedy output is the target's own ------------------------------------------------------------------------

NARROW = DominoHead(0, 0, 0)  # P = 0; good_pair sets the widths
PAIRS = {
    "M=2": {"block_size": 2, "shift_label": False, "head": NARROW},
    "M=2, shifted": {"block_size": 2},
    "M=5": {"block_size": 5},
    "M=8, unshifted, its mask token generated": {
        "block_size": 8,
        "shift_label": False,
        "head": NARROW,
        "mask_token_id": 33,
    },
    "M=16": {"block_size": 16},
    "DFlash, M=3": {"block_size": 3, "shift_label": False, "head": None},
}


LARGER = {"M=2, shifted", "M=16"}  # between the others: what differs from them is a size


@pytest.mark.parametrize(
    "changes", [pytest.param(PAIRS[n], id=n, marks=[pytest.mark.slow] if n in LARGER else []) for n in PAIRS]
)
def test_domino_is_transformers_greedy_token_for_token(truth, changes):
    pair = good(**changes)
    config = pair.configs.draft
    assert config is not None
    outputs = run(pair)
    assert [o.tokens for o in outputs] == [row[:COUNT] for row in truth]
    # Cycle for cycle what the restatement accepts, the last one counted whole.
    weights = pair.reference()
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = reference.decode_greedy(*weights, prompt, COUNT, [])
        assert (output.tokens, output.accepted) == (expected["tokens"], expected["accepted"])
    seen = {m for o in outputs for m in o.accepted}
    assert seen >= {0, 1} if config.head else 0 in seen
    assert max(seen) >= min(config.num_proposals, 3) or not config.head, "a good drafter should be right now and then"
    if "mask_token_id" in changes:
        assert any(changes["mask_token_id"] in o.tokens[1:-1] for o in outputs)


@pytest.mark.parametrize("drafts", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_fewer_drafts_a_cycle(pair, truth, drafts):
    """The same tokens; from the same place, what is accepted is what a whole block's first drafts give."""
    fewer = Pair(pair.params, dataclasses.replace(pair.configs, drafts=drafts))
    outputs = run(fewer)
    assert [o.tokens for o in outputs] == [row[:COUNT] for row in truth]
    assert max(m for o in outputs for m in o.accepted) == drafts
    for output, whole in zip(outputs, run(pair), strict=True):
        assert output.accepted[0] == min(whole.accepted[0], drafts)


def test_a_random_drafter_changes_nothing():
    """Also on a target that is no bigram model, and with a sliding window in the drafter."""
    pair = Pair.make(factory.draft_config(block_size=6, shift_label=False, windows=(3, None)), seed=21)
    prompts = [[3, 1, 4, 1, 5], [9] * 11]
    model = factory.torch_model(pair.params.target, pair.configs.target)
    outputs = run(pair, COUNT, prompts=prompts)
    assert [o.tokens for o in outputs] == [loops.hf_greedy(model, p, COUNT) for p in prompts]
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.accepted == reference.decode_greedy(*pair.reference(), prompt, COUNT, [])["accepted"]


def test_the_lean_loop_is_transformers_greedy_too(pair, truth):
    for limit in (COUNT, [3, 1, 20, 9]):
        outputs = loops.autoregress(pair.params, pair.configs, start(pair, limit))
        limits = [limit] * 4 if isinstance(limit, int) else limit
        assert [o.tokens for o in outputs] == [row[:n] for row, n in zip(truth, limits, strict=True)]
        assert [o.accepted for o in outputs] == [[0] * (n - 1) for n in limits]
    stop = truth[1][6]
    outputs = loops.autoregress(pair.params, pair.configs, start(pair, stop=jnp.array([stop])))
    assert [o.tokens for o in outputs] == [cut(row, COUNT, stop) for row in truth]


# --- Every accepted length, stops and limits: an oracle drafter -------------------------------------------------


@pytest.fixture(scope="module")
def oracle(pair):
    """Runs greedy cycles with proposals read from a table of absolute positions."""

    def go(table: np.ndarray, limits: Any, stop: int, pair: Pair = pair) -> list[Output]:
        stops = jnp.array([stop], jnp.int32)
        configs = DecodeConfig(pair.configs.target, loops.TableDrafter(5))
        read = Pair(Params(pair.params.target, jnp.asarray(table)), configs)
        state = start(read, limits, stops)
        assert state.cache.capacity >= table.shape[1]
        return loops.speculate(read.params, configs, state)

    return go


def written(truth: list[list[int]], wrong: np.ndarray) -> np.ndarray:
    """The oracle's table: the truth by absolute position, another token where `wrong` [B, COUNT + 20]."""
    table = np.zeros((len(truth), 64), np.int32)
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, truth, strict=True)):
        spoiled = (np.array(tokens) + wrong[row]) % TARGET.vocab_size
        table[row, len(prompt) : len(prompt) + len(tokens)] = spoiled
    return table


def simulate(tokens: list[int], wrong: np.ndarray, proposals: int, limit: int, stop: int) -> Output:
    """What a row must give, from which of its drafts are wrong."""
    out = Output(cut(tokens[:1], 1, stop), [])
    while out.tokens[-1] != stop and len(out.tokens) < limit:
        at = len(out.tokens)
        m = 0
        while m < proposals and not wrong[at + m]:
            m += 1
        out.accepted.append(m)
        out.tokens.extend(cut(tokens[at : at + m + 1], limit - at, stop))
    return out


def test_every_accepted_length_stop_and_limit(oracle, truth):
    rng = np.random.default_rng(0)
    vocabulary = sorted({t for row in truth for t in row[:COUNT]})
    lengths, cut_inside, exact_limits = set(), 0, 0
    for trial in range(40):
        wrong = rng.random((4, COUNT + 20)) < rng.choice([0.05, 0.3, 0.6])
        limits = rng.integers(1, COUNT + 1, 4).tolist()
        stop = -1 if trial % 3 == 0 else int(rng.choice(vocabulary))
        outputs = oracle(written(truth, wrong), limits, stop)
        for row, output in enumerate(outputs):
            assert output == simulate(truth[row], wrong[row], 5, limits[row], stop), (trial, row, limits, stop)
            assert output.tokens == cut(truth[row], limits[row], stop)
            lengths |= set(output.accepted)
            whole = 1 + sum(m + 1 for m in output.accepted)
            exact_limits += len(output.tokens) == limits[row] < whole
            cut_inside += output.tokens[-1] == stop and len(output.tokens) < min(whole, limits[row])
    assert lengths == {0, 1, 2, 3, 4, 5}
    assert cut_inside > 10 and exact_limits > 10, "the cases this test is for did not come up"


@pytest.mark.parametrize("wrong, accepted", [(False, 5), (True, 0)], ids=["always right", "adversarial"])
def test_the_best_and_the_worst_drafter(oracle, truth, wrong, accepted):
    outputs = oracle(written(truth, np.full((4, COUNT + 20), wrong)), 19, -1)
    assert [o.tokens for o in outputs] == [row[:19] for row in truth]
    assert [o.accepted for o in outputs] == [[accepted] * (18 // (accepted + 1))] * 4


def test_a_first_token_that_is_a_stop_or_the_limit_ends_a_row_before_any_cycle(pair, truth):
    stop = truth[2][0]
    assert stop not in truth[0][:4]
    stops = jnp.array([stop], jnp.int32)
    state = start(pair, [4, 1, 9, 1], stops)
    assert state.done.tolist() == [False, True, True, True]
    outputs = loops.speculate(pair.params, pair.configs, state)
    assert [o.tokens for o in outputs] == [truth[0][:4], truth[1][:1], [stop], truth[3][:1]]
    assert [len(o.accepted) for o in outputs[1:]] == [0, 0, 0]
    state = start(pair, 1, stops)
    before = jax.device_get((state.token, state.length))
    state, emitted = speculate(pair, state)
    assert int(emitted.cycles) == 0
    np.testing.assert_array_equal(before, jax.device_get((state.token, state.length)))


def test_what_a_dispatch_emits(pair, truth):
    """Shapes, bytes, the drafts themselves, zeros for rows that are done and for cycles that did not run."""
    state, emitted = speculate(pair, start(pair, [3, COUNT, 1, COUNT]))
    emitted = jax.device_get(emitted)
    assert emitted.logprobs is None and emitted.confidence is None
    arrays = emitted[:-2]
    assert [x.shape for x in arrays] == [(), (8, 4, 6), (8, 4), (8, 4), (8, 4, 5), (8, 4)]
    assert all(x.dtype == np.int32 for x in arrays)
    assert (emitted.verified == np.where(np.arange(8) < emitted.cycles, 5, 0)[:, None]).all()
    assert (emitted.counts[:, 2] == 0).all() and emitted.counts[:, 0].sum() == 2
    for row, tokens in enumerate(truth):
        at = 1
        for i in range(int(emitted.cycles)):
            count, m = int(emitted.counts[i, row]), int(emitted.accepted[i, row])
            assert count <= m + 1
            assert emitted.tokens[i, row, :count].tolist() == tokens[at : at + count]
            if count:
                assert emitted.drafts[i, row, :m].tolist() == tokens[at : at + m]
                assert m == 5 or emitted.drafts[i, row, m] != tokens[at + m]
            at += count
        assert at == int(state.emitted[row]) == 1 + emitted.counts[:, row].sum()
        assert int(state.length[row]) == len(PROMPTS[row]) + at - 1
        assert int(state.token[row]) == tokens[at - 1]


def test_caches_hold_what_one_pass_over_the_committed_tokens_gives(pair, truth):
    """After eight cycles of accepting and rejecting: target and context keys and values of positions 0 ... a - 1."""
    assert pair.params.draft is not None and pair.configs.draft is not None
    state, _ = speculate(pair, start(pair, 40))
    tokens = np.zeros((4, 64), np.int32)
    for row, (prompt, new) in enumerate(zip(PROMPTS, truth, strict=True)):
        tokens[row, : len(prompt) + len(new)] = prompt + new

    @jax.jit
    def once(params):
        zero = jnp.zeros(4, jnp.int32)
        empty = kv.init_cache(pair.configs.target, 4, 64, jnp.float32)
        target_layer_ids = pair.configs.draft.target_layer_ids
        ids = jnp.asarray(tokens)
        _, features, cache = target.forward(params.target, pair.configs.target, ids, zero, empty, target_layer_ids)
        empty = kv.init_cache(pair.configs.draft, 4, 64, jnp.float32)
        return cache, block.append_context(params.draft, pair.configs.draft, empty, features, zero)

    for name, ours, theirs in zip(("target", "drafter"), (state.cache, state.drafter), once(pair.params), strict=True):
        for a, b in zip(jax.device_get(jax.tree.leaves(ours)), jax.device_get(jax.tree.leaves(theirs)), strict=True):
            for row, length in enumerate(state.length.tolist()):
                assert length > len(PROMPTS[row]) + 7
                np.testing.assert_allclose(a[row, :, :length], b[row, :, :length], atol=1e-4, rtol=0, err_msg=name)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_output_does_not_depend_on_the_drafts(oracle, pair, dtype):
    """Whatever is proposed, right, wrong or mixed, the same program gives the same tokens, in bfloat16 too."""
    exact = Pair(jax.tree.map(lambda w: w.astype(dtype), pair.params), pair.configs)
    nothing = np.full((4, COUNT + 20), -1)  # no id of the vocabulary: what none would propose

    def go(proposed: np.ndarray) -> list[Output]:
        table = np.zeros((len(PROMPTS), 64), np.int32)
        for row, prompt in enumerate(PROMPTS):
            table[row, len(prompt) : len(prompt) + proposed.shape[1]] = proposed[row]
        return oracle(table, COUNT, -1, exact)

    alone = go(nothing)
    assert all(o.accepted == [0] * (COUNT - 1) for o in alone)
    tokens = np.array([o.tokens for o in alone])
    right = go(np.pad(tokens, ((0, 0), (0, 20))))
    rng = np.random.default_rng(0)
    mixed = [go(np.pad(np.where(rng.random(tokens.shape) < 0.6, tokens, 7), ((0, 0), (0, 20)))) for _ in range(5)]
    assert all(o.accepted[:-1] == [5] * (len(o.accepted) - 1) for o in right)
    assert {m for outputs in mixed for o in outputs for m in o.accepted} >= {0, 1, 2, 3}
    for outputs in (right, *mixed, run(exact)):
        assert [o.tokens for o in outputs] == tokens.tolist()


# --- Buckets, neighbours, programs --------------------------------------------------------------------------------


def test_growing_holds_one_cache_and_one_buffer_more(pair: Pair, monkeypatch):
    """Each buffer is deleted before the next one is resized."""
    state = loops.begin(pair.params, pair.configs, PROMPTS, COUNT)
    old, resized, alive = jax.tree.leaves((state.cache, state.drafter)), decode._resized, []

    def noted(buffer: jax.Array, capacity: int, axis: int) -> jax.Array:
        alive.append(sum(not b.is_deleted() for b in old))
        return resized(buffer, capacity, axis)

    monkeypatch.setattr(decode, "_resized", noted)
    grown = decode.grow_caches(pair.configs, state, 2 * state.cache.capacity)
    assert alive == list(range(len(old), 0, -1)) and all(b.is_deleted() for b in old)
    assert grown.cache.capacity == 2 * state.cache.capacity
    assert grown.drafter.capacity == grown.cache.capacity


def test_growing_the_bucket_in_mid_generation_changes_nothing(pair: Pair, truth, monkeypatch):
    """A dispatch ends by itself where the bucket is full, before anything is written beyond it."""
    monkeypatch.setattr(kv, "SMALLEST_BUCKET", 32)
    state = start(pair, COUNT + 6)
    seen = []

    def dispatch(state: DecodeState) -> tuple[DecodeState, Emitted]:
        capacity = state.cache.capacity
        state, emitted = decode.speculate(pair.params, pair.configs, state, 40, True)
        assert int(state.length.max()) <= capacity
        seen.append((capacity, int(emitted.cycles) < 40, bool(state.done.all())))
        return state, emitted

    outputs = loops.finish(pair.configs, state, dispatch)
    assert seen == [(32, True, False), (64, True, True)]
    assert [o.tokens for o in outputs] == [row[: COUNT + 6] for row in truth]
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.accepted == reference.decode_greedy(*pair.reference(), prompt, COUNT + 6, [])["accepted"]


MIXED = Sampling(
    temperature=jnp.array([1.0, 0.7, 0.0, 1.3], jnp.float32),
    top_k=jnp.array([0, 20, 0, 0], jnp.int32),
    top_p=jnp.array([1.0, 0.9, 1.0, 1.0], jnp.float32),
    min_p=jnp.array([0.0, 0.0, 0.0, 0.02], jnp.float32),
)


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
def test_a_row_does_not_change_when_its_neighbours_do(pair, truth, greedy):
    """Bit for bit: same tokens, same accepted counts, same cache, whatever the other rows are."""
    keys = jax.random.split(jax.random.key(3), 4)
    sampling = None if greedy else MIXED

    def dispatch(prompts: list[list[int]], limits: list[int], keys, sampling) -> tuple[DecodeState, Emitted]:
        state = start(pair, limits, prompts=prompts, keys=keys, sampling=sampling)
        return jax.device_get(speculate(pair, state, greedy=greedy))

    first, emitted = dispatch(PROMPTS, [40] * 4, keys, sampling)
    assert emitted.accepted.max() > 1
    for row in range(4):
        order = [(row + 1) % 4, row]  # the row under test keeps its place and key; the others are mixed up
        prompts = [PROMPTS[row] if i == row else [7 + i] * (3 * i + 1) for i in range(4)]
        others = jnp.array([i if i == row else order[0] for i in range(4)])
        mixed = None if sampling is None else Sampling(*(x[others] for x in sampling))
        limits = [40 if i == row else 1 + 3 * i for i in range(4)]
        state, again = dispatch(prompts, limits, keys[others], mixed)
        for name in ("tokens", "counts", "accepted", "drafts"):
            np.testing.assert_array_equal(getattr(emitted, name)[:, row], getattr(again, name)[:, row], err_msg=name)
        assert (again.counts[:, row] > 0).all()
        length = int(first.length[row])
        for a, b in zip(jax.tree.leaves(first.cache), jax.tree.leaves(state.cache), strict=True):
            np.testing.assert_array_equal(a[row, :, :length], b[row, :, :length])


def test_sampled_rows_follow_their_keys_and_greedy_rows_among_them_stay_greedy(pair, truth):
    def tokens(seed: int) -> list[list[int]]:
        keys = jax.random.split(jax.random.key(seed), 4)
        return [o.tokens for o in run(pair, COUNT, sampling=MIXED, keys=keys, greedy=False)]

    first, again, other = tokens(1), tokens(1), tokens(2)
    assert first == again
    assert first[2] == other[2] == truth[2][:COUNT]  # temperature 0
    for row in (0, 1, 3):
        assert first[row] != other[row] and first[row] != truth[row][:COUNT]
        assert len(first[row]) == COUNT


def test_nothing_compiles_and_only_the_small_result_crosses_after_warm_up(pair, truth):
    def whole_run(prompts: list[list[int]], limits: list[int], stop: int) -> list[int]:
        stops = jnp.asarray(np.array([stop], np.int32))
        state = start(pair, limits, stops, prompts, sampling=sampling, keys=keys)
        sizes, done = [], False
        while not done:
            with jax.transfer_guard("disallow"):  # explicit transfers only: the one device_get
                old = state.cache.layer(0)[0]
                state, emitted = speculate(pair, state)
                fetched, done = jax.device_get((emitted, state.done))
                done = bool(done.all())
            assert old.is_deleted(), "the state is donated"
            sizes.append(sum(x.nbytes for x in jax.tree.leaves(fetched)))
        return sizes

    sampling, keys = settings(4), jax.random.split(jax.random.key(0), 4)
    with loops.compilations() as seen:
        jax.jit(lambda x: x + 1)(np.arange(3))
    assert seen, "the counter must see a compilation"
    whole_run(PROMPTS, [COUNT] * 4, -1)
    with loops.compilations() as seen:
        sizes = whole_run([[9] * 16, [1, 2], [3] * 7, [88]], [40, 1, 17, 33], truth[0][5])
        sizes += whole_run(PROMPTS[::-1], [90] * 4, -1)
    assert not seen
    assert len(sizes) > 3
    assert set(sizes) == {4 * (1 + 8 * 4 * (6 + 1 + 1 + 5 + 1))}  # 1796 bytes for up to 8 cycles of 4 rows

    # On CPU the guard can't see a transfer to the host, so the program itself must hold none.
    program: Any = decode.speculate
    text = program.lower(pair.params, pair.configs, start(pair), 8, True).as_text()
    assert "while" in text
    assert not [word for word in ("callback", "infeed", "outfeed", "send", "recv") if word in text]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA for CPUs makes of it")
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("loop", [decode.speculate, decode.autoregress], ids=["cycles", "steps"])
def test_no_cycle_copies_a_cache(pair, loop: Any, rows):
    """Else its cost would follow the bucket, in steps of one row five times over."""
    state = start(pair, [COUNT] * rows, prompts=PROMPTS[:rows])
    text = loop.lower(pair.params, pair.configs, state, 8, True).compile().as_text()
    copied = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", text)
    assert " while(" in text and copied, "this is how they are written"
    caches = {buffer.shape for buffer in jax.tree.leaves((state.cache, state.drafter))}
    sizes = {(rows * heads, *rest) for rows, heads, *rest in caches} | caches
    assert not sizes & {tuple(map(int, shape.split(","))) for shape in copied}


def test_single_steps_of_one_row_to_the_very_end_of_a_bucket(pair, truth, monkeypatch):
    monkeypatch.setattr(kv, "SMALLEST_BUCKET", 32)
    lean = Pair(pair.params.without_drafter, pair.configs.without_drafter)
    state = start(lean, COUNT + 6, prompts=PROMPTS[:1])
    ends = []

    def dispatch(state: DecodeState) -> tuple[DecodeState, Emitted]:
        state, emitted = decode.autoregress(lean.params, lean.configs, state, 40, True)
        ends.append((int(state.length[0]), state.cache.capacity))
        return state, emitted

    (output,) = loops.finish(lean.configs, state, dispatch)
    assert output.tokens == truth[0][: COUNT + 6]
    assert ends[0] == (31, 32) and len(ends) == 2


# --- Other forms of attention ---------------------------------------------------------------------------------


def test_the_pallas_kernel_gives_the_same_tokens(pair, truth):
    """In float32, interpreted: token for token what transformers gives, by cycles and by single steps."""
    other = Pair(pair.params, dataclasses.replace(pair.configs, attention="pallas"))
    assert [o.tokens for o in run(other)] == [row[:COUNT] for row in truth]
    lean = loops.autoregress(other.params, other.configs, start(other))
    assert [o.tokens for o in lean] == [row[:COUNT] for row in truth]


@pytest.mark.slow
def test_the_pallas_kernel_knows_a_drafters_window():
    drafter = factory.draft_config(block_size=6, shift_label=False, windows=(3, None))
    pair = Pair.make(drafter, seed=21)
    other = Pair(pair.params, dataclasses.replace(pair.configs, attention="pallas"))
    prompts = [[3, 1, 4, 1, 5], [9] * 11]
    assert run(other, COUNT, prompts=prompts) == run(pair, COUNT, prompts=prompts)
