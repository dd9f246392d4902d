"""A model's files from the Hugging Face Hub, in huggingface_hub's cache: config.json first, weights after the check.

A GGUF file is fetched whole before: its config is in it.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from convert.companions import is_text_file
from convert.gguf import as_folder, gguf_names, gguf_parts
from convert.progress import byte_bars
from convert.tensors import INDEX, SINGLE, tensor_files, tensor_index
from domino_jax.errors import DominoError, first_line

if TYPE_CHECKING:  # slow to import
    from huggingface_hub.hf_api import RepoSibling

CONFIG = "config.json"
TIMEOUT = 10  # seconds without an answer


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository."""

    repo: str
    revision: str | None
    commit: str
    files: "Mapping[str, RepoSibling]"  # by name; empty where the Hub gives no answer and the cache is used
    flag: str  # the command line's, for errors
    gguf: str | None = None  # the file that is meant; None for the repository's safetensors

    def configure(self, console: Console) -> Path:
        """The folder, with config.json and the index of the weights in it; nothing else is fetched yet.

        Of a GGUF file the folder that is made of it, which is fetched.

        Raises:
            DominoError: there is no config.json or file of that name, or fetching fails.
        """
        if self.gguf is not None:
            download([self], console)
            return as_folder(self.fetch(self.gguf))
        if self.files and CONFIG not in self.files:
            files = self._gguf_files()
            more = f"name one of its GGUF files, such as {self.repo}/{files[0]}" if files else f"see {self.flag}"
            raise DominoError(f"{self.repo} has no {CONFIG}, so it is no model of this kind; {more}.")
        if INDEX in self.files:
            self.fetch(INDEX)
        return self.fetch(CONFIG).parent

    def fetch(self, name: str, **options: Any) -> Path:
        """A file of this commit, from the cache or from the Hub.

        Args:
            options: of huggingface_hub.hf_hub_download.

        Raises:
            DominoError: it can't be fetched or written, or what arrived is not the file that the Hub lists.
        """
        from huggingface_hub import hf_hub_download

        fetched = not self.has(name)
        with _explained(self.repo, self.flag):
            path = Path(hf_hub_download(self.repo, name, revision=self.commit, **options))
            stored = self.files[name].lfs if fetched and name in self.files else None
            if stored and _sha256(path) != stored.sha256:
                path.resolve().unlink()  # the content, to which the cache links by this name
                raise DominoError(
                    f"{name} of {self.repo} arrived damaged and was deleted; give the same command again."
                )
        return path

    def has(self, name: str) -> bool:
        """Whether the cache has a file of this commit."""
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(self.repo, name, revision=self.commit), str)

    def missing(self) -> dict[str, int]:
        """The bytes of each file of the model that is not in the cache, small files first.

        Raises:
            DominoError: the repository has no safetensors, or not all that its index names.
        """
        if self.gguf is not None:
            weights = gguf_names(self.gguf)
            if lost := [name for name in weights if name not in self.files]:
                there = ", ".join(self._gguf_files()[:8]) or "none"
                raise DominoError(f"{self.repo} has no {lost[0]}; its GGUF files are {there}.")
            return {name: self.files[name].size or 0 for name in weights if not self.has(name)}
        if SINGLE in self.files:  # before the index, as transformers and convert.hf look
            weights = [SINGLE]
        elif INDEX in self.files:
            placed = tensor_index(self.fetch(INDEX).parent) or {}
            weights = sorted({file.name for file in placed.values()})
        else:
            weights = sorted(n for n in self.files if n.endswith(".safetensors") and "/" not in n)
        lost = [name for name in weights if name not in self.files]
        if not weights or lost:
            what = f"has no safetensors {lost[0]}, which its index names," if lost else "has no weights as safetensors"
            raise DominoError(f"{self.repo} {what} (pickles are never read); give another with {self.flag}.")
        names = [*sorted(filter(is_text_file, self.files)), *weights]
        return {name: self.files[name].size or 0 for name in names if not self.has(name)}

    def _gguf_files(self) -> list[str]:
        return sorted(name for name in self.files if name.endswith(".gguf"))

    def remember(self) -> None:
        """Record in the cache which commit the revision is, for use without the Hub."""
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        name = self.gguf or CONFIG
        path = try_to_load_from_cache(self.repo, name, revision=self.revision)
        if not isinstance(path, str) or self.commit not in Path(path).parts:
            with _explained(self.repo, self.flag):
                hf_hub_download(self.repo, name, revision=self.revision)


