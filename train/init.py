"""First weights of a drafter that are not random: the target's last layers, or another drafter's."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from convert import folders, hf
from convert.draft_configs import is_drafter, read_draft_config
from convert.drafters import form_of
from domino_jax.config import CALIBRATION, DraftConfig, TargetConfig
from domino_jax.drafters.dual_view import DualViewConfig
from domino_jax.errors import DominoError
from domino_jax.matrix import Matrix, dequantize
from domino_jax.weights import Target, flatten
from train.config import TrainedConfig


class FirstDrafter(NamedTuple):
    """The config of a drafter that another one begins with, and what had to be guessed of it."""

    config: TrainedConfig
    warnings: list[str]


def dequantized(target: Target) -> Target:
    """The target with its matrices as plain arrays, for what begins as a copy of some of them."""
    return jax.tree.map(dequantize, target, is_leaf=lambda leaf: isinstance(leaf, Matrix))


def check_target_layers(draft: DraftConfig, config: TargetConfig) -> None:
    """Refuse a drafter that can't begin as its target's last layers.

    Raises:
        DominoError: the layers differ in shape, there are too few, or the drafter reads no target layer below the last.
    """
    depth, layers = config.num_hidden_layers, draft.num_hidden_layers
    below = any(i < depth - 1 for i in draft.target_layer_ids)
    experts = any(config.is_sparse(i) for i in range(depth - layers, depth))
    if layers > depth or draft.intermediate_size != config.intermediate_size or not below or experts:
        raise DominoError(
            "a drafter can begin as the target's last layers only if it has no more of them, the same "
            "intermediate size, reads a target layer below the last, and those layers have no experts."
        )


def from_target(
    weights: dict[str, Array], draft: DraftConfig, config: TargetConfig, target: Target
) -> dict[str, Array]:
    """The drafter's weights with its layers and last norm copied from the target's last layers.

    fc passes on the deepest feature below the target's last layer, and adds its small random mixture of all features.
    At first the drafter is then the target without its first layers.

    Args:
        weights: the drafter's random weights, by path.

    Raises:
        DominoError: see `check_target_layers`.
    """
    check_target_layers(draft, config)
    depth, layers = config.num_hidden_layers, draft.num_hidden_layers
    made = dict(weights)
    theirs = flatten(target)
    for i in range(layers):
        own = [path for path in weights if path.startswith(f"layers.{i}.") and "_conv." not in path]
        made |= {
            path: theirs[path.replace(f"layers.{i}.", f"layers.{depth - layers + i}.", 1)]
            for path in own
            if config.qk_norm or not path.endswith(("q_norm", "k_norm"))
        }
        if not config.qk_norm:  # one that leaves the mean size of queries and keys as it is
            layer = target.layers[depth - layers + i]
            for name, weight in (("q_norm", layer.q), ("k_norm", layer.kv[0])):
                size = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(weight * layer.input_norm), axis=-1)))
                made[f"layers.{i}.{name}"] = jnp.full_like(weights[f"layers.{i}.{name}"], size)
    made["norm"] = theirs["norm"]
    made["context_norm"] = theirs[f"layers.{depth - 1}.input_norm"]
    width, below = config.hidden_size, [i for i in draft.target_layer_ids if i < depth - 1]
    place = draft.target_layer_ids.index(max(below))
    columns = slice(place * width, (place + 1) * width)
    made["fc"] = weights["fc"].at[:, columns].add(jnp.eye(width, dtype=weights["fc"].dtype))
    return made


def copied_view(weights: dict[str, Array], target: Target) -> dict[str, Array]:
    """A second view's weights with its attention copied from the target's own; those of a head stay."""
    theirs = flatten(target)
    return {path: theirs.get(path, weight) for path, weight in weights.items()}


def read_first_drafter(folder: Path, draft: TrainedConfig) -> FirstDrafter:
    """The config of the drafter in `folder`, with warnings, if `draft` can begin with its weights.

    Raises:
        DominoError: it is no drafter, or its config differs; it may lack a head.
    """
    if not folder.is_dir():
        raise DominoError(f"{folder} is not a folder; see --init-from.")
    file = folder / "config.json"
    raw = hf.read_json(file)
    if isinstance(draft, DraftConfig):
        if not is_drafter(raw):
            raise DominoError(f"{folder} is not a drafter (its config.json has no dflash_config); see --init-from.")
        found, warnings = read_draft_config(raw, draft.num_target_layers, file)
    else:
        form = form_of(raw, folder)
        if not issubclass(form.config, DualViewConfig):
            raise DominoError(f"{folder} holds no second view; see --init-from.")
        found, warnings = form.read(raw, None, file)
    # These were found for its proposals as they are, which training changes.
    for name in draft.__dataclass_fields__.keys() - set(CALIBRATION):
        theirs, ours = getattr(found, name, None), getattr(draft, name)
        if theirs != ours and not (name == "head" and theirs is None):
            raise DominoError(f"the drafter in {folder} has {name} {theirs}, this one {ours}: they must be the same.")
    return FirstDrafter(found, warnings)


def from_drafter(weights: dict[str, Array], draft: TrainedConfig, folder: Path) -> dict[str, Array]:
    """The drafter's weights with those of the drafter in `folder`, in float32.

    A plain DFlash drafter has no head: that of `weights` stays.

    Raises:
        DominoError: it is no whole drafter, or its config differs.
    """
    config = read_first_drafter(folder, draft).config
    return weights | flatten(folders.load_weights(folder, config, jnp.float32))
