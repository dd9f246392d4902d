"""The block-parallel backbone and the causal head against the NumPy reference (docs/algorithm.md)."""

import dataclasses
from functools import partial
from typing import Any

import factory
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from domino_jax import cache as kv
from domino_jax import decode
from domino_jax.config import DraftConfig, choose_target_layer_ids, default_target_layer_ids
from domino_jax.decode import DecodeConfig, DecodeState, Rows
from domino_jax.drafters import block
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.heads import domino
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.sampling import settings
from domino_jax.weights import Params

TOLERANCE = 1e-4
S = 12  # positions with features
ANCHORS = [0, 1, 5, 12]

HEAD = DominoHead(gru_hidden_dim=14, emb_dim=7, pure_draft_prefix_len=0)
BACKBONES = {
    "M=2": {"block_size": 2},
    "M=5": {"block_size": 5},
    "M=16": {"block_size": 16},
    "one layer, three target layers": {"num_hidden_layers": 1, "target_layer_ids": (0, 2, 1)},
    "window wider than the block": {"block_size": 3, "windows": (7, None)},
    "window inside the block": {"block_size": 6, "windows": (None, 2)},
    "window of one": {"block_size": 4, "windows": (1, 1)},
}


def make(**changes: Any) -> tuple[DraftConfig, factory.Pair]:
    config = factory.draft_config(**changes)
    return config, factory.Pair.make(config, seed=4)


def features(config: DraftConfig, rows: int = len(ANCHORS)) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(rows, S, config.sizes["LD"])).astype(np.float32)


append_context = jax.jit(block.append_context, static_argnums=1)


@partial(jax.jit, static_argnums=1)
def decode_form(params: Params, config: DraftConfig, tokens, anchors, given):
    """Backbone states of one block a row, through the cache."""
    assert params.draft is not None
    cache = kv.init_cache(config, tokens.shape[0], S + config.block_size, jnp.float32)
    # All S positions are written, also those from the anchor on: they must not be seen.
    cache = block.append_context(params.draft, config, cache, given, jnp.zeros_like(anchors))
    x = block.block_inputs(params.target.embed, config, tokens)
    return block.block(params.draft, config, x, anchors, cache)[0]


@partial(jax.jit, static_argnums=1)
def training_form(params: Params, config: DraftConfig, tokens, anchors, given):
    """Backbone states of all blocks of the sequences in one pass."""
    assert params.draft is not None
    x = block.block_inputs(params.target.embed, config, tokens)
    return block.training_blocks(params.draft, config, x, anchors, given)


RARER = {"M=2", "M=16", "window of one", "shifted, P=J-1", "M=2, unshifted, P=0", "DFlash, shifted"}


def cases(of: dict[str, Any]) -> list[Any]:
    return [pytest.param(of[n], id=n, marks=[pytest.mark.slow] if n in RARER else []) for n in of]


@pytest.mark.parametrize("changes", cases(BACKBONES))
def test_backbone_is_the_specs(changes):
    config, pair = make(**changes)
    target_w, _, draft_w, draft_cfg = pair.reference()
    embed, given = target_w["model.embed_tokens.weight"], features(config)
    tokens = np.array([3, 60, 7, 31], np.int32)

    def spec(row: int, anchor: int, token: int) -> np.ndarray:
        return reference.draft_block(draft_w, draft_cfg, embed, given[row, :anchor], token, anchor)

    ours = decode_form(pair.params, config, tokens, np.array(ANCHORS, np.int32), given)
    expected = np.stack([spec(row, a, int(tokens[row])) for row, a in enumerate(ANCHORS)])
    assert expected.std() > 0.3
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE, rtol=0)

    # Training: several blocks a sequence, in any order, one of them at position 0, one of them twice.
    anchors = np.array([[0, 11, 4, 4], [9, 1, 2, 12]], np.int32)
    starts = np.array([[8, 1, 5, 6], [70, 88, 2, 3]], np.int32)
    ours = training_form(pair.params, config, starts, anchors, given[:2])
    expected = [[spec(row, int(anchors[row, i]), int(starts[row, i])) for i in range(4)] for row in range(2)]
    np.testing.assert_allclose(ours, np.array(expected), atol=TOLERANCE, rtol=0)


def test_context_in_pieces_is_context_in_one():
    config, pair = make()
    given = features(config, 2)
    empty = kv.init_cache(config, 2, 16, jnp.float32)
    whole = append_context(pair.params.draft, config, empty, given, np.zeros(2, np.int32))
    # As in decoding: four positions a cycle, of which row 0 commits three and row 1 one.
    pieces, lengths = empty, np.zeros(2, np.int32)
    while lengths.min() < 8:
        at = np.minimum(lengths[:, None] + np.arange(4), S - 1)
        pieces = append_context(pair.params.draft, config, pieces, given[np.arange(2)[:, None], at], lengths)
        lengths = np.minimum(lengths + np.array([3, 1], np.int32), 8)
    for a, b in zip(jax.device_get(jax.tree.leaves(whole)), jax.device_get(jax.tree.leaves(pieces)), strict=True):
        np.testing.assert_allclose(a[:, :, :8], b[:, :, :8], atol=1e-5, rtol=0)