def open_snapshot(repo: str, revision: str | None, flag: str, console: Console, gguf: str | None = None) -> Snapshot:
    """The commit of a revision, by the Hub, or by the cache where the Hub gives no answer.

    Args:
        revision: a branch, tag or commit; the main branch when None.
        flag: of the command line, for errors.
        gguf: the GGUF file that is meant.

    Raises:
        DominoError: there is no such repository or revision, or neither the Hub nor the cache has the model.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError

    try:
        info = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT, files_metadata=True)
    except RevisionNotFoundError:
        raise DominoError(
            f"{repo} has no revision {revision!r} on the Hub; give a branch, a tag or a commit of it."
        ) from None
    except Exception as error:  # huggingface_hub's own, and those of its HTTP library
        commit = _cached_commit(repo, revision, gguf)
        if commit is None:
            raise _refusal(error, repo, flag) from None
        if not isinstance(error, OfflineModeIsEnabled):
            _say(console, f"{repo} is taken from the cache: the Hub gives no answer ({first_line(error)}).")
        return Snapshot(repo, revision, commit, {}, flag, gguf)
    files = {file.rfilename: file for file in info.siblings or ()}
    return Snapshot(repo, revision, str(info.sha), files, flag, gguf)


def _cached_commit(repo: str, revision: str | None, gguf: str | None) -> str | None:
    """The commit of a revision in the cache, if the cache has its config.json and all its weights, or the GGUF file."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo, gguf or CONFIG, revision=revision)
    if not isinstance(path, str):
        return None
    try:
        _ = tensor_files(Path(path).parent) if gguf is None else gguf_parts(Path(path))
    except DominoError:
        return None
    return Path(path).parents[(gguf or CONFIG).count("/")].name


def download(snapshots: list[Snapshot], console: Console) -> None:
    """Fetch the files that the cache lacks, after a note of their size, with a progress bar for each repository.

    One file at a time, in this thread: hf_xet fetches parts of one file in parallel, and Ctrl-C ends the download at
    once, where huggingface_hub's snapshot_download would first finish the files that it has begun.

    Raises:
        DominoError: the disk has too little room (nothing is fetched then), or fetching fails; finished files are kept.
        KeyboardInterrupt: as it is, after a note.
    """
    snapshots = [snapshot for snapshot in snapshots if snapshot.files]
    jobs = [(snapshot, missing) for snapshot in snapshots if (missing := snapshot.missing())]
    if jobs:
        _announce({snapshot.repo: sum(missing.values()) for snapshot, missing in jobs}, console)
    try:
        with byte_bars(console) as bars:
            for snapshot, missing in jobs:
                task = bars.add_task(snapshot.repo, total=sum(missing.values()))
                for name in missing:
                    snapshot.fetch(name, tqdm_class=_bar(lambda count, task=task: bars.advance(task, count)))
    except KeyboardInterrupt:
        _say(console, "interrupted: finished files are kept, and the same command fetches the rest.")
        raise
    for snapshot in snapshots:
        snapshot.remember()


def _bar(advance: Any) -> Any:
    """A tqdm class for huggingface_hub, which draws nothing and calls `advance` with the bytes that were written."""
    from huggingface_hub.utils import tqdm

    class Bytes(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **(options | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            advance(n or 0)

        # hf_xet counts the bytes on the wire beside those that are written; they are not drawn.
        def update_transfer(self, n: float | None = 1) -> None: ...

        def set_transfer_postfix_str(self, *_: Any, **__: Any) -> None: ...

    return Bytes


def _announce(sizes: Mapping[str, int], console: Console) -> None:
    """Say how many bytes of each repository will be fetched; raises DominoError where the disk has no room for them."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    parts = " and ".join(f"{repo} ({_gigabytes(size)})" for repo, size in sizes.items())
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if sum(sizes.values()) > free:
        raise DominoError(
            f"{parts} would go to {cache}, where {_gigabytes(free)} are free; make room there, or name another folder "
            "by the environment variable HF_HOME."
        )
    _say(console, f"fetching {parts} into {cache}")


@contextmanager
def _explained(repo: str, flag: str) -> Iterator[None]:
    """Turns whatever fetching raises into a DominoError of one sentence."""
    try:
        yield
    except DominoError:
        raise
    except Exception as error:  # huggingface_hub's, the disk's, and those of the HTTP library
        raise _refusal(error, repo, flag) from None


def _refusal(error: Exception, repo: str, flag: str) -> DominoError:
    """What an error of the Hub, of the network or of the disk means to the user."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    folder = f"give a folder with {flag} DIR"
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{repo}"
        return DominoError(f"{repo} is gated: accept its terms at {page} and log in (hf auth login, or HF_TOKEN).")
    if isinstance(error, RepositoryNotFoundError):
        return DominoError(
            f"{repo} is no folder here and no repository on the Hub, or a private one (hf auth login, or HF_TOKEN); "
            f"check the name, or {folder}."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return DominoError(
            f"{repo} is no folder here and not whole in the cache, and HF_HUB_OFFLINE forbids the network; {folder}."
        )
    if isinstance(error, OSError) and error.errno is not None:  # the disk's; huggingface_hub's have no number
        return DominoError(
            f"{repo} can't be written to {constants.HF_HUB_CACHE}: {first_line(error)}; finished files are kept."
        )
    reason = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
    return DominoError(
        f"{repo} could not be fetched from the Hugging Face Hub ({reason}): check the network and try again (finished "
        f"files are kept), or {folder}."
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
