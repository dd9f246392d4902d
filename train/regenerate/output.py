"""The file that rewritten answers are added to, whole line by whole line, so that a killed run can go on."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from convert.values import is_whole, token_ids
from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.files import JsonLine, lock_file, read_jsonl, read_line, whole_lines
from domino_jax.runtime.processes import broadcast_from_first, max_over_processes
from train.begun import keep_settings

Number = tuple[int, int]  # line of the data, turn


class Answers:
    """One JSON object a line, each with its numbers `row` and `turn`; what is there is never changed."""

    def __init__(self, path: Path, settings: Mapping[str, Any], places: Mapping[str, Any]):
        """Open the file to add to it; a last line that was cut off is dropped. The caller holds its lock.

        Args:
            settings: what decides the answers; kept in PATH.settings.json, and compared when the file is there already.
            places: of what was read; kept beside the settings for people, since folders may move.

        Raises:
            DominoError: the file was written with other settings or by something else, is damaged, or can't be
                written.
        """
        self.path = path
        self._places: dict[Number, int] = {}
        beside = path.with_name(path.name + ".settings.json")
        try:
            if path.exists() and path.stat().st_size and not beside.exists():
                raise DominoError(f"{path} was not written by this command ({beside} is missing); give another --out.")
            keep_settings(beside, path, settings, places)
            self._file = path.open("ab", buffering=0)  # a buffer would be lost with the process
            self._end = self._index()
        except OSError as error:
            raise DominoError(f"{path} can't be written: {first_line(error)}.") from None

    def _index(self) -> int:
        """Drop a last line that was cut off, and note where each other one begins; returns where the last one ends."""
        end = whole_lines(self.path)
        self._file.truncate(end)
        for number, line in _written(self.path):
            self._places[number] = line.start
        return end

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, number: Number) -> bool:
        return number in self._places

    def tokens(self, number: Number) -> list[int]:
        """The tokens of an answer that is there."""
        return read_line(self.path, self._places[number])["tokens"]

    def add(self, number: Number, values: Mapping[str, Any]) -> None:
        """Add an answer's line.

        Raises:
            DominoError: it can't be written; the file is as it was before.
        """
        line = (json.dumps({"row": number[0], "turn": number[1], **values}, ensure_ascii=False) + "\n").encode()
        try:
            self._write(line)
        except OSError as error:
            self._file.truncate(self._end)
            what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
            raise DominoError(
                f"{self.path} can't be written: {what}; its {len(self)} answers are kept: make room, and give the same "
                "command again."
            ) from None
        self._places[number] = self._end
        self._end += len(line)

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:  # a disk that fills up takes a part first
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Bring the file to disk."""
        if not self._file.closed:
            try:
                os.fsync(self._file.fileno())
            finally:
                self._file.close()

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()


def _written(path: Path) -> Iterator[tuple[Number, JsonLine]]:
    """The lines of a file of answers with their numbers.

    Raises:
        DominoError: one of them is no answer.
    """
    for line in read_jsonl(path, invalid="damaged (cut the file there, or give another --out)"):
        try:
            row, turn = line.value["row"], line.value["turn"]
            if not (is_whole(row) and is_whole(turn)):
                raise ValueError
            token_ids(line.value["tokens"])
        except (KeyError, TypeError, ValueError):
            raise DominoError(f"{line.where} is damaged; cut the file there, or give another --out.") from None
        yield (row, turn), line


class FollowedAnswers:
    """The answers in a process that does not write them: the file's, and those that are added, in memory."""

    def __init__(self, path: Path):
        """Raises: DominoError: the file is damaged, or can't be read."""
        self._tokens: dict[Number, np.ndarray] = {}
        for number, line in _written(path) if path.exists() else ():
            self._tokens[number] = np.array(line.value["tokens"], np.int32)

    def __len__(self) -> int:
        return len(self._tokens)

    def __contains__(self, number: Number) -> bool:
        return number in self._tokens

    def tokens(self, number: Number) -> list[int]:
        """The tokens of an answer that is there."""
        return self._tokens[number].tolist()

    def add(self, number: Number, values: Mapping[str, Any]) -> None:
        """Note an answer that the first process writes."""
        self._tokens[number] = np.array(values["tokens"], np.int32)


@contextmanager
def open_answers(
    path: Path, settings: Mapping[str, Any], places: Mapping[str, Any]
) -> Iterator[Answers | FollowedAnswers]:
    """The answers of a file that this run holds alone; of several processes the first writes it (see `Answers`).

    Raises:
        DominoError: as `Answers`; another run holds it; or the processes do not see the same file.
    """
    first = jax.process_index() == 0
    problem: DominoError | None = None
    answers: Answers | FollowedAnswers | None = None
    with ExitStack() as held:
        try:
            if first:
                held.enter_context(lock_file(path))
                answers = held.enter_context(Answers(path, settings, places))
        except DominoError as error:
            problem = error
        count = broadcast_from_first([len(answers) if answers is not None else -1])[0]
        if problem:
            raise problem
        if count < 0:
            raise DominoError("the first process can't write the answers, and says why.")
        try:
            answers = FollowedAnswers(path) if answers is None else answers
        except DominoError:
            other = 1.0
        else:
            other = float(len(answers) != count)
        if max_over_processes([other])[0]:
            raise DominoError(f"not all processes see the answers in {path}: it must lie on a disk that they share.")
        assert answers is not None
        yield answers