def test_a_block_sees_nothing_at_or_after_its_anchor():
    """Features of positions a, a + 1, ... may be anything: in both forms the block's states stay bit-equal."""
    config, pair = make()
    given, tokens, anchors = features(config), np.array([3, 60, 7, 31], np.int32), np.array(ANCHORS, np.int32)
    spoiled = np.where(np.arange(S)[:, None] >= anchors[:, None, None], np.float32(50), given)
    last = np.where(np.arange(S)[:, None] == anchors[:, None, None] - 1, np.float32(50), given)
    for run, at, starts in (
        (decode_form, anchors, tokens),
        (training_form, anchors[:, None], tokens[:, None]),
    ):
        plain = np.asarray(run(pair.params, config, starts, at, given))
        np.testing.assert_array_equal(run(pair.params, config, starts, at, spoiled), plain)
        # ... while position a - 1 does matter.
        moved = np.abs(np.asarray(run(pair.params, config, starts, at, last)) - plain).reshape(len(ANCHORS), -1)
        assert (moved.max(axis=1)[1:] > 1e-3).all() and moved[0].max() == 0


def test_rows_that_propose():
    rows = np.arange(2 * 5 * 3).reshape(2, 5, 3)
    shifted, plain = factory.draft_config(shift_label=True), factory.draft_config(shift_label=False)
    np.testing.assert_array_equal(block.proposing(shifted, rows), rows)  # type: ignore[arg-type]
    np.testing.assert_array_equal(block.proposing(plain, rows), rows[:, 1:])  # type: ignore[arg-type]
    assert (shifted.num_proposals, plain.num_proposals) == (5, 4)
    for config in (shifted, plain):
        assert reference.proposal_rows(config.to_hf()) == list(range(5))[-config.num_proposals :]


def test_block_inputs_are_the_targets_embeddings_of_anchor_and_masks():
    config = factory.draft_config(mask_token_id=17)
    embed = np.random.default_rng(0).normal(size=(89, 32)).astype(np.float32)
    x = np.asarray(block.block_inputs(jnp.asarray(embed), config, jnp.array([[4, 9]], jnp.int32)))
    np.testing.assert_array_equal(x, embed[[[[4, 17, 17, 17, 17], [9, 17, 17, 17, 17]]]])


