"""A gate: what is trained on one sample alone drafts that sample whole, with any head."""

import dataclasses
from typing import Any

import factory
import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest

from domino_jax.config import DraftConfig
from domino_jax.decode import DecodeConfig
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.convolution import Convolution
from domino_jax.drafters.heads.markov import MarkovHead
from domino_jax.drafters.heads.selector import SelectorHead
from domino_jax.weights import Params, flatten, init_weights, unflatten
from train.config import Objective, OptimizerConfig, Recipe
from train.loss import Inputs
from train.step import exported_weights, init_state, train_step

PROMPT, NEW, STEPS = [3, 1, 4, 1, 5, 9], 18, 120
TARGET = dataclasses.replace(factory.TARGET, num_hidden_layers=2)
BLOCK: dict[str, Any] = {"num_target_layers": 2, "target_layer_ids": (0, 1)}
DSPARK = {"loss": "dspark", "lambda_base_start": 0.0}

DRAFTERS: dict[str, tuple[DraftConfig, dict[str, Any]]] = {
    "domino": (factory.draft_config(TARGET, **BLOCK), {}),
    "dspark": (factory.draft_config(TARGET, head=MarkovHead(7, "vanilla", True), **BLOCK), DSPARK),
    "rnn, causal": (factory.draft_config(TARGET, head=MarkovHead(7, "rnn"), causal=True, **BLOCK), {}),
    "gated, total variation": (factory.draft_config(TARGET, head=MarkovHead(7, "gated"), **BLOCK), {"loss": "tv"}),
    "selector": (factory.draft_config(TARGET, head=SelectorHead(7, 6), shift_label=False, **BLOCK), {}),
    "selector and convolutions": (
        factory.draft_config(
            TARGET, head=SelectorHead(7, 6), shift_label=False, convolution=Convolution(2, 8), **BLOCK
        ),
        {},
    ),
    "no head, fill-in": (factory.draft_config(TARGET, head=None, shift_label=False, **BLOCK), {"loss": "kl"}),
    "domino, acceptance": (
        factory.draft_config(TARGET, causal=True, **BLOCK),
        {"loss": "acceptance", "position_weights": "uniform"},
    ),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "domino" else [pytest.mark.slow]) for n in DRAFTERS])
def test_a_sample_learned_by_heart_is_drafted_whole(name):
    config, objective = DRAFTERS[name]
    target = init_weights(TARGET, jax.random.key(0), std=0.3)

    def accepted(drafter: Any) -> loops.Output:
        params, configs = Params(target, drafter), DecodeConfig(TARGET, BlockDrafter(config))
        return loops.speculate(params, configs, loops.begin(params, configs, [PROMPT], NEW))[0]

    first = init_weights(config, jax.random.key(1), std=0.1)
    before = accepted(first)
    ids = np.array([PROMPT + before.tokens], np.int32)
    recipe = Recipe(
        TARGET,
        config,
        Objective(anchors=ids.size, **objective),
        OptimizerConfig(lr=2e-2, warmup=0.05, weight_decay=0.0),
        steps=STEPS,
        dtype="float32",
    )
    state = init_state(recipe, flatten(first), 0)
    inputs = Inputs(jnp.asarray(ids), jnp.asarray(np.arange(ids.size)[None] >= len(PROMPT) - 1))
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        for _ in range(STEPS):
            state, metrics = train_step(recipe, state, target, inputs)
    assert metrics.finite
    after = accepted(unflatten(config, exported_weights(state)))
    assert after.tokens == before.tokens, "drafts never change the output"
    assert after.accepted[0] == config.num_proposals > before.accepted[0]
