"""Tiny random models in Hugging Face folders, for tests of whatever reads a folder."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from convert.hf import save_hf, write_json
from domino_jax.config import DraftConfig, HeadConfig, TargetConfig
from domino_jax.weights import init_weights

END, CHAT_START, CHAT_END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
SPECIALS = (END, CHAT_START, CHAT_END, MASK)  # ids 0 to 3; byte b is id 4 + b's place in the byte alphabet
END_ID, CHAT_START_ID, CHAT_END_ID, MASK_ID = range(4)

TARGET = TargetConfig(
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
DRAFT = DraftConfig(
    **TARGET.geometry(num_hidden_layers=1),
    block_size=4,
    mask_token_id=MASK_ID,
    target_layer_ids=(0, 1),
    num_target_layers=2,
    shift_label=True,
    head=HeadConfig(gru_hidden_dim=16, emb_dim=8, pure_draft_prefix_len=1),
)

# With weights this small every layer adds next to nothing: the target repeats its last token, and a
# drafter proposes the anchor once and then the mask token.
REPEATING = 2e-3


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
    """Write a random target; `changes` are to TARGET's fields, `eos` goes to generation_config.json."""
    config = replace(TARGET, **changes)
    save_hf(folder, init_weights(config, jax.random.key(seed), std=std), config, config.to_hf())
    if tokenizer:
        make_tokenizer(template).save_pretrained(folder)
    if eos is not None:
        write_json(folder / "generation_config.json", {"eos_token_id": eos})
    return config


def make_draft(folder: Path, seed: int = 1, std: float = 0.2, **changes: Any) -> DraftConfig:
    """Write a random drafter for `make_target`'s target; `changes` are to DRAFT's fields."""
    config = replace(DRAFT, **changes)
    save_hf(folder, init_weights(config, jax.random.key(seed), std=std), config, config.to_hf())
    return config