def test_default_target_layer_ids():
    """Those of docs/algorithm.md, section 2, which are z-lab's and SpecForge's, rounded in the same order."""
    assert default_target_layer_ids(36, 5) == (1, 9, 17, 25, 33)
    assert default_target_layer_ids(28, 1) == (14,)
    for n in range(1, 101):
        assert default_target_layer_ids(n, 1) == (n // 2,)
        for layers in range(2, 33):
            formula = tuple(round(1 + i * (n - 4) / (layers - 1)) for i in range(layers))
            raw = {"num_target_layers": n, "num_hidden_layers": layers, "dflash_config": {}}
            assert default_target_layer_ids(n, layers) == formula == tuple(reference.target_layer_ids(raw))
    assert (default_target_layer_ids(65, 15)[7], default_target_layer_ids(127, 15)[7]) == (
        32,
        62,
    )  # another order gives 31 and 63


def test_training_never_reads_the_targets_last_layer_by_default():
    for n in range(1, 101):
        for layers in (1, 2, 3, 5, 16):
            target_layer_ids = choose_target_layer_ids(n, layers)
            assert target_layer_ids and all(0 <= tap < max(n - 1, 1) for tap in target_layer_ids), (n, layers)
            if n >= 4:
                assert target_layer_ids == default_target_layer_ids(n, layers)
    assert (choose_target_layer_ids(1, 2), choose_target_layer_ids(2, 1), choose_target_layer_ids(3, 2)) == (
        (0,),
        (0,),
        (0, 1),
    )


HEADS = {
    "shifted, P=0": {"shift_label": True, "head": HEAD},
    "shifted, P=1": {"shift_label": True, "head": dataclasses.replace(HEAD, pure_draft_prefix_len=1)},
    "shifted, P=J-1": {"shift_label": True, "head": dataclasses.replace(HEAD, pure_draft_prefix_len=4)},
    "unshifted, P=2": {"shift_label": False, "head": dataclasses.replace(HEAD, pure_draft_prefix_len=2)},
    "DFlash, shifted": {"shift_label": True, "head": None},
    "DFlash": {"shift_label": False, "head": None},
    "M=2, unshifted, P=0": {"shift_label": False, "head": HEAD, "block_size": 2},
}

propose = jax.jit(decode.propose, static_argnums=1)


@partial(jax.jit, static_argnums=1)
def teacher_forced_logits(params: Params, config: DraftConfig, z, base, eaten):
    """Final logits of given proposals' rows, when the GRU eats `eaten` [B, J] (training's form)."""
    assert params.draft is not None
    if params.draft.head is None or config.head is None:
        return base
    found = config.head.teacher_forced(params.draft.head, z[:, None], eaten[:, None], params.target.embed)
    assert found is not None
    return base + (found.rank @ found.output.T)[:, 0]


@pytest.mark.parametrize("changes", cases(HEADS))
def test_head_scanned_is_teacher_forced_is_the_specs(changes):
    config, pair = make(num_hidden_layers=1, **changes)
    configs = DecodeConfig(pair.configs.target, BlockDrafter(config))
    target_w, target_cfg, draft_w, draft_cfg = pair.reference()
    embed, lm_head = target_w["model.embed_tokens.weight"], reference.target_lm_head(target_w, target_cfg)
    given, tokens, anchors = features(config), np.array([3, 60, 7, 31], np.int32), np.array(ANCHORS, np.int32)
    empty = kv.init_cache(config, len(tokens), S + config.block_size, jnp.float32)
    context = append_context(pair.params.draft, config, empty, given, np.zeros(4, np.int32))
    hot = settings(4, temperature=1.0)
    none: Any = None
    asked = Rows(none, none, none, hot, none)
    state = DecodeState(jnp.asarray(tokens), jnp.asarray(anchors), none, none, none, asked, none, none, context)

    # Scanned, greedy, against the reference's walk from left to right.
    draft, _ = propose(pair.params, configs, state, None)
    drafts = draft.tokens
    assert draft.probs is None
    rows, walked, states = reference.proposal_rows(draft_cfg), [], []
    for row, a in enumerate(ANCHORS):
        args = (draft_w, draft_cfg, embed, lm_head, given[row, :a], int(tokens[row]), a)
        expected, logits = reference.propose_greedy(*args)
        walked.append(logits)
        states.append(reference.draft_block(draft_w, draft_cfg, embed, given[row, :a], int(tokens[row]), a)[rows])
        assert np.asarray(drafts)[row].tolist() == expected
    assert drafts.shape == (4, config.num_proposals) == (4, len(rows))

    # Teacher-forced with those very drafts: the same logits.
    z = np.array(states, np.float32)
    base = z @ lm_head.T.astype(np.float32)
    eaten = np.concatenate([tokens[:, None], np.asarray(drafts)[:, :-1]], axis=1)
    forced = np.asarray(teacher_forced_logits(pair.params, config, z, base, eaten))
    np.testing.assert_allclose(forced, np.array(walked), atol=TOLERANCE, rtol=0)
    if isinstance(config.head, DominoHead):
        changed = np.abs(forced - base).max(axis=(0, 2))
        assert (changed[: config.head.pure_draft_prefix_len] == 0).all()
        assert (changed[config.head.pure_draft_prefix_len :] > 0.1).all(), "a head that changes nothing tests nothing"

    # Teacher-forced with other tokens, against the reference's GRU.
    other = np.random.default_rng(3).integers(0, 89, eaten.shape).astype(np.int32)
    forced = np.asarray(teacher_forced_logits(pair.params, config, z, base, other))
    for row in range(4):
        eats = reference.gru_states(draft_w, embed, other[row]) if config.head else None
        spec = reference.corrected_logits(draft_w, draft_cfg, base[row], z[row], eats)
        np.testing.assert_allclose(forced[row], spec, atol=TOLERANCE, rtol=0)

    # Scanned, sampled: each distribution is the softmax of the teacher-forced logits at the tokens really drawn.
    keys = jax.random.split(jax.random.key(5), (4, config.num_proposals))
    draft, _ = propose(pair.params, configs, state, keys)
    drafts, q = draft.tokens, draft.probs
    drafts, q = np.asarray(drafts), np.asarray(q)
    eaten = np.concatenate([tokens[:, None], drafts[:, :-1]], axis=1)
    spec = reference.softmax(np.asarray(teacher_forced_logits(pair.params, config, z, base, eaten), np.float64))
    prefix = config.head.pure_draft_prefix_len if isinstance(config.head, DominoHead) else config.num_proposals
    for j in range(config.num_proposals):
        if j == 0 or j >= prefix:
            np.testing.assert_allclose(q[:, j], spec[:, j], atol=1e-5, rtol=0)
        else:  # drawn blind to its neighbours: the argmax, and said to be so
            np.testing.assert_array_equal(drafts[:, j], spec[:, j].argmax(axis=-1))
            np.testing.assert_array_equal(q[:, j], np.eye(89)[drafts[:, j]])


def test_gru_is_pytorchs():
    import torch

    config, pair = make()
    draft_w = pair.reference()[2]
    gru = torch.nn.GRU(config.hidden_size, 14, bias=False, batch_first=True)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        getattr(gru, name).data = torch.from_numpy(draft_w[f"prefix_gru.{name}"].copy())
    x = np.random.default_rng(0).normal(size=(2, 6, config.hidden_size)).astype(np.float32)
    with torch.no_grad():
        expected = gru(torch.from_numpy(x))[0].numpy()
    assert pair.params.draft is not None and pair.params.draft.head is not None
    ours, weights = np.zeros((2, 14), np.float32), pair.params.draft.head
    cell = jax.jit(domino.gru_cell)
    for t in range(6):
        ours = cell(x[:, t] @ np.asarray(weights.gru_in).T, ours @ np.asarray(weights.gru_state).T, ours)
        np.testing.assert_allclose(ours, expected[:, t], atol=1e-5, rtol=0)
