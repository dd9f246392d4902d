"""Attention over pages on a TPU: JAX's ragged paged attention, which reads no page beyond a row's length.

It has run on no TPU here: tests interpret it and compile it for TPUs that are not there.
"""

import jax.numpy as jnp
from jax import Array

KEYS_OF_A_BLOCK, QUERIES_OF_A_BLOCK = 256, 32  # that the kernel holds at once


def attend_pages_tpu(q: Array, pages: Array, table: Array, start: Array, window: int | None) -> Array:
    """Causal attention of T queries a row over its pages.

    Args:
        q: [B, T, N, H].
        pages: [P, page_size, 2K, H], see `paged.PagedKVCache`; the queries' own keys are there.
        table: [B, S / page_size] int32.
        start: [B] int32, the first query's position.
        window: keys that a query sees, its own among them; all when None.

    Returns:
        [B, T, N, H].
    """
    # Imported here: nothing but TPUs needs it.
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    batch, tokens, heads, width = q.shape
    capacity = table.shape[1] * pages.shape[1]
    attended = ragged_paged_attention(
        q.reshape(batch * tokens, heads, width),
        pages,
        jnp.minimum(start + tokens, capacity),
        table,
        jnp.arange(batch + 1, dtype=jnp.int32) * tokens,
        jnp.full(1, batch, jnp.int32),
        sm_scale=width**-0.5,
        sliding_window=window,
        # Given, since JAX's own choice asks for this process's devices, which need not be those that it compiles for.
        num_kv_pages_per_block=min(table.shape[1], max(1, KEYS_OF_A_BLOCK // pages.shape[1])),
        num_queries_per_block=min(QUERIES_OF_A_BLOCK, batch * tokens),
    )
    return attended.reshape(q.shape)
