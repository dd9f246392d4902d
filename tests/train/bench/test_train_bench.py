"""The bench of the step: a row of figures, FLOPs that are those of the compiled products, refusals."""

import json
import math
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from training import curriculum

from convert.shapes import SHAPES, Shape
from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.weights import init_weights
from train.bench import command
from train.bench.command import main
from train.bench.flops import flops

TINY = "--batch 2 --length 32 --anchors 4 --block-size 4 --gru-hidden-dim 16 --emb-dim 8 --steps 1"


@pytest.fixture
def tiny(monkeypatch):
    target = TargetConfig(64, 32, 2, 4, 2, 8, 48, 1e-6, 1e4, 512, tie_word_embeddings=False)
    layer = target.geometry(num_hidden_layers=1)
    draft = DraftConfig(
        **layer,
        block_size=16,
        mask_token_id=63,
        target_layer_ids=(1,),
        num_target_layers=2,
        shift_label=True,
        head=DominoHead(16, 8, 1),
    )
    monkeypatch.setitem(SHAPES, "tiny", Shape(target, draft))
    with jax.numpy_dtype_promotion("standard"):
        yield ["--shapes", "tiny", *TINY.split()]


@pytest.mark.e2e
@pytest.mark.slow
def test_a_row_of_figures(tiny, tmp_path, capsys, quick_compilation):
    out = tmp_path / "new" / "row.json"
    assert main([*tiny, "--out", str(out), "--peak-tflops", "2"]) == 0
    row = json.loads(out.read_text())
    assert not [key for key, value in row.items() if isinstance(value, dict)]
    assert row["shapes"] == "tiny" and row["weights"] == "random" and row["dtype"] == "float32"
    assert row["ms_per_sample"] == pytest.approx(row["step_ms"] / 2)
    assert sum(row[name] for name in command.PHASES) == pytest.approx(row["step_ms"])
    total = row["target_tflop"] + row["forward_tflop"] + row["backward_tflop"]
    assert row["mfu"] == pytest.approx(total / (row["step_ms"] / 1e3) / 2)
    assert row["temporary_gb"] > 0 and row["peak_source"] == "stated"
    said = capsys.readouterr().out
    assert "random weights (speed only)" in said and "optimizer" in said


@pytest.mark.e2e
@pytest.mark.slow
def test_on_a_mesh_with_captured_states(tiny, capsys, quick_compilation):
    words = ["--mesh", "data=2,model=2", "--captured", "--loss", "kl", "--no-phases", "--accumulate", "1"]
    assert main([*tiny, *words]) == 0
    assert "4 x cpu" in capsys.readouterr().out


@pytest.mark.e2e
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[aot]'")
@pytest.mark.parametrize(
    "words",
    [
        ["v5e:2x2", "--mesh", "fsdp=2,model=2"],
        pytest.param(["v6e:1x1", "--captured", "--loss", "kl"], marks=pytest.mark.slow),
    ],
)
def test_a_step_is_compiled_for_tpus_that_are_not_here(tiny, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # libtpu ends the process where it does not know a CPU's flag
    out = tmp_path / "row.json"
    assert main([*tiny, "--compile", *words, "--out", str(out)]) == 0
    row = json.loads(out.read_text())
    assert row["estimated"] and row["dtype"] == "bfloat16" and row["fits"] and row["estimated_cycles"] > 0
    assert row["devices"] == (4 if "--mesh" in words else 1) and bool(row["collectives"]) == ("--mesh" in words)
    assert row["tflop"] > 0 and {"weight_copies", "state_copies"} <= row.keys()
    assert "Estimated by libtpu" in capsys.readouterr().out


def products(jaxpr: Any) -> float:
    """Operations of all matrix products of a program, loops unrolled."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        inner = sum(products(getattr(p, "jaxpr", p)) for p in equation.params.values() if hasattr(p, "eqns"))
        total += inner * equation.params.get("length", 1) if equation.primitive.name == "scan" else inner
    return total


def test_flops_are_those_of_the_products():
    """Of the traced program, where nothing is skipped: what a token or a block can't see is computed there too."""
    with jax.numpy_dtype_promotion("standard"):
        target = TargetConfig(64, 32, 2, 4, 2, 8, 48, 1e-6, 1e4, 512, tie_word_embeddings=False)
        geometry = target.geometry(num_hidden_layers=2)
        config = DraftConfig(
            **geometry,
            block_size=4,
            mask_token_id=63,
            target_layer_ids=(0, 1),
            num_target_layers=2,
            shift_label=True,
            head=DominoHead(16, 8, 0),
        )
    rows, length, count = 2, 64, 16
    counted = flops(target, config, rows, length, count)
    whole = init_weights(target, jax.random.key(0)), init_weights(config, jax.random.key(1))
    ids, mask = jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length), bool)
    places, valid = jnp.zeros((rows, count), jnp.int32), jnp.ones((rows, count), bool)
    how = {"lam": jnp.float32(0), "gamma": 7.0, "chunk": 1 << 20, "block_attention": "dense"}

    def loss(drafter, frozen):
        return curriculum(drafter, frozen, (target, config), ids, mask, places, valid, **how)[0]

    unseen = 4 * 4 * 8 * length / 2 * rows * 2  # a query and layer
    forward = products(jax.make_jaxpr(loss)(whole[1], whole[0]).jaxpr)
    assert counted["target"] + counted["forward"] + unseen * (length + count * 4) == forward
    both = products(jax.make_jaxpr(jax.grad(loss))(whole[1], whole[0]).jaxpr)
    again = 2 * 64 * (32 + 8) * rows * count * 4  # the chunks' logits
    assert counted["backward"] + 2 * unseen * count * 4 == pytest.approx(both - forward - again, rel=0.05)


def test_refusals(tiny, capsys):
    assert main(["--shapes", "qwen3-9b"]) == 2
    assert "the shapes are qwen3-0.6b" in capsys.readouterr().err
    assert main([*tiny, "--length", "0"]) == 2
    assert "--length must be at least 1" in capsys.readouterr().err
    for words, says in (
        (["--mesh", "3"], "a mesh is given as data=1,fsdp=4,model=2"),
        (["--dtype", "float16"], "--dtype is one of bfloat16, float32"),
        (["--gamma", "nan"], "--gamma must be above 0"),
        (["--steps", "-1"], "--steps must be at least 1"),
        (["--compile", "v5e-8"], "--compile is given as v5e:2x4"),
    ):
        assert main([*tiny, *words]) == 2
        assert says in capsys.readouterr().err
    assert main([*tiny, "--mesh", "model=3"]) == 1
    assert "model=3 does not divide num_attention_heads 4" in capsys.readouterr().err
