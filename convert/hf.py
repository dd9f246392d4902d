"""Hugging Face directories: config.json and safetensors, single or sharded, in and out.

Only safetensors are read. A pickle can run code when it is opened, so it is refused.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from convert.names import Entry, entries
from domino_jax.config import DecoderConfig, DraftConfig, TargetConfig
from domino_jax.errors import DominoError
from domino_jax.weights import flatten, unflatten

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
OLD_HEAD_PREFIX = "logit_head."  # some older drafters nest the causal head

Progress = Callable[[int, int], None]  # tensors done, tensors in all
Put = Callable[[str, np.ndarray], Any]  # a weight's path and its value -> where it is to be


def on_device(path: str, value: np.ndarray) -> jax.Array:
    """Puts a weight on the default device."""
    return jnp.asarray(value)


def on_host(path: str, value: np.ndarray) -> np.ndarray:
    """Leaves a weight in the host's memory."""
    return np.ascontiguousarray(value)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        DominoError: the file is missing, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DominoError(f"{path} does not exist; a model folder needs a {path.name}.") from None
    except (OSError, ValueError) as error:
        raise DominoError(f"{path} can't be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise DominoError(f"{path} holds a {type(value).__name__}, expected a JSON object.")
    return value


def parse_config(raw: Mapping[str, Any], num_target_layers: int | None = None) -> TargetConfig | DraftConfig:
    """The config of a target, or of a drafter if it has a `dflash_config`."""
    try:
        if "dflash_config" in raw:
            return DraftConfig.from_hf(raw, num_target_layers)
        return TargetConfig.from_hf(raw)
    except (TypeError, ValueError, AttributeError) as error:
        raise DominoError(f"config.json has a value of the wrong kind: {error}.") from None


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, as its index lists them or the single one.

    Raises:
        DominoError: there are none, one that the index names is missing, or only pickles are there.
    """
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise DominoError(f"{folder / INDEX} has no weight_map.")
        files = [folder / name for name in sorted({str(name) for name in weight_map.values()})]
    elif (folder / SINGLE).exists():
        files = [folder / SINGLE]
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
        if not file.exists():
            raise DominoError(f"{folder / INDEX} names {file.name}, which is not in the folder.")
    return files


def load(
    folder: Path, config: DecoderConfig, dtype: Any = None, progress: Progress | None = None, put: Put = on_device
) -> Any:
    """Read the weights of a Hugging Face folder into a module (Target or Draft).

    Args:
        folder: holds the safetensors.
        config: what the folder's config.json says.
        dtype: to convert to; as stored when None.
        progress: called after each tensor.
        put: where each weight goes as soon as it is read (`on_device` or `on_host`, or onto a mesh).

    Raises:
        DominoError: tensors are missing, unexpected or misshapen (all are named), or a file is damaged.
    """
    table = entries(config)
    with ExitStack() as stack:
        where = {}
        for file in tensor_files(folder):
            try:
                handle = stack.enter_context(safe_open(file, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise DominoError(
                    f"{file} is not a whole safetensors file ({error}); it may be truncated: fetch it again."
                ) from None
            where |= {name.removeprefix(OLD_HEAD_PREFIX): (handle, name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
        _account(folder, config, table, where)
        leaves = {}
        for done, entry in enumerate(table, 1):
            try:
                tensor = entry.join(where[known][0].get_tensor(where[known][1]) for known in entry.hf_names)
            except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
                raise DominoError(f"{entry.hf_names[0]} in {folder} can't be read: {error}.") from None
            if dtype is not None:
                tensor = tensor.astype(dtype)
            leaves[entry.path] = put(entry.path, tensor)
            if progress:
                progress(done, len(table))
    return unflatten(config, leaves)


def _account(folder: Path, config: DecoderConfig, table: list[Entry], where: Mapping[str, Any]) -> None:
    """Report every missing, unexpected and misshapen tensor in one error."""
    known = {name for entry in table for name in entry.hf_names}
    # A tied model may carry its output projection a second time; the embedding counts.
    spare = {"lm_head.weight"} if isinstance(config, TargetConfig) and config.tie_word_embeddings else set()
    problems = [f"missing {name}" for name in sorted(known - where.keys())]
    problems += [f"unexpected {name}" for name in sorted(where.keys() - known - spare)]
    for entry in table:
        for hf_name in filter(where.__contains__, entry.hf_names):
            handle, name = where[hf_name]
            found = tuple(handle.get_slice(name).get_shape())
            if found != entry.hf_shape:
                problems.append(f"{hf_name} has shape {list(found)}, expected {list(entry.hf_shape)}")
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise DominoError(f"{folder} does not hold the model of its config.json: {'; '.join(problems[:8])}{more}.")


def save(folder: Path, module: Any, config: DecoderConfig, raw: Mapping[str, Any], dtype: Any = None) -> None:
    """Write a module as a Hugging Face folder: config.json, and safetensors in shards of at most 5 GB.

    Args:
        raw: the config.json to write, as read or from `config.to_hf()`.
        dtype: to convert to; as held when None.

    Raises:
        DominoError: the folder can't be written (a full disk, say); no half-written file keeps a final name.
    """
    leaves = flatten(module)
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for entry in entries(config):
        array = np.asarray(jax.device_get(leaves[entry.path]))
        for name, tensor in entry.split(array if dtype is None else array.astype(dtype)).items():
            if size and size + tensor.nbytes > SHARD_BYTES:
                shards.append({})
                size = 0
            shards[-1][name] = np.ascontiguousarray(tensor)
            size += tensor.nbytes
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    written = [*names, INDEX, "config.json"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).unlink(missing_ok=True)  # of an earlier model: it would be read instead of a single file
        for name, shard in zip(names, shards, strict=True):
            temporary = folder / f".{name}.tmp"
            save_file(shard, temporary, metadata={"format": "pt"})
            temporary.replace(folder / name)
        if len(shards) > 1:
            weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            total = sum(t.nbytes for shard in shards for t in shard.values())
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        stored = {} if dtype is None else {"torch_dtype": jnp.dtype(dtype).name}
        write_json(folder / "config.json", {**raw, **stored})
    except (OSError, SafetensorError) as error:
        raise DominoError(f"{folder} can't be written: {error}.") from None
    finally:
        for name in written:
            with suppress(OSError):
                (folder / f".{name}.tmp").unlink()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is whole or absent."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def copy_companions(source: Path, destination: Path) -> None:
    """Copy what belongs to a model beside its weights: tokenizer, templates, generation config, card."""
    skip = {INDEX, "config.json"}
    for file in sorted(source.iterdir()):
        text = file.suffix in {".json", ".jinja", ".txt", ".md", ".model"} or file.name == "LICENSE"
        if file.is_file() and text and file.name not in skip:
            shutil.copyfile(file, destination / file.name)
