"""Names, revisions and downloads, against a Hub on loopback; nothing here leaves the machine."""

import hashlib
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub
from tiny import DRAFT, TARGET, make_draft, make_target

from convert import hf
from domino_jax.errors import DominoError
from infer import names
from infer.bench.shapes import SHAPES

ROOT = Path(__file__).parents[1]
TARGET_REPO, DRAFT_REPO, DFLASH_REPO = names.TABLE["qwen3-4b"][:3]
WORDS = ("--input-ids", "5,70,71", "--max-new-tokens", "6", "--dtype", "float32", "--json")
assert DRAFT_REPO and DFLASH_REPO


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders as a repository may have them: target, sharded (with other files beside), other; draft, dflash."""
    root = tmp_path_factory.mktemp("models")
    make_target(root / "target")
    make_target(root / "other", seed=7)
    make_draft(root / "draft")
    make_draft(root / "dflash", seed=2, head=None, shift_label=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "SHARD_BYTES", 30_000)
        make_target(root / "sharded")
    for name in ("pytorch_model.bin", "modeling_x.py", "model.pt", "consolidated.safetensors", "trainer_state.json"):
        (root / "sharded" / name).write_text("never to be fetched")
    return root


@pytest.fixture
def hub(models) -> Iterator[Hub]:
    """Serves target, draft and dflash under public names."""
    with Hub() as server:
        server.add(TARGET_REPO, models / "target")
        server.add(DRAFT_REPO, models / "draft")
        server.add(DFLASH_REPO, models / "dflash")
        yield server


class Machine:
    """A user's machine: a cache of its own, and the Hub under HF_ENDPOINT."""

    def __init__(self, hub: Hub, home: Path, programs: Path):
        self.env = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_secret",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "true",  # the runs of this file compile the same programs
            "JAX_COMPILATION_CACHE_DIR": str(programs),
        }
        self.cache = home / "hub"

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "infer", *WORDS, *words]

    def run(self, *words: str, limit: Callable[[], None] | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words), env=self.env | env, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit
        )

    def generate(self, *words: str, **env: str) -> dict[str, Any]:
        """The one row of a run that must succeed."""
        done = self.run(*words, **env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def refuse(self, *words: str, status: int = 1, **how: Any) -> str:
        """The last line of a run that must fail, and end with one sentence."""
        done = self.run(*words, **how)
        assert (done.returncode, done.stdout) == (status, ""), done.stderr
        assert "Traceback" not in done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: "), done.stderr
        return last

    def partial(self, repo: str = TARGET_REPO) -> list[Path]:
        """What is there of files that are not whole."""
        return list((self.cache / f"models--{repo.replace('/', '--')}" / "blobs").glob("*.incomplete"))


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def machine(hub, tmp_path, programs) -> Machine:
    return Machine(hub, tmp_path / "home", programs)


@pytest.fixture(scope="module")
def tokens(models, tmp_path_factory, programs) -> dict[str, list[int]]:
    """What `target` and `other` write, run from their folders."""
    home = tmp_path_factory.mktemp("offline")
    with Hub() as nobody:
        machine = Machine(nobody, home, programs)
        rows = {n: machine.generate("--model", str(models / n), "--draft", "none") for n in ("target", "other")}
        assert not nobody.log
    return {name: row["tokens"] for name, row in rows.items()}


def total(*files: Path) -> int:
    return sum(file.stat().st_size for file in files)


# --- Names --------------------------------------------------------------------------------------------------------


def test_the_table_has_the_public_checkpoints():
    assert {name for name, public in names.TABLE.items() if public.domino} == {"demo", "qwen3-4b", "qwen3-8b"}
    assert [public.target for public in names.TABLE.values()][1:] == [
        f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B", "30B-A3B")
    ]
    assert set(SHAPES) <= set(names.TABLE)  # the benchmark's shapes go by the same names
    for name, public in names.TABLE.items():
        if public.shape:
            target = SHAPES[name].target
            assert public.shape == (target.hidden_size, target.num_hidden_layers)


@pytest.mark.parametrize(
    ("model", "draft", "found"),
    [
        ("qwen3-8b", None, ("Qwen/Qwen3-8B", "Huang2020/Qwen3-8B-Domino-b16")),
        ("Qwen/Qwen3-8B", None, ("Qwen/Qwen3-8B", "Huang2020/Qwen3-8B-Domino-b16")),
        ("qwen3-8b", "qwen3-8b-dflash", ("Qwen/Qwen3-8B", "z-lab/Qwen3-8B-DFlash-b16")),
        ("qwen3-8b", "qwen3-8b", ("Qwen/Qwen3-8B", "Huang2020/Qwen3-8B-Domino-b16")),
        ("qwen3-8b", "none", ("Qwen/Qwen3-8B", None)),
        ("qwen3-30b-a3b", None, ("Qwen/Qwen3-30B-A3B", None)),
        ("Qwen/Qwen3-14B", None, ("Qwen/Qwen3-14B", None)),
        ("qwen3-14b", "my/drafter", ("Qwen/Qwen3-14B", "my/drafter")),
        ("some/model", None, ("some/model", None)),
    ],
)
def test_names_and_repositories_find_their_drafter(model, draft, found):
    assert names.where(model, draft) == found


def test_a_folder_called_as_a_repository_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "Qwen" / "Qwen3-8B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert names.where("Qwen/Qwen3-8B") == ("Qwen/Qwen3-8B", None)


def test_a_target_without_a_public_drafter_lends_none_and_a_drafter_is_no_target():
    with pytest.raises(DominoError, match="no drafter is public for qwen3-32b.*qwen3-8b-dflash"):
        names.where("qwen3-8b", "qwen3-32b")
    with pytest.raises(DominoError, match="qwen3-4b-dflash is a drafter: give it with --draft"):
        names.where("qwen3-4b-dflash")


def test_a_folder_of_a_public_shape_is_told_which_drafter_fits(tmp_path):
    for name, hint in (("qwen3-8b", "with --draft qwen3-8b."), ("qwen3-14b", "give one with --draft DIR.")):
        folder = tmp_path / name
        folder.mkdir()
        hf.write_json(folder / "config.json", SHAPES[name].target.to_hf())
        console = names_console()
        assert names.resolve(str(folder), None, console) == (folder, None)
        assert console.export_text().strip().endswith(hint)


def names_console() -> Any:
    from rich.console import Console

    return Console(record=True, file=Path(os.devnull).open("w"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--model", "demo", "--revision", "v1"), "--revision chooses"),
        (("--model", "qwen3-4b", "--draft", ".", "--draft-revision", "v1"), "--draft-revision chooses"),
        (("--model", "qwen3-4b", "--draft", "none", "--draft-revision", "v1"), "--draft-revision needs a drafter"),
        (("--model", "qwen3-14b", "--draft-revision", "v1"), "--draft-revision needs a drafter"),
    ],
)
def test_a_revision_of_what_has_none_is_a_contradiction(words, says, capsys):
    from infer.__main__ import main
    from infer.bench.command import main as bench

    assert main(["hi", *words]) == 2
    assert says in capsys.readouterr().err
    assert bench([*words]) == 1
    assert says in capsys.readouterr().err


# --- Fetching -----------------------------------------------------------------------------------------------------


def test_target_and_drafter_are_fetched_once_and_kept_for_when_the_hub_is_gone(hub, machine, models, tokens):
    first = machine.run("--model", "qwen3-4b")
    assert first.returncode == 0, first.stderr
    row = json.loads(first.stdout)
    assert row["tokens"] == tokens["target"] and row["cycles"] > 0
    assert f"fetching {TARGET_REPO} (" in first.stderr and f"and {DRAFT_REPO} (" in first.stderr
    assert sorted(r.sent for r in hub.received()) == sorted(
        total(models / n / "model.safetensors") for n in ("target", "draft")
    )
    assert not machine.partial() and not machine.partial(DRAFT_REPO)

    hub.log.clear()
    again = machine.run("--model", TARGET_REPO)  # by its other name
    assert json.loads(again.stdout)["tokens"] == row["tokens"] and "fetching" not in again.stderr
    assert {r.method for r in hub.log} == {"GET"} and all("/api/" in r.path for r in hub.log)  # only what there is

    offline = machine.run("--model", "qwen3-4b", HF_HUB_OFFLINE="1")
    assert json.loads(offline.stdout)["accepted"] == row["accepted"] and "cache" not in offline.stderr
    hub.stop()
    gone = machine.run("--model", "qwen3-4b")
    assert json.loads(gone.stdout)["accepted"] == row["accepted"]
    assert f"{TARGET_REPO} is taken from the cache: the Hub gives no answer" in gone.stderr
    assert "could not be fetched" in machine.refuse("--model", "qwen3-8b")


def test_a_dflash_drafter_has_a_name(hub, machine, tokens):
    row = machine.generate("--model", "qwen3-4b", "--draft", "qwen3-4b-dflash")
    assert row["tokens"] == tokens["target"]
    assert row["drafts"][0] == DRAFT.block_size - 1
    assert not any(DRAFT_REPO in r.path for r in hub.log)


def test_a_name_without_a_drafter_says_so_and_decodes_plainly(hub, machine, models, tokens):
    hub.add("Qwen/Qwen3-14B", models / "target")
    done = machine.run("--model", "qwen3-14b")
    assert "no drafter is public for qwen3-14b: decoding plainly" in done.stderr
    assert json.loads(done.stdout)["tokens"] == tokens["target"]


def test_of_a_sharded_repository_exactly_what_its_index_lists_is_fetched(hub, machine, models, tokens):
    hub.add(TARGET_REPO, models / "sharded")
    shards = {file.name for file in hf.tensor_files(models / "sharded")}
    assert len(shards) > 1
    row = machine.generate("--model", "qwen3-4b", "--draft", "none")
    assert row["tokens"] == tokens["target"]
    fetched = {"config.json", hf.INDEX, "generation_config.json", "tokenizer.json", "tokenizer_config.json"} | shards
    assert hub.names("HEAD") == hub.names("GET") == fetched


def test_a_revision_serves_its_own_weights(hub, machine, models, tokens):
    commit = hub.add(TARGET_REPO, models / "other", "v1.0")
    hub.add(DRAFT_REPO, models / "dflash", "plain")
    assert tokens["target"] != tokens["other"]
    row = machine.generate("--model", "qwen3-4b", "--revision", "v1.0", "--draft-revision", "plain")
    assert (row["tokens"], row["drafts"][0]) == (tokens["other"], DRAFT.block_size - 1)
    assert machine.generate("--model", "qwen3-4b")["tokens"] == tokens["target"]
    for revision in (commit, "v1.0"):
        words = ("--model", TARGET_REPO, "--revision", revision, "--draft", "none")
        assert machine.generate(*words, HF_HUB_OFFLINE="1")["tokens"] == tokens["other"]


# --- Interruptions ------------------------------------------------------------------------------------------------


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub, machine, models, tokens):
    size = total(models / "target" / "model.safetensors")
    hub.cuts = [20_000, 5_000, 0]
    assert machine.generate("--model", "qwen3-4b", "--draft", "none")["tokens"] == tokens["target"]
    got = [(r.start, r.sent) for r in hub.received()]
    assert got == [(0, 20_000), (20_000, 5_000), (25_000, size - 25_000)]


