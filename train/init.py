"""First weights of a drafter that are not random: the target's last layers, or another drafter's."""

from pathlib import Path

import jax.numpy as jnp
from jax import Array

from convert import folders
from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.errors import DominoError
from domino_jax.weights import Target, flatten


def from_target(
    weights: dict[str, Array], draft: DraftConfig, config: TargetConfig, target: Target
) -> dict[str, Array]:
    """The drafter's weights with its layers and last norm copied from the target's last layers.

    fc passes on the deepest feature below the target's last layer, and adds its small random mixture of all features.
    At first the drafter is then the target without its first layers.

    Args:
        weights: the drafter's random weights, by path.

    Raises:
        DominoError: the layers differ in shape, there are too few, or the drafter reads no target layer below the last.
    """
    depth, layers = config.num_hidden_layers, draft.num_hidden_layers
    below = [i for i in draft.target_layer_ids if i < depth - 1]
    experts = any(config.is_sparse(i) for i in range(depth - layers, depth))
    if layers > depth or draft.intermediate_size != config.intermediate_size or not below or experts:
        raise DominoError(
            "a drafter can begin as the target's last layers only if it has no more of them, the same "
            "intermediate size, reads a target layer below the last, and those layers have no experts."
        )
    made = dict(weights)
    theirs = flatten(target)
    for i in range(layers):
        made |= {
            path: theirs[path.replace(f"layers.{i}.", f"layers.{depth - layers + i}.", 1)]
            for path in weights
            if path.startswith(f"layers.{i}.")
        }
    made["norm"] = theirs["norm"]
    made["context_norm"] = theirs[f"layers.{depth - 1}.input_norm"]
    width, place = config.hidden_size, draft.target_layer_ids.index(max(below))
    columns = slice(place * width, (place + 1) * width)
    made["fc"] = weights["fc"].at[:, columns].add(jnp.eye(width, dtype=weights["fc"].dtype))
    return made


def from_drafter(weights: dict[str, Array], draft: DraftConfig, folder: Path) -> dict[str, Array]:
    """The drafter's weights with those of the drafter in `folder`, in float32.

    A plain DFlash drafter has no head: that of `weights` stays.

    Raises:
        DominoError: it is no whole drafter, or its config differs.
    """
    config = folders.read_config(folder, draft.num_target_layers)
    if not isinstance(config, DraftConfig):
        raise DominoError(f"{folder} is not a drafter (its config.json has no dflash_config); see --init-from.")
    for name in DraftConfig.__dataclass_fields__:
        theirs, ours = getattr(config, name), getattr(draft, name)
        if theirs != ours and not (name == "head" and theirs is None):
            raise DominoError(f"the drafter in {folder} has {name} {theirs}, this one {ours}: they must be the same.")
    return weights | flatten(folders.load_weights(folder, config, jnp.float32))
