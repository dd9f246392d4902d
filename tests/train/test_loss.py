"""The objective: loss, gradients and reports against the plain restatement, packing, D-PACE, KL, memory."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from training import curriculum

from convert.names import export
from domino_jax import target
from domino_jax.attention import attend_without_cache
from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.drafters import training_attention
from domino_jax.drafters.heads.base import Correction, under
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.drafters.heads.markov import MarkovHead
from domino_jax.drafters.heads.selector import SelectorHead
from domino_jax.errors import DominoError
from domino_jax.weights import flatten, init_weights
from train import anchors
from train.loss import chunked_scores, d_pace

TARGET = TargetConfig(23, 16, 3, 4, 2, 8, 24, 1e-6, 1e4, 64, True)
LENGTH = 19
DSPARK = {"loss": "dspark"}
D_PACE = {"position_weights": "d-pace", "d_pace_alpha": 0.3}


def make_draft(shift: bool, prefix: int | None, block: int = 4, window: int | None = None) -> DraftConfig:
    head = None if prefix is None else DominoHead(6, 5, prefix)
    return DraftConfig(
        23, 16, 2, 2, 1, 8, 20, 1e-6, 1e4, 64, block, 22, (0, 2), 3, shift, head, (None, window) if window else ()
    )


def with_markov(kind: Any, shift: bool = True, confidence: bool = False, **changes: Any) -> DraftConfig:
    head = MarkovHead(5, kind, enable_confidence_head=confidence)
    return dataclasses.replace(make_draft(shift, None), head=head, **changes)


def named(config, module) -> dict[str, np.ndarray]:
    """A module as tensors under Hugging Face's names."""
    return export(config, flatten(module))


def sequences(seed: int = 0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 22, (3, LENGTH)).astype(np.int32)
    mask = rng.random((3, LENGTH)) < 0.8
    ids[1, 5:] = 0
    mask[1, 5:] = False  # a short, padded sequence
    mask[2] = False  # one without any anchor
    places = [[0, 3, 7, 15, 17], [0, 1, 2, 3, 0], [0, 1, 2, 3, 4]]
    valid = np.array([[True] * 5, [True, True, True, False, False], [False] * 5])
    return ids, mask, np.array(places, np.int32), valid


def restated(draft, frozen, drafter, lam, batch, restate, kept=None) -> dict[str, Any]:
    """`reference.training_loss` over a batch; frozen and drafter are tensors by Hugging Face's names."""
    parts = [
        reference.training_loss(
            frozen,
            TARGET.to_hf(),
            drafter,
            draft.to_hf(),
            [int(t) for t in ids],
            list(mask),
            [int(a) for a, v in zip(places, valid, strict=True) if v],
            3.0,
            lam,
            **restate,
            kept=labels,
        )
        for ids, mask, places, valid, labels in zip(*batch, kept or [None] * len(batch[0]), strict=True)
    ]
    return reference.combine_training(parts, lam) | {"kept": [part["kept"] for part in parts]}


def compare(loss, report, expected) -> None:
    found = {
        "loss": loss,
        "final_loss": report.final.loss,
        "base_loss": report.base.loss,
        "final_ce": report.final.ce,
        "base_ce": report.base.ce,
        "final_accuracy": report.final.accuracy,
        "base_accuracy": report.base.accuracy,
        "final_accept": report.final.acceptance,
        "base_accept": report.base.acceptance,
        "block_count": report.blocks,
        "label_count": report.proposals,
    }
    if report.confidence_loss is not None:
        found["confidence_loss"] = report.confidence_loss
    assert (report.confidence_loss is not None) == bool(expected["confidence_loss"])
    for key, value in found.items():
        assert float(value) == pytest.approx(float(expected[key]), abs=2e-5), key


def pair(draft) -> tuple[Any, Any]:
    return init_weights(TARGET, jax.random.key(1), std=0.3), init_weights(draft, jax.random.key(2), std=0.3)


