"""Which device holds what: a mesh of named axes, and one rule for each letter of the axis legend.

Weights, caches and activations are laid out by the same table: the batch over `data`; heads, MLP width, experts and
vocabulary over `model`. Without a mesh in context (`jax.set_mesh`) nothing here does anything.

Training's meshes have a third axis, `fsdp`: the batch is divided over it too, and so is every matrix while it lies in
memory, along one axis that `model` leaves whole. It is gathered where it is used (`gathered`), and its gradient goes
back in parts.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from domino_jax.config import DecoderConfig
from domino_jax.errors import DominoError
from domino_jax.matrix import AnyMatrix, Scaled, letters_of_parts
from domino_jax.weights import axes, flatten

DATA, FSDP, MODEL = "data", "fsdp", "model"

# Letters that are not here are whole on every device. The head's GRU and its inner projection are small, and a cycle
# runs them J times one after another: sharding them would cost a collective each time.
RULES = {"B": DATA, "N": MODEL, "NH": MODEL, "K": MODEL, "F": MODEL, "E": MODEL, "V": MODEL, "DV": MODEL}

# Which axis of a matrix lies over `fsdp`: the first of these that it has. Norms and biases are whole.
DIVIDED = ("D", "U", "R")


def make_mesh(data: int, model: int, fsdp: int | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of data x model devices, or for training of data x fsdp x model, the first of those there are.

    Args:
        devices: to take them from, as of a topology that programs are compiled for; this process's when None.

    Raises:
        DominoError: there are fewer devices.
    """
    here = devices is None
    devices = jax.devices() if devices is None else devices
    sizes = {DATA: data, MODEL: model} if fsdp is None else {DATA: data, FSDP: fsdp, MODEL: model}
    count, words = math.prod(sizes.values()), ", ".join(f"{name}={size}" for name, size in sizes.items())
    if min(sizes.values()) < 1 or count > len(devices):
        raise DominoError(f"a mesh of {words} needs {count} devices; found {len(devices)}.")
    if here and jax.process_count() > 1 and count != len(devices):
        raise DominoError(
            f"a mesh of several processes has all their {len(devices)} devices; {words} has {count}: give another with "
            "--mesh."
        )
    axis_types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types, devices=devices[:count])


def spec(letters: str, mesh: Mesh | AbstractMesh | None = None) -> PartitionSpec:
    """The partition of an array by its axis letters ("D N H"); "-" is an axis without one.

    Args:
        mesh: the one in context when None.
    """
    names = (jax.sharding.get_abstract_mesh() if mesh is None else mesh).axis_names
    rows = {"B": (DATA, FSDP)} if FSDP in names else {}
    return PartitionSpec(*((RULES | rows).get(letter) for letter in letters.split()))


def stored_spec(letters: str, mesh: Mesh | AbstractMesh | None = None) -> PartitionSpec:
    """The partition of a weight in memory: `spec`, and over `fsdp` where the mesh has that axis."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    names, axes = letters.split(), list(spec(letters, mesh))
    if FSDP in mesh.axis_names and len(names) > 1:
        divided = next((names.index(letter) for letter in DIVIDED if letter in names), None)
        if divided is not None:
            axes[divided] = FSDP
    return PartitionSpec(*axes)


def gathered(weights: Any, letters: Any) -> Any:
    """Weights in the form in which they are used: whole over `fsdp`. The gradient of each comes back as it is stored.

    Args:
        weights: a tree of matrices, stored by `stored_spec`; those in 8 bits are of a frozen model.
        letters: the tree of their axis letters.
    """
    if FSDP not in jax.sharding.get_abstract_mesh().axis_names:
        return weights
    return jax.tree.map(_gathered_matrix, letters, weights)


def _gathered_matrix(letters: str, weight: AnyMatrix) -> AnyMatrix:
    if isinstance(weight, Scaled):  # which has no gradient: its values are gathered as they are stored
        return jax.tree.map(constrain, weight, letters_of_parts(weight, letters))
    return _gathered(weight, letters)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(weight: Array, letters: str) -> Array:
    return jax.lax.with_sharding_constraint(weight, spec(letters))


def _gathered_forward(weight: Array, letters: str) -> tuple[Array, None]:
    return _gathered(weight, letters), None


def _gathered_backward(letters: str, _: None, gradient: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(gradient, stored_spec(letters)),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def row_shards() -> int:
    """Parts that the batch is divided into: the devices of `data` and `fsdp` of the mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in (DATA, FSDP) if name in mesh.axis_names)


