"""Tiny random models in all forms that tests compare: arrays, Hugging Face's names, transformers, folders.

Two targets: `TARGET` for arrays alone, and `BYTE_TARGET`, whose vocabulary is that of `make_tokenizer`, for what
reads folders and text.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from convert.hf import save_hf, write_json
from convert.names import entries, export
from domino_jax import prepare, sharding, weights
from domino_jax.config import DecoderConfig, DraftConfig, TargetConfig
from domino_jax.decode import DecodeConfig
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.sampling import Sampling, settings
from domino_jax.weights import Params

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
        "head": DominoHead(gru_hidden_dim=14, emb_dim=7, pure_draft_prefix_len=1),
    }
    return DraftConfig(**(fields | changes))


class HeadCase(NamedTuple):
    """What a head is given of three rows' blocks of four places, for drafters of `TARGET`."""

    z: np.ndarray  # [3, 4, 32]
    base: np.ndarray  # [3, 4, 89]
    anchors: np.ndarray  # [3]
    keys: jax.Array  # [3, 4]
    temperatures: tuple[float, ...]
    sampling: Sampling  # of the temperatures


def head_case() -> HeadCase:
    """Random states and logits of blocks, of a greedy row, a cool and a hot one."""
    rng, temperatures = np.random.default_rng(1), (0.0, 0.7, 1.3)
    z = rng.normal(size=(3, 4, TARGET.hidden_size)).astype(np.float32)
    base = (2 * rng.normal(size=(3, 4, TARGET.vocab_size))).astype(np.float32)
    keys = jax.random.split(jax.random.key(2), (3, 4))
    sampling = settings(3)._replace(temperature=jnp.array(temperatures, jnp.float32))
    return HeadCase(z, base, np.array([5, 88, 0], np.int32), keys, temperatures, sampling)


END, CHAT_START, CHAT_END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
SPECIALS = (END, CHAT_START, CHAT_END, MASK)  # ids 0 to 3; byte b is id 4 + b's place in the byte alphabet
END_ID, CHAT_START_ID, CHAT_END_ID, MASK_ID = range(4)

BYTE_TARGET = TargetConfig(
    vocab_size=260,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=64,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)
BYTE_DRAFT = draft_config(
    BYTE_TARGET,
    **BYTE_TARGET.geometry(num_hidden_layers=1),
    block_size=4,
    mask_token_id=MASK_ID,
    target_layer_ids=(0, 1),
    head=DominoHead(gru_hidden_dim=16, emb_dim=8, pure_draft_prefix_len=1),
)

# With weights this small every layer adds next to nothing: the target repeats its last token, and a
# drafter proposes the anchor once and then the mask token.
REPEATING = 2e-3


def random_weights(config: DecoderConfig, seed: int, scale: float = 1.5) -> Any:
    """Weights whose activations keep their size from layer to layer, and norm weights other than one.

    They are drawn tensor by tensor under Hugging Face's names, so that no layout of ours changes them.
    """
    rng = np.random.default_rng(seed)

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name == "d2t":  # some tokens of the vocabulary, in no order
            return rng.permutation(config.vocab_size)[: shape[0]] - np.arange(shape[0])
        if name.endswith("bias"):
            return (0.5 * rng.normal(size=shape)).astype(np.float32)
        if len(shape) == 1:
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        fan_in = 1 if "embed_tokens" in name else shape[-1]
        return (scale * rng.normal(size=shape) / fan_in**0.5).astype(np.float32)

    shapes = {name: entry.hf_shape for entry in entries(config) for name in entry.hf_names}
    tensors = {name: tensor(name, shapes[name]) for name in sorted(shapes, key=_drawn)}
    return weights.unflatten(
        config, {e.path: jnp.asarray(e.read(lambda name, index: tensors[name][index])) for e in entries(config)}
    )


