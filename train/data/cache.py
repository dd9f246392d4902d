"""Tokenized corpora on disk, so that a corpus is tokenized once for all runs, resumes and hosts that share the disk.

A corpus lies in a folder of its own whose name is a digest of all that it was made from. The arrays are mapped into
memory, not read. Any of the folders may be deleted at any time; the user's cache folder is XDG_CACHE_HOME or ~/.cache.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from domino_jax.errors import DominoError
from domino_jax.runtime.files import lock_file
from train.data.corpus import Corpus

CACHE_VERSION = 2  # of what a row of data becomes: raise it where that changes
ARRAYS = ("ids", "mask", "ends", "order", "rows")
MAPPED = ("ids", "mask")  # the large ones, which stay on disk
ABOUT = "corpus.json"
WORTH_TOKENS = 200_000  # below which a corpus is sooner tokenized than looked for

Found = tuple[Corpus, dict[str, Any]]  # with what reading came to


def cache_folder() -> Path | None:
    """Where corpora are kept; None for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "domino-jax" / "corpora"
    except RuntimeError:
        return None


def corpus_key(parts: Mapping[str, Any]) -> str:
    """A name for a corpus that is made from these parts, with the libraries that are installed."""
    libraries = {name: _version(name) for name in ("tokenizers", "transformers")}
    text = json.dumps({"version": CACHE_VERSION, **libraries, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def cached_corpus(folder: Path, key: str, make: Callable[[], Found]) -> Found:
    """The corpus of a key from the cache; where it is not there, it is made and kept.

    Of several processes that want the same, one makes it, and the others wait. A cache that can't be used is no error.
    """
    found = _load(folder / key)
    if found is not None:
        return found
    with ExitStack() as held:
        with suppress(DominoError):  # a folder that can't be written
            held.enter_context(lock_file(folder / key, wait=True))
        found = _load(folder / key)  # another process may have made it meanwhile
        if found is None:
            found = make()
            if len(found[0].ids) >= WORTH_TOKENS:
                with suppress(OSError):  # a full disk, say: the corpus is there all the same
                    _save(folder / key, *found)
        return found


def _save(place: Path, corpus: Corpus, about: Mapping[str, Any]) -> None:
    temporary = place.with_name(place.name + ".tmp")  # the lock is held, so nobody else writes it
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name in ARRAYS:
            np.save(temporary / f"{name}.npy", getattr(corpus, name))
        values = {"length": corpus.length, "fingerprint": corpus.fingerprint, "about": about}
        (temporary / ABOUT).write_text(json.dumps(values) + "\n", encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)  # one that is not whole
        temporary.replace(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(place: Path) -> Found | None:
    """None where it is not there or not whole."""
    try:
        values = json.loads((place / ABOUT).read_text(encoding="utf-8"))
        arrays = {name: np.load(place / f"{name}.npy", "r" if name in MAPPED else None) for name in ARRAYS}
        corpus = Corpus(**arrays, length=values["length"])
        corpus.fingerprint = values["fingerprint"]
        return corpus, values["about"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
