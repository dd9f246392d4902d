"""Pre-train a small Qwen3 target and its tokenizer from text, so that the demo can be made from nothing.

    python -m train pretrain --out target

The result is a standard Hugging Face folder. Matrices train with Muon, embeddings and norms with AdamW.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from convert.configs import read_target_config
from convert.hf import save_hf, write_json
from convert.options import check_count, check_real, local_sources
from convert.tokenizer import load_tokenizer
from domino_jax import target
from domino_jax.config import TargetConfig
from domino_jax.errors import DominoError
from domino_jax.runtime.command import UsageError, run_command
from domino_jax.runtime.compile_cache import enable_compile_cache
from domino_jax.runtime.files import check_output, lock_folder
from domino_jax.runtime.parsing import parse_json
from domino_jax.weights import axes, flatten, init_weights, unflatten
from train.demo.corpus import read_texts
from train.loading import find
from train.monitor import curves
from train.optimizer import muon
from train.stopping import stop_signals

END, CHAT_START, CHAT_END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"


@dataclass(frozen=True)
class Pretrain:
    """Pre-train a small Qwen3 target from text."""

    out: Path
    """folder to write the model to"""
    text: Path | None = None
    """folder of text files; transformers' own model code when not given"""
    files: str = "modeling_*.py"
    """pattern for the names of the files to read in it"""
    tokenizer: str | None = None
    """model whose tokenizer to use, as an assistant for it needs: a name, a folder, or org/repo on the Hub; one of
    --vocab-size tokens is trained when not given"""
    vocab_size: int = 2048
    hidden_size: int = 512
    layers: int = 5
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 1280
    steps: int = 700
    batch: int = 8
    """sequences a step"""
    length: int = 512
    """tokens a sequence, and the positions the model is good for"""
    muon_lr: float = 0.02
    adam_lr: float = 0.003
    warmup: Annotated[float, tyro.conf.arg(metavar="SHARE")] = 0.04
    """share of the steps with a rising learning rate"""
    decay: Annotated[float, tyro.conf.arg(metavar="SHARE")] = 0.5
    """share of the steps, at the end, with a falling one"""
    weight_decay: float = 0.01
    seed: int = 0


def train_tokenizer(texts: list[str], vocab_size: int):
    """A byte-level BPE tokenizer of `vocab_size` tokens, trained on `texts`; a transformers tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [END, CHAT_START, CHAT_END, MASK]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        mask_token=MASK,
        additional_special_tokens=[CHAT_START, CHAT_END],
        clean_up_tokenization_spaces=False,
    )


def other_tokenizer(name: str):
    """The tokenizer of another model.

    Raises:
        DominoError: it has none, or none with a token that ends a text.
    """
    folder = find(name, "--tokenizer")
    tokenizer = load_tokenizer(folder)
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise DominoError(f"{folder} has no tokenizer with an end token.")
    return tokenizer


def _stated_vocab_size(name: str) -> int:
    """The size of another model's vocabulary, which may have more entries than its tokenizer has tokens."""
    file = find(name, "--tokenizer") / "config.json"
    return read_target_config(parse_json(file.read_text()), file).vocab_size if file.exists() else 0


def encode_texts(tokenizer, texts: list[str]) -> np.ndarray:
    """All texts in one array of ids, each followed by the end token."""
    end = tokenizer.eos_token_id
    pieces = []
    for start in range(0, len(texts), 64):
        for ids in tokenizer(texts[start : start + 64], add_special_tokens=False)["input_ids"]:
            pieces.append(np.asarray([*ids, end], np.int32))
    return np.concatenate(pieces)


def pretrain_optimizer(config: TargetConfig, options: Pretrain) -> optax.GradientTransformation:
    """Muon for the layers' matrices, AdamW for the rest; the rates rise, stay, and fall."""

    def schedule(peak: float) -> optax.Schedule:
        rise, fall = round(options.steps * options.warmup), round(options.steps * options.decay)
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, rise),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, 0.0, fall),
            ],
            [rise, options.steps - fall],
        )

    rule = muon(schedule(options.muon_lr), schedule(options.adam_lr), options.weight_decay, flatten(axes(config)))
    return optax.chain(optax.clip_by_global_norm(1.0), rule)