CASES = [
    pytest.param(make_draft(True, 1), 0.3, {}, {}, id="domino"),
    pytest.param(make_draft(True, 0), 0.0, {}, {}, id="corrected from the first"),
    pytest.param(make_draft(False, 2), 0.7, {}, {}, id="unshifted labels, longer prefix"),
    pytest.param(make_draft(True, 1, block=6, window=3), 1.0, {}, {}, id="sliding layer, base only"),
    pytest.param(make_draft(False, None), 0.5, {}, {}, id="plain DFlash"),
    pytest.param(make_draft(True, 1), 0.3, D_PACE, {"weights": "d-pace", "alpha": 0.3}, id="d-pace"),
    pytest.param(make_draft(True, 1), 0.3, {"loss": "kl"}, {"objective": "kl"}, id="kl"),
    pytest.param(
        make_draft(False, 0),
        0.6,
        {"loss": "kl", "block_attention": "chunked", **D_PACE},
        {"objective": "kl", "weights": "d-pace", "alpha": 0.3},
        id="kl with d-pace, chunked attention",
    ),
    pytest.param(make_draft(True, 1), 0.3, {"loss": "tv"}, {"objective": "tv"}, id="tv"),
    pytest.param(
        with_markov("rnn"),
        0.2,
        {"loss": "acceptance", "position_weights": "uniform"},
        {"objective": "acceptance", "weights": "uniform"},
        id="rnn, acceptance",
    ),
    pytest.param(
        dataclasses.replace(make_draft(False, None), head=SelectorHead(5, 4)), 0.5, {}, {}, id="selector of few"
    ),
    pytest.param(with_markov("vanilla", confidence=True), 0.0, DSPARK, {"objective": "dspark"}, id="dspark"),
    pytest.param(
        with_markov("gated", False, causal=True, windows=(None, 3)), 0.4, {}, {}, id="gated, causal blocks, unshifted"
    ),
    pytest.param(
        make_draft(True, 0), 0.3, DSPARK, {"objective": "dspark"}, id="dspark's loss of domino", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize("chunk", [pytest.param(1000, marks=pytest.mark.slow), 7])
@pytest.mark.parametrize(("draft", "lam", "ours", "restate"), CASES)
def test_loss_and_report_equal_the_restatement(monkeypatch, draft, lam, ours, restate, chunk):
    monkeypatch.setattr(training_attention, "ROWS", 8)
    frozen, drafter = pair(draft)
    batch = sequences()
    loss, report = jax.jit(
        lambda d: curriculum(
            d,
            frozen,
            (TARGET, draft),
            *(jnp.asarray(x) for x in batch),
            lam=jnp.float32(lam),
            gamma=3.0,
            chunk=chunk,
            **ours,
        )
    )(drafter)
    compare(loss, report, restated(draft, named(TARGET, frozen), named(draft, drafter), lam, batch, restate))
    for branch in (report.final, report.base):
        assert float(branch.acceptance) == pytest.approx(1 + float(branch.accepted.sum()), abs=1e-5)
        assert branch.position_accuracy.shape == (draft.num_proposals,)


@pytest.mark.parametrize(
    ("draft", "lam", "ours", "restate"),
    [
        CASES[0],
        pytest.param(*CASES[2].values, id=CASES[2].id, marks=pytest.mark.slow),
        CASES[6],
        pytest.param(*CASES[8].values, id=CASES[8].id, marks=pytest.mark.slow),
        *CASES[9:12],
        pytest.param(*CASES[12].values, id=CASES[12].id, marks=pytest.mark.slow),
    ],
)
def test_gradients_equal_differences_of_the_restatement(draft, lam, ours, restate):
    """Central differences of the float64 restatement, along a few random directions."""
    frozen, drafter = pair(draft)
    batch = sequences()
    arrays = [jnp.asarray(x) for x in batch]

    def loss(d):
        return curriculum(
            d, frozen, (TARGET, draft), *arrays, lam=jnp.float32(lam), gamma=3.0, chunk=11, remat=True, **ours
        )[0]

    gradient = named(draft, jax.jit(jax.grad(loss))(drafter))
    weights = {name: tensor.astype(np.float64) for name, tensor in named(draft, drafter).items()}
    frozen_weights = named(TARGET, frozen)
    rng = np.random.default_rng(0)
    groups = [
        ["fc.weight", "hidden_norm.weight"],
        [n for n in weights if n.startswith("layers.")],
        ["norm.weight"],
        [n for n in weights if n.startswith(("prefix_gru", "embed_proj", "markov_head", "candidate_selector"))],
        [n for n in weights if n.startswith("confidence_head")],
    ]
    # The labels of a confidence head are held: the loss has no gradient through them.
    kept = restated(draft, frozen_weights, weights, lam, batch, restate)["kept"]
    for names in groups:
        if not names:
            continue
        direction = {n: rng.normal(size=weights[n].shape) for n in names}
        step = 1e-5
        ends = [
            restated(
                draft,
                frozen_weights,
                {**weights, **{n: weights[n] + s * step * direction[n] for n in names}},
                lam,
                batch,
                restate,
                kept,
            )["loss"]
            for s in (1, -1)
        ]
        expected = (ends[0] - ends[1]) / (2 * step)
        found = sum((gradient[n] * direction[n]).sum() for n in names)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5), names


def test_d_pace_weights_are_the_gradient_of_the_expected_length():
    """That is what the paper derives them from: d E / d log q~_j, for E the sum of the prefix products."""
    ce = jnp.asarray([[0.1, 2.0, 0.5, 1.0]], jnp.float32)
    on = jnp.asarray([[True, True, False, True]])

    def expected_length(logs):
        reached = jnp.cumprod(jnp.where(on, jnp.exp(logs), 1.0), axis=-1)
        return jnp.where(on, reached, 0.0).sum()

    smoothed = 0.6 * jnp.exp(-ce) + 0.4
    np.testing.assert_allclose(d_pace(ce, on, 0.4), jax.grad(expected_length)(jnp.log(smoothed)), rtol=1e-6)
    assert not np.any(jax.grad(lambda x: d_pace(x, on, 0.4).sum())(ce)), "the weights have no gradient"


@pytest.mark.parametrize("kind", [pytest.param("ce", marks=pytest.mark.slow), "kl"])
def test_a_packed_row_is_its_conversations(kind):
    """Two conversations and padding in one row, against each in a row of its own from position 0 on."""
    draft = make_draft(True, 1, window=5)
    frozen, drafter = pair(draft)
    ids, mask, _, _ = (np.array(x) for x in sequences(3))
    row, on = ids[0], mask[0] | True
    ends = [(0, 8), (8, 17)]
    starts = np.array([0] * 8 + [8] * 9 + [17, 18], np.int32)
    on[17:] = False
    places, valid = np.array([[1, 6, 8, 11, 15]], np.int32), np.ones((1, 5), bool)
    arrays = [jnp.asarray(x) for x in (row[None], on[None], places, valid)]
    how = {"lam": jnp.float32(0.4), "gamma": 3.0, "chunk": 50, "starts": jnp.asarray(starts[None]), "loss": kind}
    loss, report = jax.jit(lambda d: curriculum(d, frozen, (TARGET, draft), *arrays, **how))(drafter)
    parts = [([row[a:b]], [on[a:b]], [[p - a for p in places[0] if a <= p < b]]) for a, b in ends]
    names = named(TARGET, frozen), named(draft, drafter)
    alone = [restated(draft, *names, 0.4, (*part, [[True] * len(part[2][0])]), {"objective": kind}) for part in parts]
    compare(loss, report, reference.combine_training(alone, 0.4))


def test_anchors_stay_inside_a_conversation():
    mask = jnp.asarray([[True] * 7])
    starts = jnp.asarray([[0, 0, 0, 3, 3, 3, 3]], jnp.int32)
    drawn, valid = anchors.draw_anchors(jax.random.key(0), mask, 7, starts)
    assert sorted(np.asarray(drawn)[np.asarray(valid)].tolist()) == [0, 1, 3, 4, 5]


def test_tokens_of_a_packed_row_see_their_own_conversation_only(monkeypatch):
    """And in parts of the queries, which are the same."""
    frozen = init_weights(TARGET, jax.random.key(1), std=0.3)
    ids = jnp.asarray(sequences()[0][:1])
    starts = jnp.asarray([[0] * 8 + [8] * 11], jnp.int32)

    def forward(ids, starts=None):
        run = jax.jit(lambda p: target.forward(p, TARGET, ids, target_layer_ids=(0, 2), starts=starts)[:2])
        return run(frozen)

    hidden, features = forward(ids, starts)
    monkeypatch.setattr("domino_jax.attention.LARGEST_ALONE", 5)
    parts = forward(ids, starts)
    np.testing.assert_allclose(hidden, parts[0], atol=1e-5)
    np.testing.assert_allclose(features, parts[1], atol=1e-5)
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 19, n, 8)) for i, n in enumerate((4, 2, 2)))
    for given in (starts, None):
        ours, theirs = (attend_without_cache(q, k, v, given, form, "xla") for form in ("xla", "cudnn"))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for a, b in ((0, 8), (8, 19)):
        alone, _ = forward(ids[:, a:b])
        np.testing.assert_allclose(hidden[:, a:b], alone, atol=2e-5)


