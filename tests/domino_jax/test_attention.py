"""Attention by every backend against the NumPy restatement, what the kernels lower to, and refusals.

On a machine with a GPU or a TPU, `JAX_PLATFORMS=cuda pytest tests/domino_jax/test_attention.py` also runs that device's
backend; where it passes, the kind of device may be added to `attention.TESTED_KINDS`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import factory
import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
import reference
from factory import make_target
from jax import Array
from jax._src.cudnn import fused_attention_stablehlo as stablehlo

from domino_jax import attention, decode, sharding
from domino_jax.attention import attend, available_backends
from domino_jax.errors import DominoError
from domino_jax.kernels import attention_cudnn, attention_gpu, attention_tpu
from domino_jax.kernels.attention_cudnn import attend_cudnn
from domino_jax.kernels.attention_gpu import attend_gpu
from domino_jax.kernels.attention_tpu import attend_tpu
from domino_jax.runtime import autotune
from domino_jax.runtime.autotune import fastest_backend
from domino_jax.weights import Params
from infer.__main__ import main

CAPACITY, WIDTH = 256, 16
CASES = {  # T, G, K, causal, window
    "one token": (1, 4, 2, True, None),
    "verification": (17, 4, 2, True, None),
    "five heads share one": (9, 5, 1, True, None),
    "a block": (16, 2, 2, False, None),
    "a block in a window": (16, 1, 3, True, 5),
    "a block in a window both ways": (16, 1, 3, False, 5),
    "a window larger than a block of the cache": (4, 3, 1, True, 150),
    "a prompt": (64, 2, 1, True, None),
}
BACKENDS: dict[str, Callable[..., Array]] = {
    "xla": attention.attend_xla,
    "xla on TPUs": partial(attention.attend_xla, heads_first=True),
    "cudnn, as JAX states it": partial(attend_cudnn, implementation="xla"),
    "pallas, interpreted": partial(attend_tpu, interpret=True),
    "pallas for GPUs, interpreted": partial(attend_gpu, interpret=True),
}
TOLERANCES = {"float32": 2e-6, "bfloat16": 1.5e-2}


def arrays(
    tokens: int, group: int, kv_heads: int, dtype: Any, rows: int = 4, capacity: int = CAPACITY, width: int = WIDTH
) -> tuple[Array, Array, Array]:
    """Random queries, keys and values."""
    rng = np.random.default_rng(tokens)
    shapes = (rows, tokens, group * kv_heads, width), *((rows, kv_heads, capacity, width),) * 2
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return q, k, v


def expected(q: Array, k: Array, v: Array, starts: list[int], causal: bool, window: int | None) -> np.ndarray:
    """Row by row, each over its live positions alone."""
    rows = []
    for row, start in enumerate(starts):
        live = start + q.shape[1]
        ours = (np.asarray(x[row].astype(jnp.float32), np.float64) for x in (q, k, v))
        query, key, value = (x if x.shape[0] == q.shape[1] else x[:, :live].swapaxes(0, 1) for x in ours)
        visible = np.zeros((q.shape[1], live), bool)
        for t in range(q.shape[1]):
            here = start + t
            first = 0 if window is None else max(0, here - window + 1)
            visible[t, first : here + 1 if causal else live if window is None else here + window] = True
        rows.append(reference.attention(query, key, value, visible))
    return np.stack(rows)


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """So that small shapes have several blocks of queries and of the cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_tpu, "LARGEST_QUERY_BLOCK", 32)
        patch.setattr(attention_tpu, "LARGEST_KEY_BLOCK", 64)
        patch.setattr(attention_gpu, "LARGEST_QUERY_BLOCK", 32)
        patch.setattr(attention_gpu, "LEAST_SHARE", 128)
        yield


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_backend_is_the_restatement(case, name, dtype):
    """Rows at the cache's beginning, around a block's edge, and at its end; a row that is over may stand beyond."""
    tokens, group, kv_heads, causal, window = case
    q, k, v = arrays(tokens, group, kv_heads, dtype, rows=5)
    starts = [0, 65 - tokens, 130, CAPACITY - tokens, CAPACITY]
    with jax.numpy_dtype_promotion("standard" if "JAX" in name else "strict"):  # JAX's statement mixes types itself
        out = jax.jit(BACKENDS[name], static_argnums=(4, 5))(q, k, v, jnp.array(starts, jnp.int32), causal, window)
    assert out.dtype == q.dtype
    ours = np.asarray(out.astype(jnp.float32))
    assert np.isfinite(ours).all()
    theirs = expected(q[:4], k[:4], v[:4], starts[:4], causal, window)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours[:4], theirs, atol=TOLERANCES[dtype], rtol=0)