def _drawn(name: str) -> tuple[Any, ...]:
    """The order in which tensors are drawn: tests are written for the weights that it gives."""
    short = name.removeprefix("model.").removesuffix(".weight").replace("post_attention_layernorm", "mlp_norm")
    layer, expert = re.search(r"layers\.(\d+)", short), re.search(r"experts\.(\d+)", short)
    last = short.rsplit(".", 1)[-1].replace("_proj", "").replace("input_layernorm", "input_norm")
    if short.endswith(".bias"):
        last = short.split(".")[-2].replace("_proj", "_bias")
    if short.endswith("mlp.gate"):
        last = "router"
    top = {"hidden_norm": "context_norm", "embed_tokens": "embed"}.get(short, short)
    top = {"embed_proj.0": "head.proj_in", "embed_proj.2": "head.proj_out"}.get(top, top)
    top = {"prefix_gru.weight_ih_l0": "head.gru_in", "prefix_gru.weight_hh_l0": "head.gru_state"}.get(top, top)
    return ("layers", int(layer[1]), last, int(expert[1]) if expert else 0) if layer else (top, 0, "", 0)


def hf_weights(module: Any, config: DecoderConfig) -> dict[str, np.ndarray]:
    """The same weights under Hugging Face's names, in its layout [out, in]."""
    return {name: np.ascontiguousarray(x) for name, x in export(config, weights.flatten(module)).items()}


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
        return cls(params, DecodeConfig(target, BlockDrafter(draft)))

    def reference(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
        """What tests/support/reference.py takes: target weights and config, draft weights and config."""
        target, draft = self.configs.target, self.configs.draft
        assert draft is not None
        return (
            hf_weights(self.params.target, target),
            target.to_hf(),
            hf_weights(self.params.draft, draft),
            draft.to_hf(),
        )


def with_candidates(pair: Pair, candidates: int) -> Pair:
    """The pair whose causal head scores so many tokens."""
    assert isinstance(pair.configs.drafter, BlockDrafter)
    drafter = dataclasses.replace(pair.configs.drafter, candidates=candidates)
    return Pair(pair.params, dataclasses.replace(pair.configs, drafter=drafter))


def turned(pair: Pair) -> Pair:
    """The pair with its matrices as a float32 run on a CPU holds them; those in bfloat16 stay so."""
    assert pair.configs.draft is not None
    params = jax.tree.map(lambda w: w, pair.params)  # other modules of the same arrays
    prepare.prepare_for_cpu(params.target, pair.configs.target)
    prepare.prepare_for_cpu(params.draft, pair.configs.draft)
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
    head = changes.pop("head", DominoHead(width, 2 * width, 1))
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
        lm_head = model.embed if model.lm_head is None else model.lm_head
        readout = np.asarray(lm_head * model.norm) * 100
        drafter.head.gru_in = jnp.asarray(np.concatenate([zero, forget.T, identity / 8]))
        drafter.head.gru_state = jnp.zeros((3 * width, width))
        drafter.head.proj_block = jnp.zeros((2 * width, width))
        drafter.head.proj_state = jnp.asarray(np.concatenate([identity, -identity]))
        drafter.head.proj_out = jnp.asarray(np.concatenate([readout, -readout], axis=1))
    return pair


def make_tokenizer(template: str | None = None) -> Any:
    """A byte-level tokenizer with a token for each byte, and a chat template if one is given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate((*SPECIALS, *alphabet))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        mask_token=MASK,
        additional_special_tokens=[CHAT_START, CHAT_END],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def make_target(
    folder: Path,
    seed: int = 0,
    std: float = 0.2,
    tokenizer: bool = True,
    template: str | None = None,
    eos: int | Sequence[int] | None = (END_ID, CHAT_END_ID),
    **changes: Any,
) -> TargetConfig:
    """Write a random target; `changes` are to BYTE_TARGET's fields, `eos` goes to generation_config.json."""
    config = dataclasses.replace(BYTE_TARGET, **changes)
    save_hf(folder, weights.init_weights(config, jax.random.key(seed), std=std), config, config.to_hf())
    if tokenizer:
        make_tokenizer(template).save_pretrained(folder)
    if eos is not None:
        write_json(folder / "generation_config.json", {"eos_token_id": eos})
    return config


def make_draft(folder: Path, seed: int = 1, std: float = 0.2, **changes: Any) -> DraftConfig:
    """Write a random drafter for `make_target`'s target; `changes` are to BYTE_DRAFT's fields."""
    config = dataclasses.replace(BYTE_DRAFT, **changes)
    save_hf(folder, weights.init_weights(config, jax.random.key(seed), std=std), config, config.to_hf())
    return config
