"""Orbax folders: config.json and the tokenizer's files as in Hugging Face's, the weights as an Orbax checkpoint.

DIR/config.json, DIR/tokenizer.json, ...    as they were
DIR/weights/                                our tree, each array in our layout and its stored dtype
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from convert.hf import Put, on_device
from domino_jax.config import DecoderConfig
from domino_jax.errors import DominoError
from domino_jax.weights import flatten, shapes, unflatten

WEIGHTS = "weights"


def is_orbax(folder: Path) -> bool:
    """Whether the folder holds an Orbax checkpoint of ours."""
    return (folder / WEIGHTS / "_CHECKPOINT_METADATA").exists()


def _nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """{"layers.0.q": x} -> {"layers": {"0": {"q": x}}}, a form that any Orbax user can read."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def save(folder: Path, module: Any) -> None:
    """Write a module's weights to `folder`/weights.

    Raises:
        DominoError: the folder can't be written.
    """
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((folder / WEIGHTS).absolute(), _nested(flatten(module)))
    except Exception as error:  # the array storage behind Orbax raises several kinds
        raise DominoError(f"{folder / WEIGHTS} can't be written: {error}") from error


def load(folder: Path, config: DecoderConfig, dtype: Any = None, put: Put = on_device) -> Any:
    """Read `folder`/weights into a module (Target or Draft).

    Args:
        dtype: to convert to; as stored when None.
        put: where each weight goes once all are read.

    Raises:
        DominoError: weights are missing, unexpected or misshapen (all are named), or damaged.
    """
    path = (folder / WEIGHTS).absolute()
    wanted = flatten(shapes(config))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            found = flatten(checkpointer.metadata(path).item_metadata.tree)  # type: ignore[union-attr]
            problems = [f"missing {name}" for name in sorted(wanted.keys() - found.keys())]
            problems += [f"unexpected {name}" for name in sorted(found.keys() - wanted.keys())]
            problems += [
                f"{name} has shape {list(found[name].shape)}, expected {list(spec.shape)}"
                for name, spec in wanted.items()
                if name in found and tuple(found[name].shape) != spec.shape
            ]
            if problems:
                raise DominoError(f"{folder} does not hold the model of its config.json: {'; '.join(problems[:8])}.")
            form = {
                name: jax.ShapeDtypeStruct(spec.shape, found[name].dtype, sharding=_default_sharding())
                for name, spec in wanted.items()
            }
            leaves = flatten(checkpointer.restore(path, _nested(form)))
    except DominoError:
        raise
    except Exception as error:
        raise DominoError(f"{path} is not a whole Orbax checkpoint: {error}") from error
    if dtype is not None:
        leaves = {name: leaf.astype(dtype) for name, leaf in leaves.items()}
    return unflatten(config, {name: put(name, np.asarray(leaf)) for name, leaf in leaves.items()})


def _default_sharding() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])
