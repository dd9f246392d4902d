"""The causal head: a GRU over realised tokens corrects the block's logits left to right (SPEC section 4).

Two forms of one computation: `teacher_forced` for training, where the tokens are known, and
`propose` for decoding, where each correction depends on the token chosen before it.
"""

import jax
import jax.numpy as jnp
from jax import Array

from domino_jax.config import DraftConfig
from domino_jax.sampling import Sampling, draw, probabilities
from domino_jax.sharding import constrain
from domino_jax.weights import Draft, Head


def gru_cell(head: Head, inputs: Array, state: Array) -> Array:
    """One GRU step from the input's gates (x · W_i) [..., GU] and the state [..., U]; PyTorch's gate order.

    r = σ(W_ir x + W_hr h);  u = σ(W_iz x + W_hz h);  n = tanh(W_in x + r ∘ W_hn h);  h' = (1 - u) ∘ n + u ∘ h
    """
    reset_x, update_x, new_x = jnp.split(inputs, 3, axis=-1)
    # Training keeps this matrix in float32, so that its gradient is summed over the steps in float32.
    reset_h, update_h, new_h = jnp.split(state @ head.gru_state.astype(state.dtype), 3, axis=-1)
    update = jax.nn.sigmoid(update_x + update_h)
    new = jnp.tanh(new_x + jax.nn.sigmoid(reset_x + reset_h) * new_h)
    return (1 - update) * new + update * state


def projected(head: Head, z: Array, state: Array) -> Array:
    """SiLU(embed_proj.0([z ; h])): z [..., D], state [..., U] -> [..., R]."""
    width = z.shape[-1]
    return jax.nn.silu(z @ head.proj_in[:width] + state @ head.proj_in[width:])


def teacher_forced(head: Head, z: Array, embedded: Array) -> Array:
    """The low-rank part of the correction of every proposal, given the true tokens.

    Args:
        z: [..., J, D] of the proposing rows.
        embedded: [..., J, D] embeddings of t_a, t_{a+1}, ..., t_{a+J-1}: what each state has newly eaten.

    Returns:
        [..., J, R]; the logits' correction is this times embed_proj.2.
    """
    gates = jnp.moveaxis(embedded @ head.gru_in, -2, 0)  # [J, ..., GU]
    start = jnp.zeros((*gates.shape[1:-1], head.gru_state.shape[0]), z.dtype)

    def step(state: Array, x: Array) -> tuple[Array, Array]:
        state = gru_cell(head, x, state)
        return state, state

    _, states = jax.lax.scan(step, start, gates)
    return projected(head, z, jnp.moveaxis(states, 0, -2))


def propose(
    params: Draft,
    config: DraftConfig,
    embed: Array,
    z: Array,
    base: Array,
    anchor: Array,
    sampling: Sampling,
    keys: Array | None,
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
        keys: [B] random keys, or None for greedy proposals.

    Returns:
        drafts [B, J] int32; the distributions they were drawn from [B, J, V], None if greedy.
    """
    head, proposals = params.head, z.shape[1]
    prefix = config.head.pure_draft_prefix_len if config.head else proposals
    if keys is not None:
        keys = jax.vmap(lambda key: jax.random.split(key, proposals))(keys)
    token, drafts, distributions = anchor, [], []
    state = jnp.zeros((anchor.shape[0], head.gru_state.shape[0] if head else 0), z.dtype)
    # Unrolled: J is small, and XLA then overlaps and fuses the steps' tiny kernels.
    for j in range(proposals):
        logits = base[:, j]
        if head:
            state = gru_cell(head, embed[token] @ head.gru_in, state)
            if j >= prefix:
                rank = projected(head, z[:, j], state)
                logits += jnp.einsum("BR,VR->BV", rank, head.proj_out, preferred_element_type=jnp.float32)
                logits = constrain(logits, "B V")
        if keys is None:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        elif j == 0 or j >= prefix:
            distribution = probabilities(logits[:, None], sampling)[:, 0]
            token = draw(keys[:, j], distribution)
            distributions.append(distribution)
        else:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            distributions.append(jax.nn.one_hot(token, logits.shape[-1], dtype=jnp.float32))
        drafts.append(token)
    return jnp.stack(drafts, axis=1), jnp.stack(distributions, axis=1) if keys is not None else None
