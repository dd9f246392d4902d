"""Hugging Face directories: config.json and safetensors, single or sharded, in and out.

Only safetensors are read. A pickle can run code when it is opened, so it is refused.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from convert.configs import TOKEN_IDS, read_target_config
from convert.draft_configs import is_drafter, read_draft_config
from convert.fields import Fields
from convert.names import Entry, entries, to_hf, units
from convert.safetensors import Stored, TensorFiles
from domino_jax.config import DecoderConfig, DraftConfig, TargetConfig
from domino_jax.errors import DominoError
from domino_jax.runtime.files import write_text
from domino_jax.runtime.parsing import parse_json, read_text
from domino_jax.sharding import mesh_context, shard_stored
from domino_jax.weights import flatten, unflatten

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
GROUP_BYTES = 2**28  # weights that are asked for at a time
FLOATS = {"F32", "F16", "BF16", "float32", "float16", "bfloat16"}  # dtypes, in the words of safetensors and of NumPy
# Some older drafters nest the causal head, and those of the speculators library.
HEAD_PREFIXES = ("logit_head.", "logits_correction.")

Progress = Callable[[int, int], None]  # bytes done, bytes in all
Leaves = Callable[[list[str]], Mapping[str, Any]]  # paths of some weights -> their values


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        DominoError: the file is missing, or is not a JSON object.
    """
    try:
        value = parse_json(read_text(path))
    except FileNotFoundError:
        raise DominoError(f"{path} does not exist; a model folder needs a {path.name}.") from None
    except (OSError, ValueError) as error:
        raise DominoError(f"{path} can't be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise DominoError(f"{path} holds a {type(value).__name__}, expected a JSON object.")
    return value


def stop_ids(folder: Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a sequence, by generation_config.json, else by the config.json `raw`.

    Raises:
        DominoError: they are no ids, or the file is damaged.
    """
    generation = folder / "generation_config.json"
    first = read_json(generation) if generation.exists() else {}
    for file, fields in ((generation, first), (folder / "config.json", raw)):
        ids = Fields(str(file), ("", fields), null_is_absent=True).get("eos_token_id", TOKEN_IDS, None)
        if ids is not None:
            return ids if isinstance(ids, tuple) else (ids,)
    return ()


def parse_config(
    raw: Mapping[str, Any], num_target_layers: int | None = None, file: Path | None = None
) -> TargetConfig | DraftConfig:
    """The config of a target or of a drafter, by what a config.json holds.

    Args:
        num_target_layers: the target's depth, for a drafter that does not state it.
        file: where `raw` is from, for errors.

    Raises:
        DominoError: a field is missing or of another kind, or asks for what is not supported.
    """
    if is_drafter(raw):
        return read_draft_config(raw, num_target_layers, file).config
    return read_target_config(raw, file)


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, as its index lists them or the single one.

    Raises:
        DominoError: there are none, one that the index names is missing, or only pickles are there.
    """
    if (folder / SINGLE).exists():  # before the index, as transformers looks
        files = [folder / SINGLE]
    elif (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise DominoError(f"{folder / INDEX} has no weight_map.")
        files = [folder / name for name in sorted({str(name) for name in weight_map.values()})]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"))]
        if pickles:
            raise DominoError(
                f"{folder} holds only pickles ({pickles[0]}), which can run code when opened and are never read; "
                "save the model as safetensors."
            )
        raise DominoError(f"{folder} has no {SINGLE} and no {INDEX}.")
    for file in files:
        if file.is_symlink() and not file.exists():
            raise DominoError(f"{file} is a link to a file that is gone: fetch the model again.")
        if not file.exists():
            raise DominoError(f"{folder / INDEX} names {file.name}, which is not in the folder.")
    return files


def load_hf(
    folder: Path,
    config: DecoderConfig,
    dtype: Any = None,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
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

    Raises:
        DominoError: tensors are missing, unexpected or misshapen (all are named), or a file is damaged.
    """
    table = entries(config)
    with TensorFiles(tensor_files(folder)) as files, mesh_context(mesh):
        where = today(files)
        problems = account(config, where)
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
            leaves[entry.path] = jax.block_until_ready(stored if dtype is None else stored.astype(dtype))
            del stored
            done += prod(entry.shape)
            if progress:
                progress(done * size, total * size)
    return unflatten(config, leaves)


def today(files: TensorFiles) -> dict[str, Stored]:
    """The tensors of a folder under today's names."""
    return {_today(name): stored for name, stored in files.stored.items()}


def _today(name: str) -> str:
    for prefix in HEAD_PREFIXES:
        name = name.removeprefix(prefix)
    return name


def account(config: DecoderConfig, where: Mapping[str, Stored]) -> list[str]:
    """What is wrong with the tensors of a model of this config, in words: see `tensor_differences`."""
    wanted = {name: entry.hf_shape for entry in entries(config) for name in entry.hf_names}
    found = {name: (stored.shape, stored.dtype) for name, stored in where.items()}
    if isinstance(config, TargetConfig) and config.tie_word_embeddings:
        found.pop("lm_head.weight", None)  # some files carry the embedding a second time
    layers = _read_layers(config, where)
    if layers:
        del wanted["fc.weight"], found["fc.weight"]
    return layers + tensor_differences(wanted, found)


def _read_layers(config: DecoderConfig, where: Mapping[str, Stored]) -> list[str]:
    """Whether a drafter's fc takes as many of the target's layers as its config names, where it takes whole ones."""
    shape = where["fc.weight"].shape if "fc.weight" in where else ()
    if not isinstance(config, DraftConfig) or len(shape) != 2 or shape[1] % config.hidden_size:
        return []
    count, taps = shape[1] // config.hidden_size, list(config.target_layer_ids)
    if count == len(taps):
        return []
    return [
        f"fc.weight takes {count} layers, target_layer_ids (by the public formula, where none are given) are {taps}"
    ]


def tensor_differences(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[tuple[int, ...], str]]
) -> list[str]:
    """Every missing, unexpected and misshapen tensor, and those that are no floats of 16 or 32 bits, in words.

    Args:
        wanted: shapes by name.
        found: shapes and dtypes by name.
    """
    both = [name for name in wanted if name in found]
    return [
        *(f"missing {name}" for name in sorted(wanted.keys() - found.keys())),
        *(f"unexpected {name}" for name in sorted(found.keys() - wanted.keys())),
        *(
            f"{name} has shape {list(found[name][0])}, expected {list(wanted[name])}"
            for name in both
            if found[name][0] != wanted[name]
        ),
        *(f"{name} holds {found[name][1]}, expected F32, F16 or BF16" for name in both if found[name][1] not in FLOATS),
    ]


def some(problems: Sequence[str], most: int = 8) -> str:
    """The first of a list of problems, and how many more there are."""
    more = f" and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def save_hf(folder: Path, module: Any, config: DecoderConfig, raw: Mapping[str, Any], dtype: Any = None) -> None:
    """Write a module as a Hugging Face folder; see `write_hf`."""
    leaves = flatten(module)
    write_hf(folder, lambda paths: {path: leaves[path] for path in paths}, config, raw, dtype)


def write_hf(
    folder: Path,
    leaves: Leaves,
    config: DecoderConfig,
    raw: Mapping[str, Any],
    dtype: Any = None,
    progress: Progress | None = None,
) -> None:
    """Write a model as a Hugging Face folder: config.json, and safetensors in shards of at most 5 GB.

    Args:
        leaves: gives some weights by their paths; asked for each once, in groups of about 256 MB, so that the host
            holds one shard and one group.
        raw: the config.json to write, as read or from `config.to_hf()`.
        dtype: to convert to; as held when None.
        progress: called after each group, with float32's bytes where `dtype` is None.

    Raises:
        DominoError: the folder can't be written (a full disk, say); no half-written file keeps a final name.
    """
    table = units(entries(config))
    total = sum(_bytes(unit, dtype) for unit in table)
    files: list[tuple[Path, list[str]]] = []  # temporary names, and what is inside
    done = written = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shard: dict[str, np.ndarray] = {}

        def flush() -> None:
            nonlocal shard
            files.append((folder / f".shard-{len(files) + 1}.tmp", list(shard)))
            save_file(shard, files[-1][0], metadata={"format": "pt"})
            shard = {}

        for group in grouped(table, lambda unit: _bytes(unit, dtype)):
            held = leaves([entry.path for unit in group for entry in unit])
            for unit in group:
                parts = {entry.path: _on_host(held[entry.path], dtype) for entry in unit}
                for name, tensor in to_hf(unit, parts).items():
                    if shard and sum(x.nbytes for x in shard.values()) + tensor.nbytes > SHARD_BYTES:
                        flush()
                    shard[name] = np.ascontiguousarray(tensor)
                    written += tensor.nbytes
            done += sum(_bytes(unit, dtype) for unit in group)
            if progress:
                progress(done, total)
        flush()
        count = len(files)
        # Of another model: one would be read instead of the other. A single file gives way at once, whole to whole.
        for earlier in (INDEX,) if count == 1 else (INDEX, SINGLE):
            (folder / earlier).unlink(missing_ok=True)
        names = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        for name, (file, _) in zip(names, files, strict=True):
            file.replace(folder / name)
        if count > 1:
            weight_map = {tensor: name for name, (_, inside) in zip(names, files, strict=True) for tensor in inside}
            write_json(folder / INDEX, {"metadata": {"total_size": written}, "weight_map": weight_map})
        write_json(folder / "config.json", raw if dtype is None else with_dtype(raw, dtype))
    except (OSError, SafetensorError) as error:
        raise DominoError(f"{folder} can't be written: {error}.") from None
    finally:
        for file, _ in files:
            with suppress(OSError):
                file.unlink()


def _bytes(unit: list[Entry], dtype: Any) -> int:
    return sum(prod(entry.shape) for entry in unit) * jnp.dtype(dtype or jnp.float32).itemsize


def _on_host(array: Any, dtype: Any) -> np.ndarray:
    """A weight on the host, converted on its device unless `dtype` is None."""
    return np.asarray(jax.device_get(array if dtype is None else array.astype(dtype)))


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
    """Copy what belongs to a model beside its weights: tokenizer, templates, generation config, card."""
    skip = {INDEX, "config.json"}
    for file in sorted(source.iterdir()):
        text = file.suffix in {".json", ".jinja", ".txt", ".md", ".model"} or file.name == "LICENSE"
        if file.is_file() and text and file.name not in skip:
            shutil.copyfile(file, destination / file.name)
