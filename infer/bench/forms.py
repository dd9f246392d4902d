"""Every form of attention and of experts that a device can run, against the plain one in float32 there."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from domino_jax import attention, moe
from domino_jax.attention import Backend
from domino_jax.cache import length_bucket
from domino_jax.config import DraftConfig, MoeBackend, MoeConfig, TargetConfig
from domino_jax.decode import LARGEST_CHUNK
from domino_jax.drafters import training_attention
from domino_jax.drafters.training_attention import BlockBackend
from domino_jax.errors import DominoError, first_line
from domino_jax.paged import PagedKVCache
from domino_jax.runtime.autotune import ROUNDING
from domino_jax.runtime.pages import PAGE_SIZE
from domino_jax.runtime.precision import matmul_precision

BOUNDS = {"bfloat16": ROUNDING, "float32": 1e-4}  # of the largest value: how far a form may lie from the plain one
CAPACITY, SMALL = 4096, 512  # positions of the caches: on accelerators, on a CPU
WINDOW = 64
EXPERTS = MoeConfig(16, 4, 256, norm_topk_prob=True)
Check = dict[str, Any]


class ComparedForm(NamedTuple):
    """One way of computing something, and the plain one."""

    group: str
    case: str
    backend: str
    run: Callable[..., Any]
    plain: Callable[..., Any]
    given: tuple[Any, ...]  # arguments, in the dtype that is tested
    refusal: str | None = None  # why it can't run here


def check_forms(target: TargetConfig, draft: DraftConfig, dtype: str, device: Any) -> Iterator[Check]:
    """What becomes of each form: a dict before it runs, whose status is then "begun", and the same one after.

    Args:
        target, draft: whose heads and blocks are taken.
        dtype: of the forms; products in float32 are of full precision.
        device: one of this process's, which the forms run on.
    """
    for form in all_forms(target, draft, jnp.dtype(dtype), device):
        check: Check = {"group": form.group, "case": form.case, "backend": form.backend, "dtype": dtype}
        if form.refusal:
            yield check | {"status": "refused", "reason": form.refusal}
            continue
        yield check | {"status": "begun"}
        yield check | run_form(form, dtype)


def run_form(form: ComparedForm, dtype: str) -> Check:
    """Whether a form agrees with the plain one: its error as a share of the largest value, and what it may be."""
    try:
        with matmul_precision(dtype):
            ours = jax.device_get(jax.jit(form.run)(*form.given))
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, form.given)
        with matmul_precision("float32"):
            theirs = jax.device_get(jax.jit(form.plain)(*wide))
    except Exception as error:  # whatever a kernel that does not compile or run here raises
        return {"status": "failed", "reason": first_line(error)}
    found = max(map(difference, jax.tree.leaves(ours), jax.tree.leaves(theirs)))
    bound = BOUNDS[dtype]
    return {"status": "equal" if found <= bound else "differs", "error": found, "bound": bound}


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference as a share of the largest value; infinity where numbers are not finite."""
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    found = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    return found if np.isfinite(found) else float("inf")


def all_forms(target: TargetConfig, draft: DraftConfig, dtype: Any, device: Any) -> Iterator[ComparedForm]:
    """Those of decoding, of prompts without a cache, of training's blocks, and of experts."""
    yield from cached_forms(target, draft, dtype, device)
    yield from alone_forms(target, dtype, device)
    yield from block_forms(draft, dtype, device)
    yield from expert_forms(target, dtype)