def test_the_next_run_fetches_the_rest_of_a_broken_download(hub, machine, models, tokens):
    size = total(models / "target" / "model.safetensors")
    hub.cuts = [30_000] + [0] * 10
    error = machine.refuse("--model", "qwen3-4b", "--draft", "none")
    assert f"{TARGET_REPO} could not be fetched" in error and "what arrived is kept" in error
    (partial,) = machine.partial()
    assert total(partial) == 30_000
    hub.cuts.clear()
    hub.log.clear()
    done = machine.run("--model", "qwen3-4b", "--draft", "none")
    assert json.loads(done.stdout)["tokens"] == tokens["target"]
    assert f"({(size - 30_000) / 1e6:.2f} MB of {size / 1e6:.2f} MB)" in done.stderr
    assert [(r.start, r.sent) for r in hub.received()] == [(30_000, size - 30_000)]
    assert not machine.partial()


def test_a_server_that_ignores_ranges_sends_the_file_again(hub, machine, models, tokens):
    hub.cuts, hub.ignore_ranges = [30_000], True
    assert machine.generate("--model", "qwen3-4b", "--draft", "none")["tokens"] == tokens["target"]
    assert [r.start for r in hub.received()] == [0, 0]


def test_ctrl_c_is_one_line_and_loses_nothing(hub, machine, models, tokens):
    size = total(models / "target" / "model.safetensors")
    hub.cuts, hub.hold = [25_000], True
    process = subprocess.Popen(
        machine.command("--model", "qwen3-4b", "--draft", "none"),
        env=machine.env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: any(total(partial) == 25_000 for partial in machine.partial()))
    began = time.perf_counter()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert time.perf_counter() - began < 5  # the connection still hangs
    assert (process.returncode, out) == (130, "")
    announced, interrupted = err.splitlines()
    assert announced.startswith("fetching") and interrupted.startswith("interrupted: what arrived is kept")
    hub.hold = False
    hub.log.clear()
    assert machine.generate("--model", "qwen3-4b", "--draft", "none")["tokens"] == tokens["target"]
    assert [(r.start, r.sent) for r in hub.received()] == [(25_000, size - 25_000)]


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_terminal_sees_bytes_and_rate(hub, machine):
    hub.slow = 0.1
    master, slave = pty.openpty()
    process = subprocess.Popen(
        machine.command("--model", "qwen3-4b", "--draft", "none"),
        env=machine.env | {"TERM": "xterm", "COLUMNS": "120"},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=slave,
    )
    os.close(slave)
    seen = b""
    while b"bytes" not in seen or b"/s" not in seen:  # a frame of the bar; it is erased in the end
        seen += os.read(master, 65536)
        if b"cycle" in seen or b"tokens/s" in seen:
            break
    while True:
        try:
            more = os.read(master, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not more:
            break
        seen += more
    assert process.wait() == 0
    os.close(master)
    bar = next(line for line in seen.decode().split("\r") if "kB" in line and "kB/s" in line)
    assert TARGET_REPO in bar


# --- Refusals -----------------------------------------------------------------------------------------------------

MISFITS = {
    "width": ({"hidden_size": 64}, "hidden_size is 64"),
    "vocabulary": ({"vocab_size": 300}, "vocab_size is 300"),
    "layers": ({"num_target_layers": 5}, "number of layers is 5"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_drafter_that_does_not_fit_costs_no_weights(hub, machine, tmp_path, case):
    change, says = MISFITS[case]
    make_draft(tmp_path / "misfit", **change)
    hub.add(DRAFT_REPO, tmp_path / "misfit")
    error = machine.refuse("--model", "qwen3-4b")
    assert "made for another target" in error and says in error
    assert hub.names() == {"config.json"} and not hub.received()


@pytest.mark.parametrize(
    ("change", "says"), [({"target_layer_ids": [0, 2]}, "target_layer_ids"), ({"mask_token_id": 260}, "mask_token_id")]
)
def test_a_drafter_that_taps_or_masks_what_is_not_there_costs_no_weights(hub, machine, models, tmp_path, change, says):
    raw = hf.read_json(models / "draft" / "config.json")
    raw["dflash_config"] |= change
    hf.write_json(tmp_path / "config.json", raw)
    (tmp_path / "model.safetensors").write_text("weights")
    hub.add("my/drafter", tmp_path)
    # A folder's target is checked as well before anything of a drafter is fetched.
    assert says in machine.refuse("--model", str(models / "target"), "--draft", "my/drafter")
    assert hub.names() == {"config.json"}


def test_what_is_not_there_is_one_sentence(hub, machine, models, tmp_path):
    assert "Qwen/Qwen3-8B is no folder here and no repository on the Hub" in machine.refuse("--model", "qwen3-8b")
    error = machine.refuse("--model", "qwen3-4b", "--revision", "nowhere")
    assert f"{TARGET_REPO} has no revision 'nowhere'" in error
    hub.gated.add(DRAFT_REPO)
    assert f"{DRAFT_REPO} is gated: accept its terms at {hub.url}/{DRAFT_REPO}" in machine.refuse("--model", "qwen3-4b")
    hub.gated.clear()
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "config.json").write_text((models / "target" / "config.json").read_text())
    (tmp_path / "pickles" / "pytorch_model.bin").write_text("pickle")
    hub.add("my/pickles", tmp_path / "pickles")
    assert "my/pickles has no weights as safetensors" in machine.refuse("--model", "my/pickles")
    assert "pytorch_model.bin" not in hub.names("HEAD") | hub.names()
    assert not hub.received()


def test_without_room_nothing_is_fetched(hub, machine):
    hub.claims["model.safetensors"] = 10**15
    error = machine.refuse("--model", "qwen3-4b")
    assert f"{TARGET_REPO} (1000000.00 GB)" in error and "GB are free" in error and "HF_HOME" in error
    assert not hub.received()


def test_a_disk_that_refuses_is_one_sentence_and_what_arrived_is_kept(hub, machine, models, tokens):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    error = machine.refuse("--model", "qwen3-4b", "--draft", "none", limit=limit)
    assert f"{TARGET_REPO} can't be written to {machine.cache}" in error
    (partial,) = machine.partial()
    assert 0 < total(partial) <= 40_000
    assert machine.generate("--model", "qwen3-4b", "--draft", "none")["tokens"] == tokens["target"]


def test_damaged_weights_are_not_kept(hub, machine, models, tokens):
    hub.spoil = True
    assert "model.safetensors of Qwen/Qwen3-4B arrived damaged" in machine.refuse("--model", "qwen3-4b")
    assert not machine.partial()
    hub.spoil = False
    assert machine.generate("--model", "qwen3-4b")["tokens"] == tokens["target"]
