"""Tiny random models in memory, in every form the tests compare: ours, Hugging Face's names, transformers itself."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import Mesh

from convert.names import entries
from domino_jax import decode, prepare, sharding, weights
from domino_jax.config import DecoderConfig, DraftConfig, HeadConfig, TargetConfig
from domino_jax.decode import DecodeConfig, DecodeState, Emitted, Params
from domino_jax.sampling import Sampling, settings

NO_STOP = jnp.full(1, -1, jnp.int32)

# Every size differs from the others, so that a swapped axis can't go unseen.
TARGET = TargetConfig(
    vocab_size=89,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    intermediate_size=40,
    rms_norm_eps=1e-5,
    rope_theta=500.0,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)


def draft_config(target: TargetConfig = TARGET, **changes: Any) -> DraftConfig:
    """A two-layer Domino drafter for `target`, M = 5 and `shift_label`; `changes` replace any field."""
    fields = target.geometry()
    fields |= {
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "intermediate_size": 28,
        "block_size": 5,
        "mask_token_id": target.vocab_size - 1,
        "target_layer_ids": (1, 0),
        "num_target_layers": target.num_hidden_layers,
        "shift_label": True,
        "head": HeadConfig(gru_hidden_dim=14, emb_dim=7, pure_draft_prefix_len=1),
    }
    return DraftConfig(**(fields | changes))


def random_weights(config: DecoderConfig, seed: int, scale: float = 1.5) -> Any:
    """Weights whose activations keep their size from layer to layer, and norm weights other than one."""
    rng = np.random.default_rng(seed)

    def leaf(entry) -> np.ndarray:
        if weights.is_bias(entry.path):
            return (0.5 * rng.normal(size=entry.hf_shape)).astype(np.float32)
        if len(entry.hf_shape) == 1:
            return rng.uniform(0.5, 1.5, entry.hf_shape).astype(np.float32)
        fan_in = 1 if entry.path == "embed" else entry.hf_shape[-1]
        return (scale * rng.normal(size=entry.hf_shape) / fan_in**0.5).astype(np.float32)

    return weights.unflatten(config, {e.path: jnp.asarray(e.to_ours(leaf(e))) for e in entries(config)})


def hf_weights(module: Any, config: DecoderConfig) -> dict[str, np.ndarray]:
    """The same weights under Hugging Face's names, in its layout [out, in]."""
    leaves = weights.flatten(module)
    return {
        name: np.ascontiguousarray(tensor)
        for e in entries(config)
        for name, tensor in e.tensors(np.asarray(e.to_hf(leaves[e.path]))).items()
    }


def place(module: Any, config: DecoderConfig, mesh: Mesh) -> Any:
    """A module spread over a mesh."""
    letters = weights.flatten(weights.axes(config))
    leaves = {
        path: sharding.shard_stored(np.asarray(leaf).__getitem__, letters[path].split(), leaf.shape, config, mesh)
        for path, leaf in weights.flatten(module).items()
    }
    return weights.unflatten(config, leaves)


