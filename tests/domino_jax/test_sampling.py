"""Sampling: the filters against transformers', verification against brute force, Domino's output against the target."""

import dataclasses
import itertools
from typing import Any

import factory
import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
import reference
import scipy.stats
import torch
from factory import Pair
from loops import NO_STOP
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from domino_jax import cache as kv
from domino_jax import decode, sampling, verify
from domino_jax.decode import DecodeConfig
from domino_jax.drafters.assistant import AssistantDrafter
from domino_jax.drafters.base import Drafter
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.combined import CombinedDrafter
from domino_jax.drafters.convolution import Convolution
from domino_jax.drafters.dual_view import DualViewConfig, DualViewDrafter
from domino_jax.drafters.heads import choosing
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.drafters.heads.markov import MarkovHead
from domino_jax.drafters.heads.selector import SelectorHead
from domino_jax.drafters.ngram import NgramDrafter
from domino_jax.drafters.tree import TreeDrafter
from domino_jax.drafters.view_tree import DualViewTreeDrafter
from domino_jax.sampling import Sampling, SamplingParams, mass_above_reaches, probabilities, sample, settings
from domino_jax.weights import Params

jitted_probabilities = jax.jit(probabilities)

# temperature, top-k, top-p, min-p: every filter alone, together, and at its ends.
SETTINGS = [
    (0.0, 0, 1.0, 0.0),
    (0.0, 5, 0.5, 0.3),
    (1.0, 0, 1.0, 0.0),
    (0.6, 0, 1.0, 0.0),
    (1.9, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 7, 1.0, 0.0),
    (1.0, 1000, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.0, 0, 0.5, 0.0),
    (1.0, 0, 0.001, 0.0),
    (1.0, 0, 1.0, 0.05),
    (1.0, 0, 1.0, 1.0),
    (0.7, 20, 0.8, 0.0),
    (1.4, 12, 0.95, 0.04),
    (1.4, 3, 0.5, 0.2),
]


def rows(chosen: list[tuple[float, int, float, float]]) -> Sampling:
    temperature, top_k, top_p, min_p = zip(*chosen, strict=True)
    return Sampling(*(jnp.asarray(np.array(x, t)) for x, t in zip(
        (temperature, top_k, top_p, min_p), (np.float32, np.int32, np.float32, np.float32), strict=True
    )))  # fmt: skip


def transformers_probabilities(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float):
    """[T, V] -> [T, V] by transformers' own warpers, in the order of its `generate`."""
    scores: Any = torch.from_numpy(logits.copy())
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        scores = warper(None, scores)  # type: ignore[arg-type]
    return scores.softmax(-1).numpy()


def test_filters_are_transformers_with_rows_of_all_settings_in_one_batch():
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(len(SETTINGS), 6, 50)) * 2.5).astype(np.float32)
    ours = np.asarray(jitted_probabilities(logits, rows(SETTINGS)))
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours.sum(-1), 1, atol=1e-6)
    kept = set()
    for row, chosen in enumerate(SETTINGS):
        for t in range(6):
            again = reference.filtered_probabilities(logits[row, t], *chosen)
            np.testing.assert_allclose(ours[row, t], again, atol=1e-6, err_msg=str(chosen))
            np.testing.assert_array_equal(ours[row, t] > 0, again > 0)
            kept.add(int((again > 0).sum()))
        if chosen[0] > 0:
            theirs = transformers_probabilities(logits[row], *chosen)
            np.testing.assert_allclose(ours[row], theirs, atol=1e-6, err_msg=str(chosen))
            np.testing.assert_array_equal(ours[row] > 0, theirs > 0)
        else:
            np.testing.assert_array_equal(ours[row], np.eye(50)[logits[row].argmax(-1)])
    assert len(kept) > 8, "the filters should cut at many places"


def test_filters_do_not_depend_on_what_other_rows_ask_for():
    logits = np.random.default_rng(1).normal(size=(len(SETTINGS), 2, 50)).astype(np.float32) * 3
    together = np.asarray(jitted_probabilities(logits, rows(SETTINGS)))
    for row, chosen in enumerate(SETTINGS):
        alone = np.asarray(jitted_probabilities(np.repeat(logits[row : row + 1], 16, 0), rows([chosen] * 16)))
        np.testing.assert_array_equal(together[row], alone[3], err_msg=str(chosen))


