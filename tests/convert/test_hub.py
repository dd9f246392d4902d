"""Names, revisions and downloads, against a Hub on loopback; nothing here leaves the machine."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from factory import BYTE_TARGET, hf_weights, make_draft, make_target, random_weights
from gguf_files import write_gguf
from hub_server import Hub
from rich.console import Console

from convert import hf
from convert import hub as convert_hub
from convert import registry as names
from convert.shapes import SHAPES
from convert.tensors import tensor_files
from domino_jax.errors import DominoError

ROOT = Path(__file__).parents[2]
TARGET_REPO, DRAFT_REPO, DFLASH_REPO = (str(repo) for repo in names.TABLE["qwen3-4b"][:3])
WORDS = ("--input-ids", "5,70,71", "--max-new-tokens", "6", "--dtype", "float32", "--json")
# What the command line does before it loads a model, for tests of nothing else.
FETCH = """
import sys
from rich.console import Console
from convert.registry import resolve_folders
model, draft, *revisions = (word or None for word in sys.argv[1:])
print(*resolve_folders(model, draft, Console(stderr=True), *revisions), sep="\\n")
"""


# The command line several times in one process, since starting one takes seconds.
SEVERAL = """
import json, sys
from infer.__main__ import main
for words in json.loads(sys.argv[1]):
    print("exit status", main(words), file=sys.stderr, flush=True)
"""


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


class Fetched(NamedTuple):
    """Folders, and what was said."""

    target: Path
    draft: Path | None
    err: str


def ran(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)


class Machine:
    """A user's machine: a cache of its own, and the Hub under HF_ENDPOINT."""

    def __init__(self, hub: Hub, home: Path):
        self.env = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_secret",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        }
        self.cache = home / "hub"

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "infer", *WORDS, *words]

    def run(self, *words: str, before: Sequence[str] = (), **env: str) -> subprocess.CompletedProcess[str]:
        """The command line; `before` are words to put before it."""
        return ran([*before, *self.command(*words)], self.env | env)

    def fetch(self, model: str = "qwen3-4b", draft: str = "none", *revisions: str, **env: str) -> Fetched:
        """What it fetches, which must succeed."""
        done = ran([sys.executable, "-c", FETCH, model, draft, *revisions], self.env | env)
        assert done.returncode == 0, done.stderr
        target, drafter = done.stdout.splitlines()
        return Fetched(Path(target), None if drafter == "None" else Path(drafter), done.stderr)

    def refuse(self, *words: str, status: int = 1, **how: Any) -> str:
        """The last line of a run that must fail, and end with one sentence."""
        done = self.run(*words, **how)
        assert (done.returncode, done.stdout) == (status, ""), done.stderr
        assert "Traceback" not in done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: "), done.stderr
        return last

    def refuse_all(self, *commands: Sequence[str]) -> list[str]:
        """`refuse` for each of several runs in one process."""
        done = ran([sys.executable, "-c", SEVERAL, json.dumps([[*WORDS, *words] for words in commands])], self.env)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert "Traceback" not in done.stderr
        lines = done.stderr.splitlines()
        last = [lines[i - 1] for i, line in enumerate(lines) if line == "exit status 1"]
        assert len(last) == len(commands) and all(line.startswith("error: ") for line in last), done.stderr
        return last

    def unfinished(self) -> list[Path]:
        """The beginnings of files that the cache holds."""
        return list(self.cache.glob("*/blobs/*.incomplete"))


@pytest.fixture
def machine(hub, tmp_path) -> Machine:
    return Machine(hub, tmp_path / "home")


def same(folder: Path | None, source: Path) -> bool:
    """Whether a fetched folder has the weights of the one that was served."""
    names = [file.name for file in tensor_files(source)]
    return folder is not None and all((folder / n).read_bytes() == (source / n).read_bytes() for n in names)


def total(*files: Path) -> int:
    return sum(file.stat().st_size for file in files)


# --- Names --------------------------------------------------------------------------------------------------------


LLAMA = ("meta-llama/Llama-3.1-8B-Instruct", "z-lab/LLaMA3.1-8B-Instruct-DFlash-UltraChat")


