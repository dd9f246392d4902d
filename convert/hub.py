"""A model's files from the Hugging Face Hub, into its usual cache: only what is needed, resumed where it stopped.

huggingface_hub says what there is, logs in and owns the cache. The bytes are received here: from 2.x on it throws away
what an interrupted process had of a file, which for weights is gigabytes.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, BinaryIO, NamedTuple

from rich.console import Console
from rich.progress import Progress

from convert import hf
from convert.progress import byte_bars
from convert.tokenizer import TOKENIZER_FILES
from domino_jax.errors import DominoError, first_line

CONFIG = "config.json"
# What a model's folder needs beside config.json and weights. All else stays where it is; pickles and code above all,
# since either could run on this machine.
BESIDES = (
    "generation_config.json",
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
AT_ONCE = 4  # files
TRIES = 4  # without a new byte
TIMEOUT = 10  # seconds without an answer
PASSING = {408, 429, 500, 502, 503, 504}  # HTTP statuses that are worth another try


class File(NamedTuple):
    """A file to fetch: its name in the repository, its bytes, and the name of its content in the cache."""

    name: str
    size: int
    etag: str


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository, and the folder of the cache where its files appear."""

    repo: str
    revision: str | None
    commit: str
    listed: frozenset[str]  # files of the repository; empty where the Hub is out of reach, and the cache has to do
    storage: Path  # of the repository in the cache: blobs, refs and snapshots
    flag: str  # that asked for it

    @property
    def folder(self) -> Path:
        return self.storage / "snapshots" / self.commit

    def configure(self) -> Path:
        """The folder, with its config.json and the index of its weights in it; nothing else is fetched yet.

        Raises:
            DominoError: there is no config.json, or fetching fails.
        """
        if self.listed and CONFIG not in self.listed:
            raise DominoError(f"{self.repo} has no {CONFIG}, so it is no model of this kind; see {self.flag}.")
        with _explained(self):
            for name in (CONFIG, hf.INDEX):
                if name in self.listed and not self.has(name):
                    self.receive(self.ask(name), lambda count: None)
        return self.folder

    def has(self, name: str) -> bool:
        """Whether a file is there, whole."""
        return (self.folder / name).exists()

    def wanted(self) -> list[str]:
        """The files that the model consists of, small ones first.

        Raises:
            DominoError: the repository has no safetensors, or not those that its index names.
        """
        if hf.SINGLE in self.listed:  # before the index, as transformers and convert.hf look
            weights = [hf.SINGLE]
        elif hf.INDEX in self.listed:
            weight_map = hf.read_json(self.folder / hf.INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise DominoError(f"{hf.INDEX} of {self.repo} has no weight_map.")
            weights = sorted({str(name) for name in weight_map.values()})
        else:
            weights = sorted(n for n in self.listed if n.endswith(".safetensors") and "/" not in n)
        lost = [name for name in weights if name not in self.listed or not name.endswith(".safetensors")]
        if not weights or lost:
            what = f"has no safetensors {lost[0]}, which its index names," if lost else "has no weights as safetensors"
            raise DominoError(f"{self.repo} {what} (pickles are never read); give another with {self.flag}.")
        return [name for name in dict.fromkeys((CONFIG, *BESIDES)) if name in self.listed] + weights

    def ask(self, name: str) -> File:
        """What the Hub says of a file; raises its errors."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        about = get_hf_file_metadata(hf_hub_url(self.repo, name, revision=self.commit), timeout=TIMEOUT)
        if about.etag is None or about.size is None:
            raise DominoError(f"the Hub does not say how large {name} of {self.repo} is; try again later.")
        return File(name, about.size, about.etag)

    def partial(self, file: File) -> Path:
        """Where the bytes of a file are collected; huggingface_hub 1.x goes on from the same."""
        return self.storage / "blobs" / f"{file.etag}.incomplete"

    def missing(self, file: File) -> int:
        """The bytes of it that are still to be fetched."""
        if (self.storage / "blobs" / file.etag).exists():
            return 0
        partial = self.partial(file)
        return file.size - min(partial.stat().st_size if partial.exists() else 0, file.size)

    def receive(self, file: File, advance: Callable[[int], None]) -> None:
        """Bring a file to the folder, going on where an earlier try ended.

        Args:
            advance: called with the bytes that came, fewer than none when they have to come again.

        Raises:
            DominoError: what came is not the file. The Hub's errors and the disk's as they are.
        """
        from huggingface_hub import hf_hub_download, hf_hub_url
        from huggingface_hub.utils import WeakFileLock

        blob, partial = self.storage / "blobs" / file.etag, self.partial(file)
        lock = self.storage.parent / ".locks" / self.storage.name / f"{file.etag}.lock"
        for folder in (blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):  # huggingface_hub's own lock of this file
            if not blob.exists():
                with partial.open("ab") as out:
                    _stream(hf_hub_url(self.repo, file.name, revision=self.commit), out, file.size, advance)
                if not _is_whole(partial, file):
                    partial.unlink()
                    raise DominoError(
                        f"{file.name} of {self.repo} arrived damaged and was deleted; give the same command again."
                    )
                partial.replace(blob)
        hf_hub_download(self.repo, file.name, revision=self.commit)  # finds the content there, and links to it

    def keep(self) -> None:
        """Remember, as huggingface_hub does, which commit the revision was: for when the Hub is out of reach."""
        if self.revision == self.commit:
            return
        ref = self.storage / "refs" / (self.revision or "main")
        with suppress(OSError):  # a cache that is only to be read serves as well
            if not ref.exists() or ref.read_text() != self.commit:
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(self.commit)


def open_snapshot(repo: str, revision: str | None, flag: str, console: Console) -> Snapshot:
    """The commit that a revision of a repository is, by the Hub, or by the cache where the Hub is out of reach.

    Args:
        revision: a branch, tag or commit; the main branch when None.
        flag: of the command line, for errors.

    Raises:
        DominoError: there is no such repository or revision, or it can be had neither here nor there.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    storage = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT)
    except RevisionNotFoundError:
        raise DominoError(
            f"{repo} has no revision {revision!r} on the Hub; give a branch, a tag or a commit of it."
        ) from None
    except Exception as error:  # the Hub's own, and those of its HTTP library
        commit = _cached(repo, revision)
        if commit is None:
            raise _refusal(error, repo, flag) from None
        if not isinstance(error, OfflineModeIsEnabled):
            _say(console, f"{repo} is taken from the cache: the Hub gives no answer ({first_line(error)}).")
        return Snapshot(repo, revision, commit, frozenset(), storage, flag)
    listed = frozenset(sibling.rfilename for sibling in info.siblings or ())
    return Snapshot(repo, revision, str(info.sha), listed, storage, flag)