def mesh_context(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """What to run programs in: the mesh, or nothing for the default device."""
    return jax.set_mesh(mesh) if mesh else nullcontext()


def constrain(x: Array, letters: str) -> Array:
    """`x` in a program, laid out by its axis letters where a mesh is in context."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(letters))


def constrain_stored(weight: AnyMatrix, letters: str) -> AnyMatrix:
    """A weight in a program, laid out by its axis letters as it lies in memory, where a mesh is in context."""
    if jax.sharding.get_abstract_mesh().empty:
        return weight

    def lay(x: Array, names: str) -> Array:
        return jax.lax.with_sharding_constraint(x, stored_spec(names))

    return jax.tree.map(lay, weight, letters_of_parts(weight, letters))


def model_devices() -> int:
    """Devices that share the vocabulary, and each layer: the size of the mesh axis `model` in context."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[MODEL]


def shard_copy(x: Any, letters: str) -> Array:
    """A copy of `x`, laid out by its axis letters where a mesh is in context; each process must have the same `x`."""
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.array(x, copy=True)
    if isinstance(x, Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(shard_copy(jax.random.key_data(x), f"{letters} -"))
    return shard_array(np.asarray(x), NamedSharding(jax.sharding.get_mesh(), spec(letters)))


def fetch(tree: Any) -> Any:
    """The tree's arrays on the host of every process."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and not all(x.is_fully_addressable for x in jax.tree.leaves(tree) if isinstance(x, Array)):
        tree = _everywhere(tree)
    return jax.device_get(tree)


@jax.jit
def _everywhere(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)


def shard_array(array: Any, sharding: NamedSharding) -> Array:
    """An array that every process has, on a mesh: each gives its own devices their parts, and sends nothing."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def zeros(shape: tuple[int, ...], dtype: Any, letters: str) -> Array:
    """Zeros, made where they belong: on each device its part."""
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.zeros(shape, dtype)
    if isinstance(made := jnp.zeros((), dtype), Tracer):  # in a program, whose devices are not known yet
        return constrain(jnp.broadcast_to(made, shape), letters)
    return jnp.zeros(shape, dtype, device=NamedSharding(jax.sharding.get_mesh(), spec(letters)))


def parse_mesh(text: str) -> tuple[int, int]:
    """The sizes (data, model) of "data=2,model=4"; one that is not named is 1.

    Raises:
        DominoError: it is not of this form.
    """
    return _parse(text, {DATA: 1, MODEL: 1}, "data=2,model=4")


def parse_training_mesh(text: str) -> tuple[int, int, int]:
    """The sizes (data, fsdp, model) of "data=1,fsdp=4,model=2"; one that is not named is 1.

    Raises:
        DominoError: it is not of this form.
    """
    return _parse(text, {DATA: 1, FSDP: 1, MODEL: 1}, "data=1,fsdp=4,model=2")


def _parse(text: str, sizes: dict[str, int], example: str) -> Any:
    given: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        number = int(size) if size.isascii() and size.isdecimal() and len(size) < 10 else 0
        if name not in sizes or name in given or number < 1:
            raise DominoError(f"a mesh is given as {example}, found {text[:80]!r}.")
        given[name] = number
    return tuple((sizes | given).values())


Config = TypeVar("Config", bound=DecoderConfig)


def fit_to_mesh(config: Config, model: int) -> Config:
    """The config of the weights that `shard_stored` makes for `model` devices: more KV heads where there are too few.

    Raises:
        DominoError: heads, MLP width or experts can't be divided.
    """
    heads = config.num_key_value_heads
    copies = 1 if heads % model == 0 else model // heads if model % heads == 0 else 0
    used = {letter for letters in flatten(axes(config)).values() for letter in letters.split()}
    for letter, name in (("N", "num_attention_heads"), ("F", "intermediate_size"), ("E", "num_experts")):
        if letter in used and config.sizes[letter] % model:
            raise DominoError(f"mesh axis model={model} does not divide {name} {config.sizes[letter]}.")
    if not copies:
        raise DominoError(f"mesh axis model={model} neither divides num_key_value_heads {heads} nor is divided by it.")
    return dataclasses.replace(config, num_key_value_heads=heads * copies)


def config_of_device(config: Config, mesh: Mesh | None) -> Config:
    """The config with the heads that one device of the mesh has."""
    model = mesh.shape[MODEL] if mesh else 1
    heads, kv_heads = config.num_attention_heads // model, config.num_key_value_heads // model
    return dataclasses.replace(config, num_attention_heads=heads, num_key_value_heads=kv_heads)


def stored_shape(letters: Sequence[str], shape: Sequence[int], config: DecoderConfig, model: int) -> tuple[int, ...]:
    """The shape of a stored array on a mesh of `model` devices: more KV heads (see `fit_to_mesh`), padded vocabulary.

    Args:
        letters: of each axis; the first, where an axis holds several.
    """
    copies = _copies(config, model)
    return tuple(
        size * copies if letter == "K" else size + -size % model if letter in ("V", "DV") else size
        for letter, size in zip(letters, shape, strict=True)
    )


def _copies(config: DecoderConfig, model: int) -> int:
    return fit_to_mesh(config, model).num_key_value_heads // config.num_key_value_heads


def shard_stored(
    read: Callable[[tuple[slice, ...]], np.ndarray],
    letters: Sequence[str],
    shape: tuple[int, ...],
    config: DecoderConfig,
    mesh: Mesh,
) -> Array:
    """A stored array on a mesh: each device is given its part, and nothing else is read.

    KV heads are repeated until there is one for each device of `model` (groups of devices then hold the same), and the
    vocabulary is padded with zeros to a multiple of it.

    Args:
        read: gives the part of the stored array that has these slices, one for each axis.
        letters: see `stored_shape`.
        shape: the stored array's.
    """
    copies = _copies(config, mesh.shape[MODEL])
    whole = stored_shape(letters, shape, config, mesh.shape[MODEL])
    read_parts: dict[Any, np.ndarray] = {}  # devices of one group hold the same

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        bounds = [one.indices(size)[:2] for one, size in zip(index, whole, strict=True)]
        key = tuple(bounds)
        if key not in read_parts:
            padding = []
            for axis, letter in enumerate(letters):
                begin, end = bounds[axis]
                if letter == "K" and copies > 1:
                    head = shape[axis] // config.num_key_value_heads  # rows of the axis
                    assert end - begin == head, "with copies, a device has one KV head"
                    begin = begin // head // copies * head
                    end = begin + head
                stop = min(end, shape[axis])
                padding.append((0, end - max(begin, stop)))
                bounds[axis] = (begin, stop) if begin < stop else (0, 0)
            value = read(tuple(slice(*bound) for bound in bounds))
            read_parts[key] = np.pad(value, padding) if any(map(any, padding)) else value
        return read_parts[key]

    return jax.make_array_from_callback(whole, NamedSharding(mesh, stored_spec(" ".join(letters), mesh)), part)
