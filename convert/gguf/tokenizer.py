"""A tokenizer's files from the metadata of a GGUF file: its tokens and merges, and how text is split before."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from domino_jax.errors import DominoError
from domino_jax.fields import BOOLEAN, INTEGERS, TEXT, TEXTS, Fields, as_json, integer

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# By tokenizer.ggml.pre: the expression whose matches are words; None for GPT-2's own, with each digit apart.
SPLITS: Final[dict[str, str | None]] = {
    "qwen2": rf"{_WORDS}|\p{{N}}{_REST}",
    "deepseek-r1-qwen": rf"{_WORDS}|\p{{N}}{_REST}",
    "llama-bpe": rf"{_WORDS}|\p{{N}}{{1,3}}{_REST}",
    "llama3": rf"{_WORDS}|\p{{N}}{{1,3}}{_REST}",
    "smollm": None,
}
LLAMA3: Final = ("llama-bpe", "llama3")  # a word that is a token is that token, and text begins with one
# Ends of an answer that a file need not name, if they are control tokens of it; as llama.cpp takes them.
ENDS: Final = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
NAMED: Final = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class Vocabulary:
    """What a GGUF file says of its tokens.

    Raises:
        DominoError: it is of another kind than expected, or makes no sense.
    """

    def __init__(self, where: str, metadata: Mapping[str, Any]):
        said = {name.removeprefix(PREFIX): x for name, x in metadata.items() if name.startswith(PREFIX)}
        self.where, self.fields = where, Fields(where, (PREFIX, said))
        self.model = self.fields.get("model", TEXT)
        self.tokens: Sequence[str] = self.fields.get("tokens", TEXTS)
        self.types: Sequence[int] = self.fields.get("token_type", INTEGERS, (NORMAL,) * len(self.tokens))
        self.template: str | None = Fields(where, ("", metadata)).get("tokenizer.chat_template", TEXT, None)
        if len(self.types) != len(self.tokens) or len(set(self.tokens)) != len(self.tokens):
            raise DominoError(f"{where} has {len(self.tokens)} tokens, which must differ, of {len(self.types)} types.")
        self.special = {token for token, kind in zip(self.tokens, self.types, strict=True) if kind == CONTROL}

    def token(self, name: str) -> str | None:
        """The token that the file calls by this name, such as "eos"."""
        number = self.fields.get(f"{name}_token_id", integer(), None)
        if number is None:
            return None
        if number >= len(self.tokens):
            raise DominoError(f"{self.where} has {PREFIX}{name}_token_id {number}, of {len(self.tokens)} tokens.")
        return self.tokens[number]

    def ends(self) -> list[int]:
        """The tokens that end an answer, the file's own first."""
        named = [token for name in ("eos", "eot", "eom") if (token := self.token(name)) is not None]
        known = [token for token in ENDS if token in self.special]
        return [self.tokens.index(token) for token in dict.fromkeys([*named, *known])]

    def files(self, positions: int) -> dict[str, str]:
        """The files of a tokenizer by name.

        Args:
            positions: of the model.
        """
        return {"tokenizer.json": self._tokenizer(), "tokenizer_config.json": json.dumps(self._config(positions))}

    def _config(self, positions: int) -> dict[str, Any]:
        named = {ours: token for ours, name in NAMED.items() if (token := self.token(name)) is not None}
        template = {} if self.template is None else {"chat_template": self.template}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": positions,
            **named,
            **template,
        }

    def _tokenizer(self) -> str:
        from tokenizers import AddedToken, Tokenizer, processors

        byte_level = self.model == "gpt2"
        if not byte_level and self.model != "llama":
            raise DominoError(
                f"{self.where} has {PREFIX}model {as_json(self.model)}; gpt2 (byte-level BPE) and llama "
                "(SentencePiece) are supported."
            )
        made: Tokenizer = self._byte_level() if byte_level else self._sentencepiece()
        added = [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
        made.add_tokens(added)
        if made.get_vocab_size() > len(self.tokens):
            raise DominoError(f"{self.where} has special tokens that are none of its {len(self.tokens)} tokens.")
        before, after = (self._around(name, default) for name, default in (("bos", self._begins()), ("eos", False)))
        if before or after:
            ids = {token: self.tokens.index(token) for token in (*before, *after)}
            made.post_processor = processors.Sequence(
                [
                    *([made.post_processor] if made.post_processor is not None else []),
                    processors.TemplateProcessing(
                        single=[*before, "$A", *after],
                        pair=[*before, "$A", "$B", *after],
                        special_tokens=list(ids.items()),
                    ),
                ]
            )
        return made.to_str()

    def _begins(self) -> bool:
        """Whether text begins with a token, where the file does not say."""
        return self.model == "llama" or self.fields.get("pre", TEXT, "") in LLAMA3

    def _around(self, name: str, default: bool) -> list[str]:
        token = self.token(name)
        return [token] if token is not None and self.fields.get(f"add_{name}_token", BOOLEAN, default) else []

    def _ids(self) -> dict[str, int]:
        return {
            token: number
            for number, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind != UNUSED
        }

    def _byte_level(self) -> Any:
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

        pre, merges = self.fields.get("pre", TEXT, None), self.fields.get("merges", TEXTS)
        if pre not in SPLITS:
            raise DominoError(f"{self.where} has {PREFIX}pre {as_json(pre)}; {', '.join(SPLITS)} are supported.")
        ids, pairs = self._ids(), [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
        wrong = next((pair for pair in pairs if not {*pair, "".join(pair)} <= ids.keys()), None)
        if wrong is not None:
            raise DominoError(
                f"{self.where} has the merge {' '.join(wrong).strip()!r}, expected two of its tokens that make a third."
            )
        made = Tokenizer(models.BPE(vocab=ids, merges=pairs, ignore_merges=pre in LLAMA3))
        if pre.endswith("qwen2"):
            made.normalizer = normalizers.NFC()
        split = SPLITS[pre]
        first = pre_tokenizers.Digits(True) if split is None else pre_tokenizers.Split(Regex(split), "isolated")
        second = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
        made.pre_tokenizer = pre_tokenizers.Sequence([first, second])
        made.decoder, made.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
        return made

    def _sentencepiece(self) -> Any:
        """Byte-pair merges that make of text what SentencePiece's scores do."""
        from tokenizers import Tokenizer, decoders, models, normalizers

        ids, scores = self._ids(), self.fields.given("scores")
        if not scores or not isinstance(scores[0][1], list) or len(scores[0][1]) != len(self.tokens):
            raise DominoError(f"{self.where} has no list {PREFIX}scores of its {len(self.tokens)} tokens.")
        by_token = dict(zip(self.tokens, scores[0][1], strict=True))
        merges = [
            (by_token[token], token[:cut], token[cut:])
            for token in ids
            for cut in range(1, len(token))
            if token[:cut] in ids and token[cut:] in ids
        ]
        merges.sort(key=lambda merge: (-merge[0], ids[merge[1]], ids[merge[2]]))
        pairs = [(left, right) for _, left, right in merges]
        unknown = self.token("unknown")
        model = models.BPE(vocab=ids, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
        made = Tokenizer(model)
        prefixed = self.fields.get("add_space_prefix", BOOLEAN, True)
        spaces = normalizers.Replace(" ", SPACE)
        made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefixed else spaces
        strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
        made.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        return made