def loss(weights: dict[str, Any], config: TargetConfig, tokens: jax.Array) -> jax.Array:
    """Mean next-token cross-entropy of tokens [B, T + 1], in nats."""
    params = unflatten(config, weights)
    hidden, _, _ = target.forward(params, config, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(target.logits(params, config, hidden), tokens[:, 1:]).mean()


def windows(ids: np.ndarray, count: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """`count` random stretches of length + 1 tokens."""
    starts = rng.integers(0, len(ids) - length - 1, count)
    return np.stack([ids[s : s + length + 1] for s in starts])


def check_pretrain(options: Pretrain) -> None:
    """Refuse what cannot be trained, and a folder that already holds a model."""
    least = dict.fromkeys(("hidden_size", "layers", "heads", "kv_heads", "head_dim", "intermediate_size"), 1)
    least |= dict.fromkeys(("steps", "batch", "length"), 1) | {"vocab_size": 256 + 4}  # bytes and special tokens
    for name, low in least.items():
        check_count(name, getattr(options, name), low)
    check_count("seed", options.seed, least=0, limit=2**32)
    for name in ("muon_lr", "adam_lr"):
        check_real(name, getattr(options, name), "above 0")
    for name in ("weight_decay", "warmup", "decay"):
        check_real(name, getattr(options, name), "0 or more")
    if options.warmup + options.decay > 1:
        raise UsageError("--warmup and --decay are shares of the steps, of at most 1 together.")
    if options.tokenizer is not None and options.vocab_size != Pretrain.vocab_size:
        raise UsageError("--tokenizer has a vocabulary of its own: leave out --vocab-size.")
    check_output(options.out, sources=local_sources(options.text, options.tokenizer))


def run_pretrain(options: Pretrain) -> None:
    """Pre-train a target and write it.

    Raises:
        UsageError: a value makes no sense.
        DominoError: the text is too short, the loss diverges, or the folder holds a model or can't be written.
    """
    check_pretrain(options)
    with lock_folder(options.out):  # a folder that can't be written is known before the work is done
        _pretrain(options)


def _pretrain(options: Pretrain) -> None:
    enable_compile_cache()
    texts, held_out = read_texts(options.text, options.files)
    if options.tokenizer is None:
        tokenizer, vocab_size = train_tokenizer(texts, options.vocab_size), options.vocab_size
    else:
        tokenizer = other_tokenizer(options.tokenizer)
        vocab_size = max(len(tokenizer), _stated_vocab_size(options.tokenizer))
    ids, held_ids = encode_texts(tokenizer, texts), encode_texts(tokenizer, held_out)
    config = TargetConfig(
        vocab_size=vocab_size,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.head_dim,
        intermediate_size=options.intermediate_size,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=options.length,
        tie_word_embeddings=True,
    )
    weights = flatten(init_weights(config, jax.random.key(options.seed)))
    count = sum(w.size for w in weights.values())
    print(
        f"{len(texts)} files, {len(ids):,} tokens to train on, {len(held_ids):,} held out; "
        f"{count / 1e6:.1f}M parameters",
        flush=True,
    )
    rule = pretrain_optimizer(config, options)
    state = rule.init(weights)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(weights, state, tokens):
        value, gradient = jax.value_and_grad(loss)(weights, config, tokens)
        updates, state = rule.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, value

    evaluate = jax.jit(partial(loss, config=config))
    if min(len(ids), len(held_ids)) < options.length + 2:
        raise DominoError(f"the text has fewer than --length {options.length} tokens to train on or to hold out.")
    rng = np.random.default_rng(options.seed)
    held = windows(held_ids, 4 * options.batch, options.length, np.random.default_rng(1))

    def held_out_loss() -> float:
        parts = held.reshape(4, options.batch, -1)
        return float(np.mean([evaluate(weights, tokens=jnp.asarray(part)) for part in parts]))

    history = []
    begun = time.perf_counter()
    done = 0
    with stop_signals() as stopping:
        while done < options.steps and not stopping.is_set():
            tokens = windows(ids, options.batch, options.length, rng)
            weights, state, value = step(weights, state, jnp.asarray(tokens))
            done += 1
            if done % 20 == 0 or done == options.steps:
                train_loss = float(value)
                if not math.isfinite(train_loss):
                    raise DominoError(f"the loss is {train_loss} at step {done}; lower --muon-lr and --adam-lr.")
                elapsed = time.perf_counter() - begun
                row = {"step": done, "loss": train_loss, "tokens_per_second": done * tokens[:, 1:].size / elapsed}
                if done % 200 == 0 or done == options.steps:
                    row["held_out_loss"] = held_out_loss()
                history.append(row)
                left = elapsed / done * (options.steps - done)
                shown = "  ".join(f"{k} {v:,.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
                print(f"{shown}  {left / 60:.1f} min left", flush=True)
    raw = config.to_hf() | {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
    save_hf(options.out, unflatten(config, weights), config, raw, jnp.bfloat16)
    tokenizer.save_pretrained(options.out)
    write_json(options.out / "generation_config.json", {"eos_token_id": tokenizer.eos_token_id, "do_sample": False})
    curves.write_metrics(history, options.out / "pretrain.jsonl")
    print(f"wrote {options.out}")
    if done < options.steps:
        print(f"interrupted after {done} steps: the model is what they made of it", file=sys.stderr)
        raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None, prog: str = "python -m train pretrain") -> int:
    """Run the command line; returns the exit code."""
    return run_command(Pretrain, run_pretrain, argv, prog=prog)
