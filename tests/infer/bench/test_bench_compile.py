"""`python -m infer.bench compile`: programs compiled ahead of time for TPUs that are not here.

What compiles needs libtpu (`pip install -e ".[aot]"`).
"""

import json
import re
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
from factory import BYTE_DRAFT, BYTE_TARGET
from rich.console import Console

from convert.options import DraftingOptions
from convert.shapes import SHAPES, Shape
from domino_jax.errors import DominoError
from domino_jax.runtime.ahead import program_figures
from domino_jax.runtime.devices import DEVICES, KINDS, device_of_kind
from infer.bench import command, programs
from infer.bench import compile as compile_command
from infer.bench.compile import Compile, main
from infer.bench.programs import compile_programs, cut_layers, rates

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[aot]'")
SHAPED = ["--shapes", "qwen3-8b", "--topology", "v6e:2x2"]
QUIET = Console(quiet=True)


@pytest.fixture
def compiles(monkeypatch):
    """This process compiles for TPUs: libtpu ends it where it does not know a CPU's flag."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setitem(SHAPES, "tiny", Shape(BYTE_TARGET, BYTE_DRAFT))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--topology", "v5e:2x4"], "give one of --shapes NAME and --model DIR"),
        ([*SHAPED, "--model", "demo"], "give one of --shapes NAME and --model DIR"),
        (["--shapes", "qwen3-8b"], "--topology"),
        (["--shapes", "qwen3-8b", "--topology", "v6e-4"], "--topology is given as v5e:2x4, .* found 'v6e-4'"),
        (["--shapes", "qwen3-8b", "--topology", "h100:2x2"], "--topology is given as"),
        ([*SHAPED, "--mesh", "model"], "a mesh is given as data=2,model=4"),
        ([*SHAPED, "--batch", "0"], "--batch must be at least 1"),
        ([*SHAPED, "--layers", "-1"], "--layers must be at least 1"),
        ([*SHAPED, "--tau", "0.5"], "--tau must be 1 or more"),
        ([*SHAPED, "--draft", "qwen3-4b"], "leave --draft out"),
        ([*SHAPED, "--programs", "chat"], "--programs"),
        ([*SHAPED, "--attention", "cudnn"], "--attention is one of pallas, xla"),
    ],
)
def test_words_that_make_no_sense(words, says, capsys):
    assert command.main(["compile", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ") and re.search(says, err), err


@needs_libtpu
@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--shapes", "qwen3-9b", "--topology", "v6e:2x2"], 2, "the shapes are qwen3-0.6b"),
        (["--shapes", "tiny", "--topology", "v5e:3x5"], 2, "libtpu knows no topology v5e:3x5"),
        (["--shapes", "tiny", "--topology", "v5e:2x2", "--mesh", "model=8"], 2, "needs 8 devices; found 4"),
        (["--shapes", "tiny", "--topology", "v5e:2x4", "--mesh", "model=8"], 2, "does not divide num_attention_heads"),
        (["--shapes", "tiny", "--topology", "v5e:2x2", "--mesh", "data=4", "--batch", "3"], 2, "give a multiple of it"),
        (["--shapes", "tiny", "--topology", "v5e:2x2", "--layers", "9"], 2, "more than the target's 2"),
        (
            ["--shapes", "tiny", "--topology", "v5e:2x2", "--mesh", "data=2", "--batch", "2", "--kv-cache", "paged"],
            2,
            "a KV cache in pages needs a mesh with data=1",
        ),
        (["--shapes", "tiny", "--topology", "v5e:2x2", "--num-draft-tokens", "9"], 2, "4 at most"),
        (["--model", "no-such-folder", "--topology", "v5e:2x2"], 1, "no-such-folder"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_compiled(words, code, says, compiles, capsys):
    assert main(words) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and says in err and err.count("\n") == 1, err


def test_a_missing_libtpu_is_said_with_its_extra(monkeypatch, capsys):
    monkeypatch.setattr("domino_jax.runtime.extras.find_spec", lambda name: None)
    assert main(SHAPED) == 1
    assert 'pip install "domino-jax[aot]"' in capsys.readouterr().err


@pytest.mark.parametrize(("layers", "few", "ids"), [(36, 5, (1, 9, 17, 25, 33)), (2, 2, (0,)), (6, 5, (1, 2, 3))])
def test_a_cut_has_fewer_layers_of_the_same_widths(layers, few, ids):
    whole = SHAPES["qwen3-8b"]
    target, draft = cut_layers(*whole, layers)
    assert (target.num_hidden_layers, draft and draft.num_hidden_layers) == (layers, few)
    assert target.hidden_size == whole.target.hidden_size
    assert draft == whole.draft if layers == 36 else set(ids) <= set(draft.target_layer_ids)  # type: ignore[union-attr]


def test_figures_are_of_the_devices_stated_rates():
    """1.75 million cycles at 1.75 GHz, and floors; the larger of both, phase by phase."""
    text = """HloModule m

