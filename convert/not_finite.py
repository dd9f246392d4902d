"""What to say where a model's numbers are not finite."""

import re
import sys
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from convert.names import entries
from domino_jax.config import TargetConfig
from domino_jax.errors import DominoError
from domino_jax.finite import first_not_finite
from domino_jax.runtime.slots import Completion
from domino_jax.weights import JOINED, Target

NOT_FINITE_DRAFTS = (
    "the drafter's numbers are not finite (NaN or infinite), so that few or none of its drafts stand: the output is "
    "the target's own all the same; check the drafter with python -m convert --check DIR."
)
MOST_NAMES = 2  # an expert's weight has a name for each expert


class NotFiniteError(DominoError):
    """A target's numbers are not finite: whatever it is asked next, it is not to be trusted."""


def check_finite(completion: Completion, params: Target, config: TargetConfig, dtype: Any) -> None:
    """Refuse to go on where the target's logits after a request's tokens were not finite.

    Raises:
        NotFiniteError: they were not.
    """
    if not completion.finite:
        raise not_finite_error(params, config, completion.ids, dtype)


def warn_of_drafts() -> None:
    """Say on standard error that the drafter's numbers are not finite."""
    print(f"warning: {NOT_FINITE_DRAFTS}", file=sys.stderr)


def not_finite_error(params: Target, config: TargetConfig, ids: Sequence[int], dtype: Any) -> NotFiniteError:
    """The error of a target whose logits after `ids` are not finite; it names where such numbers begin.

    Args:
        dtype: of the caches.
    """
    found = first_not_finite(params, config, ids, dtype)
    if found.place is None:
        return NotFiniteError(
            "the target's output is not finite (NaN or infinite), though its numbers are when the text is run alone: "
            "try --draft none, --dtype float32, or a higher temperature."
        )
    said = f"the target's numbers are not finite (NaN or infinite) from {found.place} on"
    if found.place.startswith("layer"):
        said += f" (of {config.num_hidden_layers}, counted from 0)"
    if found.position is not None:
        said += f", first at token {found.position} (id {ids[found.position]}) of {len(ids)}"
    if found.weight is not None:
        return NotFiniteError(
            f"{said}: {_tensor(config, found.weight)} holds such values; fetch the model again, or check it with "
            "python -m convert --check DIR."
        )
    if jnp.dtype(dtype) == jnp.float32:
        return NotFiniteError(f"{said}: its weights are finite, but so large that sums overflow in float32.")
    return NotFiniteError(
        f"{said}: its weights are finite, but sums overflow in {jnp.dtype(dtype).name}; try --dtype float32."
    )


def _tensor(config: TargetConfig, path: str) -> str:
    """The name in the file of the weight that has a leaf at this path."""
    *layer, name = re.sub(r"(\.values|\.scale)+$", "", path).split(".")
    if name in JOINED:
        return " or ".join(_tensor(config, ".".join([*layer, part])) for part in JOINED[name])
    for entry in entries(config):
        if f"{path}.".startswith(f"{entry.path}."):
            more = f" or one of {len(entry.hf_names) - MOST_NAMES} more" if len(entry.hf_names) > MOST_NAMES else ""
            return " or ".join(entry.hf_names[:MOST_NAMES]) + more
    return path
