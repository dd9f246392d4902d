"""`python -m infer.bench products`: which forms of a matrix are read as they are stored."""

import json
import re
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest

from domino_jax import matrix
from domino_jax.runtime.ahead import Place, compile_ahead, topology_devices
from infer.bench import command, products
from infer.bench.products import main, widened_bytes

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[aot]'")
SMALL = ["--outputs", "1024", "--inputs", "512"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--topology", "v6e-4"], "--topology is given as v5e:2x4, .* found 'v6e-4'"),
        (["--rows"], "--rows needs at least one number"),
        (["--rows", "0"], "--rows must be at least 1"),
        (["--outputs", "-1"], "--outputs must be at least 1"),
        (["--inputs", "0"], "--inputs must be at least 1"),
        (["--rounds", "1"], "--rounds must be at least 3"),
        (["--json", "/nowhere/x.json"], "--json is to be written there"),
    ],
)
def test_words_that_make_no_sense(words, says, capsys):
    assert command.main(["products", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ") and re.search(says, err), err


def test_a_cpus_integers_are_not_widened_and_other_8_bits_are(tmp_path, capsys):
    """Temporaries say the same as the text."""
    assert main([*SMALL, "--rows", "1", "17", "--rounds", "3", "--json", str(tmp_path / "found.json")]) == 0
    table = capsys.readouterr().out
    rows = json.loads((tmp_path / "found.json").read_text())
    assert [row["weights"] for row in rows[:4]] == ["float32", "int8", "int8, widened", "float8"]
    for row in rows:
        wide = 4 * 1024 * 512 if row["weights"] in ("int8, widened", "float8") else 0
        assert wide <= row["widened_bytes"] <= row["temporary_bytes"] < wide + 2**19, row
    assert table.count("2 MB ×") == 4 and "| M = 1 | M = 17 |" in table and "×1.00" in table


def test_what_was_measured_is_kept_by_ctrl_c(tmp_path, capsys, monkeypatch):
    row = {"weights": "int8", "rows": 8, "widened_bytes": 0, "over_exact": 1.25}

    def measured(options):
        yield row
        raise KeyboardInterrupt

    monkeypatch.setattr(products, "measured_rows", measured)
    assert main(["--json", str(tmp_path / "found.json")]) == 130
    (kept,) = json.loads((tmp_path / "found.json").read_text())
    assert kept | row == kept
    out, err = capsys.readouterr()
    assert "| int8 | ×1.25 |" in out and "interrupted" in err


@needs_libtpu
@pytest.mark.slow
def test_tpus_widen_none(tmp_path, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    file = tmp_path / "found.json"
    words = ["--outputs", "4096", "--inputs", "4096", "--rounds", "3", "--json", str(file)]
    assert main([*words, "--rows", "1", "17", "--topology", "v5e:2x2", "v6e:2x2"]) == 0
    rows = [row for row in json.loads(file.read_text()) if row.get("estimated")]
    assert len(rows) == 12 and not any(row["widened_bytes"] or row["temporary_bytes"] for row in rows)
    stored = {row["weights"]: row["stored_bytes"] for row in rows}
    assert stored["int8"] == stored["float8"] < 0.51 * stored["bfloat16"]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", matrix.QUANTIZED)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_tpus_widen_no_experts(topology, kind, monkeypatch):
    """Their grouped product takes the values as they are."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    place = Place(None, topology_devices(topology)[0])
    shapes = jax.eval_shape(lambda w: matrix.quantize(w, kind), jax.ShapeDtypeStruct((16, 2, 512, 1024), jnp.bfloat16))
    held = jax.tree.map(lambda x: place.array(x, ""), shapes)
    x, sizes = (place.array(jax.ShapeDtypeStruct(*s), "") for s in (((24, 1024), jnp.bfloat16), ((16,), jnp.int32)))
    _, text = compile_ahead("experts", place, lambda: jax.jit(matrix.dot_grouped).lower(x, held, sizes))
    assert widened_bytes(text, held.values.size, held.values.size) == 0


def test_only_what_is_written_counts():
    """Not what lies within a fusion, and no copy in as many bytes."""
    text = """HloModule x

%inside (p: s8[64,32]) -> f32[64,32] {
  %p = s8[64,32]{1,0} parameter(0)
  ROOT %c = f32[64,32]{1,0} convert(%p)
}

ENTRY %main (a: s8[64,32]) -> f32[64] {
  %a = s8[64,32]{1,0} parameter(0)
  %b = s8[64,32]{1,0} copy(%a)
  WRITTEN
  ROOT %d = f32[64]{0} fusion(%b), kind=kLoop, calls=%inside
}
"""
    wide = "%w = f32[64,32]{1,0} fusion(%b), kind=kLoop, calls=%inside"
    assert widened_bytes(text.replace("WRITTEN", ""), 64 * 32, 64 * 32) == 0
    assert widened_bytes(text.replace("WRITTEN", wide), 64 * 32, 64 * 32) == 4 * 64 * 32
    assert widened_bytes(text.replace("WRITTEN", wide.replace("f32", "bf16")), 64 * 32, 64 * 32) == 2 * 64 * 32