def test_ties():
    """Argmax goes to the lowest id; top-k keeps what ties with the k-th, as transformers does."""
    logits = np.array([[[1.0, 3.0, 3.0, 0.0, 1.0]]] * 2, np.float32)
    greedy, top = np.asarray(probabilities(jnp.asarray(logits), rows([(0.0, 0, 1.0, 0.0), (1.0, 3, 1.0, 0.0)])))[:, 0]
    assert greedy.tolist() == [0, 1, 0, 0, 0]
    np.testing.assert_allclose(top, transformers_probabilities(logits[0], 1.0, 3, 1.0, 0.0)[0], atol=1e-6)
    assert (top > 0).tolist() == [True, True, True, False, True]


def test_what_outweighs_a_score_is_what_a_sort_says():
    """Over the whole range of floats, with ties, zeros of both signs and minus infinity."""
    rng = np.random.default_rng(0)
    scores = (rng.normal(size=(40, 2, 64)) * 10.0 ** rng.integers(-30, 30, (40, 2, 1))).astype(np.float32)
    scores[:10] = rng.integers(-3, 3, (10, 2, 64))
    scores[3, :, ::2], scores[4, :, ::2], scores[5] = -0.0, -np.inf, -7
    weights = rng.integers(0, 5, scores.shape).astype(np.float32)
    limits = rng.integers(1, 140, (40, 1, 1)).astype(np.float32)
    limits[6:8] = np.inf
    found = jax.jit(mass_above_reaches)(scores, weights, limits)
    above = np.where(scores[..., None, :] > scores[..., :, None], weights[..., None, :], 0).sum(axis=-1)
    np.testing.assert_array_equal(found, above >= limits)
    assert 0.2 < np.mean(found) < 0.8


def test_greedy_verification_is_the_loop_written_out():
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 3, (300, 5, 3)).astype(np.float32)  # ties abound: the lowest id wins
    drafts = rng.integers(0, 3, (300, 4)).astype(np.int32)
    drafts[:100] = logits[:100, :4].argmax(-1)
    counts, bonus = (np.asarray(x) for x in verify.accept_greedy(jnp.asarray(drafts), jnp.asarray(logits)))
    assert counts.dtype == bonus.dtype == np.int32
    for row in range(300):
        m = 0
        while m < 4 and drafts[row, m] == logits[row, m].argmax():
            m += 1
        assert (counts[row], bonus[row]) == (m, logits[row, m].argmax())
    assert set(counts.tolist()) == {0, 1, 2, 3, 4}


def p_value(samples: np.ndarray, exact: np.ndarray) -> float:
    """Pearson's chi-square test of samples [n, tokens] against the exact joint distribution [V, V, ...]."""
    expected = len(samples) * exact.ravel()
    counts = np.bincount(np.ravel_multi_index(tuple(samples.T), exact.shape), minlength=exact.size)
    if counts[expected == 0].any():
        return 0.0  # something impossible came out
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    assert len(counts) > 2
    return float(scipy.stats.chisquare(counts, expected * (counts.sum() / expected.sum())).pvalue)


RIGHT, WRONG = 1e-3, 1e-9  # a right sampler passes (the keys are fixed); a wrong one must miss by far
V = 6


@pytest.mark.e2e
def test_draw_follows_the_weights():
    weights = np.array([0.0, 1, 2, 0, 4, 3], np.float32)
    drawn = sample(jax.random.split(jax.random.key(0), 20000), jnp.broadcast_to(weights, (20000, 6)))
    assert p_value(np.asarray(drawn)[:, None], weights / 10) > RIGHT


