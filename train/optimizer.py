"""Muon for the matrices of a model, AdamW for the rest (optax.contrib.muon; Jordan et al. 2024)."""

from collections.abc import Collection
from typing import Any, cast

import jax
import optax
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as optax_muon

from domino_jax.config import DecoderConfig
from domino_jax.weights import axes, flatten


def dimensions(letters: str) -> MuonDimensionNumbers | None:
    """Which axes of a weight are inputs and which outputs; None for norms and what is as long as the vocabulary."""
    names = letters.split()
    if len(names) == 1 or "V" in names:
        return None
    # Ours are [in, out]; where the model width comes last it is the only output, else the first axis is the only input.
    inputs = tuple(range(len(names) - 1)) if names[-1] == "D" else (0,)
    return MuonDimensionNumbers(inputs, tuple(i for i in range(len(names)) if i not in inputs))


def muon(
    config: DecoderConfig,
    lr: optax.Schedule,
    adam_lr: optax.Schedule,
    weight_decay: float,
    paths: Collection[str] | None = None,
) -> optax.GradientTransformation:
    """The rule over a model's flat dict of weights, or those of `paths`; norms do not decay."""
    letters = flatten(axes(config))
    matrices = {path: dimensions(letters[path]) for path in letters if paths is None or path in paths}
    return optax_muon(
        lr,
        adam_learning_rate=adam_lr,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        weight_decay_mask=lambda weights: jax.tree.map(lambda w: w.ndim > 1, weights),
        muon_weight_dimension_numbers=cast(Any, matrices),
    )
