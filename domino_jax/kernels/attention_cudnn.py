"""Attention over the cache by cuDNN, for NVIDIA GPUs and 16-bit floats. It stops at each row's length.

It has run on no device here: tests compare it with JAX's own reference of the same function, and look at what it lowers
to.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from domino_jax.attention import apart, side_by_side, visible


def attend_cudnn(
    q: Array,
    k: Array,
    v: Array,
    start: Array,
    causal: bool,
    window: int | None,
    implementation: Any = "cudnn",
    sees: Array | None = None,
) -> Array:
    """`attention.attend` by `jax.nn.dot_product_attention`.

    That function takes keys as [B, S, K, H], which would transpose the cache. Each KV head with its G query heads is
    passed as a row of its own instead, [BK, S, 1, H]: the cache as it lies in memory. Its causal mask is aligned to
    position 0 and not to each row's start, so several causal queries need an explicit mask, [BK, 1, T, S], and so do
    the nodes of a tree.

    Args:
        implementation: of jax.nn.dot_product_attention; "xla" is JAX's reference, for tests.
    """
    batch, tokens, heads, width = q.shape
    kv_heads, capacity = k.shape[1:3]
    rows = side_by_side(q, kv_heads).reshape(batch * kv_heads, tokens, heads // kv_heads, width)
    keys, values = (x.reshape(batch * kv_heads, capacity, 1, width) for x in (k, v))
    mask = None
    if window is not None or (causal and tokens > 1):
        mask = jnp.repeat(visible(start, tokens, capacity, causal, window, sees)[:, None], kv_heads, axis=0)
    out = jax.nn.dot_product_attention(
        rows,
        keys,
        values,
        mask=mask,
        # Never beyond the cache: a row that is over may stand at its end.
        key_value_seq_lengths=jnp.repeat(jnp.minimum(start + tokens, capacity), kv_heads),
        implementation=implementation,
    )
    return apart(out.reshape(batch, kv_heads, -1, width), tokens)