@pytest.mark.e2e
def test_speculative_verification_is_leviathans():
    """Two drafts from q, V = 6: acceptance rates Σ min(p, q), each output token distributed as p."""
    rng = np.random.default_rng(5)
    n = 20000
    p, q = rng.dirichlet(np.ones(V), 3), rng.dirichlet(np.ones(V), 2)
    p[1, 2] = 0  # the target can't, the drafter can
    q[0, 4] = 0  # and the other way round
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    drafts = np.stack([rng.choice(V, n, p=q[j]) for j in range(2)], axis=1).astype(np.int32)
    counts, bonus = (
        np.asarray(x)
        for x in jax.jit(verify.accept_sampled)(
            jax.random.split(jax.random.key(1), (n, 3)),
            drafts,
            np.broadcast_to(q, (n, 2, V)).astype(np.float32),
            np.broadcast_to(p, (n, 3, V)).astype(np.float32),
        )
    )
    rates = np.minimum(p[:2], q).sum(-1)
    assert (rates > 0.2).all() and (rates < 0.8).all()
    for j in range(2):
        reached = counts >= j
        accepted = int((counts > j).sum())
        assert scipy.stats.binomtest(accepted, int(reached.sum()), rates[j]).pvalue > RIGHT
    out = np.concatenate([drafts, np.zeros((n, 1), np.int32)], axis=1)
    out[np.arange(n), counts] = bonus
    for j in range(3):
        assert p_value(out[counts >= j, j : j + 1], p[j]) > RIGHT
    # After a rejection the next token is drawn from the residual, and where nothing was left of it, from p.
    for j in range(2):
        assert p_value(bonus[counts == j, None], reference.residual(p[j], q[j])) > RIGHT
    twice = np.array([[0, 0.5, 0.5]], np.float32)
    counts, bonus = verify.accept_sampled(
        jax.random.split(jax.random.key(1), (500, 2)),
        jnp.zeros((500, 1), jnp.int32),
        jnp.broadcast_to(jnp.array([0.25, 0.5, 0.5]), (500, 1, 3)),
        jnp.broadcast_to(jnp.asarray(np.repeat(twice, 2, 0)), (500, 2, 3)),
    )
    assert not np.asarray(counts).any()
    assert set(np.asarray(bonus).tolist()) == {1, 2}


@pytest.mark.e2e
def test_a_drafter_that_computes_nonsense_changes_no_distribution():
    """Its probabilities are not numbers: nothing is accepted, and the next token is the target's own."""
    p = jnp.broadcast_to(jnp.array([0, 0.5, 0.5, 0]), (400, 2, 4))
    keys = jax.random.split(jax.random.key(2), (400, 2))
    counts, bonus = verify.accept_sampled(keys, jnp.zeros((400, 1), jnp.int32), jnp.full((400, 1, 4), jnp.nan), p)
    assert not np.asarray(counts).any()
    assert set(np.asarray(bonus).tolist()) == {1, 2}


# --- The whole of it: tokens of sampled Domino are distributed as the target's --------------------------------------

PROMPT = [2, 0, 5]
HALF = 8192  # rows of each setting; the two settings share one batch and one program
FILTERS = [(1.0, 0, 1.0, 0.0), (0.7, 0, 0.85, 0.0)]
TARGET = dataclasses.replace(
    factory.TARGET,
    vocab_size=V,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    intermediate_size=8,
)
DRAFTERS = {
    "Domino": {"block_size": 3, "head": DominoHead(5, 4, 1)},
    "DFlash": {"block_size": 4, "shift_label": False, "head": None},
    "DFlash 2": {"block_size": 4, "shift_label": False, "head": SelectorHead(4, 3), "convolution": Convolution(2, 4)},
    "reduced": {"block_size": 3, "head": DominoHead(5, 4, 1), "draft_vocab_size": 4},
    "DSpark": {"block_size": 3, "head": MarkovHead(4, "rnn", enable_confidence_head=True)},
}
OTHERS = ("n-gram", "assistant", "Domino and n-gram", "tree", "tree without a head")
EARLY = tuple(f"{name}, ended early" for name in DRAFTERS)
OTHERS += EARLY
VIEWS = ("Orthrus", "Orthrus, drawn", "Orthrus, tree", "Orthrus, head")
OTHERS += (*VIEWS, "DFlash 2, tree", "reduced, tree")
THRESHOLDS = dict.fromkeys(EARLY, 0.3)
RARE = (
    *VIEWS,
    "DFlash",
    "DFlash 2",
    "DFlash 2, tree",
    "DSpark",
    "DFlash, ended early",
    "DFlash 2, ended early",
    "reduced",
    "reduced, tree",
    "reduced, ended early",
    "DSpark, ended early",
    "Domino and n-gram",
    "tree",
    "tree without a head",
)
VIEW = DualViewConfig(**TARGET.geometry(), block_size=4, mask_token_id=5)
HEADED = dataclasses.replace(VIEW, head=DominoHead(5, 4, 1))
LOOKUP = NgramDrafter(3, 2, 1)  # of seven tokens one is often there already


