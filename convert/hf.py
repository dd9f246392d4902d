"""Hugging Face directories: config.json and safetensors, single or sharded, in and out.

Only safetensors are read. A pickle can run code when it is opened, so it is refused.
"""

import gc
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import save_file

from convert.companions import companions
from convert.configs import read_target_config
from convert.drafters import form_of
from convert.dual_view import holds_both
from convert.fields import read_json as read_json  # hf.read_json reads a model's files
from convert.names import Entry, entries, to_hf, units, vocabulary_tables
from convert.tensors import INDEX, SINGLE, account_tensors, compare_derived, open_tensors, some
from domino_jax.config import CustomDraftConfig, DecoderConfig, DraftConfig, TargetConfig
from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.files import write_text
from domino_jax.sharding import mesh_context, shard_stored
from domino_jax.weights import flatten, in_dtype, is_table, unflatten

SHARD_BYTES = 5 * 10**9
GROUP_BYTES = 2**28  # weights that are asked for at a time

Progress = Callable[[int, int], None]  # bytes done, bytes in all
Leaves = Callable[[list[str]], Mapping[str, Any]]  # paths of some weights -> their values
Form = Callable[[str, Any], Any]  # a weight's path, and the weight -> what is to be held of it


def parse_config(
    raw: Mapping[str, Any], num_target_layers: int | None = None, file: Path | None = None
) -> TargetConfig | DraftConfig | CustomDraftConfig:
    """The config of a target or of a drafter, by what a config.json holds; the target's where a folder has both.

    Args:
        num_target_layers: the target's depth, for a drafter that does not state it.
        file: where `raw` is from, for errors.

    Raises:
        DominoError: a field is missing or of another kind, or asks for what is not supported.
    """
    if holds_both(raw, file and file.parent):
        return read_target_config(raw, file)
    return form_of(raw).read(raw, num_target_layers, file)[0]