ENTRY %main (p: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  ROOT %x = f32[] add(%p, %p), metadata={op_name="a/target/add"}, backend_config={"estimated_cycles":"1750000"}
}
"""
    held = SimpleNamespace(
        argument_size_in_bytes=30 << 30, temp_size_in_bytes=3 << 30, output_size_in_bytes=2, alias_size_in_bytes=1
    )
    compiled = SimpleNamespace(memory_analysis=lambda: held)
    row = program_figures(compiled, text, DEVICES["v6e"], {"target": 0.5, "head": 2.0, "verify": 0.0})
    assert row["estimated_cycles"] == 1750000 and not row["fits"]
    assert (row["estimated_ms"], row["floor_ms"], row["larger_ms"]) == (1.0, 2.5, 3.0)
    assert row["phases"] == {
        "target": {"estimated_cycles": 1750000, "estimated_ms": 1.0, "floor_ms": 0.5},
        "head": {"estimated_cycles": 0, "estimated_ms": 0.0, "floor_ms": 2.0},
    }
    assert rates(row, 6) == {
        "estimated_tokens_per_second": 6000,
        "floor_tokens_per_second": 2400,
        "larger_tokens_per_second": 2000,
    }
    assert set(rates(row, None).values()) == {None}


def test_tpus_of_the_table_have_a_clock():
    """Four matrix units of 256 x 256, or four of 128 x 128 a core, give the stated rate at it."""
    units = {"v4": 8 * 128**2, "v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2}
    assert units.keys() == {name for name, device in DEVICES.items() if device.platform == "tpu"}
    for name, size in units.items():
        assert DEVICES[name].flops == pytest.approx(2 * size * DEVICES[name].gigahertz * 1e9, rel=0.01)
    assert units.keys() <= set(KINDS.values()) <= DEVICES.keys()
    assert device_of_kind("TPU v6 lite") is DEVICES["v6e"] and device_of_kind("cpu") is None


@needs_libtpu
@pytest.mark.e2e
@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["tiny", "v5e:2x2", "--mesh", "data=2,model=2", "--batch", "2"], ["prefill", "step", "cycle"]),
        pytest.param(["demo", "v6e:1x1", "--programs", "step"], ["step"], marks=pytest.mark.slow),
        pytest.param(
            ["tiny", "v5p:2x2x1", "--draft", "none", "--mesh", "model=1"], ["prefill", "step"], marks=pytest.mark.slow
        ),
    ],
)
def test_a_small_model_is_compiled_and_its_figures_are_written(words, names, compiles, tmp_path, capsys):
    out = tmp_path / "compile.json"
    model, topology, *others = words
    words = ["--model" if model == "demo" else "--shapes", model, "--topology", topology, *others]
    assert main([*words, "--context", "100", "--tau", "3", "--json", str(out)]) == 0
    row = json.loads(out.read_text())
    assert row["estimated"] and row["libtpu"] and row["commit"] and row["capacity"] == 128
    assert [program["name"] for program in row["programs"]] == names
    for program in row["programs"]:
        assert program["estimated_cycles"] > 0 and program["argument_bytes"] > 0 and program["fits"]
        assert set(program["phases"]) & {"target"}
        assert program["estimated_tokens_per_second"] > 0
    said = capsys.readouterr()
    assert "Estimated by libtpu" in said.out and "compiled in" in said.err


@needs_libtpu
@pytest.mark.e2e
@pytest.mark.parametrize(
    ("topology", "program"),
    [
        ("v5e:2x2", "step"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("v6e:2x2", "cycle"), ("v6e:2x2", "step"), ("v5e:2x2", "cycle"))
        ),
    ],
)
def test_no_weight_and_no_cache_is_copied_transposed_or_gathered(topology, program, compiles):
    """Two layers at Qwen3-8B's widths on four devices."""
    row = compile_programs(Compile(topology, shapes="qwen3-8b", layers=2, programs=(program,)), QUIET)
    (found,) = row["programs"]
    assert found["collectives"]["all-reduce"]["count"] >= 4
    assert found["weight_copies"]["count"] == found["cache_copies"]["count"] == 0, found
    if program == "step":  # a product of one row would leave the matrix unit, and come to several times the floor
        assert found["estimated_ms"] < 1.5 * found["floor_ms"]
    assert "all-gather" not in found["collectives"] or found["collectives"]["all-gather"]["bytes"] < 2**20


@needs_libtpu
@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shapes", "program"), [("qwen3-8b", "step"), ("qwen3-8b", "cycle"), ("qwen3-30b-a3b", "step")]
)
def test_no_weight_in_8_bits_is_widened_copied_or_gathered(shapes, program, compiles):
    """As above, dense and with experts, on one device and on four: and a step is estimated at less than in 16 bits."""
    drafting = DraftingOptions(draft_weights="int8")
    for mesh in ("model=1", "model=4"):
        how: dict[str, Any] = {"shapes": shapes, "layers": 2, "programs": (program,), "mesh": mesh}
        (small,) = compile_programs(Compile("v5e:2x2", weights="int8", drafting=drafting, **how), QUIET)["programs"]
        (whole,) = compile_programs(Compile("v5e:2x2", **how), QUIET)["programs"]
        assert small["weight_copies"]["count"] == small["cache_copies"]["count"] == 0, small
        assert small["temporary_bytes"] < whole["temporary_bytes"] + 2**26
        assert small["argument_bytes"] < 0.75 * whole["argument_bytes"]
        assert small["phases"]["target"]["estimated_ms"] < whole["phases"]["target"]["estimated_ms"]
        gathered = small["collectives"].get("all-gather", {"bytes": 0})
        assert gathered["bytes"] < 2**20