def test_the_table_has_the_public_checkpoints():
    assert {name for name, public in names.TABLE.items() if public.domino} == {"demo", "qwen3-4b", "qwen3-8b"}
    assert [public.target for public in names.TABLE.values()][1:] == [
        *(f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B", "30B-A3B")),
        "meta-llama/Llama-3.1-8B-Instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        *(f"chiennv/Orthrus-Qwen3-{size}" for size in ("1.7B", "4B", "8B")),
    ]
    assert set(SHAPES) <= set(names.TABLE)  # the benchmark's shapes go by the same names
    for name, public in names.TABLE.items():
        if public.shape:
            target = SHAPES[name].target
            assert public.shape == (target.hidden_size, target.num_hidden_layers)


@pytest.mark.parametrize(
    ("place", "repo", "file"),
    [
        ("my/repo/model-Q8_0.gguf", "my/repo", "model-Q8_0.gguf"),
        ("my/repo/Q4/model-00001-of-00002.gguf", "my/repo", "Q4/model-00001-of-00002.gguf"),
        ("my/repo", "my/repo", None),
        ("my/repo.gguf", "my/repo.gguf", None),
    ],
)
def test_a_file_of_a_repository_is_told_from_a_repository(monkeypatch, place, repo, file):
    asked: list[Any] = []
    monkeypatch.setattr(convert_hub, "open_snapshot", lambda *given: asked.append(given))
    names.open_place(place, place, "--model", None, Console())
    assert (asked[0][0], *asked[0][4:]) == ((repo, file) if file else (repo,))


@pytest.mark.parametrize("place", ["./model.gguf", "/tmp/none/model.gguf", "model.gguf"])
def test_a_gguf_file_that_is_not_here_is_not_looked_for_on_the_hub(place):
    with pytest.raises(DominoError, match="nor a folder or GGUF file here"):
        names.open_place(place, place, "--model", None, Console())


def test_a_repository_of_gguf_files_alone_asks_for_one():
    files: Any = dict.fromkeys(["README.md", "b-Q8_0.gguf", "a-Q4_K_M.gguf"])
    with pytest.raises(DominoError, match=r"has no config.json.*GGUF files, such as my/repo/a-Q4_K_M.gguf\."):
        convert_hub.Snapshot("my/repo", None, "c0", files, "--model").configure(Console())
    with pytest.raises(DominoError, match=r"has no c.gguf; its GGUF files are a-Q4_K_M.gguf, b-Q8_0.gguf\."):
        convert_hub.Snapshot("my/repo", None, "c0", files, "--model", "c.gguf").missing()


@pytest.mark.slow
def test_a_gguf_file_is_fetched_alone_and_found_again_without_the_hub(hub, machine, tmp_path):
    repo = tmp_path / "repo"
    repo.mkdir()
    config = BYTE_TARGET
    for name in ("a.gguf", "b-00001-of-00002.gguf"):
        write_gguf(repo / name, config, hf_weights(random_weights(config, 0), config))
    hub.add("my/files", repo)
    home = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    fetched = machine.fetch("my/files/a.gguf", **home)
    assert "fetching my/files (" in fetched.err and fetched.target.name == "a"
    assert (fetched.target / "a.gguf").read_bytes() == (repo / "a.gguf").read_bytes()
    assert not [request for request in hub.log if "b-0000" in request.path]
    assert machine.fetch("my/files/a.gguf", HF_HUB_OFFLINE="1", **home).target == fetched.target
    assert machine.refuse("--model", "my/files/c.gguf", "--draft", "none") == (
        "error: my/files has no c.gguf; its GGUF files are a.gguf, b-00001-of-00002.gguf."
    )
    assert "has no b-00002-of-00002.gguf" in machine.refuse(
        "--model", "my/files/b-00001-of-00002.gguf", "--draft", "none"
    )


@pytest.mark.parametrize(
    ("model", "draft", "found"),
    [
        ("qwen3-8b", None, ("Qwen/Qwen3-8B", "Huang2020/Qwen3-8B-Domino-b16")),
        ("Qwen/Qwen3-8B", None, ("Qwen/Qwen3-8B", "Huang2020/Qwen3-8B-Domino-b16")),
        ("qwen3-8b", "qwen3-8b-dflash", ("Qwen/Qwen3-8B", "z-lab/Qwen3-8B-DFlash-b16")),
        ("qwen3-8b", "qwen3-8b", ("Qwen/Qwen3-8B", "Huang2020/Qwen3-8B-Domino-b16")),
        ("qwen3-8b", "none", ("Qwen/Qwen3-8B", None)),
        ("qwen3-30b-a3b", None, ("Qwen/Qwen3-30B-A3B", "JetSpec/jetspec-qwen3-30b-a3b")),
        ("Qwen/Qwen3-14B", None, ("Qwen/Qwen3-14B", "deepseek-ai/dspark_qwen3_14b_block7")),
        ("qwen3-8b", "qwen3-8b-dspark", ("Qwen/Qwen3-8B", "deepseek-ai/dspark_qwen3_8b_block7")),
        ("Qwen/Qwen3-32B", None, ("Qwen/Qwen3-32B", None)),
        ("qwen3-14b", "my/drafter", ("Qwen/Qwen3-14B", "my/drafter")),
        ("some/model", None, ("some/model", None)),
        ("llama-3.1-8b", None, LLAMA),
        (LLAMA[0], "llama-3.1-8b", LLAMA),
        ("llama-3.1-8b", "llama-3.1-8b-dflash", LLAMA),
        ("smollm2-135m", None, ("HuggingFaceTB/SmolLM2-135M-Instruct", None)),
    ],
)
def test_names_and_repositories_find_their_drafter(model, draft, found):
    assert names.locate(model, draft) == found


def test_a_folder_called_as_a_repository_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "Qwen" / "Qwen3-8B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert names.locate("Qwen/Qwen3-8B") == ("Qwen/Qwen3-8B", None)


def test_a_target_without_a_public_drafter_has_none_and_a_drafter_is_no_target():
    with pytest.raises(DominoError, match=r"no drafter is public for qwen3-32b: .*qwen3-8b-dflash"):
        names.locate("qwen3-32b", "qwen3-32b")
    with pytest.raises(DominoError, match="qwen3-4b-dflash is a drafter: give it with --draft"):
        names.locate("qwen3-4b-dflash")


def test_a_folder_of_a_public_shape_is_told_which_drafter_fits(tmp_path):
    for name, hint in (("qwen3-8b", "with --draft qwen3-8b."), ("qwen3-32b", "give one with --draft DIR.")):
        folder = tmp_path / name
        folder.mkdir()
        hf.write_json(folder / "config.json", SHAPES[name].target.to_hf())
        console = names_console()
        assert names.resolve_folders(str(folder), None, console) == (folder, None)
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
        (("--model", "qwen3-32b", "--draft-revision", "v1"), "--draft-revision needs a drafter"),
    ],
)
def test_a_revision_of_what_has_none_is_a_contradiction(words, says, capsys):
    from infer.__main__ import main
    from infer.bench.command import main as bench

    assert main(["hi", *words]) == 2
    assert says in capsys.readouterr().err
    assert bench([*words]) == 2
    assert says in capsys.readouterr().err