@pytest.mark.parametrize("kind", [pytest.param("ce", marks=pytest.mark.slow), "kl"])  # in e2e/test_train.py: ce
def test_captured_states_give_the_same_loss_without_the_target(kind):
    draft = make_draft(True, 1)
    frozen, drafter = pair(draft)
    batch = [jnp.asarray(x) for x in sequences()]
    hidden, features, _ = jax.jit(
        lambda p: target.forward(p, TARGET, batch[0], target_layer_ids=draft.target_layer_ids)
    )(frozen)

    def loss(given, **captured):
        how = {"lam": jnp.float32(0.5), "gamma": 3.0, "chunk": 99, "loss": kind}
        return jax.jit(lambda p: curriculum(drafter, p, (TARGET, draft), *batch, **how, **captured)[0])(given)

    online = loss(frozen)
    without = jax.tree.map(lambda w: w, frozen)
    for layer in without.layers:
        layer.q = jnp.full_like(layer.q, jnp.nan)
    captured = loss(without, features=features, hidden=hidden)
    assert float(online) == pytest.approx(float(captured), rel=1e-6)


def test_the_target_gets_no_gradient():
    draft = make_draft(True, 1)
    frozen, drafter = pair(draft)
    batch = [jnp.asarray(x) for x in sequences()]
    moved = init_weights(TARGET, jax.random.key(3), std=0.3)

    def loss(frozen):
        return curriculum(drafter, frozen, (TARGET, draft), *batch, lam=jnp.float32(0), gamma=3.0, chunk=99, loss="kl")[
            0
        ]

    value = jax.jit(loss)
    assert float(value(frozen)) != float(value(moved))  # it does depend on the target
    gradient = jax.jit(jax.grad(loss))(frozen)
    for path, leaf in flatten(gradient).items():
        if path.startswith("layers."):
            assert not np.any(leaf), path