def test_a_tpus_order_of_queries_is_the_same_with_a_tree_and_with_packed_rows():
    q, k, v = arrays(5, 3, 2, jnp.float32)
    start = jnp.array([0, 60, 130, 251], jnp.int32)
    rng = np.random.default_rng(0)
    sees = jnp.asarray(np.tril(rng.random((4, 5, 5)) < 0.5) | np.eye(5, dtype=bool))
    since = jnp.asarray(rng.integers(0, start[:, None] + 1, (4, 5)), jnp.int32)
    for how in ({"sees": sees}, {"since": since}):
        ours, theirs = (attention.attend_xla(q, k, v, start, True, None, **how, heads_first=x) for x in (True, False))
        np.testing.assert_allclose(ours, theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("kernel", [attend_tpu, attend_gpu])
def test_the_kernel_reads_no_block_that_nobody_sees(kernel):
    """Neither beyond a row's length nor before its window: poison there does not show."""
    q, k, v = arrays(4, 2, 2, jnp.float32, rows=3)
    starts = [0, 70, 190]
    window = 20
    for causal, narrow in ((True, None), (False, None), (True, window)):
        poisoned = np.array(v)
        for row, start in enumerate(starts):
            poisoned[row, :, -(-(start + 4) // 64) * 64 :] = np.nan
            if narrow:
                poisoned[row, :, : max(0, start - narrow + 1) // 64 * 64] = np.nan
        assert np.isnan(poisoned).any(axis=(1, 2, 3)).sum() >= 2
        run = partial(kernel, causal=causal, window=narrow, interpret=True)
        clean = run(q, k, v, jnp.array(starts, jnp.int32))
        np.testing.assert_array_equal(run(q, k, jnp.asarray(poisoned), jnp.array(starts, jnp.int32)), clean)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_kernel_lowers_for_tpus_with_the_cache_as_it_lies(case):
    tokens, group, kv_heads, causal, window = case
    q, k, v = arrays(tokens, group, kv_heads, jnp.bfloat16, width=128)
    run = partial(attend_tpu, causal=causal, window=window, interpret=False)
    traced = jax.jit(run).trace(q, k, v, jnp.zeros(4, jnp.int32))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text
    assert no_transposition_of(k, text)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_cudnn_lowers_for_nvidia_gpus_with_the_cache_as_it_lies(case, monkeypatch):
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91200)  # there is none on this machine
    tokens, group, kv_heads, causal, window = case
    q, k, v = arrays(tokens, group, kv_heads, jnp.bfloat16, width=128)
    traced = jax.jit(partial(attend_cudnn, causal=causal, window=window)).trace(q, k, v, jnp.zeros(4, jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmha" in text
    assert ("fmhaScaleBias" in text) == (window is not None or (causal and tokens > 1)), "masks only where needed"
    assert no_transposition_of(k, text)


def no_transposition_of(buffer: Array, text: str) -> bool:
    """Whether nothing of the size of `buffer` is transposed in a lowered program."""
    lines = [line for line in text.splitlines() if "stablehlo.transpose" in line]
    return not any(str(buffer.shape[2]) in line for line in lines)


@pytest.mark.parametrize(
    "sizes", [(2, 2), *(pytest.param(n, marks=pytest.mark.slow) for n in ((4, 1), (1, 2)))], ids=str
)
def test_on_a_mesh_each_device_has_its_own_part(sizes):
    """The same numbers, nothing gathered."""
    q, k, v = arrays(5, 2, 2, jnp.float32)
    start = jnp.array([0, 60, 130, 251], jnp.int32)
    alone = attend(q, k, v, start, backend="pallas")
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        placed = [sharding.shard_copy(x, letters) for x, letters in ((q, "B T N H"), (k, "B K S H"), (v, "B K S H"))]
        run = jax.jit(partial(attend, backend="pallas")).lower(*placed, sharding.shard_copy(start, "B")).compile()
        np.testing.assert_allclose(run(*placed, sharding.shard_copy(start, "B")), alone, atol=1e-6, rtol=0)
        assert "all-gather" not in (run.as_text() or "") and "all-to-all" not in (run.as_text() or "")


@pytest.mark.parametrize("backend", [b for b in get_args(attention.Backend) if b != "xla"])
def test_the_backend_of_this_device(backend):
    """On a GPU or a TPU its own backend, compiled, against xla, both in bfloat16."""
    try:
        available_backends(backend, [128], jnp.bfloat16, jax.devices()[0])
    except DominoError as error:
        pytest.skip(str(error))
    for tokens, group, kv_heads, causal, window in CASES.values():
        q, k, v = arrays(tokens, group, kv_heads, jnp.bfloat16, capacity=1024, width=128)
        start = jnp.array([0, 65, 700, 1024 - tokens], jnp.int32)
        run = jax.jit(partial(attend, causal=causal, window=window), static_argnames="backend")
        ours, plain = (np.asarray(run(q, k, v, start, backend=b).astype(jnp.float32)) for b in (backend, "xla"))
        np.testing.assert_allclose(ours, plain, atol=TOLERANCES["bfloat16"], rtol=0)


def test_what_cannot_run_on_a_device_is_refused(monkeypatch):
    cpu = jax.devices("cpu")[0]
    assert (
        available_backends("auto", [6], jnp.float32, cpu)
        == available_backends("xla", [6], jnp.float32, cpu)
        == ("xla",)
    )
    with pytest.raises(DominoError, match=r"needs a TPU or an NVIDIA GPU, found cpu"):
        available_backends("pallas", [128], jnp.bfloat16, cpu)
    with pytest.raises(DominoError, match=r"needs an NVIDIA GPU, found cpu"):
        available_backends("cudnn", [128], jnp.bfloat16, cpu)

    class Gpu:
        platform, device_kind = "gpu", "NVIDIA H200"

        class client:
            platform_version = "PJRT C API\ncuda 13000"

    for asked in ("cudnn", "auto"):
        assert "xla" in available_backends("auto", [128], jnp.bfloat16, Gpu)
        assert available_backends(asked, [128], jnp.bfloat16, Gpu)
    assert available_backends("auto", [128], jnp.bfloat16, Gpu) == ("xla",), (
        "no kernel was tested on this kind of device"
    )
    monkeypatch.setitem(attention.TESTED_KINDS, "NVIDIA H200", ("cudnn", "pallas"))
    assert available_backends("auto", [128], jnp.bfloat16, Gpu) == ("xla", "cudnn", "pallas")
    assert available_backends("auto", [128], jnp.float32, Gpu) == ("xla", "pallas")
    assert available_backends("auto", [128, 100], jnp.bfloat16, Gpu) == ("xla",)
    assert available_backends("cudnn", [128, 64], jnp.bfloat16, Gpu) == ("cudnn",)
    with pytest.raises(DominoError, match="takes bfloat16, found float32"):
        available_backends("cudnn", [128], jnp.float32, Gpu)
    for width in (100, 256):
        with pytest.raises(DominoError, match=f"up to 128, found head_dim {width}"):
            available_backends("cudnn", [128, width], jnp.bfloat16, Gpu)
    assert available_backends("pallas", [128, 64], jnp.float32, Gpu) == ("pallas",)
    for width in (8, 96, 100):
        with pytest.raises(DominoError, match=f"a power of two from 16 up, found head_dim {width}"):
            available_backends("pallas", [128, width], jnp.bfloat16, Gpu)
    Gpu.client.platform_version = "rocm 7"
    with pytest.raises(DominoError, match="needs a TPU or an NVIDIA GPU, found NVIDIA H200"):
        available_backends("pallas", [128], jnp.bfloat16, Gpu)


def test_auto_is_the_fastest_backend_with_the_same_output(monkeypatch):
    """Measured: xla is made slow, and the other backends are what a device might turn out to have."""
    plain, config = attention.attend_xla, dataclasses.replace(factory.TARGET, head_dim=16)

    def slow(*args: Any, **_: Any) -> Array:
        return sum((plain(*args) for _ in range(8)), start=jnp.float32(0)) / 8

    def right(q: Array, k: Array, v: Array, start: Array, **how: Any) -> Array:
        return plain(q, k, v, start, how["causal"], how["window"])

    def wrong(q: Array, k: Array, v: Array, start: Array, **how: Any) -> Array:
        return plain(q, k, v, start + 9, how["causal"], how["window"])

    def wrong_in_a_window(q: Array, k: Array, v: Array, start: Array, **how: Any) -> Array:
        return plain(q, k, v, start, how["causal"], None)

    def wrong_for_ragged_rows(q: Array, k: Array, v: Array, start: Array, **how: Any) -> Array:
        return plain(q, k, v, jnp.broadcast_to(start[:1], start.shape), how["causal"], how["window"])

    def broken(*_: Any, **__: Any) -> Array:
        raise NotImplementedError("no such kernel\nand more")

    def pretend(xla: Any = slow, cudnn: Any = right, pallas: Any = right) -> None:
        monkeypatch.setattr(attention, "attend_xla", xla)
        monkeypatch.setattr(attention_cudnn, "attend_cudnn", cudnn)
        monkeypatch.setattr(attention_tpu, "attend_tpu", pallas)

    run = partial(fastest_backend, config=config, dtype=jnp.float32, tokens=8)
    pretend(pallas=wrong)
    backend, notes = run(("xla", "cudnn", "pallas"))
    assert backend == "cudnn" and len(notes) == 1
    assert "pallas" in notes[0] and "its output differs from that of xla" in notes[0]
    pretend(pallas=wrong_in_a_window)
    assert run(("xla", "pallas")) == ("xla", notes), "a drafter may need it"
    pretend(pallas=wrong_for_ragged_rows)
    assert run(("xla", "pallas")) == ("xla", notes), "rows of a batch have lengths of their own"
    monkeypatch.setattr(autotune, "MARGIN", 0.0)
    assert run(("xla", "cudnn")) == ("xla", ()), "the first stays unless another is clearly faster"
    pretend(xla=plain, cudnn=broken)
    assert run(("xla", "cudnn")) == (
        "xla",
        ("attention by cudnn is left out, since it fails here: no such kernel.",),
    )
    pretend(xla=broken)
    assert run(("xla",)) == ("xla", ()), "where there is no choice nothing is run"


def test_the_command_line_refuses_too(tmp_path, capsys):
    make_target(tmp_path, tokenizer=False)
    for backend, says in (("cudnn", "needs an NVIDIA GPU"), ("pallas", "needs a TPU or an NVIDIA GPU")):
        assert main(["one", "--model", str(tmp_path), "--attention", backend]) == 1
        assert says in capsys.readouterr().err


def test_a_prefills_memory_grows_with_its_chunk_and_its_bucket_and_not_with_their_square(monkeypatch):
    """Temporaries of one chunk over caches of 512 to 2048 positions: linear, where whole scores would be 16 times."""
    monkeypatch.setattr(decode, "LARGEST_CHUNK", 64)
    pair = factory.Pair.make()

    def temporaries(capacity: int) -> int:
        configs, params = pair.configs.without_drafter, Params(pair.params.target)
        state = loops.begin(params, configs, [[1, 2, 3]], 1)
        state = decode.grow_caches(configs, state, capacity)
        tokens, last = jnp.zeros((1, 64), jnp.int32), jnp.zeros((1, configs.target.hidden_size))
        program = decode.prefill.lower(params, configs, state, tokens, jnp.int32(0), last).compile()
        memory = program.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    small, large = temporaries(512), temporaries(2048)
    scores = 64 * factory.TARGET.num_attention_heads * 4  # bytes a position
    assert scores * 1536 * 0.9 < large - small < scores * 1536 * 6