# --- Fetching -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.e2e
def test_target_and_drafter_are_fetched_once_and_kept_for_when_the_hub_is_gone(hub, machine, models):
    first = machine.run("--model", "qwen3-4b")
    assert json.loads(first.stdout)["cycles"] > 0
    assert f"fetching {TARGET_REPO} (" in first.stderr and f"and {DRAFT_REPO} (" in first.stderr
    whole = [total(models / name / "model.safetensors") for name in ("target", "draft")]
    assert sorted(r.sent for r in hub.received()) == sorted(whole)
    assert machine.unfinished() == []
    hub.log.clear()
    again = machine.fetch(TARGET_REPO, "")  # by its other name
    assert same(again.target, models / "target") and same(again.draft, models / "draft")
    assert again.err == ""
    assert hub.log and all(r.path.startswith("/api/") for r in hub.log)  # only what there is
    hub.stop()
    gone = machine.fetch("qwen3-4b", "")
    assert f"{TARGET_REPO} is taken from the cache: the Hub gives no answer" in gone.err
    assert machine.fetch("qwen3-4b", "", HF_HUB_OFFLINE="1") == again
    assert gone[:2] == again[:2]
    assert "could not be fetched" in machine.refuse("--model", "qwen3-8b")


@pytest.mark.e2e
def test_a_dflash_drafter_has_a_name(hub, machine, models):
    fetched = machine.fetch("qwen3-4b", "qwen3-4b-dflash")
    assert same(fetched.target, models / "target") and same(fetched.draft, models / "dflash")
    assert not any(DRAFT_REPO in r.path for r in hub.log)


@pytest.mark.e2e
@pytest.mark.slow
def test_a_name_without_a_drafter_says_so_and_decodes_plainly(hub, machine, models):
    hub.add("Qwen/Qwen3-14B", models / "sharded")
    done = machine.run("--model", "qwen3-14b")
    assert "no drafter is public for qwen3-14b: decoding plainly" in done.stderr
    assert json.loads(done.stdout)["cycles"] == 0


@pytest.mark.e2e
def test_exactly_what_is_needed_is_fetched(hub, machine, models):
    """Of a repository with an index the files that it lists; no pickles, no code, no other copies."""
    hub.add(TARGET_REPO, models / "sharded")
    shards = {file.name for file in tensor_files(models / "sharded")}
    assert len(shards) > 1
    assert same(machine.fetch().target, models / "sharded")
    needed = {"config.json", hf.INDEX, "generation_config.json", "tokenizer.json", "tokenizer_config.json"} | shards
    assert hub.names("HEAD") == hub.names("GET") == needed


