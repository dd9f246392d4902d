"""Models of the public shapes with random weights, loaded.

The time of a cycle does not depend on the weights' values. Acceptance does: with random weights next to
nothing is accepted, and an acceptance length can be stated instead (`--simulate-tau`).
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from convert.hf import write_json
from convert.loading import LoadedModel, load_model
from convert.registry import NO_DRAFT
from convert.shapes import Shape, find_shape, random_weights
from domino_jax.errors import DominoError


def load_random(name: str, draft: str | None = None, **how: Any) -> LoadedModel:
    """A model of a shape of the table, with random weights.

    Args:
        draft: None for the shape's drafter, "none" for no drafter.
        how: what else `convert.loading.load_model` takes (dtype, mesh).

    Raises:
        DominoError: the table has no such shape, or `load` refuses.
    """
    shape = find_shape(name)
    if draft not in (None, NO_DRAFT):
        raise DominoError(f"--shapes {name} has a drafter of its own shape: leave --draft out, or give --draft none.")
    # Through folders without weights, so that whatever is true of a loaded model is true of this one.
    with TemporaryDirectory() as root:
        folders = []
        for part, config in zip(Shape._fields, shape, strict=True):
            folders.append(Path(root) / part)
            folders[-1].mkdir()
            write_json(folders[-1] / "config.json", config.to_hf())
        target, drafter = folders
        return load_model(target, None if draft == NO_DRAFT else drafter, make_weights=random_weights, **how)