def torch_model(module: weights.Target, config: TargetConfig) -> Any:
    """transformers' own Qwen3 with these weights, float32, on the CPU."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.set_num_threads(1)
    raw = config.to_hf() | {"rope_theta": config.rope_theta}
    hf_config: Any = Qwen3Config.from_dict(raw | {"attn_implementation": "eager"})
    assert hf_config.rope_parameters["rope_theta"] == config.rope_theta
    model = Qwen3ForCausalLM(hf_config).eval()
    state = {name: torch.from_numpy(tensor.copy()) for name, tensor in hf_weights(module, config).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert list(missing) == (["lm_head.weight"] if config.tie_word_embeddings else [])
    if config.tie_word_embeddings:
        model.tie_weights()
    return model


class Pair(NamedTuple):
    """A target, a drafter for it, and all their forms."""

    params: Params
    configs: DecodeConfig

    @classmethod
    def make(cls, draft: DraftConfig | None = None, target: TargetConfig = TARGET, seed: int = 0) -> "Pair":
        draft = draft or draft_config(target)
        params = Params(random_weights(target, seed), random_weights(draft, seed + 1))
        return cls(params, DecodeConfig(target, draft))

    def reference(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
        """What tests/reference.py takes: target weights and config, draft weights and config."""
        target, draft = self.configs.target, self.configs.draft
        assert draft is not None
        return (
            hf_weights(self.params.target, target),
            target.to_hf(),
            hf_weights(self.params.draft, draft),
            draft.to_hf(),
        )


def turned(pair: Pair) -> Pair:
    """The pair with its matrices as a float32 run on a CPU holds them; those in bfloat16 stay so."""
    assert pair.configs.draft is not None
    params = jax.tree.map(lambda w: w, pair.params)  # other modules of the same arrays
    prepare.outputs_first(params.target, pair.configs.target)
    prepare.outputs_first(params.draft, pair.configs.draft)
    return Pair(params, pair.configs)


def narrow(pair: Pair) -> Pair:
    """The same with weights rounded to bfloat16, and matrices left so."""
    return turned(Pair(jax.tree.map(lambda w: w.astype(jnp.bfloat16), pair.params), pair.configs))


def good_pair(target: TargetConfig = TARGET, seed: int = 0, **changes: Any) -> Pair:
    """A pair whose drafts are often right, by construction and only if every step follows docs/algorithm.md.

    The target is close to a bigram model: its layers add little to the embedding. Where the drafter's row
    sees the anchor (`shift_label`) its base logits are then nearly the target's; elsewhere the head has to
    know the last token. Its GRU is built to forget all but that (u = 0 by a constant coordinate of the
    embeddings, n = tanh(x / 8)), and its projection to be linear (SiLU(s) - SiLU(-s) = s), so that the
    correction is the LM head over that token's embedding.
    """
    width = target.hidden_size
    head = changes.pop("head", HeadConfig(width, 2 * width, 1))
    draft = draft_config(
        target, head=head and dataclasses.replace(head, gru_hidden_dim=width, emb_dim=2 * width), **changes
    )
    pair = Pair.make(draft, target, seed)
    for module, quiet in ((pair.params.target, 0.18), (pair.params.draft, 0.1)):
        assert module is not None
        for layer in module.layers:
            layer.o, layer.down = layer.o * quiet, layer.down * quiet
            if layer.o_bias is not None:
                layer.o_bias = layer.o_bias * quiet
    model, drafter = pair.params.target, pair.params.draft
    assert drafter is not None
    model.embed = model.embed.at[:, 0].set(4.0)
    drafter.norm = model.norm
    if drafter.head is not None:
        identity, zero = np.eye(width, dtype=np.float32), np.zeros((width, width), np.float32)
        forget = np.zeros((width, width), np.float32)
        forget[0] = -10.0  # times the constant coordinate: u = σ(-40)
        readout = np.asarray(weights.lm_head(model) * model.norm) * 100
        drafter.head.gru_in = jnp.asarray(np.concatenate([zero, forget, identity / 8], axis=1))
        drafter.head.gru_state = jnp.zeros((width, 3 * width))
        drafter.head.proj_in = jnp.asarray(np.block([[zero, zero], [identity, -identity]]))
        drafter.head.proj_out = jnp.asarray(np.concatenate([readout, -readout], axis=1))
    return pair


def begin(
    params: Params,
    configs: DecodeConfig,
    prompts: Sequence[Sequence[int]],
    limits: int | Sequence[int],
    stop: Array = NO_STOP,
    sampling: Sampling | None = None,
    keys: Array | None = None,
) -> DecodeState:
    """`decode.prefill_batch` with what most tests want: greedy, one limit, caches of the weights' dtype."""
    batch = len(prompts)
    return decode.prefill_batch(
        params,
        configs,
        [list(p) for p in prompts],
        jax.random.split(jax.random.key(7), batch) if keys is None else keys,
        [limits] * batch if isinstance(limits, int) else list(limits),
        settings(batch) if sampling is None else sampling,
        stop,
        params.target.norm.dtype,
    )