@pytest.mark.e2e
@pytest.mark.slow
def test_a_revision_serves_its_own_weights(hub, machine, models):
    commit = hub.add(TARGET_REPO, models / "other", "v1.0")
    hub.add(DRAFT_REPO, models / "dflash", "plain")
    fetched = machine.fetch("qwen3-4b", "", "v1.0", "plain")
    assert same(fetched.target, models / "other") and same(fetched.draft, models / "dflash")
    fetched = machine.fetch("qwen3-4b", "")
    assert same(fetched.target, models / "target") and same(fetched.draft, models / "draft")
    for revision in (commit, "v1.0"):
        offline = machine.fetch(TARGET_REPO, "none", revision, HF_HUB_OFFLINE="1")
        assert same(offline.target, models / "other")


# --- Interruptions ------------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_a_connection_that_breaks_is_taken_up_again(hub, machine, models):
    hub.cuts = [20_000, 5_000, 0]
    assert same(machine.fetch().target, models / "target")
    assert len(hub.received()) == 3  # the one that broke before its first byte is not counted


@pytest.mark.e2e
@pytest.mark.slow
def test_the_next_run_fetches_no_finished_file_again(hub, machine, models):
    size = total(models / "target" / "model.safetensors")
    hub.cuts = [30_000] + [0] * 10
    error = machine.refuse("--model", "qwen3-4b", "--draft", "none")
    assert f"{TARGET_REPO} could not be fetched" in error and "finished files are kept" in error
    assert hub.names() > {"tokenizer.json", "model.safetensors"}
    hub.cuts.clear()
    hub.log.clear()
    fetched = machine.fetch()
    assert same(fetched.target, models / "target")
    assert f"fetching {TARGET_REPO} ({size / 1e6:.2f} MB) into" in fetched.err
    assert hub.names() == {"model.safetensors"}
    assert machine.unfinished() == []


