"""A model's tokenizer and chat template: text and conversations to ids, and ids to text."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.companions import TOKENIZER_FILES, text_files
from convert.configs import TOKEN_IDS
from convert.fields import read_json
from convert.messages import ROLES, LeftOut, valid_unicode
from domino_jax.errors import DominoError, first_line
from domino_jax.fields import Fields

THOUGHTS_START, THOUGHTS_END = "<think>", "</think>"  # as Qwen3 writes them


class RefusedByTemplate(LeftOut):
    """A chat template does not render these messages; `why` is its own word."""

    def __init__(self, why: str):
        super().__init__(f"are refused by the chat template ({why})", f"the target's chat template refuses it: {why}")
        self.why = why


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, None if it has no tokenizer files.

    Nothing is fetched. Of the folder's code only the chat template will be run, in transformers' sandbox.
    """
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    # Without PyTorch, which only its models would need, transformers gives advice on standard error.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # takes seconds to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its errors are of many kinds, and all mean the same here
        for file in text_files(folder):
            if file.suffix == ".json":
                read_json(file)  # a file that is no JSON is named
        raise DominoError(f"the tokenizer in {folder} can't be loaded: {first_line(error)}.") from None
    older = folder / "chat_template.json"  # which transformers wrote once, and reads for processors alone
    if not has_template(tokenizer) and older.exists():
        template = read_json(older).get("chat_template")
        if not isinstance(template, str):
            raise DominoError(f"{older} has no chat_template that is text.")
        tokenizer.chat_template = template
    return tokenizer


def check_same_tokens(tokenizer: Any, other: Any, folder: Path) -> None:
    """Refuse an assistant whose tokens stand for other text than the target's.

    Args:
        tokenizer, other: the target's and the assistant's; where one of them is None nothing is known.
        folder: the assistant's.

    Raises:
        DominoError: a token differs.
    """
    if tokenizer is None or other is None:
        return
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    different = next((token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)), None)
    if different is not None:
        raise DominoError(
            f"{folder} can't be an assistant: {different!r} is token {theirs.get(different)} of its tokenizer and "
            f"{ours.get(different)} of the target's; they must have the same tokenizer."
        )


def end_tokens(folder: Path, raw: Mapping[str, Any], tokenizer: Any) -> tuple[tuple[int, ...], list[str]]:
    """The ids that end a sequence, and warnings.

    They are those of generation_config.json, else of the config.json `raw`, else the tokenizer's own end token.

    Raises:
        DominoError: they are no ids, or the file is damaged.
    """
    generation = folder / "generation_config.json"
    first = read_json(generation) if generation.exists() else {}
    for file, fields in ((generation, first), (folder / "config.json", raw)):
        ids = Fields(str(file), ("", fields), null_is_absent=True).get("eos_token_id", TOKEN_IDS, None)
        if ids is not None:
            return (ids if isinstance(ids, tuple) else (ids,)), []
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None:
        return (), []
    where = f"{folder} has no eos_token_id in generation_config.json or config.json"
    return (end,), [f"{where}: the tokenizer's end token, {tokenizer.eos_token}, is used."]


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The tokens that `decode` leaves out, and their ids: those of tokenizer.json, and those that the config names."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    named = {text: tokenizer.convert_tokens_to_ids(text) for text in tokenizer.all_special_tokens}
    return named | {token.content: number for number, token in added.items() if token.special}


