"""The causal head: a GRU over realised tokens corrects the block's logits left to right (docs/algorithm.md, section 4).

Two forms of one computation: `teacher_forced` for training, where the tokens are known, and
`propose_corrected` for decoding, where each correction depends on the token chosen before it.
"""

import jax
import jax.numpy as jnp
from jax import Array

from domino_jax.config import DraftConfig
from domino_jax.layers import unembed
from domino_jax.matrix import AnyMatrix, dot, dot_rows, take
from domino_jax.sampling import Sampling, probabilities, sample
from domino_jax.sharding import constrain, model_devices
from domino_jax.weights import Draft, Head

SPARE = 16  # buckets of the vocabulary for each candidate wanted: that many keep nearly all of the true best


def gru_cell(inputs: Array, recurrent: Array, state: Array) -> Array:
    """One GRU step from what the input and the state [..., U] give the gates, each [..., GU]; PyTorch's gate order.

    r = σ(W_ir x + W_hr h);  u = σ(W_iz x + W_hz h);  n = tanh(W_in x + r ∘ W_hn h);  h' = (1 - u) ∘ n + u ∘ h
    """
    reset_x, update_x, new_x = jnp.split(inputs, 3, axis=-1)
    reset_h, update_h, new_h = jnp.split(recurrent, 3, axis=-1)
    update = jax.nn.sigmoid(update_x + update_h)
    new = jnp.tanh(new_x + jax.nn.sigmoid(reset_x + reset_h) * new_h)
    return (1 - update) * new + update * state


def teacher_forced(head: Head, z: Array, embedded: Array) -> Array:
    """The low-rank part of the correction of every proposal, given the true tokens.

    Args:
        z: [..., J, D] of the proposing rows.
        embedded: [..., J, D] embeddings of t_a, t_{a+1}, ..., t_{a+J-1}: the GRU's inputs.

    Returns:
        [..., J, R]; the logits' correction is this times embed_proj.2.
    """
    gates = jnp.moveaxis(dot(embedded, head.gru_in), -2, 0)  # [J, ..., GU]
    start = jnp.zeros((*gates.shape[1:-1], head.gru_state.shape[1]), z.dtype)

    def step(state: Array, x: Array) -> tuple[Array, Array]:
        # Training keeps this matrix in float32, so that its gradient is summed over the steps in float32.
        state = gru_cell(x, dot(state, head.gru_state.astype(state.dtype)), state)
        return state, state

    _, states = jax.lax.scan(step, start, gates)
    return jax.nn.silu(dot(z, head.proj_block) + dot(jnp.moveaxis(states, 0, -2), head.proj_state))