class Output(NamedTuple):
    """What a row generated: its tokens, and the drafts accepted in each of its cycles."""

    tokens: list[int]
    accepted: list[int]


Dispatch = Callable[[DecodeState], tuple[DecodeState, Emitted]]


def finish(state: DecodeState, dispatch: Dispatch, reach: int = 2) -> list[Output]:
    """Dispatch until all rows are done, growing the length bucket where it is full, as an engine does."""
    rows = [Output([int(t)], []) for t in jax.device_get(state.token)]
    done, dispatches = jax.device_get(state.done), 0
    while not done.all():
        dispatches += 1
        assert dispatches < 100, "rows that never end"
        if int(jax.device_get(state.length)[~done].max()) + reach > state.cache.capacity:
            state = decode.grow_caches(state, 2 * state.cache.capacity)
        state, emitted = dispatch(state)
        emitted = jax.device_get(emitted)
        assert emitted.cycles > 0, "a dispatch with work and room did nothing"
        for i in range(int(emitted.cycles)):
            for row, output in enumerate(rows):
                count = int(emitted.counts[i, row])
                output.tokens.extend(int(t) for t in emitted.tokens[i, row, :count])
                if count:
                    output.accepted.append(int(emitted.accepted[i, row]))
        done = jax.device_get(state.done)
    return rows


def speculate(
    params: Params,
    configs: DecodeConfig,
    state: DecodeState,
    stop: Array = NO_STOP,
    cycles: int = 8,
    greedy: bool = True,
) -> list[Output]:
    """All rows to their ends by Domino cycles."""
    return finish(state, lambda s: decode.speculate(params, configs, s, stop, cycles, greedy), configs.lookahead)


def autoregress(
    params: Params,
    configs: DecodeConfig,
    state: DecodeState,
    stop: Array = NO_STOP,
    cycles: int = 8,
    greedy: bool = True,
) -> list[Output]:
    """All rows to their ends by the lean loop."""
    return finish(state, lambda s: decode.autoregress(params, configs, s, stop, cycles, greedy))


Loop = Callable[..., tuple[DecodeState, Emitted]]


def retraced(**replacements: Any) -> Loop:
    """`decode.speculate` traced anew with functions of decode or its modules replaced ("verify.greedy": ...)."""
    plain = decode.speculate.__wrapped__  # type: ignore[attr-defined]

    @partial(jax.jit, static_argnums=(1, 4, 5), donate_argnums=2)
    def run(*arguments: Any) -> tuple[DecodeState, Emitted]:
        with pytest.MonkeyPatch.context() as patch:
            for name, function in replacements.items():
                patch.setattr(f"domino_jax.{name.replace('__', '.')}", function)
            return plain(*arguments)

    return run


def oracle_loop() -> Callable[..., tuple[DecodeState, Emitted]]:
    """A greedy `speculate` whose drafter reads its proposals from a table [B, positions], the first argument.

    Row b with its anchor at position a proposes table[b, a + 1 : a + 1 + J]: any accepted length can be had by
    writing the truth there and a wrong token where the run shall end.
    """
    plain = decode.speculate.__wrapped__  # type: ignore[attr-defined]

    @partial(jax.jit, static_argnums=(2, 5))
    def run(
        table: Array, params: Params, configs: DecodeConfig, state: DecodeState, stop: Array, cycles: int
    ) -> tuple[DecodeState, Emitted]:
        def propose(params: Params, configs: DecodeConfig, state: DecodeState, keys: Array | None):
            assert configs.draft is not None and keys is None
            places = state.length[:, None] + 1 + jnp.arange(configs.proposals, dtype=jnp.int32)
            return jnp.take_along_axis(table, places, axis=1), None, state.context

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode, "propose", propose)
            return plain(params, configs, state, stop, cycles, True)

    return run


def hf_greedy(model: Any, prompt: Sequence[int], count: int, stop: Sequence[int] = ()) -> list[int]:
    """transformers' own greedy continuation of one prompt, the new ids only, a stop token kept."""
    import torch

    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=list(stop) or None,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects what JAX traces, lowers or compiles meanwhile."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.startswith("/jax/core/compile"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