@pytest.mark.e2e
def test_ctrl_c_is_one_line_and_loses_no_finished_file(hub, machine, models):
    hub.cuts, hub.hold = [25_000], True
    process = subprocess.Popen(
        machine.command("--model", "qwen3-4b", "--draft", "none"),
        env=machine.env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: hub.received() != [])
    began = time.perf_counter()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert time.perf_counter() - began < 5  # though the connection hangs
    assert (process.returncode, out) == (130, "")
    announced, interrupted = err.splitlines()
    assert announced.startswith("fetching") and interrupted.startswith("interrupted: finished files are kept")
    hub.hold = False
    hub.log.clear()
    assert same(machine.fetch().target, models / "target")
    assert hub.names() == {"model.safetensors"}


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.e2e
def test_a_terminal_sees_bytes_and_rate(hub, machine):
    hub.slow = 0.1
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", FETCH, "qwen3-4b", "none"]
    env = machine.env | {"TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    seen = b""
    with suppress(OSError):  # how Linux says that the other end is closed
        while more := os.read(ours, 65536):
            seen += more
    os.close(ours)
    assert process.wait() == 0
    frames = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", seen.decode())
    assert re.search(rf"{TARGET_REPO} ━+.* [1-9][\d.]*/[\d.]+ kB [\d.]+ kB/s", frames), frames


# --- Refusals -----------------------------------------------------------------------------------------------------

MISFITS = {
    "width": ({"hidden_size": 64}, "hidden_size is 64"),
    "vocabulary": ({"vocab_size": 300}, "vocab_size is 300"),
    "layers": ({"num_target_layers": 5}, "number of layers is 5"),
}


@pytest.mark.e2e
@pytest.mark.parametrize(
    "case", ["width", *(pytest.param(c, marks=pytest.mark.slow) for c in ("vocabulary", "layers"))]
)
def test_a_drafter_that_does_not_fit_costs_no_weights(hub, machine, tmp_path, case):
    change, says = MISFITS[case]
    make_draft(tmp_path / "misfit", **change)
    hub.add(DRAFT_REPO, tmp_path / "misfit")
    error = machine.refuse("--model", "qwen3-4b")
    assert "made for another target" in error and says in error
    assert hub.names() == {"config.json"} and not hub.received()


@pytest.mark.e2e
def test_a_drafter_that_taps_or_masks_what_is_not_there_costs_no_weights(hub, machine, models, tmp_path):
    changes = {"target_layer_ids": [0, 2], "mask_token_id": 260}
    for name, value in changes.items():
        folder = tmp_path / name
        folder.mkdir()
        raw = hf.read_json(models / "draft" / "config.json")
        raw["dflash_config"][name] = value
        hf.write_json(folder / "config.json", raw)
        (folder / "model.safetensors").write_text("weights")
        hub.add(f"my/{name}", folder)
    # A folder's target is checked as well before anything of a drafter is fetched.
    target = ("--model", str(models / "target"))
    errors = machine.refuse_all(*((*target, "--draft", f"my/{name}") for name in changes))
    assert all(name in error for name, error in zip(changes, errors, strict=True))
    assert hub.names() == {"config.json"}


@pytest.mark.e2e
def test_what_can_not_run_here_costs_no_weights(hub, machine):
    cases = {("--mesh", "model=7"): "needs 7 devices", ("--attention", "cudnn"): "needs an NVIDIA GPU"}
    errors = machine.refuse_all(*(("--model", "qwen3-4b", *words) for words in cases))
    assert all(says in error for says, error in zip(cases.values(), errors, strict=True)), errors
    assert hub.names() == {"config.json"} and not hub.received()


@pytest.mark.e2e
def test_an_index_that_names_anything_but_safetensors_is_refused(hub, machine, models, tmp_path):
    folder = tmp_path / "indexed"
    folder.mkdir()
    (folder / "config.json").write_text((models / "target" / "config.json").read_text())
    hf.write_json(folder / hf.INDEX, {"weight_map": {"model.norm.weight": "pytorch_model.bin"}})
    (folder / "pytorch_model.bin").write_text("pickle")
    hub.add("my/model", folder)
    assert 'in "pytorch_model.bin", expected the name of a .safetensors file' in machine.refuse(
        "--model", "my/model", "--draft", "none"
    )
    assert hub.names() == {"config.json", hf.INDEX}


@pytest.mark.e2e
def test_what_is_not_there_is_one_sentence(hub, machine, models, tmp_path):
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "config.json").write_text((models / "target" / "config.json").read_text())
    (tmp_path / "pickles" / "pytorch_model.bin").write_text("pickle")
    hub.add("my/pickles", tmp_path / "pickles")
    hub.gated.add(DFLASH_REPO)
    cases = {
        ("qwen3-8b",): "Qwen/Qwen3-8B is no folder here and no repository on the Hub",
        ("qwen3-4b", "--revision", "nowhere"): f"{TARGET_REPO} has no revision 'nowhere'",
        ("qwen3-4b", "--draft-revision", "elsewhere"): f"{DRAFT_REPO} has no revision 'elsewhere'",
        ("qwen3-4b", "--draft", DFLASH_REPO): f"{DFLASH_REPO} is gated: accept its terms at {hub.url}/{DFLASH_REPO}",
        ("my/pickles",): "my/pickles has no weights as safetensors",
        ("qwen3-32b", "--compare"): "needs a drafter",
    }
    errors = machine.refuse_all(*(("--model", *words) for words in cases))
    assert all(says in error for says, error in zip(cases.values(), errors, strict=True)), errors
    assert "pytorch_model.bin" not in hub.names("HEAD") | hub.names()
    assert not hub.received()


@pytest.mark.e2e
def test_without_room_nothing_is_fetched(hub, machine):
    hub.claims["model.safetensors"] = 10**15
    error = machine.refuse("--model", "qwen3-4b")
    assert f"{TARGET_REPO} (1000000.00 GB)" in error and "GB are free" in error and "HF_HOME" in error
    assert not hub.received()


@pytest.mark.e2e
def test_a_disk_that_refuses_is_one_sentence_and_finished_files_are_kept(hub, machine, models):
    limited = ("bash", "-c", 'ulimit -f 40 && exec "$@"', "bash")  # blocks of 1024 bytes in a file
    error = machine.refuse("--model", "qwen3-4b", "--draft", "none", before=limited)
    assert f"{TARGET_REPO} can't be written to {machine.cache}" in error
    assert machine.unfinished() == []
    hub.log.clear()
    assert same(machine.fetch().target, models / "target")
    assert hub.names() == {"model.safetensors"}


@pytest.mark.e2e
def test_damaged_weights_are_not_kept(hub, machine, models):
    hub.spoil = True
    error = machine.refuse("--model", "qwen3-4b", "--draft", "none")
    assert "model.safetensors of Qwen/Qwen3-4B arrived damaged" in error
    hub.spoil = False
    hub.log.clear()
    assert same(machine.fetch().target, models / "target")
    assert hub.names() == {"model.safetensors"}
