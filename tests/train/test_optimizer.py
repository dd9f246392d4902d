"""Which weights decay, and which of them Muon moves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factory import BYTE_DRAFT

from domino_jax.config import DraftConfig
from domino_jax.drafters.convolution import Convolution
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.drafters.heads.markov import MarkovHead
from domino_jax.drafters.heads.selector import SelectorHead
from domino_jax.weights import axes, flatten, init_weights, is_bias
from train.config import OptimizerConfig
from train.optimizer import dimensions, make_optimizer


@pytest.fixture(autouse=True)
def optax_mixes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def biased() -> DraftConfig:
    """A drafter whose projections have biases, q's with two axes [N, H]."""
    return dataclasses.replace(BYTE_DRAFT, attention_bias=True)


def update(config: DraftConfig, name: str, gradient: float) -> tuple[dict, dict]:
    """The weights, and what a step at the peak of the learning rate adds to them, by path."""
    rule = make_optimizer(
        OptimizerConfig(optimizer=name, lr=0.1, muon_lr=0.1, warmup=0.0, weight_decay=0.5),  # type: ignore[arg-type]
        100,
        flatten(axes(config)),
    )
    weights = jax.tree.map(lambda w: jnp.ones_like(w), flatten(init_weights(config, jax.random.key(0))))
    gradients = jax.tree.map(lambda w: jnp.full_like(w, gradient), weights)

    @jax.jit
    def second_step():  # the first step has a rate of 0
        _, state = rule.update(gradients, rule.init(weights), weights)
        return rule.update(gradients, state, weights)[0]

    return weights, second_step()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_norms_and_biases_do_not_decay(biased, name):
    weights, added = update(biased, name, 0.0)
    moved = {path for path, step in added.items() if np.any(step)}
    kept = {path for path, w in weights.items() if w.ndim == 1 or is_bias(path)}
    assert any(weights[path].ndim == 2 for path in kept), "the case does not tell"
    assert moved == set(weights) - kept


def test_muon_leaves_biases_to_adam(biased):
    """Adam moves every number by the rate, whatever the gradient; Muon's steps depend on the matrix's shape."""
    weights, added = update(biased, "muon", 1e-3)
    steps = {path: np.unique(np.asarray(step).round(4)) for path, step in added.items()}
    biases = [path for path in weights if is_bias(path)]
    assert any(weights[path].ndim == 2 for path in biases)
    for path in biases:
        np.testing.assert_allclose(steps[path], steps["norm"], err_msg=path)
    assert not np.array_equal(steps["layers.0.q"], steps["norm"])


HEADS = [DominoHead(8, 6, 1), MarkovHead(6, "gated", True), SelectorHead(6, 4)]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.name)
def test_muon_leaves_what_is_as_long_as_the_vocabulary_to_adam(head):
    letters = flatten(axes(dataclasses.replace(BYTE_DRAFT, head=head, convolution=Convolution(2, 4))))
    sizes = {path: {"V", "DV"} & set(names.split()) for path, names in letters.items()}
    assert any(sizes[path] for path in letters if path.startswith("head."))
    assert not [path for path, long in sizes.items() if long and dimensions(letters[path]) is not None]
    assert dimensions(letters["layers.0.q"]) is not None


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_filters_of_convolutions_neither_decay_nor_are_matrices(name):
    """Their first value is the identity, and zero is not nearer to anything."""
    filters = "layers.0.attention_conv.base_kernel"
    config = dataclasses.replace(BYTE_DRAFT, convolution=Convolution(2, 4))
    assert not np.any(update(config, name, 0.0)[1][filters])
    _, added = update(config, name, 1e-3)
    np.testing.assert_allclose(np.unique(added[filters].round(4)), np.unique(added["norm"].round(4)))
