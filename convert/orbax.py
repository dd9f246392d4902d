"""Orbax folders: config.json and the tokenizer's files as in Hugging Face's, the weights as an Orbax checkpoint.

DIR/config.json, DIR/tokenizer.json, ...    as they were
DIR/weights/                                our tree, each array in our layout and its stored dtype
DIR/weights/format.json                     the number of that layout: another one is refused

A training run's folder is read as well: DIR/config.json is its drafter's, DIR/checkpoints holds its states.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from convert.fields import read_json
from convert.hf import Form, Progress, grouped, write_json
from convert.tensors import some, tensor_differences
from domino_jax.config import DecoderConfig
from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.devices import own_devices
from domino_jax.sharding import DATA, MODEL, mesh_context, stored_shape
from domino_jax.sharding import stored_spec as stored_as
from domino_jax.weights import axes, flatten, is_table, unflatten, weight_shapes

WEIGHTS = "weights"
CHECKPOINTS = "checkpoints"  # of a training run
# Of the tree's names and layouts: 1 (without a file) had matrices [in, out...], 2 has [out..., in], K with V and gate
# with up in one array each, and the head's projection in two.
FORMAT = 2
FORMAT_FILE = "format.json"
CHUNK_BYTES = 2**22  # what a device of a mesh reads of a weight is whole chunks: small ones, little for nothing


def is_orbax(folder: Path) -> bool:
    """Whether the folder holds an Orbax checkpoint of ours."""
    return (folder / WEIGHTS / "_CHECKPOINT_METADATA").exists()


def is_run(folder: Path) -> bool:
    """Whether the folder is a training run's."""
    return (folder / CHECKPOINTS).is_dir() and not is_orbax(folder) and not any(folder.glob("*.safetensors"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Orbax misses a file that a training run's checkpoint has one folder further up, and says so each time."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"layers.0.q": x} -> {"layers": {"0": {"q": x}}}, a form that any Orbax user can read."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def save_orbax(folder: Path, module: Any) -> None:
    """Write a module's weights to `folder`/weights.

    Raises:
        DominoError: the folder can't be written.
    """
    tree = _nested(flatten(module))
    form: Any = ocp.args.PyTreeSave(tree, jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree))
    most = 1 + max(leaf.nbytes for leaf in jax.tree.leaves(tree)) // 10**9  # in flight; Orbax refuses what is not below
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=most, save_device_host_concurrent_gb=most)
    try:
        with ocp.AsyncCheckpointer(handler) as checkpointer:
            checkpointer.save((folder / WEIGHTS).absolute(), args=form)
        write_json(folder / WEIGHTS / FORMAT_FILE, {"format": FORMAT})
    except Exception as error:  # the array storage behind Orbax raises several kinds
        raise DominoError(f"{folder / WEIGHTS} can't be written: {first_line(error)}") from error


def check_format(folder: Path, names: Iterable[str]) -> None:
    """Refuse weights in another format than this version's.

    Args:
        names: of the stored weights; a training run has no file that tells its format.

    Raises:
        DominoError: they are in another one.
    """
    if is_run(folder):
        found = 1 if any(name.endswith((".k", ".v")) for name in names) else FORMAT
    else:
        file = folder / WEIGHTS / FORMAT_FILE
        found = read_json(file).get("format") if file.exists() else 1
    if found != FORMAT:
        again = "train it again" if is_run(folder) else "convert the Hugging Face files again with python -m convert"
        raise DominoError(f"{folder} holds weights in format {found}, and this version reads format {FORMAT}: {again}.")