def temporary_bytes(config, draft, batch: int, length: int, count: int, chunk: int = 32, **how) -> int:
    frozen, drafter = init_weights(config, jax.random.key(0)), init_weights(draft, jax.random.key(1))
    ids, mask = jnp.zeros((batch, length), jnp.int32), jnp.ones((batch, length), bool)
    places, valid = jnp.zeros((batch, count), jnp.int32), jnp.ones((batch, count), bool)

    def loss(d):
        given = jnp.zeros((batch, length, config.hidden_size), jnp.float32)
        lam = jnp.float32(0.5)
        return curriculum(
            d,
            frozen,
            (config, draft),
            ids,
            mask,
            places,
            valid,
            lam=lam,
            gamma=7.0,
            chunk=chunk,
            features=given,
            hidden=given,
            **how,
        )[0]

    analysis = jax.jit(jax.grad(loss)).lower(drafter).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("kind", ["ce", pytest.param("kl", marks=pytest.mark.slow)])
def test_no_full_set_of_logits_exists(kind):
    """With chunks, no buffer of the compiled step is as large as all logits."""
    config = TargetConfig(4001, 16, 2, 2, 1, 8, 16, 1e-6, 1e4, 64, True)
    draft = DraftConfig(4001, 16, 1, 2, 1, 8, 16, 1e-6, 1e4, 64, 8, 3, (0,), 2, True, DominoHead(8, 4, 1))
    whole = 4 * 16 * 8 * 4001 * 4
    few = temporary_bytes(config, draft, 4, 64, 16, chunk=32, loss=kind)
    assert few < whole < temporary_bytes(config, draft, 4, 64, 16, chunk=4 * 16 * 8, loss=kind)


def test_chunked_attention_holds_no_scores_of_all_blocks():
    """Twice the blocks, or their attention as a whole: the temporary memory tells whether A·M x S exists."""
    config = TargetConfig(50, 16, 2, 2, 1, 8, 16, 1e-6, 1e4, 4096, True)
    draft = DraftConfig(50, 16, 1, 2, 1, 8, 16, 1e-6, 1e4, 4096, 16, 3, (0,), 2, True, None)
    one, two = (temporary_bytes(config, draft, 1, 2048, n, block_attention="chunked") for n in (96, 192))
    dense = temporary_bytes(config, draft, 1, 2048, 192, block_attention="dense")
    scores = 2 * 192 * 16 * 2048 * 4
    assert dense > scores
    assert two < scores
    assert two - one < scores / 8, "what grows are the blocks' own rows"


