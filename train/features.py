"""Captured features of a corpus: what the target made of each sequence, written once and read as memory maps.

A folder holds features.json, which says what was captured from what, and shards in the safetensors format. Of a row of
the corpus only the tokens that exist are kept, one after another, so that padding costs nothing on disk. A shard has

    features    [tokens, L·D (+ D)] BF16: each token's tapped features, then its state after the final norm if wanted
    lengths     [rows] I32, tokens of each row
    checksums   [rows] U32, CRC-32 of each row's bytes

Sizes and the two small tables are checked when the folder is opened; a row's values when it is first read, for opening
would otherwise read everything once more (48 KB a token at Qwen3-8B's shapes).
"""

import hashlib
import json
import os
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from convert import hf
from domino_jax.errors import DominoError

VERSION = 1
HEADER = "features.json"
SHARD_BYTES = 2**32  # a run that is killed loses at most this much; each shard that is read is an open file
WINDOW = 4096  # bytes of a tensor's begin, middle and end that count for its model's identity


class Captured(NamedTuple):
    """What was captured of B rows, zeros after a row's end."""

    features: np.ndarray  # [B, S, LD] bfloat16
    hidden: np.ndarray | None  # [B, S, D] bfloat16, the states after the final norm, if they were wanted


@dataclass(frozen=True)
class Plan:
    """What is captured from what: the header of a folder."""

    target: str  # `identity` of the model
    corpus: str  # fingerprint of the corpus
    taps: tuple[int, ...]
    width: int  # LD
    hidden: int  # D if the states after the final norm are there as well, else 0
    dtype: str  # in which the target computed
    length: int  # S, tokens of a row with its padding
    rows: tuple[int, ...]  # of each shard
    tokens: tuple[int, ...]  # of each shard
    checksums: tuple[int | None, ...]  # of each shard's tables; None: not written yet

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

    def differences(self, other: "Plan") -> list[str]:
        """What of two captures is not the same, in words, the finished shards aside."""
        names = {
            "target": "target model",
            "corpus": "data",
            "taps": "taps",
            "hidden": "choice of final states (--hidden)",
            "dtype": "--dtype",
            "length": "--length",
        }
        found = [words for field, words in names.items() if getattr(self, field) != getattr(other, field)]
        if not found and replace(self, checksums=()) != replace(other, checksums=()):
            found = ["division into shards"]
        return found