@pytest.fixture(scope="module")
def exact() -> list[np.ndarray]:
    """The target's own joint distribution of the first three tokens, by enumeration, for each of FILTERS."""
    params = factory.random_weights(TARGET, 11)
    weights, config = factory.hf_weights(params, TARGET), TARGET.to_hf()

    def following(prefix: tuple[int, ...], chosen: Any) -> np.ndarray:
        logits, _ = reference.target_forward(weights, config, [*PROMPT, *prefix], [])
        return reference.filtered_probabilities(logits[-1], *chosen)

    joints = []
    for chosen in FILTERS:
        joint = np.zeros((V, V, V))
        for x, y in itertools.product(range(V), repeat=2):
            joint[x, y] = following((), chosen)[x] * following((x,), chosen)[y] * following((x, y), chosen)
        assert abs(joint.sum() - 1) < 1e-9
        joints.append(joint)
    assert (joints[0] > 0).all() and (joints[1] == 0).any(), "the filters should forbid something"
    return joints


def make(drafter: str) -> Pair:
    if drafter == "tree without a head":
        plain = make("DFlash")
        assert plain.configs.draft is not None
        return plain._replace(configs=DecodeConfig(TARGET, TreeDrafter(plain.configs.draft, nodes=4)))
    if drafter in EARLY:
        whole = make(drafter.removesuffix(", ended early"))
        config = whole.configs.draft
        assert config is not None
        config = dataclasses.replace(config, confidence_temperatures=(2.0, 0.5, 1.5)[: config.num_proposals])
        early = BlockDrafter(config, confidence_threshold=THRESHOLDS[drafter])
        return whole._replace(configs=DecodeConfig(TARGET, early))
    if drafter in OTHERS:
        domino = make("Domino")
        assert domino.configs.drafter is not None and domino.configs.draft is not None
        dflash2, reduced = make("DFlash 2"), make("reduced")
        assert dflash2.configs.draft is not None and reduced.configs.draft is not None
        made: dict[str, tuple[Drafter, Any]] = {
            "DFlash 2, tree": (TreeDrafter(dflash2.configs.draft, nodes=5), dflash2.params.draft),
            "reduced, tree": (TreeDrafter(reduced.configs.draft, nodes=5), reduced.params.draft),
            "tree": (TreeDrafter(domino.configs.draft, nodes=5), domino.params.draft),
            "n-gram": (LOOKUP, None),
            "Orthrus": (DualViewDrafter(VIEW), factory.random_weights(VIEW, 13)),
            "Orthrus, drawn": (DualViewDrafter(VIEW, drawn=True), factory.random_weights(VIEW, 13)),
            "Orthrus, tree": (DualViewTreeDrafter(VIEW, nodes=5), factory.random_weights(VIEW, 13)),
            "Orthrus, head": (DualViewDrafter(HEADED), factory.random_weights(HEADED, 13)),
            "assistant": (AssistantDrafter(TARGET, 3), factory.random_weights(TARGET, 12)),
            "Domino and n-gram": (CombinedDrafter(domino.configs.drafter, LOOKUP), domino.params.draft),
        }
        other, weights = made[drafter]
        return Pair(Params(domino.params.target, weights), DecodeConfig(TARGET, other))
    pair = Pair.make(
        factory.draft_config(TARGET, num_hidden_layers=1, target_layer_ids=(0,), **DRAFTERS[drafter]), TARGET
    )
    return pair._replace(params=pair.params._replace(target=factory.random_weights(TARGET, 11)))