def cached_forms(target: TargetConfig, draft: DraftConfig, dtype: Any, device: Any) -> Iterator[ComparedForm]:
    """Attention over caches, contiguous and in pages, as models call it: rows at the beginning, middle and end."""
    host, block = device.platform == "cpu", draft.block_size
    capacity = min(SMALL if host else CAPACITY, length_bucket(target.positions))
    heads, kv_heads, width = target.num_attention_heads, target.num_key_value_heads, target.head_dim
    keys = jax.random.split(jax.random.key(0), 3)
    k, v = (jax.random.normal(key, (3, kv_heads, capacity, width)).astype(dtype) for key in keys[:2])
    cases: dict[str, tuple[int, bool, int | None, bool]] = {
        "plain step": (1, True, None, False),
        "verification": (block, True, None, False),
        "drafter's block": (block, False, None, False),
        "drafter's block, window": (block, False, WINDOW, False),
        "part of a prompt": (min(LARGEST_CHUNK, capacity // 4), True, None, False),
        "tree": (block, True, None, True),
    }
    for case, (tokens, causal, window, tree) in cases.items():
        q = jax.random.normal(keys[2], (3, tokens, heads, width)).astype(dtype)
        start = jnp.array([0, capacity // 2, capacity - tokens], jnp.int32)
        sees = jnp.tril(jnp.ones((3, tokens, tokens), bool)) & (jnp.arange(tokens) % 2 == 0) | jnp.eye(
            tokens, dtype=bool
        )
        seen = sees if tree else None
        how = {"causal": causal, "window": window}
        plain = partial(attention.attend, **how, sees=seen)
        for backend in get_args(Backend):
            refusal = refused(partial(attention.available_backends, backend, (width,), dtype, device, tree))
            run = partial(attention.attend, **how, backend=backend, sees=seen)
            yield ComparedForm("attention over caches", case, backend, run, plain, (q, k, v, start), refusal)
            run, contiguous = partial(over_pages, how=how, sees=seen, backend=backend), partial(not_paged, plain)
            given = q, k, v, start, *pages_of(k, v)
            yield ComparedForm("attention over pages", case, backend, run, contiguous, given, refusal)


def pages_of(k: Array, v: Array) -> tuple[Array, Array]:
    """Keys and values [B, K, S, H] in pages, in an order of their own, and the table of them."""
    rows, heads, capacity, width = k.shape
    count = capacity // PAGE_SIZE
    both = jnp.stack([k, v], axis=2).reshape(rows, 2 * heads, count, PAGE_SIZE, width)
    pages = both.transpose(0, 2, 3, 1, 4).reshape(rows * count, PAGE_SIZE, 2 * heads, width)
    order = jax.random.permutation(jax.random.key(1), rows * count)
    table = jnp.argsort(order).astype(jnp.int32).reshape(rows, count) + 1  # page 0 is nobody's
    return jnp.concatenate([jnp.zeros_like(pages[:1]), pages[order]]), table


def over_pages(
    q: Array,
    k: Array,
    v: Array,
    start: Array,
    pages: Array,
    table: Array,
    how: dict[str, Any],
    sees: Array | None,
    backend: Backend,
) -> Array:
    """`attention.attend_cached` of one layer in pages; what they hold is not read from `k` and `v`."""
    return attention.attend_cached(q, PagedKVCache((pages,), table), 0, start, **how, sees=sees, backend=backend)


def not_paged(plain: Callable[..., Array], q: Array, k: Array, v: Array, start: Array, *_: Array) -> Array:
    """The same from the contiguous cache."""
    return plain(q, k, v, start)


def refused(ask: Callable[[], Any]) -> str | None:
    """Why a form can't run here, in the words of whoever is asked for it; None if it can."""
    try:
        ask()
    except DominoError as error:
        return first_line(error)
    return None


def alone_forms(target: TargetConfig, dtype: Any, device: Any) -> Iterator[ComparedForm]:
    """Attention without a cache, of whole rows and of packed ones."""
    length = SMALL // 2 if device.platform == "cpu" else 2 * SMALL
    keys = jax.random.split(jax.random.key(2), 3)
    counts = target.num_attention_heads, target.num_key_value_heads, target.num_key_value_heads
    q, k, v = (
        jax.random.normal(key, (2, length, count, target.head_dim)).astype(dtype)
        for key, count in zip(keys, counts, strict=True)
    )
    packed = jnp.tile(jnp.where(jnp.arange(length) < length // 3, 0, length // 3).astype(jnp.int32), (2, 1))
    for case, starts in (("whole rows", None), ("packed rows", packed)):
        for backend in ("xla", "cudnn"):
            refusal = refused(partial(attention.available_backends, backend, (target.head_dim,), dtype, device))
            run, plain = (
                partial(attention.attend_without_cache, starts=starts, backend=one) for one in (backend, "xla")
            )
            yield ComparedForm("attention without a cache", case, backend, run, plain, (q, k, v), refusal)


def block_forms(draft: DraftConfig, dtype: Any, device: Any) -> Iterator[ComparedForm]:
    """Attention of training's blocks, with its gradients."""
    host, size = device.platform == "cpu", draft.block_size
    # More than one group of blocks, else chunked would be dense.
    length, blocks = (128 if host else 1024), max(0 if host else 64, training_attention.ROWS // size + 1)
    heads, kv_heads, width = draft.num_attention_heads, draft.num_key_value_heads, draft.head_dim
    keys = jax.random.split(jax.random.key(3), 6)

    def normal(key: Array, *shape: int) -> Array:
        return jax.random.normal(key, shape).astype(dtype)

    q = normal(keys[0], 1, blocks, size, heads, width)
    own = tuple(normal(key, 1, blocks, size, kv_heads, width) for key in keys[1:3])
    context = tuple(normal(key, 1, length, kv_heads, width) for key in keys[3:5])
    anchors = jnp.sort(jax.random.randint(keys[5], (1, blocks), 1, length - size, jnp.int32))
    for case, window in (("blocks and gradients", None), ("blocks and gradients, window", WINDOW)):

        def run(q: Array, own: Any, context: Any, anchors: Array, backend: Any, window: int | None = window) -> Any:
            def summed(q: Array, own: Any, context: Any) -> Any:
                out = training_attention.attend_blocks(q, own, context, anchors, None, window, backend)
                return jnp.sum(out.astype(jnp.float32) ** 2), out

            gradients, out = jax.grad(summed, (0, 1, 2), has_aux=True)(q, own, context)
            return out, gradients

        for backend in get_args(BlockBackend):
            refusal = refused(partial(training_attention.check_block_backend, backend, draft, dtype, device))
            ours, plain = (partial(run, backend=one) for one in (backend, "dense"))
            yield ComparedForm("training's attention", case, backend, ours, plain, (q, own, context, anchors), refusal)


def expert_forms(target: TargetConfig, dtype: Any) -> Iterator[ComparedForm]:
    """A layer of few and small experts, by both backends."""
    config, width = EXPERTS, min(target.hidden_size, 1024)
    count, inner = config.num_experts, config.moe_intermediate_size
    keys = jax.random.split(jax.random.key(4), 4)
    gate_up, down = (
        (jax.random.normal(key, shape) * width**-0.5).astype(dtype)
        for key, shape in zip(keys, ((count, 2, inner, width), (count, width, inner)), strict=False)
    )
    router = jnp.eye(count, width).astype(dtype)

    def run(y: Array, router: Array, gate_up: Array, down: Array, backend: Any) -> Array:
        layer = SimpleNamespace(router=router, gate_up=gate_up, down=down)
        return moe.mlp(layer, dataclasses.replace(config, backend=backend), y)

    for tokens in (1, 16):
        # Scores that lie apart and are exact in any dtype: else rounding would choose other experts.
        scores = jax.vmap(lambda key: jax.random.permutation(key, count))(jax.random.split(keys[2], 2 * tokens)) / 4
        y = jax.random.normal(keys[3], (2, tokens, width)).at[..., :count].set(scores.reshape(2, tokens, count))
        for backend in get_args(MoeBackend):
            ours, plain = (partial(run, backend=one) for one in (backend, "one by one"))
            given = y.astype(dtype), router, gate_up, down
            yield ComparedForm("experts", f"{tokens} tokens a row", backend, ours, plain, given)