def propose_corrected(
    params: Draft,
    config: DraftConfig,
    embed: AnyMatrix,
    z: Array,
    base: Array,
    anchor: Array,
    sampling: Sampling,
    keys: Array | None,
    candidates: int | None = None,
) -> tuple[Array, Array | None]:
    """Choose the proposals of a block, or its first J, each corrected by those before it.

    A proposal whose logits know the tokens before it (the first, and every corrected one) is drawn
    from its distribution. The others (plain DFlash, and the head's uncorrected prefix after its first)
    would be drawn independently of their neighbours, which wrecks acceptance: they are the argmax, with
    a one-hot distribution.

    Args:
        embed: the target's embeddings [V, D].
        z: [B, J, D] block states of the proposing rows; base: [B, J, V] their logits.
        anchor: [B].
        keys: [B, J] random keys, or None for greedy proposals.
        candidates: C, tokens that the head scores and one of which is proposed; the whole vocabulary when None.

    Returns:
        drafts [B, J] int32; the distributions they were drawn from [B, J, V], None if greedy.
    """
    proposals = z.shape[1]
    head = params.head
    prefix = config.head.pure_draft_prefix_len if config.head else proposals
    token, drafts, distributions = anchor, [], []
    state, recurrent, part, from_state, few = z, z, z, z, None
    if head:
        state = jnp.zeros((anchor.shape[0], head.gru_state.shape[1]), z.dtype)
        recurrent = jnp.zeros((anchor.shape[0], 3 * state.shape[1]), z.dtype)  # what a state of zeros gives the gates
        part = dot(z, head.proj_block)  # no token changes it, so a block needs it once
        from_state = jnp.concatenate([head.gru_state, head.proj_state])  # one product with a state instead of two
    if head and candidates is not None and candidates < base.shape[-1]:
        best, ids = likeliest(base, candidates)  # [B, J, C]
        few = best, ids, take(head.proj_out, ids)  # the last [B, J, C, R]
    # Unrolled: J is small, and XLA then overlaps and fuses the steps' tiny kernels.
    for j in range(proposals):
        logits, names = base[:, j], None  # names: the tokens that the logits are of, where not all
        if head:
            state = gru_cell(dot_rows(embed, token, head.gru_in), recurrent, state)
            recurrent, inner = jnp.split(dot(state, from_state), [recurrent.shape[1]], axis=1)
            if j >= prefix:
                rank = jax.nn.silu(part[:, j] + inner)
                if few:
                    logits, names, weights = (x[:, j] for x in few)
                    logits += jnp.einsum("BR,BCR->BC", rank, weights, preferred_element_type=jnp.float32)
                else:
                    logits = constrain(logits + unembed(rank, head.proj_out), "B V")
        distribution = None
        if keys is not None and (j == 0 or j >= prefix):
            distribution = _spread(probabilities(logits[:, None], sampling)[:, 0], names, base.shape[-1])
            token = sample(keys[:, j], distribution)  # of the whole vocabulary, as the target draws
        else:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            if names is not None:
                token = jnp.take_along_axis(names, token[:, None], axis=1)[:, 0]
            if keys is not None:
                distribution = jax.nn.one_hot(token, base.shape[-1], dtype=jnp.float32)
        if distribution is not None:
            distributions.append(distribution)
        drafts.append(token)
    return jnp.stack(drafts, axis=1), jnp.stack(distributions, axis=1) if keys is not None else None


def likeliest(logits: Array, count: int) -> tuple[Array, Array]:
    """The `count` highest of logits [B, J, V], or nearly: values and ids, each [B, J, count], highest first.

    A large vocabulary is first divided into many more buckets than are wanted, and the best of each bucket kept (the
    partial reduction of Chern et al. 2022, "TPU-KNN"): sorting all of it would cost more than the head saves. The
    highest of all is always there, and a bucket seldom holds two of the others. Devices that share the vocabulary
    send each other the buckets' best alone.
    """
    batch, rows, vocab = logits.shape
    shards = model_devices()
    part = vocab // shards
    depth = max(1, vocab // (SPARE * count))  # tokens of a bucket
    width = -(-part // depth)  # buckets of a device
    cells = logits.reshape(batch, rows, shards, part)
    cells = jnp.pad(cells, ((0, 0), (0, 0), (0, 0), (0, depth * width - part)), constant_values=-jnp.inf)
    cells = cells.reshape(batch, rows, shards, depth, width)
    places = jnp.argmax(cells, axis=3).astype(jnp.int32) * width + jnp.arange(width, dtype=jnp.int32)
    ids = jnp.arange(shards, dtype=jnp.int32)[:, None] * part + places
    best = jnp.max(cells, axis=3)
    best, ids = (constrain(x.reshape(batch, rows, -1), "B J -") for x in (best, ids))
    # Sorted, since jax.lax.top_k would gather the rows of the other devices' batches first.
    lowest, ids = jax.lax.sort((-best, ids), num_keys=1)
    return -lowest[..., :count], ids[..., :count]


def _spread(distribution: Array, names: Array | None, vocab: int) -> Array:
    """A distribution over the tokens `names` [B, C], or over all, as one over the vocabulary: [B, V]."""
    if names is None:
        return distribution
    if model_devices() == 1:
        rows = jnp.arange(names.shape[0])[:, None]
        return jnp.zeros((names.shape[0], vocab), distribution.dtype).at[rows, names].set(distribution)
    # A masked sum: a scatter into a sharded vocabulary would gather it.
    here = jnp.arange(vocab) == names[..., None]
    return constrain(jnp.sum(jnp.where(here, distribution[..., None], 0), axis=1), "B V")