class Saved:
    """The weights of an Orbax folder, or of the newest checkpoint of a training run, to be read some at a time."""

    def __init__(self, folder: Path, config: DecoderConfig):
        """Looks at what there is, and reads no values.

        Raises:
            DominoError: weights are missing, unexpected or misshapen (all are named), or there are none.
        """
        self.config = config
        self._nest = not is_run(folder)
        self._path = (folder / WEIGHTS if self._nest else _newest(folder)).absolute()
        self._checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        wanted = flatten(weight_shapes(config))
        try:
            with _quiet():
                tree: Any = self._checkpointer.metadata(self._path).item_metadata.tree  # type: ignore[union-attr]
            # Of a run that keeps an average of its weights, that is the drafter.
            averaged = {} if self._nest else dict(tree.get("average") or {})
            found = flatten(tree) if self._nest else dict(tree["weights"]) | averaged
        except Exception as error:  # the array storage behind Orbax raises several kinds
            raise DominoError(f"{self._path} is not a whole Orbax checkpoint: {error}") from error
        check_format(folder, found)
        self.shapes = {name: form.shape for name, form in wanted.items()}
        problems = tensor_differences(
            self.shapes, {n: (tuple(x.shape), jnp.dtype(x.dtype).name) for n, x in found.items()}
        )
        if problems:
            raise DominoError(f"{folder} does not hold the model of its config.json: {some(problems)}.")
        self.dtypes = {name: jnp.dtype(found[name].dtype) for name in wanted}
        self._letters = flatten(axes(config))
        self._averaged = frozenset(averaged)

    def bytes(self, path: str) -> int:
        """A weight's size as stored."""
        return prod(self.shapes[path]) * self.dtypes[path].itemsize

    def read(self, paths: list[str], dtype: Any = None, mesh: Mesh | None = None) -> dict[str, Any]:
        """Some weights by their paths, on the default device, or each device's part of a mesh on that device.

        Args:
            dtype: to convert to; as stored when None.

        Raises:
            DominoError: they are damaged.
        """
        places = {path: self._place(path, mesh) for path in paths}
        arguments = {
            path: ocp.ArrayRestoreArgs(
                sharding=sharding,
                global_shape=shape,
                strict=False,  # a padded vocabulary: what is beyond the stored one is zero
                dtype=self.dtypes[path] if is_table(path) else dtype or self.dtypes[path],
            )
            for path, (shape, sharding) in places.items()
        }
        form = {path: jax.ShapeDtypeStruct(self.shapes[path], self.dtypes[path]) for path in paths}
        tree, arguments = self._stored(form), self._stored(arguments)
        try:
            wanted: Any = ocp.args.PyTreeRestore(item=tree, restore_args=arguments, partial_restore=True)
            with _quiet():
                restored = self._checkpointer.restore(self._path, args=wanted)
        except Exception as error:  # the array storage behind Orbax raises several kinds
            raise DominoError(f"{self._path} is not a whole Orbax checkpoint: {error}") from error
        leaves = flatten(restored) if self._nest else {p: x for part in restored.values() for p, x in part.items()}
        return {path: self._whole(path, leaves[path], mesh) for path in paths}

    def _stored(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """Some leaves by path, in the tree that the checkpoint is."""
        if self._nest:
            return _nested(leaves)
        parts: dict[str, Any] = {}
        for path, leaf in leaves.items():
            parts.setdefault("average" if path in self._averaged else "weights", {})[path] = leaf
        return parts

    def _place(self, path: str, mesh: Mesh | None) -> tuple[tuple[int, ...], Any]:
        """The shape to restore a weight with, and where to."""
        if mesh is None:
            return self.shapes[path], SingleDeviceSharding(own_devices()[0])
        letters, stored, model = self._letters[path].split(), self.shapes[path], mesh.shape[MODEL]
        shape = stored_shape(letters, stored, self.config, model)
        if "K" in letters and shape != stored:
            # Devices that share a KV head read the same one: an axis for the heads, and one for the copies.
            heads = self.config.num_key_value_heads
            finer = Mesh(mesh.devices.reshape(mesh.shape[DATA], heads, -1), (DATA, "heads", "copies"))
            part = PartitionSpec(*("heads" if letter == "K" else None for letter in letters))
            return stored, NamedSharding(finer, part)
        return shape, NamedSharding(mesh, stored_as(self._letters[path], mesh))

    def _whole(self, path: str, restored: jax.Array, mesh: Mesh | None) -> jax.Array:
        """A restored weight as the mesh has it: its parts are there, copies of KV heads included."""
        if mesh is None:
            return restored
        letters = self._letters[path]
        shape = stored_shape(letters.split(), self.shapes[path], self.config, mesh.shape[MODEL])
        parts = [shard.data for shard in restored.addressable_shards]
        return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, stored_as(letters, mesh)), parts)


def load_orbax(
    folder: Path,
    config: DecoderConfig,
    dtype: Any = None,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
    form: Form | None = None,
) -> Any:
    """Read `folder`/weights into a module (Target or Draft), each device of a mesh its part.

    Args:
        dtype: to convert to; as stored when None.
        progress: called now and then.
        mesh: the default device when None.
        form: see `hf.load_hf`.

    Raises:
        DominoError: weights are missing, unexpected or misshapen (all are named), or damaged.
    """
    saved = Saved(folder, config)
    total, leaves = sum(map(saved.bytes, saved.shapes)), {}
    for group in grouped(sorted(saved.shapes, key=saved.bytes, reverse=True), saved.bytes):
        read = jax.block_until_ready(saved.read(group, dtype, mesh))
        for path in group:
            weight = read.pop(path)
            with mesh_context(mesh):
                leaves[path] = weight if form is None else jax.block_until_ready(form(path, weight))
            del weight
        if progress:
            progress(sum(map(saved.bytes, leaves)), total)
    return unflatten(config, leaves)


def _newest(run: Path) -> Path:
    """Where the newest whole checkpoint of a training run holds its state."""
    steps = ocp.utils.checkpoint_steps((run / CHECKPOINTS).absolute())
    if not steps:
        raise DominoError(f"{run / CHECKPOINTS} has no checkpoint yet.")
    return run / CHECKPOINTS / str(max(steps)) / "default"
