"""Captured features of a corpus: what the target made of each sequence, written once and read as memory maps.

A folder holds features.json, which says what was captured from what, and shards (train.features.shards). `python -m
train.capture` writes it; training reads the rows of its batches.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from domino_jax.errors import DominoError
from train.features.shards import HEADER, Shard, ShardPlan, read_header


class Captured(NamedTuple):
    """What was captured of B rows, zeros after a row's end."""

    features: np.ndarray  # [B, S, LD] bfloat16
    hidden: np.ndarray | None  # [B, S, D] bfloat16, the states after the final norm, if they were wanted


class Features:
    """The features of a corpus in a folder, rows by their number in the corpus."""

    def __init__(self, folder: Path, plan: ShardPlan, shards: Sequence[int]):
        self.folder, self.plan = folder, plan
        self._firsts = np.cumsum([0, *plan.rows])
        self._shards = {shard: Shard(folder, plan, shard) for shard in shards}

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

    def check(
        self, target: str, corpus: str, target_layer_ids: Sequence[int], hidden: bool, weights: str = "exact"
    ) -> None:
        """Refuse features of something else.

        Args:
            target: the model's fingerprint.
            corpus: the corpus's fingerprint.
            target_layer_ids: of the drafter that is trained.
            hidden: whether the states after the final norm are needed (for the losses of its distribution).
            weights: form of the target's matrices.

        Raises:
            DominoError: they are of another target, other data or other layers, or lack the final states.
        """
        plan = self.plan
        if plan.target != target:
            raise DominoError(
                f"the features in {self.folder} were captured from another target (its weights or its config differ)."
            )
        if plan.weights != weights:
            raise DominoError(
                f"the features in {self.folder} are of the target with --weights {plan.weights}, and the training is "
                f"over --weights {weights}: capture them again with the same."
            )
        if plan.corpus != corpus:
            raise DominoError(
                f"the features in {self.folder} are of other data: capture them again with the same --data and data "
                "options as the training."
            )
        if plan.target_layer_ids != tuple(target_layer_ids):
            raise DominoError(
                f"the features in {self.folder} are of the target's layers "
                f"{list(plan.target_layer_ids)}, the drafter reads {list(target_layer_ids)}."
            )
        if hidden and not plan.hidden:
            raise DominoError(
                f"the features in {self.folder} lack the final states that every loss but ce reads: capture with "
                "--hidden."
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


def resume_capture(folder: Path, plan: ShardPlan) -> ShardPlan:
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