def load_hf(
    folder: Path,
    config: DecoderConfig,
    dtype: Any = None,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
    target: Path | None = None,
    form: Form | None = None,
) -> Any:
    """Read the weights of a Hugging Face folder into a module (Target or Draft), one tensor after another.

    Each goes to its device, or device by device to its part of a mesh, before the next is read, and gets its layout and
    dtype there. On the way the host holds one tensor, and no device more than its part and one tensor's part.

    Args:
        folder: holds the safetensors.
        config: what the folder's config.json says.
        dtype: to convert to; as stored when None.
        progress: called after each tensor.
        mesh: the default device when None.
        target: the folder of a drafter's target, for drafters with copies of its embeddings or LM head.
        form: is given each weight when it is there, and says what is kept of it; the weight itself when None.

    Raises:
        DominoError: tensors are missing, unexpected or misshapen (all are named), one that would be left out is not
            what the model has in its place, or a file is damaged.
    """
    table, files = entries(config), open_tensors(folder)
    with mesh_context(mesh):
        account = account_tensors(config, files.stored)
        where = account.stored
        problems = account.problems or compare_derived(config, account, files, target, whole=False)
        if problems:
            raise DominoError(f"{folder} does not hold the model of its config.json: {some(problems)}.")
        # The largest first: what is needed besides a tensor itself is needed while the device is still empty.
        table.sort(key=lambda entry: -prod(entry.shape))
        total, done = sum(prod(entry.shape) for entry in table), 0
        size = max(where[name].bytes // max(prod(where[name].shape), 1) for entry in table for name in entry.hf_names)
        leaves: dict[str, Any] = {}
        for entry in table:
            read = partial(entry.read, lambda name, index: files.read(where[name], index))
            if mesh is None:
                stored = jnp.asarray(read())
            else:
                stored = shard_stored(read, entry.letters, entry.shape, config, mesh)
            # Waiting for each keeps at most one in flight; reading costs more than the wait.
            stored = jax.block_until_ready(in_dtype(entry.path, stored, dtype))
            leaves[entry.path] = stored if form is None else jax.block_until_ready(form(entry.path, stored))
            del stored
            gc.collect(0)  # with which JAX lets go of what was read, where a thread of its own had it last
            done += prod(entry.shape)
            if progress:
                progress(done * size, total * size)
    return unflatten(config, leaves)


def save_hf(
    folder: Path, module: Any, config: DecoderConfig, raw: Mapping[str, Any], dtype: Any = None, **how: Any
) -> None:
    """Write a module as a Hugging Face folder; see `write_hf`, which takes what else is given."""
    leaves = flatten(module)
    write_hf(folder, lambda paths: {path: leaves[path] for path in paths}, config, raw, dtype, **how)


def write_hf(
    folder: Path,
    leaves: Leaves,
    config: DecoderConfig,
    raw: Mapping[str, Any],
    dtype: Any = None,
    progress: Progress | None = None,
    names: Callable[[str], str] = str,
    more: Mapping[str, Callable[[], np.ndarray]] | None = None,
    written: Callable[[str, np.ndarray], Mapping[str, np.ndarray]] = lambda name, tensor: {name: tensor},
) -> None:
    """Write a model as a Hugging Face folder: config.json, and safetensors in shards of at most 5 GB.

    Args:
        leaves: gives some weights by their paths; asked for each once, in groups of about 256 MB, so that the host
            holds one shard and one group.
        raw: the config.json to write, as read or from `config.to_hf()`.
        dtype: to convert to; as held when None.
        progress: called after each group, with float32's bytes where `dtype` is None.
        names: what a tensor is to be called, by its name in `convert.names`.
        more: other tensors by name, each read when it is its turn.
        written: what of a tensor is written, by name: codes and scales, say.

    Raises:
        DominoError: the folder can't be written (a full disk, say); no half-written file keeps a final name.
    """
    table = units(entries(config))
    total = sum(_bytes(unit, dtype) for unit in table)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        done = 0
        for group in grouped(table, lambda unit: _bytes(unit, dtype)):
            held = leaves([entry.path for unit in group for entry in unit])
            for unit in group:
                parts = {entry.path: jax.device_get(in_dtype(entry.path, held[entry.path], dtype)) for entry in unit}
                for name, tensor in to_hf(unit, parts).items():
                    if is_table(name):
                        yield from vocabulary_tables(tensor, config.vocab_size).items()
                    else:
                        yield from written(names(name), tensor).items()
            done += sum(_bytes(unit, dtype) for unit in group)
            if progress:
                progress(done, total)
        yield from ((name, read()) for name, read in (more or {}).items())

    write_tensors(folder, tensors(), raw if dtype is None else with_dtype(raw, dtype))


def write_tensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], raw: Mapping[str, Any]) -> None:
    """Write tensors by name and a config.json; see `write_hf`."""
    files: list[tuple[Path, list[str]]] = []  # temporary names, and what is inside
    written = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shard: dict[str, np.ndarray] = {}

        def flush() -> None:
            nonlocal shard
            files.append((folder / f".shard-{len(files) + 1}.tmp", list(shard)))
            save_file(shard, files[-1][0], metadata={"format": "pt"})
            shard = {}

        def write(name: str, tensor: np.ndarray) -> None:
            nonlocal written
            if shard and sum(x.nbytes for x in shard.values()) + tensor.nbytes > SHARD_BYTES:
                flush()
            shard[name] = np.ascontiguousarray(tensor)
            written += tensor.nbytes

        for name, tensor in tensors:
            write(name, tensor)
        flush()
        count = len(files)
        # Of another model: one would be read instead of the other. A single file gives way at once, whole to whole.
        for earlier in (INDEX,) if count == 1 else (INDEX, SINGLE):
            (folder / earlier).unlink(missing_ok=True)
        called = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        for name, (file, _) in zip(called, files, strict=True):
            file.replace(folder / name)
        if count > 1:
            weight_map = {tensor: name for name, (_, inside) in zip(called, files, strict=True) for tensor in inside}
            write_json(folder / INDEX, {"metadata": {"total_size": written}, "weight_map": weight_map})
        write_json(folder / "config.json", raw)
    except (OSError, SafetensorError) as error:
        raise DominoError(f"{folder} can't be written: {first_line(error)}.") from None
    finally:
        for file, _ in files:
            with suppress(OSError):
                file.unlink()


def _bytes(unit: list[Entry], dtype: Any) -> int:
    return sum(prod(entry.shape) for entry in unit) * jnp.dtype(dtype or jnp.float32).itemsize


Item = TypeVar("Item")


def grouped(items: Sequence[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """The items in their order, in groups of GROUP_BYTES by their `size` (a larger one by itself)."""
    group: list[Item] = []
    for item in items:
        if group and sum(map(size, (*group, item))) > GROUP_BYTES:
            yield group
            group = []
        group.append(item)
    yield group


def with_dtype(raw: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """The config.json of a model whose weights have been converted, in the spelling that it has."""
    return {**raw, "dtype" if "dtype" in raw else "torch_dtype": jnp.dtype(dtype).name}


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is whole or absent."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def copy_companions(source: Path, destination: Path) -> None:
    """Copy what belongs to a model beside its weights; see `convert.companions`."""
    for file in companions(source):
        copy = destination / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