@needs_libtpu
@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shapes", "topology", "fits"),
    [
        ("qwen3-8b", "v6e:2x2", True),
        *(
            (shape, tpus, True)
            for shape in ("qwen3-32b", "qwen3-30b-a3b")
            for tpus in ("v5e:2x4", "v5p:2x2x2", "v6e:2x4")
        ),
    ],
)
def test_the_public_shapes_compile_and_fit(shapes, topology, fits, compiles):
    row = compile_programs(Compile(topology, shapes=shapes, programs=("step", "cycle")), QUIET)
    assert [program["fits"] for program in row["programs"]] == [fits, fits]
    assert not any(program["weight_copies"]["in_loop"] for program in row["programs"])


@needs_libtpu
@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x2"])
def test_programs_over_pages_have_a_kernel_a_layer_and_copy_no_pages(topology, compiles):
    """Two layers at Qwen3-8B's widths; the drafter's are two more in a cycle."""
    how: dict[str, Any] = {"kv_cache": "paged", "attention": "pallas", "programs": ("step", "cycle")}
    row = compile_programs(Compile(topology, shapes="qwen3-8b", layers=2, batch=4, **how), QUIET)
    assert not row["failed"] and (row["kv_cache"], row["page_size"]) == ("paged", 16)
    assert [program["kernels_without_estimate"] for program in row["programs"]] == [2, 4]
    for program in row["programs"]:
        assert program["fits"] and program["weight_copies"]["count"] == program["cache_copies"]["count"] == 0, program


@pytest.mark.parametrize(
    "words",
    [
        ["--kv-cache", "paged", "--page-size", "24"],
        ["--kv-cache", "paged", "--page-size", "256"],
        ["--page-size", "32"],
        ["--kv-cache", "auto"],
    ],
)
def test_pages_are_powers_of_two_and_asked_for(words, capsys):
    assert command.main(["compile", *SHAPED, *words]) == 2
    assert re.match("error: .*(--page-size|--kv-cache)", capsys.readouterr().err)


def test_figures_of_files_become_a_table(tmp_path, capsys):
    none = {"count": 0, "bytes": 0}
    program = {
        **{"name": "step", "argument_bytes": 3 << 30, "temporary_bytes": 1 << 30, "device_bytes": 32 << 30},
        **{"weight_copies": {"count": 2, "bytes": 5e6}, "cache_copies": none, "larger_tokens_per_second": 400.4},
        **{"estimated_ms": 2.4, "floor_ms": 2.5, "larger_ms": 2.5},
    }
    row = {"model": "qwen3-8b", "layers": 2, "topology": "v6e:2x2", "mesh": "data=1,model=4", "batch": 8}
    for name, whole in (("a", True), ("b", False)):
        (tmp_path / name).write_text(json.dumps(row | {"whole": whole, "programs": [program]}))
    assert main(["--table", *(str(tmp_path / name) for name in "ab")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| qwen3-8b | v6e:2x2, model=4 | 8 | step | 4.0 of 32 | 5 | 2.40 | 2.50 | 2.50 | 400 |"
    assert lines[3].startswith("| qwen3-8b, 2 layers |") and len(lines) == 4


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"programs": [{}]}', '{"programs": 3}', "null"])
def test_another_file_is_refused(text, tmp_path, capsys):
    (tmp_path / "other.json").write_text(text)
    assert main(["--table", str(tmp_path / "other.json")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'other.json'} is no file of --json: ")
    assert main(["--table", str(tmp_path / "none.json")]) == 1


@needs_libtpu
@pytest.mark.parametrize("broken", [["cycle"], ["prefill", "step"], ["prefill", "step", "cycle"]])
def test_what_does_not_compile_does_not_take_the_others_with_it(broken, compiles, monkeypatch, tmp_path, capsys):
    def compile_program(name: str, *_: object) -> dict[str, object]:
        if name in broken:
            raise DominoError(f"{name} does not compile: too large.")
        return {"name": name, "compile_seconds": 1.0}

    monkeypatch.setattr(programs, "compile_program", compile_program)
    monkeypatch.setattr(compile_command, "show_figures", lambda row, console: print("shown"))
    out = tmp_path / "out.json"
    assert main(["--shapes", "tiny", "--topology", "v5e:1x1", "--json", str(out)]) == 1
    row, said = json.loads(out.read_text()), capsys.readouterr()
    assert list(row["failed"]) == broken and len(row["programs"]) == 3 - len(broken)
    assert ("shown" in said.out) == (len(broken) < 3)
    assert said.err.splitlines()[-1] == "error: " + " ".join(f"{name} does not compile: too large." for name in broken)