def encode(tokenizer: Any, text: str, *, special: bool = True, split_special: bool = False) -> list[int]:
    """The ids of text; by default as a raw prompt, with the tokens that the tokenizer puts around one (a BOS, say).

    Args:
        special: add those tokens. Text that continues other text, and a rendered template, goes without them.
        split_special: text that spells a special token is ordinary text.

    Raises:
        DominoError: there is no tokenizer, or it is not valid Unicode.
    """
    if tokenizer is None:
        raise DominoError("this is text, and the model's folder has no tokenizer.")
    try:
        valid_unicode(text)
    except ValueError as error:
        raise DominoError(f"the prompt can't be encoded: {error}.") from None
    more = {"split_special_tokens": True} if split_special else {}
    return list(tokenizer(text, add_special_tokens=special, **more)["input_ids"])


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of tokens, without special ones."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def has_template(tokenizer: Any) -> bool:
    """Whether conversations can be rendered; a base model has no template and takes raw text."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    ask: bool = True,
    thinking: bool = False,
    tools: list[Any] | None = None,
) -> str:
    """A conversation in the model's template, which writes the special tokens itself.

    Args:
        messages: as `convert.messages.parse_messages` gives them; their `weight` is for training and is not rendered.
        ask: with the generation prompt, up to where the assistant answers.
        thinking: off by default (templates that know no `enable_thinking` ignore it): the drafters are trained so.

    Raises:
        DominoError: there is no template.
        RefusedByTemplate: the template refuses the messages, or leaves out what one of them says.
    """
    if not has_template(tokenizer):
        raise DominoError("this model has no chat template, so it takes raw prompts and no messages.")
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]

    def apply(given: list[dict[str, Any]]) -> str:
        return tokenizer.apply_chat_template(
            given, tools=tools, tokenize=False, add_generation_prompt=ask, enable_thinking=thinking
        )

    try:
        rendered = apply(plain)
    except Exception as error:  # jinja's, and whatever the template itself raises
        raise RefusedByTemplate(first_line(error)) from None
    hidden = _hidden(plain, rendered, apply)
    if hidden is not None:
        role = hidden["role"]
        known = "" if role in ROLES else f"; known roles are {', '.join(ROLES)}"
        raise RefusedByTemplate(f"it leaves out a message of the role {role!r}{known}")
    for name in filter(None, map(_function, tools or [])):
        if not _contains(rendered, name):
            raise RefusedByTemplate(f"it leaves out the tool {name!r}")
    return rendered


def _hidden(
    messages: list[dict[str, Any]], rendered: str, apply: Callable[[list[dict[str, Any]]], str]
) -> dict[str, Any] | None:
    """A message that the template does not show; None where it shows all.

    Each text must be found in the rendering. A short one may be found there by chance, so the same conversation is
    rendered a second time, with a mark in the place of each text.
    """
    for message in messages:
        if not _shown(message, rendered):
            return message
    marks = [f"mark{place}mark" for place in range(len(messages))]
    marked = [
        message if "tool_calls" in message and not message["content"] else message | {"content": mark}
        for message, mark in zip(messages, marks, strict=True)
    ]
    try:
        second = apply(marked)
    except Exception:  # a template that looks into the texts; what it made of the real ones has been compared
        return None
    for message, given, mark in zip(messages, marked, marks, strict=True):
        if given is not message and mark not in second:
            return message
    return None


def _shown(message: Mapping[str, Any], rendered: str) -> bool:
    """Whether a message is in the rendering: its text, of an answer without thoughts, and the names of its calls."""
    content = message["content"]
    names = map(_function, message.get("tool_calls", ())) if message["role"] == "assistant" else ()
    if not all(_contains(rendered, name) for name in names if name):
        return False
    if message["role"] == "assistant":  # as templates cut off what was thought before
        content = content.rpartition(THOUGHTS_END)[2]
    if content.strip() in rendered or (message["role"] == "tool" and _contains(rendered, content)):
        return True
    return "".join(content.split()) in "".join(rendered.split())  # templates may set other spaces and line ends


def _contains(rendered: str, text: str) -> bool:
    """Whether a text is in a rendering, as it is or as JSON writes it."""
    return text in rendered or json.dumps(text, ensure_ascii=False)[1:-1] in rendered


def _function(call: Any) -> str | None:
    """The name of the function that a tool declares, or a call calls; None where it is of another form."""
    if not isinstance(call, Mapping):
        return None
    inner = call.get("function")
    name = (inner if isinstance(inner, Mapping) else call).get("name")
    return name if isinstance(name, str) else None


def encode_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], thinking: bool = False, tools: list[Any] | None = None
) -> list[int]:
    """The ids of a conversation in the model's own template, up to where the assistant answers; see `render`.

    Raises:
        DominoError: there is no template, or it refuses the messages.
    """
    try:
        rendered = render(tokenizer, messages, thinking=thinking, tools=tools)
    except RefusedByTemplate as error:
        raise DominoError(f"the model's chat template refuses these messages: {error.why}.") from None
    return encode(tokenizer, rendered, special=False)


def final_answer(text: str) -> str:
    """An answer without the thoughts before it, which later turns are not told; empty where they were cut off.

    Qwen3's own template drops them too, but only those that came to an end.
    """
    _, end, answer = text.rpartition(THOUGHTS_END)
    if end:
        return answer.lstrip("\n")
    return "" if text.lstrip().startswith(THOUGHTS_START) else text