def plan(
    lengths: np.ndarray,
    *,
    target: str,
    corpus: str,
    taps: tuple[int, ...],
    width: int,
    hidden: int,
    dtype: str,
    length: int,
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """How rows of these lengths [N] are divided into shards: whole rows, of about `shard_bytes` together."""
    row_bytes = lengths.astype(np.int64) * 2 * (width + hidden)
    shard = (np.cumsum(row_bytes) - row_bytes) // shard_bytes  # by where a row begins
    _, shard = np.unique(shard, return_inverse=True)  # a number may be missing where a row is larger than a shard
    count = int(shard[-1]) + 1
    rows = tuple(int(n) for n in np.bincount(shard, minlength=count))
    tokens = tuple(int(n) for n in np.bincount(shard, lengths, minlength=count))
    return Plan(target, corpus, tuple(taps), width, hidden, dtype, length, rows, tokens, (None,) * count)


def row_lengths(starts: np.ndarray) -> np.ndarray:
    """Tokens of each row up to its padding, from `starts` [N, S]: a padding token's start is its own position.

    A row that ends in a conversation of one token loses that one, from which nothing is learned.
    """
    real = starts < np.arange(starts.shape[1])
    return np.where(real.any(1), starts.shape[1] - real[:, ::-1].argmax(1), 1).astype(np.int64)


def identity(folder: Path) -> str:
    """A model's identity: SHA-256 over its config and, of each tensor, name, dtype, shape and some of the bytes.

    Of each tensor the first, middle and last 4 KiB count: reading a whole model would take minutes. Weights that were
    trained differ there, however they are divided into files; a few values changed elsewhere are not noticed.

    Raises:
        DominoError: it has no safetensors, or one is damaged.
    """
    digest = hashlib.sha256(json.dumps(hf.read_json(folder / "config.json"), sort_keys=True).encode())
    found: dict[str, tuple[Path, int, Mapping[str, Any]]] = {}
    for file in hf.tensor_files(folder):
        try:
            with file.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                tensors = json.loads(stream.read(size) if size <= file.stat().st_size else b"")
            found |= {name: (file, 8 + size, value) for name, value in tensors.items() if name != "__metadata__"}
        except (OSError, ValueError, AttributeError) as error:
            raise DominoError(f"{file} is not a whole safetensors file ({error}); fetch it again.") from None
    for name in sorted(found):
        file, start, tensor = found[name]
        begin, end = tensor["data_offsets"]
        digest.update(f"{name} {tensor['dtype']} {tensor['shape']}".encode())
        with file.open("rb") as stream:
            for place in sorted({begin, max(begin, (begin + end - WINDOW) // 2), max(begin, end - WINDOW)}):
                stream.seek(start + place)
                digest.update(stream.read(min(WINDOW, end - place)))
    return digest.hexdigest()


def write_header(folder: Path, plan: Plan) -> None:
    """Write a plan as features.json, whole or not at all, with its own checksum."""
    values = {"version": VERSION, **asdict(plan)}
    hf.write_json(folder / HEADER, values | {"checksum": _checksum(values)})


def read_header(folder: Path) -> Plan:
    """The plan in a folder's features.json.

    Raises:
        DominoError: there is none, it is damaged, or of another version.
    """
    if not (folder / HEADER).exists():
        raise DominoError(f"{folder} holds no captured features ({HEADER}); write them with python -m train.capture.")
    values = hf.read_json(folder / HEADER)
    checksum = values.pop("checksum", None)
    if values.get("version") != VERSION:
        raise DominoError(f"{folder / HEADER} has version {values.get('version')}, expected {VERSION}: capture again.")
    if checksum != _checksum(values):
        raise DominoError(f"{folder / HEADER} was altered (its checksum is wrong): capture the features again.")
    del values["version"]
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return Plan(**fields)


def _checksum(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def write_shard(folder: Path, plan: Plan, shard: int, rows: Iterable[np.ndarray]) -> Plan:
    """Write one shard, row after row, and then note it in the header: the plan with that shard finished.

    Args:
        rows: of each row, [tokens, LD (+ D)] bfloat16.

    Raises:
        OSError: it can't be written; nothing of it is left, and finished shards are as they were.
    """
    path = folder / plan.name(shard)
    temporary = path.with_suffix(".tmp")
    lengths, checksums = [], []
    try:
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
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    done = (*plan.checksums[:shard], zlib.crc32(tables), *plan.checksums[shard + 1 :])
    plan = replace(plan, checksums=done)
    write_header(folder, plan)
    return plan


class Features:
    """The features of a corpus in a folder, rows by their number in the corpus."""

    def __init__(self, folder: Path, plan: Plan, shards: Sequence[int]):
        self.folder, self.plan = folder, plan
        self._firsts = np.cumsum([0, *plan.rows])
        self._shards = {shard: _Shard(folder, plan, shard) for shard in shards}

    @classmethod
    def open(cls, folder: Path) -> "Features":
        """Open a folder that train.capture wrote.

        Raises:
            DominoError: it is not there, not complete, or not whole.
        """
        plan = read_header(folder)
        if plan.missing:
            count = len(plan.rows)
            raise DominoError(
                f"the features in {folder} are not complete: {count - len(plan.missing)} of {count} shards are "
                "written; run the same train.capture again to continue."
            )
        return cls(folder, plan, range(len(plan.rows)))

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def check(self, target: str, corpus: str, taps: Sequence[int], hidden: bool) -> None:
        """Refuse features of something else.

        Args:
            target: the model's `identity`.
            corpus: the corpus's fingerprint.
            taps: of the drafter that is trained.
            hidden: whether the states after the final norm are needed (for the KL loss).

        Raises:
            DominoError: they are of another target, other data or other taps, or lack the final states.
        """
        plan = self.plan
        if plan.target != target:
            raise DominoError(
                f"the features in {self.folder} were captured from another target (its weights or its config differ)."
            )
        if plan.corpus != corpus:
            raise DominoError(
                f"the features in {self.folder} are of other data: capture them again with the same --data and data "
                "options as the training."
            )
        if plan.taps != tuple(taps):
            raise DominoError(
                f"the features in {self.folder} are of the taps {list(plan.taps)}, the drafter reads {list(taps)}."
            )
        if hidden and not plan.hidden:
            raise DominoError(
                f"the features in {self.folder} lack the final states that --loss kl needs: capture with --hidden."
            )

    def rows(self, indices: Iterable[int]) -> Captured:
        """What was captured of some rows of the corpus.

        Raises:
            DominoError: a row's checksum is wrong.
        """
        chosen = [self._row(int(i)) for i in indices]
        plan, shape = self.plan, (len(chosen), self.plan.length)
        features = np.zeros((*shape, plan.width), ml_dtypes.bfloat16)
        hidden = np.zeros((*shape, plan.hidden), ml_dtypes.bfloat16) if plan.hidden else None
        for place, row in enumerate(chosen):
            features[place, : len(row)] = row[:, : plan.width]
            if hidden is not None:
                hidden[place, : len(row)] = row[:, plan.width :]
        return Captured(features, hidden)

    def read_ahead(self, batches: Iterable[Any]) -> Generator[tuple[Any, Captured], None, None]:
        """Batches with what was captured of their `rows`, the next one read while one is used."""

        def read(batch: Any) -> tuple[Any, Captured]:
            return batch, self.rows(batch.rows)

        with ThreadPoolExecutor(1, "features") as pool:
            waiting = None
            for batch in batches:
                following = pool.submit(read, batch)
                if waiting is not None:
                    yield waiting.result()
                waiting = following
            if waiting is not None:
                yield waiting.result()

    def _row(self, index: int) -> np.ndarray:
        shard = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self._shards[shard].row(index - int(self._firsts[shard]))

    def verify(self) -> Iterator[int]:
        """Read and check every row, a shard after another; yields the shards that are done.

        Raises:
            DominoError: a row's checksum is wrong.
        """
        for number, shard in self._shards.items():
            for row in range(len(shard.lengths)):
                shard.row(row)
            yield number


class _Shard:
    """One file of features: its tables, and its rows as a memory map."""

    def __init__(self, folder: Path, plan: Plan, number: int):
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
            raise DominoError(f"{self.path} can't be read: {error}; capture the features again.") from None
        if not same or zlib.crc32(tables) != plan.checksums[number]:
            raise DominoError(f"{self.path} was altered (its checksum is wrong): capture the features again.")
        self.lengths, self.checksums = np.frombuffer(tables, "<i4", rows), np.frombuffer(tables, "<u4", rows, 4 * rows)
        self.offsets = np.cumsum([0, *self.lengths.tolist()])
        self.checked = np.zeros(rows, bool)

    def row(self, index: int) -> np.ndarray:
        values = self.values[self.offsets[index] : self.offsets[index + 1]]
        if not self.checked[index]:
            if zlib.crc32(values.data) != self.checksums[index]:
                raise DominoError(
                    f"{self.path} was altered (the checksum of its row {index} is wrong): capture the features again."
                )
            self.checked[index] = True
        return values.view(ml_dtypes.bfloat16)


def resume(folder: Path, plan: Plan) -> Plan:
    """The plan with those shards finished that an earlier, interrupted capture into `folder` left whole.

    Raises:
        DominoError: the folder holds features of something else.
    """
    if not (folder / HEADER).exists():
        return plan
    before = read_header(folder)
    different = before.differences(plan)
    if different:
        raise DominoError(
            f"{folder} holds features that differ in the {', the '.join(different)}: give another --out, or delete it."
        )
    whole: list[int | None] = []
    for shard, checksum in enumerate(before.checksums):
        whole.append(None)
        if checksum is not None:
            with suppress(DominoError):
                list(Features(folder, before, [shard]).verify())
                whole[shard] = checksum
    return replace(before, checksums=tuple(whole))