def _cached(repo: str, revision: str | None) -> str | None:
    """The commit of a revision in the cache, if the cache has a model of it."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=CONFIG))
        hf.tensor_files(folder)
    except (OSError, ValueError, DominoError):  # not there, or not whole
        return None
    return folder.name


def download(snapshots: list[Snapshot], console: Console) -> None:
    """Fetch what is missing of models, after saying what it is; with a bar for each at a terminal.

    Raises:
        DominoError: the disk has too little room (nothing is fetched then), or fetching fails; what arrived is kept.
        KeyboardInterrupt: as it is, after a note.
    """
    jobs: list[tuple[Snapshot, File]] = []
    for snapshot in snapshots:
        if snapshot.listed:
            with _explained(snapshot):
                jobs += [(snapshot, snapshot.ask(name)) for name in snapshot.wanted() if not snapshot.has(name)]
    if jobs:
        _announce(jobs, console)
        try:
            with byte_bars(console) as bars:
                _receive_all(jobs, bars)
        except KeyboardInterrupt:
            _say(console, "interrupted: what arrived is kept, and the same command goes on from there.")
            raise
    for snapshot in snapshots:
        if snapshot.listed:
            snapshot.keep()


def _announce(jobs: list[tuple[Snapshot, File]], console: Console) -> None:
    """Say what will be fetched; raises DominoError where the disk has no room for it."""
    parts = []
    for repo in dict.fromkeys(snapshot.repo for snapshot, _ in jobs):
        mine = [(snapshot, file) for snapshot, file in jobs if snapshot.repo == repo]
        whole, missing = sum(file.size for _, file in mine), sum(snapshot.missing(file) for snapshot, file in mine)
        parts.append(f"{repo} ({_gigabytes(missing)}{f' of {_gigabytes(whole)}' if missing < whole else ''})")
    cache = jobs[0][0].storage.parent
    needed = sum(snapshot.missing(file) for snapshot, file in jobs)
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if needed > free:
        raise DominoError(
            f"{' and '.join(parts)} would go to {cache}, where {_gigabytes(free)} are free; make room there, or "
            "name another folder by the environment variable HF_HOME."
        )
    _say(console, f"fetching {' and '.join(parts)} into {cache}")


def _receive_all(jobs: list[tuple[Snapshot, File]], bars: Progress) -> None:
    """Receive files, several at once; the first error ends it."""
    tasks: dict[str, Any] = {}
    for repo in dict.fromkeys(snapshot.repo for snapshot, _ in jobs):
        mine = [(snapshot, file) for snapshot, file in jobs if snapshot.repo == repo]
        total = sum(file.size for _, file in mine)
        tasks[repo] = bars.add_task(repo, total=total, completed=total - sum(s.missing(file) for s, file in mine))
    waiting: SimpleQueue[tuple[Snapshot, File]] = SimpleQueue()
    results: SimpleQueue[DominoError | None] = SimpleQueue()
    ended = Event()
    for job in jobs:
        waiting.put(job)

    def work() -> None:
        while not ended.is_set():
            try:
                snapshot, file = waiting.get_nowait()
            except Empty:
                return
            try:
                with _explained(snapshot):
                    snapshot.receive(file, partial(bars.advance, tasks[snapshot.repo]))
                results.put(None)
            except DominoError as error:
                results.put(error)

    # Daemons: Ctrl-C does not wait for them. A file that one of them leaves is a beginning of the whole one.
    for _ in range(min(AT_ONCE, len(jobs))):
        Thread(target=work, daemon=True).start()
    try:
        for _ in jobs:
            error = results.get()
            if error:
                raise error
    finally:
        ended.set()


def _stream(url: str, out: BinaryIO, size: int, advance: Callable[[int], None]) -> None:
    """Append what `out` lacks of `size` bytes; a connection that breaks is taken up again.

    Raises:
        HfHubHTTPError: the server refuses. OSError: the disk does. Of httpx: the connection broke too often.
    """
    from huggingface_hub.errors import HfHubHTTPError

    failures = 0
    while (begin := out.tell()) < size:
        try:
            _stream_once(url, out, advance)
            reason: Exception = DominoError("it sends less than it announced")
        except Exception as error:
            # Errors of connections are httpx's, and no OSErrors. Those are the server's refusals and the disk's.
            refused = isinstance(error, HfHubHTTPError) and error.response.status_code not in PASSING
            if refused or (isinstance(error, OSError) and not isinstance(error, HfHubHTTPError)):
                raise
            reason = error
        failures = 0 if out.tell() > begin else failures + 1
        if failures == TRIES:
            raise reason
        if failures:
            time.sleep(failures)


def _stream_once(url: str, out: BinaryIO, advance: Callable[[int], None]) -> None:
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    have = out.tell()
    # Another encoding than the file's own would count other bytes.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True) as response:
        hf_raise_for_status(response)
        if have and response.status_code != 206:  # the whole file comes again
            out.seek(0)
            out.truncate()
            advance(-have)
        for chunk in response.iter_bytes():
            out.write(chunk)
            advance(len(chunk))


def _is_whole(path: Path, file: File) -> bool:
    """Whether a file is what was announced: its size, and for large ones (kept by the Hub in LFS) its SHA-256."""
    if path.stat().st_size != file.size:
        return False
    if len(file.etag) != 64:
        return True
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest() == file.etag


@contextmanager
def _explained(snapshot: Snapshot) -> Iterator[None]:
    """Turns whatever fetching raises into a DominoError of one sentence."""
    try:
        yield
    except DominoError:
        raise
    except Exception as error:  # the Hub's, the disk's, and those of the HTTP library
        raise _refusal(error, snapshot.repo, snapshot.flag) from None


def _refusal(error: Exception, repo: str, flag: str) -> DominoError:
    """What an error of the Hub, of the network or of the disk means to the user."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

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
    if isinstance(error, OSError) and not isinstance(error, HfHubHTTPError):
        return DominoError(f"{repo} can't be written to {constants.HF_HUB_CACHE}: {error}; what arrived is kept.")
    return DominoError(
        f"{repo} could not be fetched from the Hugging Face Hub ({first_line(error)}): check the network and try again "
        f"(what arrived is kept), or {folder}."
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
