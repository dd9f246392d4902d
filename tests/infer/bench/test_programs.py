"""Decoding's programs lowered for TPUs and NVIDIA GPUs that are not here: what they are made of.

`JAX_PLATFORMS=cpu python -m pytest -m slow tests/infer/bench/test_programs.py` counts what docs/performance.md states.
"""

import dataclasses
import re
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest
from factory import BYTE_DRAFT, BYTE_TARGET
from jax._src.cudnn import fused_attention_stablehlo
from lowered import count_operations, lower_program

from convert.shapes import SHAPES
from domino_jax.config import MoeConfig
from domino_jax.sharding import make_mesh

PAGE = Path(__file__).parents[3] / "docs" / "performance.md"
EXPERTS = dataclasses.replace(BYTE_TARGET, moe=MoeConfig(8, 3, 20, norm_topk_prob=True)), BYTE_DRAFT
TRITON = "__gpu$xla.gpu.triton"
slow = pytest.mark.slow
without_cuda = pytest.mark.skipif(
    jax.__version_info__ >= (0, 11) and not any(find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)),
    reason="from 0.11 on JAX compiles Triton's kernels while it lowers: pip install -e '.[cuda]'",
)


@pytest.mark.parametrize("name", ["prefill", "step", "cycle"])
def test_a_program_takes_the_forms_of_what_it_is_compiled_for(name):
    """Whatever runs this: experts by loops on a CPU alone, rows of caches written one by one on a TPU alone."""
    rows, looped = 3, int(name != "prefill")
    of = {
        platform: count_operations(lower_program(name, EXPERTS, platform, batch=rows, capacity=256))
        for platform in ("cpu", "tpu", "cuda")
    }
    assert [of[platform]["while"] - looped for platform in of] == [EXPERTS[0].num_hidden_layers, 0, 0]
    assert [of[platform]["chlo.ragged_dot"] for platform in of] == [0, 4, 4]
    writes = [(EXPERTS[0].num_hidden_layers + draft * BYTE_DRAFT.num_hidden_layers) * 2 * rows for draft in (0, 1)]
    assert of["tpu"]["dynamic_update_slice"] >= writes[name != "step"] and of["cpu"]["dynamic_update_slice"] == 0
    assert of["tpu"]["scatter"] < of["cuda"]["scatter"] == of["cpu"]["scatter"]


@pytest.mark.parametrize("name", ["step", "cycle"])
@pytest.mark.parametrize("page_size", [None, 16])
def test_a_tpus_kernel_is_in_its_programs_and_in_no_others(name, page_size):
    """With heads of 8, for which JAX has no kernel over pages: they are gathered first."""
    how = {"batch": 2, "capacity": 256, "page_size": page_size}
    lowered = lower_program(name, (BYTE_TARGET, BYTE_DRAFT), "tpu", attention="pallas", **how)
    plain = lower_program(name, (BYTE_TARGET, BYTE_DRAFT), "tpu", **how)
    layers = BYTE_TARGET.num_hidden_layers + (BYTE_DRAFT.num_hidden_layers if name == "cycle" else 0)
    assert count_operations(lowered)["tpu_custom_call"] == layers
    assert count_operations(plain)["custom_call"] == 0


def test_a_product_of_one_row_has_two_on_a_tpu():
    """Else it would leave the matrix unit."""
    pair = SHAPES["qwen3-8b"]
    cut = dataclasses.replace(pair.target, num_hidden_layers=1), dataclasses.replace(pair.draft, target_layer_ids=(0,))
    left = {
        platform: set(re.findall(r"dot_general .*: \(tensor<([\dx]+)x(?:4096|12288)xbf16>", text))
        for platform in ("cuda", "tpu")
        if (text := lower_program("step", cut, platform).as_text())
    }
    assert left["cuda"] == {"1x1"} and left["tpu"] == {"1x1x2"}, left


def stated() -> dict[tuple[str, ...], list[int]]:
    """The table of docs/performance.md: by shape, attention and program."""
    line = r"^\| (qwen3-\S+) \| (xla|pallas|pallas, pages) \| (\w+) \| ([\d, |]+) \|$"
    rows = re.findall(line, PAGE.read_text(), re.M)
    return {tuple(names): [int(n.replace(",", "")) for n in cells.split(" | ")] for *names, cells in rows}


@without_cuda
@pytest.mark.parametrize(
    ("shape", "attention", "name"),
    [
        pytest.param(*case, marks=[] if case == ("qwen3-8b", "xla", "cycle") else slow)
        for case in (
            (shape, attention, name)
            for shape in ("qwen3-8b", "qwen3-4b")
            for attention in ("xla", "pallas", "pallas, pages")
            for name in ("prefill", "step", "cycle")
        )
    ],
)
def test_whole_programs_lower_for_nvidia_gpus_at_real_shapes(shape, attention, name):
    backend, *pages = attention.split(", ")
    lowered = lower_program(
        name,
        SHAPES[shape],
        "cuda",
        attention="pallas" if backend == "pallas" else "xla",
        page_size=16 if pages else None,
    )
    found = count_operations(lowered)
    target, draft = SHAPES[shape].target.num_hidden_layers, SHAPES[shape].draft.num_hidden_layers
    attentions = target + draft * (name == "cycle")  # a prefill's drafter only keeps what the target has seen
    assert found[TRITON] == found["custom_call"] == (attentions if backend == "pallas" else 0)
    assert found["while"] == (name != "prefill") and not found["all_reduce"]
    if name == "step":
        # Queries, keys with values, output, gate with up, down, attention's two where no kernel has them; the LM head.
        assert found["dot_general"] == target * (7 if backend == "xla" else 5) + 1
    kinds = ("arguments", "dot_general", "custom_call", "while", "gather", "scatter", "dynamic_update_slice")
    assert stated()[shape, attention, name] == [found[kind] for kind in kinds]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prefill", "step", "cycle"])
@pytest.mark.parametrize("shape", ["qwen3-8b", "qwen3-4b"])
def test_cudnn_has_every_layers_attention(shape, name, monkeypatch):
    """JAX asks for cuDNN's version while it traces, the one thing that it wants to know of this machine."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    found = count_operations(lower_program(name, SHAPES[shape], "cuda", attention="cudnn"))
    layers = SHAPES[shape].target.num_hidden_layers + SHAPES[shape].draft.num_hidden_layers * (name == "cycle")
    assert sum(count for kind, count in found.items() if kind.startswith("__cudnn$fmha")) == layers
    assert found["custom_call"] == layers
    if name == "step":
        assert found["dot_general"] == 5 * layers + 1


@without_cuda
@pytest.mark.slow
@pytest.mark.parametrize("attention", ["xla", "pallas"])
@pytest.mark.parametrize(("shape", "sums"), [("qwen3-8b", 0), ("qwen3-30b-a3b", 48)])
def test_on_four_gpus_only_what_the_model_sums_itself_is_there_before_partitioning(shape, sums, attention):
    found = count_operations(
        lower_program("cycle", SHAPES[shape], "cuda", attention=attention, mesh=make_mesh(1, 4, devices=jax.devices()))
    )
    assert found["all_reduce"] == sums and not found["all_gather"] and not found["collective_permute"]
    assert found["sdy.sharding_constraint"] > SHAPES[shape].target.num_hidden_layers
    layers = SHAPES[shape].target.num_hidden_layers + SHAPES[shape].draft.num_hidden_layers
    assert found[TRITON] == (layers if attention == "pallas" else 0)