def sample_rows(
    pair: Pair, loop: Any, seed: int = 0, coupled: bool = False, half: int = HALF
) -> tuple[list[np.ndarray], float]:
    """Three tokens of 2 · `half` rows, each with a key of its own; and the share of drafts accepted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv, "SMALLEST_BUCKET", 16)  # only the memory of so many rows
        batch = 2 * half
        keys = jax.random.split(jax.random.key(seed), batch)
        chosen = [FILTERS[0]] * half + [FILTERS[1]] * half
        state = loops.begin(
            pair.params, pair.configs, [PROMPT] * batch, 4, NO_STOP, rows(chosen), keys, [coupled] * batch
        )
        outputs = loops.finish(pair.configs, state, lambda s: loop(pair.params, pair.configs, s, 4, False))
    tokens = np.array([o.tokens for o in outputs])
    assert tokens.shape == (batch, 4)
    accepted = [m for o in outputs for m in o.accepted]
    return [tokens[:half, :3], tokens[half:, :3]], float(np.mean(accepted))


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("drafter", "coupled"),
    [
        *(
            pytest.param(name, False, id=f"{name}, rejection", marks=[pytest.mark.slow] if name in RARE else [])
            for name in (*DRAFTERS, *OTHERS)
        ),
        pytest.param("Domino", True, id="Domino, coupled"),
        pytest.param("a small tree", False, id="tree of fewer rows"),
        *(pytest.param(name, True, id=f"{name}, coupled", marks=pytest.mark.slow) for name in ("DFlash", *OTHERS)),
    ],
)
def test_sampled_output_is_distributed_as_the_targets(exact, drafter, coupled):
    few = drafter == "a small tree"  # the suite's time is short, and rows with trees are slow
    drafter, half = ("tree", HALF // 4) if few else (drafter, HALF)
    samples, accepted = sample_rows(make(drafter), decode.speculate, coupled=coupled, half=half)
    least = 0.05 if drafter == "n-gram" else 0.2  # a text of three tokens seldom repeats itself
    assert least < accepted < 2, "drafts must be accepted and rejected for this to mean anything"
    for chosen, tokens, joint in zip(FILTERS, samples, exact, strict=True):
        assert p_value(tokens, joint) > RIGHT, chosen


@pytest.mark.e2e
@pytest.mark.parametrize("coupled", [False, True], ids=["rejection", "coupled"])
def test_rows_that_verify_unequal_numbers_of_drafts_are_too(exact, coupled):
    """None, one and two of each row's drafts; a draft that is not verified must not shift what is drawn after it."""
    lengths = jnp.arange(2 * HALF, dtype=jnp.int32) % 3
    total = int(lengths.sum()) + 2 * HALF

    def loop(params: Params, configs: DecodeConfig, state: Any, cycles: int, greedy: bool) -> Any:
        configs = dataclasses.replace(configs, verified=total)
        return decode.speculate(params, configs, state, cycles, greedy, lengths=lengths)

    samples, accepted = sample_rows(make("Domino"), loop, coupled=coupled)
    assert 0.1 < accepted < 1.5
    for chosen, tokens, joint in zip(FILTERS, samples, exact, strict=True):
        assert p_value(tokens, joint) > RIGHT, chosen


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("coupled", [False, True], ids=["rejection", "coupled"])
def test_rows_that_share_a_budget_by_confidence_are_too(exact, coupled):
    def loop(params: Params, configs: DecodeConfig, state: Any, cycles: int, greedy: bool) -> Any:
        configs = dataclasses.replace(configs, verified=5 * HALF, by_confidence=True)  # three drafts of two rows
        most = jnp.full(2 * HALF, configs.proposals, jnp.int32)
        return decode.speculate(params, configs, state, cycles, greedy, lengths=most)

    samples, accepted = sample_rows(make("Domino"), loop, coupled=coupled)
    assert 0.1 < accepted < 1.5
    for chosen, tokens, joint in zip(FILTERS, samples, exact, strict=True):
        assert p_value(tokens, joint) > RIGHT, chosen


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("coupled", [False, True], ids=["rejection", "coupled"])
def test_a_hundred_thousand_draws_are_distributed_as_the_targets(exact, coupled):
    found = [sample_rows(make("Domino"), decode.speculate, seed, coupled)[0] for seed in range(13)]
    for chosen, tokens, joint in zip(FILTERS, zip(*found, strict=True), exact, strict=True):
        draws = np.concatenate(tokens)
        assert len(draws) > 100_000
        assert p_value(draws, joint) > RIGHT, chosen


@pytest.mark.e2e
def test_the_lean_loops_samples_are_too(exact):
    samples, _ = sample_rows(make("Domino"), decode.autoregress)
    for chosen, tokens, joint in zip(FILTERS, samples, exact, strict=True):
        assert p_value(tokens, joint) > RIGHT, chosen
    assert p_value(samples[0], exact[1]) < WRONG and p_value(samples[1], exact[0]) < WRONG


def wrong_residual(keys, drafts, q, p, lengths=None):
    """Draws from p after a rejection, instead of from what q left of it."""
    count, _ = verify_speculative(keys, drafts, q, p)
    keys = jax.vmap(lambda keys, m: jax.random.fold_in(keys[m], 1))(keys, count)
    return count, sample(keys, jnp.take_along_axis(p, count[:, None, None], axis=1)[:, 0])


def wrong_acceptance(keys, drafts, q, p, lengths=None):
    """Accepts with probability p(d), without dividing by q(d)."""
    return verify_speculative(keys, drafts, jnp.where(q > 0, jnp.maximum(q, 0.999), q), p)


verify_speculative = verify.accept_sampled


def wrong_draw(keys, weights):
    """Proposes the argmax while claiming to have drawn from q."""
    return jnp.argmax(weights, axis=-1).astype(jnp.int32)


