"""How sure a block drafter is of its proposals: with a confidence head and without, calibrated, and a chain's end."""

import dataclasses
from typing import Any

import factory
import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
from factory import Pair

from domino_jax import decode
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.heads.choosing import likeliest_logit
from domino_jax.drafters.heads.markov import MarkovHead
from domino_jax.errors import DominoError
from domino_jax.sampling import settings

HEADS = {
    "Domino": factory.draft_config().head,
    "none": None,
    "Markov": MarkovHead(7),
    "DSpark": MarkovHead(7, enable_confidence_head=True),
}
TEMPERATURES = (0.5, 2.0, 0.8, 3.0, 1.0)


def test_without_a_confidence_head_it_is_the_likeliest_tokens_probability():
    """Of equals one is the likeliest; certainty stays finite, and what is no number is not sure."""
    rng = np.random.default_rng(0)
    logits = np.concatenate(
        [3 * rng.normal(size=(4, 11)), [[2.0] * 11], [[0.0, 300.0] + [-np.inf] * 9], [[np.nan] * 11]]
    )
    found = np.asarray(jax.jit(likeliest_logit)(jnp.asarray(logits, jnp.float32)))
    with np.errstate(invalid="ignore"):
        best = np.exp(logits - logits.max(axis=1, keepdims=True))
    best = np.max(best / best.sum(axis=1, keepdims=True), axis=1)
    np.testing.assert_allclose(1 / (1 + np.exp(-found[:5])), best[:5], atol=1e-6)
    assert 80 < found[5] < 90 and np.isnan(found[6]) and not found[6] >= 0


@pytest.mark.parametrize(
    ("head", "threshold"),
    [
        ("Domino", 0.1),
        *(pytest.param(*slow, marks=pytest.mark.slow) for slow in (("none", 0.1), ("Markov", 0.1))),
        *(pytest.param("DSpark", threshold, marks=pytest.mark.slow) for threshold in (0.5, 0.0)),
    ],
)
def test_a_chain_ends_where_its_drafter_is_less_sure(head, threshold):
    """The tokens stay the target's, and each cycle accepts what it would have, up to the first proposal below."""
    target = dataclasses.replace(factory.TARGET, num_hidden_layers=2)
    config = factory.draft_config(
        head=HEADS[head], num_target_layers=2, confidence_temperatures=TEMPERATURES if head != "DSpark" else ()
    )
    pair = Pair.make(config, target, seed=4)
    # A drafter that is often right, as far as it knows the last token.
    pair.params.target.layers[0].o *= 0.1
    drafter = BlockDrafter(config, confidence_threshold=threshold)
    raw = BlockDrafter(dataclasses.replace(config, confidence_temperatures=()))
    sure = Pair(pair.params, dataclasses.replace(pair.configs, drafter=drafter))
    prompts = [[3, 1, 4, 1, 5], [9] * 11]
    state = loops.begin(*sure, prompts, 16)
    keys = jax.random.split(jax.random.key(1), (2, 5))

    @jax.jit
    def draft(params: Any, state: Any) -> Any:
        view = decode.view(params, sure.configs, state)
        made = drafter.propose(params.draft, state.drafter, view, 5, None)[0]
        plain = raw.propose(params.draft, state.drafter, view, 5, None)[0]
        drawn = raw.propose(params.draft, state.drafter, view._replace(sampling=settings(2, 1.0)), 5, keys)[0]
        return made, plain.confidence, drawn

    made, plain, drawn = jax.device_get(draft(sure.params, state))
    assert plain is not None and made.confidence is not None and drawn.probs is not None
    temperatures = np.array(config.confidence_temperatures or 1.0, np.float32)
    np.testing.assert_allclose(made.confidence, plain / temperatures, rtol=1e-6)
    if head != "DSpark":  # what a place is sure of is known before its token is drawn
        among = slice(1) if head == "none" else slice(None)  # the other places are the argmax, whatever is asked
        expected = drawn.probs.max(axis=-1)[:, among]
        np.testing.assert_allclose(1 / (1 + np.exp(-drawn.confidence))[:, among], expected, atol=1e-5)
    below = 1 / (1 + np.exp(-made.confidence)) < threshold
    assert made.lengths.tolist() == [int(row.argmax()) if row.any() else 5 for row in below]
    assert threshold == 0 or 0 < below.mean() < 1, "some should be below"
    plain = [o.tokens for o in loops.autoregress(*pair, loops.begin(*pair, prompts, 16))]
    assert [o.tokens for o in loops.speculate(*sure, state)] == plain


@pytest.mark.parametrize("threshold", [1.5, -0.1, float("nan")])
def test_a_threshold_that_makes_no_sense_is_refused(threshold):
    with pytest.raises(DominoError, match=f"from 0 to 1, found {threshold}"):
        BlockDrafter(factory.draft_config(), confidence_threshold=threshold)


def test_trees_have_at_least_one_candidate():
    with pytest.raises(DominoError, match="tree_candidates must be at least 1, found 0"):
        factory.draft_config(tree_candidates=0)


@pytest.mark.parametrize("given", [(1.0,), (1.0,) * 6, (1.0, 0.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0, float("inf"))])
def test_temperatures_are_a_number_above_0_for_each_proposal(given):
    with pytest.raises(DominoError, match="confidence_temperatures must be 5 numbers above 0"):
        factory.draft_config(confidence_temperatures=given)
