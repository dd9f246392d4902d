"""Training's mesh: made from one flag, checked against the models, and what is put on it.

data   the batch; weights whole on each of its devices
fsdp   the batch; matrices divided while they lie in memory, gathered where they are used
model  heads, MLP width, experts and vocabulary
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding

from domino_jax.config import DecoderConfig
from domino_jax.errors import DominoError
from domino_jax.matrix import letters_of_parts
from domino_jax.sharding import (
    DATA,
    DIVIDED,
    FSDP,
    fit_to_mesh,
    make_mesh,
    parse_training_mesh,
    shard_array,
    spec,
    stored_spec,
)
from domino_jax.weights import axes, flatten
from train.loss import Inputs


def make_training_mesh(text: str, configs: Sequence[DecoderConfig], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of "data=1,fsdp=4,model=2" for models of these configs.

    Args:
        devices: see `domino_jax.sharding.make_mesh`.

    Raises:
        DominoError: it is not of this form, there are too few devices, or a size does not divide what lies over it.
    """
    data, fsdp, model = parse_training_mesh(text)
    for config in configs:
        check_mesh(config, fsdp, model)
    return make_mesh(data, model, fsdp, devices)


def check_mesh(config: DecoderConfig, fsdp: int, model: int) -> None:
    """Refuse sizes that don't divide a model's axes: masters are saved in their true shapes, none is padded or copied.

    Raises:
        DominoError: naming the mesh's axis and the model's.
    """
    sizes = config.sizes
    if fit_to_mesh(config, model) != config:
        raise DominoError(f"mesh axis model={model} does not divide num_key_value_heads {sizes['K']}.")
    if sizes["V"] % model:
        raise DominoError(f"mesh axis model={model} does not divide vocab_size {sizes['V']}.")
    for path, letters in flatten(axes(config)).items():
        names = letters.split()
        divided = next((letter for letter in DIVIDED if letter in names), None)
        if len(names) > 1 and divided and sizes[divided] % fsdp:
            raise DominoError(f"mesh axis fsdp={fsdp} does not divide the {sizes[divided]} of {path}'s axis {divided}.")


def place_module(module: Any, config: DecoderConfig, mesh: Mesh | None) -> Any:
    """A module (Target or Draft), laid out for training; as it is without a mesh.

    What lies so already (`convert` reads weights onto this mesh) stays. What does not is moved between devices, and
    what is on the host (the same in each process) goes to its devices in parts.
    """
    if mesh is None:
        return module

    def place(letters: str, weight: Any) -> Any:
        return jax.tree.map(partial(_placed, mesh), weight, letters_of_parts(weight, letters))

    with jax.set_mesh(mesh):
        return jax.tree.map(place, axes(config), module)


def _placed(mesh: Mesh, weight: Any, letters: str) -> Array:
    sharding = NamedSharding(mesh, stored_spec(letters, mesh))
    if isinstance(weight, Array) and weight.sharding.device_set == sharding.device_set:
        if weight.sharding.is_equivalent_to(sharding, weight.ndim):
            return weight
        return jax.jit(lambda x: x, out_shardings=sharding)(weight)
    return shard_array(jax.device_get(weight), sharding)


def piece(mesh: Mesh | None) -> tuple[int, int]:
    """Which part of each batch this process reads, (i, n): the i-th of n equal pieces of its rows.

    Processes that share their rows, because `model` lies across them, read the same piece.

    Raises:
        DominoError: this process's devices have no contiguous part of the rows.
    """
    if mesh is None:
        return 0, 1
    rows = mesh.shape[DATA] * mesh.shape[FSDP]
    indices = NamedSharding(mesh, spec("B", mesh)).addressable_devices_indices_map((rows,))
    mine = sorted({index[0].indices(rows)[0] for index in indices.values() if index is not None})
    if mine != list(range(mine[0], mine[0] + len(mine))) or rows % len(mine) or mine[0] % len(mine):
        raise DominoError(
            f"the devices of process {jax.process_index()} hold rows {mine} of {rows}, not a contiguous part: give "
            "another --mesh, with data times fsdp a multiple of the number of processes."
        )
    return mine[0] // len(mine), rows // len(mine)


def put_batch(batch: Any, mesh: Mesh | None, features: Any = None, hidden: Any = None) -> Inputs:
    """This process's piece of a batch (see `piece`), on its devices, as the whole batch's `Inputs`.

    Args:
        batch: has ids, mask and starts, arrays [B, S] on the host; starts may be None.
        features, hidden: captured states [B, S, ...] of the same rows, where there are any.

    Raises:
        DominoError: the rows can't be divided over the devices.
    """
    given = Inputs(batch.ids, batch.mask, batch.starts, features, hidden)
    if mesh is None:
        return jax.tree.map(jnp.asarray, given)
    shards = mesh.shape[DATA] * mesh.shape[FSDP]
    rows = len(batch.ids) * piece(mesh)[1]
    if rows % shards:
        raise DominoError(f"a batch of {rows} rows can't be divided over data x fsdp = {shards} devices.")
    # Unlike `shard_array`: a process has its own rows, and not the others'.
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(_row_sharding(mesh, x), np.asarray(x)), given)


def laid_rows(inputs: Inputs, mesh: Mesh | None) -> Inputs:
    """Inputs that each process made alike, divided over the mesh."""
    if mesh is None:
        return inputs
    return jax.tree.map(lambda x: shard_array(x, _row_sharding(mesh, x)), inputs)


def _row_sharding(mesh: Mesh, x: Any) -> NamedSharding:
    return NamedSharding(mesh, spec(" ".join(["B", *("-" for _ in x.shape[1:])]), mesh))