def wrong_coupling(keys, drafts, p, lengths=None):
    """Accepts a draft that is likelier than most, whatever the target draws."""
    count, token = couple(keys, drafts, p)
    likely = sampling.pick(p[:, :-1], drafts) > 1 / V
    return jnp.maximum(count, verify.prefix_length(likely)), token


couple = verify.accept_coupled


def wrong_confidence(*given):
    """Is as sure of a proposal as its own probability says: then what is verified depends on what was drawn."""
    draft = choose_along(*given)
    assert draft.probs is not None
    own = sampling.pick(draft.probs, draft.tokens)
    return draft._replace(confidence=jnp.log(own) - jnp.log1p(-own))


choose_along = choosing.chosen_along

BROKEN = {
    "coupling": {"verify__accept_coupled": wrong_coupling},
    "residual": {"verify__accept_sampled": wrong_residual},
    "acceptance": {"verify__accept_sampled": wrong_acceptance},
    "drafts not drawn from q": {"drafters__heads__choosing__sample": wrong_draw},
    "ended by the drawn token": {"drafters__heads__domino__chosen_along": wrong_confidence},
}


@pytest.mark.e2e
@pytest.mark.parametrize(
    "broken",
    [pytest.param(BROKEN[n], id=n, marks=[] if n == "residual" else [pytest.mark.slow]) for n in BROKEN],
)
def test_the_test_would_catch_a_wrong_sampler(exact, broken):
    pair = make("Domino, ended early" if "drafters__heads__domino__chosen_along" in broken else "Domino")
    samples, _ = sample_rows(pair, loops.retraced(**broken), coupled="verify__accept_coupled" in broken)
    for tokens, joint in zip(samples, exact, strict=True):
        assert p_value(tokens, joint) < WRONG


@pytest.mark.e2e
@pytest.mark.slow
def test_a_coupled_sample_does_not_depend_on_the_drafter(exact):
    """Nor on the number of drafts, nor on whether there are any; a sample by rejection does."""
    pairs = [make(name) for name in (*DRAFTERS, *OTHERS)]
    pairs += [p._replace(configs=dataclasses.replace(p.configs, drafts=1)) for p in pairs[:1]]
    alike = [sample_rows(pair, decode.speculate, coupled=True)[0] for pair in pairs]
    plain, _ = sample_rows(pairs[0], decode.autoregress, coupled=False)
    other, _ = sample_rows(pairs[0], decode.speculate, coupled=False)
    for found in alike:
        # Not for all of so many rows: batches of other widths differ in rounding, and a draw may be that close.
        assert min(float(np.mean((a == b).all(axis=1))) for a, b in zip(found, plain, strict=True)) > 0.999
    assert np.mean((other[0] == plain[0]).all(axis=1)) < 0.9


def test_settings_fill_every_row():
    assert [x.tolist() for x in settings(2, 0.5, 3, 0.75, 0.25)] == [[0.5] * 2, [3] * 2, [0.75] * 2, [0.25] * 2]
    assert [x.tolist() for x in settings(1)] == [[0.0], [0], [1.0], [0.0]]


@pytest.mark.parametrize("temperature", [1e-37, 9e-6])
def test_a_temperature_next_to_zero_is_greedy(temperature):
    """Logits divided by 1e-37 overflow: the probabilities were NaN, and token 0 was drawn."""
    assert SamplingParams(temperature) == SamplingParams(0.0) and SamplingParams(1e-5).temperature == 1e-5
    logits = jnp.asarray([[[1.0, 3.0, 2.0]]])
    assert probabilities(logits, settings(1, temperature)).tolist() == [[[0.0, 1.0, 0.0]]]


@pytest.mark.parametrize("temperature", [1e-5, 1.0001e-5, 1e-3, 1e30, 1e39, 1e300])
@pytest.mark.parametrize("filters", [(0, 1.0, 0.0), (2, 0.9, 0.1), (0, 1e-30, 0.0)])
def test_every_other_temperature_gives_a_finite_distribution(temperature, filters):
    """From the least that is not greedy to those beyond float32, with logits as large as models have them."""
    logits = jnp.array([[[-1e4, 0.0, 1e4, 9999.0], [1e4, 1e4, -1e4, 0.0]]])
    found = np.asarray(probabilities(logits, settings(1, temperature, *filters)))
    assert np.isfinite(found).all() and np.allclose(found.sum(-1), 1)
    if temperature < 1:
        assert found[0, 0].tolist() == [0, 0, 1, 0] and found[0, 1].tolist() == [0.5, 0.5, 0, 0]