@pytest.mark.parametrize(
    ("form", "window", "causal"),
    [("chunked", None, True), ("chunked", 6, True), ("cudnn", None, True), ("cudnn", 6, True), ("cudnn", 2, False)],
)
def test_attention_in_groups_and_its_gradients_equal_the_dense(monkeypatch, form, window, causal):
    """cuDNN's form by JAX's own statement of the function it calls."""
    monkeypatch.setattr(training_attention, "ROWS", 8)  # two blocks at a time, of five
    shapes = {"q": (2, 5, 4, 4, 8), "k": (2, 5, 4, 2, 8), "v": (2, 5, 4, 2, 8), "K": (2, 21, 2, 8), "V": (2, 21, 2, 8)}
    keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
    given = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes.values(), strict=False)]
    weigh = jax.random.normal(keys[-1], shapes["q"])
    places = jnp.asarray([[0, 4, 9, 17, 20], [20, 3, 8, 8, 0]], jnp.int32)
    first = jnp.asarray([[0, 0, 5, 5, 18], [5, 0, 5, 8, 0]], jnp.int32)

    def run(form):
        def loss(q, k, v, K, V):
            given = q, (k, v), (K, V), places, first, window, form, "xla", causal
            return (training_attention.attend_blocks(*given) * weigh).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(5))))(*given)

    (dense, expected), (value, found) = run("dense"), run(form)
    assert float(value) == pytest.approx(float(dense), rel=1e-5)
    for name, a, b in zip(shapes, expected, found, strict=True):
        assert np.abs(a).max() > 1e-3 and np.abs(a - b).max() <= 1e-5 * np.abs(a).max(), name
    config = make_draft(True, None)
    assert [training_attention.resolve_block_backend("auto", config, n) for n in (2, 3)] == [
        "dense",
        "chunked",
    ]
    with pytest.raises(DominoError, match="needs an NVIDIA GPU"):
        training_attention.check_block_backend("cudnn", config, jnp.bfloat16, jax.devices()[0])


def test_the_chunks_gradients_are_summed_in_float32():
    """Computing in bfloat16, many small chunks must not lose the gradient of the head's projection."""
    config = make_draft(True, 0)
    rows, rng = 600, np.random.default_rng(0)
    z, rank = (jnp.asarray(rng.normal(size=(1, rows, n)).astype(np.float32)) for n in (16, 5))
    labels = jnp.asarray(rng.integers(0, 23, (1, rows)).astype(np.int32))
    leaves = flatten(init_weights(config, jax.random.key(0), std=0.3))
    output = init_weights(TARGET, jax.random.key(1), std=0.3).embed

    def gradient(dtype, kept: bool) -> np.ndarray:
        def loss(proj_out):
            given = proj_out if kept else proj_out.astype(dtype)
            z, rank, labels = cast
            return chunked_scores(Correction(rank, given), output.astype(dtype), z, labels, None, 1)[0].ce.sum()

        cast = z.astype(dtype), rank.astype(dtype), labels
        return np.asarray(jax.jit(jax.grad(loss))(leaves["head.proj_out"]))

    exact = gradient(jnp.float32, True)
    error, rounded = (np.linalg.norm(gradient(jnp.bfloat16, kept) - exact) for kept in (True, False))
    assert error < 0.01 * np.linalg.norm(exact)
    assert rounded > 3 * error, "the case does not tell"
    assert under("head", DominoHead.looped) <= set(leaves)


def test_nothing_supervised_is_a_loss_of_zero():
    draft = make_draft(True, 1)
    frozen, drafter = pair(draft)
    ids, mask, places, valid = (jnp.asarray(x) for x in sequences())
    batch = ids, mask & False, places, valid & False
    how = {"lam": jnp.float32(0.5), "gamma": 3.0, "chunk": 99, **D_PACE}
    loss, report = jax.jit(lambda d: curriculum(d, frozen, (TARGET, draft), *batch, **how))(drafter)
    assert float(loss) == 0 and float(report.blocks) == 0 and float(report.final.acceptance) == 0
