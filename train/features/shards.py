"""Shards of captured features: how a corpus is divided into files, the header that says so, and what a file holds.

A shard is a safetensors file. Of a row of the corpus only the tokens that exist are in it, one after another, so that
padding costs nothing on disk. It has

    features    [tokens, L·D (+ D)] BF16: each token's features, then its state after the final norm if wanted
    lengths     [rows] I32, tokens of each row
    checksums   [rows] U32, CRC-32 of each row's bytes

Sizes and the two small tables are checked when a shard is opened; a row's values when it is first read, for opening
would otherwise read everything once more (48 KB a token at Qwen3-8B's shapes).
"""

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert import hf
from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.files import write_atomic

HEADER_VERSION = 2
HEADER = "features.json"
SHARD_BYTES = 2**32  # a run that is killed loses at most this much; each shard that is read is an open file


@dataclass(frozen=True)
class ShardPlan:
    """What is captured from what: the header of a folder."""

    target: str  # the model's fingerprint
    corpus: str  # fingerprint of the corpus
    target_layer_ids: tuple[int, ...]
    width: int  # LD
    hidden: int  # D if the states after the final norm are there as well, else 0
    dtype: str  # in which the target computed
    length: int  # S, tokens of a row with its padding
    rows: tuple[int, ...]  # of each shard
    tokens: tuple[int, ...]  # of each shard
    checksums: tuple[int | None, ...]  # of each shard's tables; None: not written yet
    weights: str = "exact"  # form of the target's matrices; earlier headers do not say

    @property
    def token_bytes(self) -> int:
        """Bytes of a token on disk."""
        return 2 * (self.width + self.hidden)

    @property
    def size(self) -> int:
        """Bytes of all shards on disk."""
        return sum(len(self.head(i)) + self.body(i) for i in range(len(self.rows)))

    @property
    def missing(self) -> list[int]:
        """Shards that are not written yet."""
        return [i for i, checksum in enumerate(self.checksums) if checksum is None]

    def name(self, shard: int) -> str:
        """File name of a shard."""
        return f"features-{shard:05}-of-{len(self.rows):05}.safetensors"

    def first(self, shard: int) -> int:
        """The first row of a shard."""
        return sum(self.rows[:shard])

    def body(self, shard: int) -> int:
        """Bytes of a shard after its head."""
        return self.tokens[shard] * self.token_bytes + 8 * self.rows[shard]

    def head(self, shard: int) -> bytes:
        """The head of a shard as safetensors has it: its length, and JSON padded to eight bytes."""
        rows, tokens = self.rows[shard], self.tokens[shard]
        ends = np.cumsum([0, tokens * self.token_bytes, 4 * rows, 4 * rows]).tolist()
        kinds = (("features", "BF16", [tokens, self.token_bytes // 2]), ("lengths", "I32", [rows]))
        kinds += (("checksums", "U32", [rows]),)
        tensors = {
            name: {"dtype": dtype, "shape": shape, "data_offsets": ends[i : i + 2]}
            for i, (name, dtype, shape) in enumerate(kinds)
        }
        text = json.dumps(tensors, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def differences(self, other: "ShardPlan") -> list[str]:
        """What of two captures is not the same, in words, the finished shards aside."""
        names = {
            "target": "target model",
            "corpus": "data",
            "target_layer_ids": "--target-layer-ids",
            "hidden": "choice of final states (--hidden)",
            "dtype": "--dtype",
            "weights": "--weights",
            "length": "--length",
        }
        found = [words for field, words in names.items() if getattr(self, field) != getattr(other, field)]
        if not found and replace(self, checksums=()) != replace(other, checksums=()):
            found = ["division into shards"]
        return found


def plan_shards(
    lengths: np.ndarray,
    *,
    target: str,
    corpus: str,
    target_layer_ids: tuple[int, ...],
    width: int,
    hidden: int,
    dtype: str,
    length: int,
    weights: str = "exact",
    shard_bytes: int = SHARD_BYTES,
) -> ShardPlan:
    """How rows of these lengths [N] are divided into shards: whole rows, of about `shard_bytes` together."""
    row_bytes = lengths.astype(np.int64) * 2 * (width + hidden)
    shard = (np.cumsum(row_bytes) - row_bytes) // shard_bytes  # by where a row begins
    _, shard = np.unique(shard, return_inverse=True)  # a number may be missing where a row is larger than a shard
    count = int(shard[-1]) + 1
    rows = tuple(int(n) for n in np.bincount(shard, minlength=count))
    tokens = tuple(int(n) for n in np.bincount(shard, lengths, minlength=count))
    return ShardPlan(
        target, corpus, tuple(target_layer_ids), width, hidden, dtype, length, rows, tokens, (None,) * count, weights
    )


def write_header(folder: Path, plan: ShardPlan) -> None:
    """Write a plan as features.json, whole or not at all, with its own checksum."""
    values = {"version": HEADER_VERSION, **asdict(plan)}
    hf.write_json(folder / HEADER, values | {"checksum": _checksum(values)})


def read_header(folder: Path) -> ShardPlan:
    """The plan in a folder's features.json.

    Raises:
        DominoError: there is none, it is damaged, or of another version.
    """
    if not (folder / HEADER).exists():
        raise DominoError(f"{folder} holds no captured features ({HEADER}); write them with python -m train.capture.")
    values = hf.read_json(folder / HEADER)
    checksum = values.pop("checksum", None)
    if values.get("version") != HEADER_VERSION:
        raise DominoError(
            f"{folder / HEADER} has version {values.get('version')}, expected {HEADER_VERSION}: capture again."
        )
    if checksum != _checksum(values):
        raise DominoError(f"{folder / HEADER} was altered (its checksum is wrong): capture the features again.")
    del values["version"]
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return ShardPlan(**fields)


def _checksum(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def write_shard(folder: Path, plan: ShardPlan, shard: int, rows: Iterable[np.ndarray]) -> ShardPlan:
    """Write one shard, row after row, and then note it in the header: the plan with that shard finished.

    Args:
        rows: of each row, [tokens, LD (+ D)] bfloat16.

    Raises:
        OSError: it can't be written; nothing of it is left, and finished shards are as they were.
    """
    lengths, checksums = [], []
    with write_atomic(folder / plan.name(shard)) as temporary:
        with temporary.open("wb") as file:
            file.write(plan.head(shard))
            for row in rows:
                held = np.ascontiguousarray(row).view(np.uint16)
                file.write(held.data.cast("B"))
                lengths.append(len(row))
                checksums.append(zlib.crc32(held.data))
            tables = np.array(lengths, "<i4").tobytes() + np.array(checksums, "<u4").tobytes()
            file.write(tables)
            file.flush()
            os.fsync(file.fileno())
        assert temporary.stat().st_size == len(plan.head(shard)) + plan.body(shard), "the rows are the plan's"
    done = (*plan.checksums[:shard], zlib.crc32(tables), *plan.checksums[shard + 1 :])
    plan = replace(plan, checksums=done)
    write_header(folder, plan)
    return plan


class Shard:
    """One file of features: its tables, and its rows as a memory map."""

    def __init__(self, folder: Path, plan: ShardPlan, number: int):
        self.path = folder / plan.name(number)
        head, rows, tokens = plan.head(number), plan.rows[number], plan.tokens[number]
        try:
            size = self.path.stat().st_size
            if size != len(head) + plan.body(number):
                raise DominoError(
                    f"{self.path} has {size} bytes, expected {len(head) + plan.body(number)}: it was truncated or "
                    "altered; capture again."
                )
            with self.path.open("rb") as file:
                same = file.read(len(head)) == head
                file.seek(-8 * rows, os.SEEK_END)
                tables = file.read()
            self.values = np.memmap(self.path, np.uint16, "r", len(head), (tokens, plan.token_bytes // 2))
        except OSError as error:
            raise DominoError(f"{self.path} can't be read: {first_line(error)}; capture the features again.") from None
        if not same or zlib.crc32(tables) != plan.checksums[number]:
            raise DominoError(f"{self.path} was altered (its checksum is wrong): capture the features again.")
        self.lengths, self.checksums = np.frombuffer(tables, "<i4", rows), np.frombuffer(tables, "<u4", rows, 4 * rows)
        self.offsets = np.cumsum([0, *self.lengths.tolist()])
        self.checked = np.zeros(rows, bool)

    def row(self, index: int) -> np.ndarray:
        """A row of the shard, [tokens, LD (+ D)] bfloat16, checked when it is first read.

        Raises:
            DominoError: its checksum is wrong.
        """
        values = self.values[self.offsets[index] : self.offsets[index + 1]]
        if not self.checked[index]:
            if zlib.crc32(values.data) != self.checksums[index]:
                raise DominoError(
                    f"{self.path} was altered (the checksum of its row {index} is wrong): capture the features again."
                )
            self.checked[index] = True
        return values.view(ml_dtypes.bfloat16)
