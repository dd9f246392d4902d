"""What a model's folder holds, and whether it is sound: `python -m convert --check DIR`."""

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from convert import hf, orbax
from convert.draft_configs import least_depth
from convert.drafters import DUAL_VIEW, form_of
from convert.dual_view import holds_both
from convert.folders import GGUF, HF, folder_format, load_weights, read_config
from convert.packagings import packaging_of
from convert.quantized import QUANTIZATION
from convert.tensors import (
    FLOATS,
    account_tensors,
    compare_derived,
    is_gguf,
    open_tensors,
    some,
    tensor_files,
    unread_files,
)
from convert.tokenizer import end_tokens, load_tokenizer
from domino_jax import target
from domino_jax.config import CustomDraftConfig, DecoderConfig, DraftConfig, TargetConfig, Yarn, check_pair
from domino_jax.drafters import block
from domino_jax.drafters.base import View
from domino_jax.drafters.heads import head_of
from domino_jax.drafters.heads.choosing import choose_token
from domino_jax.drafters.heads.selector import SelectorHead
from domino_jax.errors import DominoError, first_line

TEXT = "def greet(name):\n    return 'Hello, ' + name\n\n\nThe capital of France is"
ALIGNMENTS = {
    True: "anchored: the anchor's own row makes the first proposal",
    False: "fill-in: the row after the anchor's makes the first proposal",
}
BLOCKS_RANKED = 48  # of that text, whose proposals are looked up among the base logits
CANDIDATES, ENOUGH_CANDIDATES = (64, 256), 0.98  # and the share of proposals that the fewest should hold
ANCHORS = 192  # tokens of a text after which a drafter's first proposal is compared with the target's own token
LARGEST_DIFFERENCE = 1e-3  # of the largest logit, in float32: two orders above what rounding gives


@dataclass
class FolderReport:
    """Lines for people, and what is wrong."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def say(self, what: str, value: str) -> None:
        self.lines.append((what, value))


def check_folder(
    folder: Path,
    target_folder: Path | None = None,
    progress: Callable[..., None] | None = None,
    report: FolderReport | None = None,
) -> FolderReport:
    """Read a folder, ours or anyone's, and report what it is and what is wrong with it.

    Args:
        folder: a target or drafter in Hugging Face's or Orbax's form, a training run, or one made of a GGUF file.
        target_folder: the target of a drafter, to see whether they fit.
        progress: called with what is being read, bytes done and bytes in all.
        report: to write into, for what is known when the check is broken off; a new one when None.

    Raises:
        DominoError: there is no such folder, its config.json can't be read or is not of a supported model, or it holds
            no weights.
    """
    if not folder.is_dir():
        raise DominoError(f"{folder} is not a folder.")
    other = read_config(target_folder) if target_folder else None
    file = folder / "config.json"
    raw, depth = hf.read_json(file), other.num_hidden_layers if other else None
    config = hf.parse_config(raw, depth or least_depth(raw), file)
    if other and (isinstance(config, TargetConfig) or not isinstance(other, TargetConfig)):
        raise DominoError("--target takes the target's folder, and --check then its drafter's.")
    report, of = FolderReport() if report is None else report, folder_format(folder)
    report.say("what", describe(config))
    report.say("form", of)
    count = parameters(config)
    report.say("parameters", f"{count:,} ({count / 1e9:.2f} B)")
    stored = of in (HF, GGUF)
    tensors = _stored(folder, config, report, target_folder) if stored else _orbax(folder, config, report)
    if holds_both(raw, folder):
        tensors += _second_view(folder, raw, config, report)
    _values(tensors, report, progress and partial(progress, "reading values"))
    if not isinstance(config, TargetConfig):
        if isinstance(config, DraftConfig):
            report.say("packaging", packaging_of(raw))
            report.say("alignment", ALIGNMENTS[config.shift_label])
        report.warnings += form_of(raw).warnings(raw, depth, file)
        report.say("target", _fit(config, other, report) if other else "not given: --target DIR says if they fit")
        if (
            target_folder
            and isinstance(other, TargetConfig)
            and isinstance(config, DraftConfig)
            and not report.problems
        ):
            for what, said in _measured(CheckedPair(folder, config, target_folder, other), report):
                report.say(what, said)
        return report
    tokenizer = None
    try:
        tokenizer = load_tokenizer(folder)
        report.warnings += end_tokens(folder, raw, tokenizer)[1]
        report.say("tokenizer", _tokenizer(tokenizer, config, report))
    except DominoError as error:
        report.problems.append(str(error).rstrip("."))
    if not report.problems:
        quantized = raw.get(QUANTIZATION) is not None
        # It needs a package for each form, and some of them round activations too.
        found = (
            "not compared: the weights are quantized" if quantized else _parity(folder, of, config, tokenizer, report)
        )
        report.say("transformers", found)
    return report


def describe(config: TargetConfig | DraftConfig | CustomDraftConfig) -> str:
    """A model in a line."""
    if isinstance(config, CustomDraftConfig):
        return config.describe()
    c = config
    shape = (
        f"{c.num_hidden_layers} layers of width {c.hidden_size}, {c.num_attention_heads} query and "
        f"{c.num_key_value_heads} KV heads of {c.head_dim}, MLP {c.intermediate_size}, vocabulary {c.vocab_size}"
    )
    if c.attention_bias:
        shape += ", attention biases"
    if c.rope_scaling:
        kind = "YaRN" if isinstance(c.rope_scaling, Yarn) else "Llama 3's RoPE"
        shape += f", {kind} to {c.positions} positions"
    if isinstance(c, TargetConfig):
        if c.moe:
            shape += f", {c.moe.num_experts} experts of width {c.moe.moe_intermediate_size}, "
            shape += f"{c.moe.num_experts_per_tok} a token"
        family = c.family.partition("_")[0].capitalize()
        return f"{family} target: {shape}, {'tied' if c.tie_word_embeddings else 'untied'} embeddings"
    head, sizes = head_of(c).name, head_of(c).describe()
    if c.convolution:
        sizes = f"{sizes}, {c.convolution.describe()}" if sizes else c.convolution.describe()
    if c.draft_vocab_size is not None:
        shape += f" of which it proposes {c.draft_vocab_size}"
    if c.causal:
        head = f"{head} with causal blocks" if c.head else "JetSpec"
    return (
        f"{head} drafter: {shape}, block {c.block_size} with {c.num_proposals} proposals, "
        f"reading layers {', '.join(map(str, c.target_layer_ids))}" + (f", {sizes}" if sizes else "")
    )


def parameters(config: DecoderConfig) -> int:
    """How many parameters a model of this config has."""
    return sum(prod(entry.shape) for entry in hf.entries(config))


Tensor = tuple[str, int, Callable[[], Any]]  # name, bytes, and its values


def _stored(folder: Path, config: DecoderConfig, report: FolderReport, target_folder: Path | None) -> list[Tensor]:
    files = tensor_files(folder)
    size = sum(file.stat().st_size for file in files)
    report.say("files", f"{len(files)} {'GGUF' if is_gguf(files) else 'safetensors'}, {size / 1e9:.2f} GB")
    unread = unread_files(folder)
    if unread:
        report.warnings.append(f"not read, since {files[0].name} or the index comes first: {some(unread)}.")
    try:
        tensors = open_tensors(folder)
    except DominoError as error:
        report.problems.append(str(error).rstrip("."))
        return []
    account = account_tensors(config, tensors.stored)
    report.say("dtype", _dtypes(Counter(stored.form for stored in account.stored.values())))
    report.problems += account.problems or compare_derived(config, account, tensors, target_folder)
    expected = len({name for entry in hf.entries(config) for name in entry.hf_names})
    left_out = f"; left out, as they should be: {some(sorted(account.derived))}" if account.derived else ""
    report.say("tensors", f"{len(account.stored)} found, {expected} expected{left_out}")
    known = {name: stored for name, stored in account.stored.items() if stored.dtype in FLOATS}
    return [(name, stored.bytes, partial(tensors.read, stored)) for name, stored in known.items()]


def _second_view(folder: Path, raw: dict[str, Any], config: DecoderConfig, report: FolderReport) -> list[Tensor]:
    """The second view that lies beside the target."""
    view, warnings = DUAL_VIEW.read(raw, None, folder / "config.json")
    report.warnings += warnings
    assert isinstance(config, TargetConfig)
    report.warnings += check_pair(config, view)
    report.say("second view", f"{describe(view)}, {parameters(view):,} parameters")
    files = open_tensors(folder)
    account = account_tensors(view, files.stored)
    report.problems += account.problems
    return [(name, stored.bytes, partial(files.read, stored)) for name, stored in account.stored.items()]


def _orbax(folder: Path, config: DecoderConfig, report: FolderReport) -> list[Tensor]:
    try:
        saved = orbax.Saved(folder, config)
    except DominoError as error:
        report.problems.append(str(error))
        return []
    report.say("dtype", _dtypes(Counter(str(dtype) for dtype in saved.dtypes.values())))
    report.say("tensors", f"{len(saved.shapes)} found, as expected")
    return [(path, saved.bytes(path), lambda p=path: saved.read([p])[p]) for path in saved.shapes]


def _dtypes(counts: Counter[str]) -> str:
    return ", ".join(f"{name} ({count} tensors)" for name, count in counts.most_common())


@jax.jit
def _not_finite(x: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(x), dtype=jnp.int32)


def _values(tensors: list[Tensor], report: FolderReport, progress: Callable[[int, int], None] | None) -> None:
    """Read every value once."""
    total, done, bad = sum(size for _, size, _ in tensors), 0, []
    for name, size, read in tensors:
        try:
            value = jnp.asarray(read())
        except DominoError as error:  # what was found so far is still worth reading
            report.problems += [*bad, str(error).rstrip(".")]
            return
        count = int(_not_finite(value))
        if count:
            bad.append(f"{name} has {count} non-finite values of {value.size}")
        done += size
        if progress:
            progress(done, total)
    report.problems += bad
    if tensors and not bad:
        report.say("values", "all finite")


def _tokenizer(tokenizer: Any, config: TargetConfig, report: FolderReport) -> str:
    if tokenizer is None:
        report.warnings.append("the folder has no tokenizer: prompts have to be given as ids.")
        return "none"
    if len(tokenizer) > config.vocab_size:
        report.problems.append(f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}")
    template = "with a chat template" if getattr(tokenizer, "chat_template", None) else "without a chat template"
    return f"{len(tokenizer)} tokens, {template}"


def _fit(config: DraftConfig | CustomDraftConfig, other: DecoderConfig, report: FolderReport) -> str:
    """Whether a drafter fits its target."""
    assert isinstance(other, TargetConfig)
    try:
        report.warnings += check_pair(other, config)
    except DominoError as error:
        report.problems.append(str(error).rstrip("."))
        return "does not fit"
    if isinstance(config, CustomDraftConfig):
        return "fits"
    return f"fits: width, vocabulary, {other.num_hidden_layers} layers, target layers, mask token"


def _parity(folder: Path, of: str, config: TargetConfig, tokenizer: Any, report: FolderReport) -> str:
    """The largest difference of logits from transformers' own model, in float32, on a short text."""
    if importlib.util.find_spec("torch") is None:
        return "not compared: PyTorch is not installed"
    if of not in (HF, GGUF):
        return "not compared: it reads Hugging Face folders and GGUF files only"
    # One after the other, each with its weights and one tensor on the way.
    needed, free = int(4.5 * parameters(config)), _free_memory()
    if free is not None and needed > free:
        return f"not compared: in float32 it takes {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free"
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    ids = tokenizer(TEXT)["input_ids"] if tokenizer else [i % config.vocab_size for i in range(1, 33)]
    ids = ids[: config.max_position_embeddings]
    try:
        how = {"gguf_file": tensor_files(folder)[0].name} if of == GGUF else {}
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, **how
        ).eval()
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).logits[0].numpy()
    except Exception as error:  # its errors are of many kinds
        return f"not compared: it can't run this model ({first_line(error)})"
    del model
    try:
        params = load_weights(folder, config, jnp.float32)
    except DominoError as error:  # it was whole a moment ago
        report.problems.append(str(error).rstrip("."))
        return "not compared"
    with jax.default_matmul_precision("highest"):
        hidden, _, _ = target.forward(params, config, jnp.array([ids]))
        ours = np.asarray(target.logits(params, config, hidden)[0])
    difference, largest = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    if difference > LARGEST_DIFFERENCE * largest:
        report.problems.append(
            f"logits differ from transformers' by up to {difference:.2g}, the largest is {largest:.2g}"
        )
    return f"logits of {len(ids)} tokens differ by at most {difference:.1e}, the largest is {largest:.1f} (float32)"


class CheckedPair(NamedTuple):
    """A drafter and its target."""

    folder: Path
    config: DraftConfig
    target_folder: Path
    target: TargetConfig


def _measured(pair: CheckedPair, report: FolderReport) -> Iterator[tuple[str, str]]:
    """What the drafter says of a text: whether its alignment is right, and what its head loses with few candidates."""
    config, other = pair.config, pair.target
    needed, free = int(4.5 * (parameters(config) + parameters(other))), _free_memory()
    if free is not None and needed > free:
        said = f"not measured: in float32 it takes {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free"
        yield "agreement", said
        return
    if config.block_size < 2:
        yield "agreement", "not measured: a block has one row"
        return
    tokenizer = load_tokenizer(pair.target_folder)
    text = Path(__file__).read_text(encoding="utf-8")
    ids = tokenizer(text)["input_ids"] if tokenizer else [i * 7 % other.vocab_size for i in range(ANCHORS)]
    ids = ids[: min(ANCHORS, other.max_position_embeddings - config.block_size)]
    target_weights = load_weights(pair.target_folder, other, jnp.float32)
    weights = load_weights(pair.folder, config, jnp.float32, target=pair.target_folder)
    with jax.default_matmul_precision("highest"):
        text = _read_text(target_weights, other, config, jnp.array([ids]))
        yield "agreement", _agreement(target_weights, weights, pair, text, report)
        few = isinstance(config.head, SelectorHead)  # it scores but a few itself
        if config.head and not few and len(ids) > 2 * config.block_size:
            yield "candidates", _candidates(target_weights, weights, pair, text, report)


class ReadText(NamedTuple):
    """A text that a target has run."""

    ids: jax.Array  # [1, S] int32
    hidden: jax.Array  # [1, S, D], after the final norm
    features: jax.Array  # [1, S, LD], of the layers that the drafter reads


@partial(jax.jit, static_argnums=(1, 2))
def _read_text(target_weights: Any, other: TargetConfig, config: DraftConfig, ids: jax.Array) -> ReadText:
    hidden, features, _ = target.forward(target_weights, other, ids, target_layer_ids=config.target_layer_ids)
    return ReadText(ids, hidden, features)


def _agreement(target_weights: Any, weights: Any, pair: CheckedPair, text: ReadText, report: FolderReport) -> str:
    """How often the row that makes the first proposal says what the target does, and whether the other row does better.

    A drafter that is read with the wrong alignment runs without an error, and next to nothing of it is accepted.
    """
    config, other = pair.config, pair.target
    found = np.asarray(_first_tokens(target_weights, weights, other, config, text))
    own, rest = (int((found[2] == found[row]).sum()) for row in ((0, 1) if config.shift_label else (1, 0)))
    count = text.ids.shape[1]
    if rest - own > max(0.05 * count, 3 * count**0.5 / 2):
        report.warnings.append(
            f"after {rest} of {count} tokens the row that makes no first proposal has the target's next token, the one "
            f"that makes it after {own}: the drafter was probably trained with the other alignment; set shift_label to "
            f"{str(not config.shift_label).lower()} with --hf-overrides."
        )
    return f"the first proposal is the target's token after {own} of {count}; the other alignment's after {rest}"


def _candidates(target_weights: Any, weights: Any, pair: CheckedPair, text: ReadText, report: FolderReport) -> str:
    """How often the token that the head chooses is among the likeliest of the base logits: where it is not, it is lost.

    A head scores only some of these where `--head-candidates` or `--tree-candidates` say so.
    """
    last = text.ids.shape[1] - pair.config.block_size - 1
    first = jnp.array([np.linspace(0, last, BLOCKS_RANKED).astype(np.int32)])
    ranks = np.asarray(_ranks(target_weights, weights, pair.target, pair.config, text, first))
    few = [count for count in CANDIDATES if count < (pair.config.draft_vocab_size or pair.target.vocab_size)]
    shares = [float((ranks < count).mean()) for count in few]
    if shares and shares[0] < ENOUGH_CANDIDATES:
        report.warnings.append(
            f"with {few[0]} candidates {1 - shares[0]:.0%} of what the head chooses can't be proposed: leave "
            "--head-candidates out, and give --tree-candidates all."
        )
    among = ", ".join(f"the {count} likeliest in {share:.1%}" for count, share in zip(few, shares, strict=True))
    return f"the head's choice is, of the base logits, among {among}" if few else "all of a small vocabulary"


@partial(jax.jit, static_argnums=(2, 3))
def _ranks(
    target_weights: Any, weights: Any, other: TargetConfig, config: DraftConfig, text: ReadText, first: jax.Array
) -> jax.Array:
    """How many base logits are above that of the head's choice, with the text before it: [A, J], blocks at `first`."""
    places = first[0, :, None] + jnp.arange(config.num_proposals, dtype=jnp.int32)
    before = text.ids[0][places][None]  # [1, A, J]
    x = block.block_inputs(target_weights.embed, config, before[:, :, 0])
    z = block.proposing(config, block.training_blocks(weights, config, x, first, text.features))
    correction = head_of(config).teacher_forced(weights.head, z, before, target_weights.embed)
    assert correction is not None

    none: Any = None
    view = View(target_weights, other, none, "xla", none, none, none, none)

    def ranks(one: tuple[jax.Array, jax.Array]) -> jax.Array:  # of a block at a time: [J, V] of each is large enough
        states, rank = one
        base = block.base_logits(weights, config, view, states[None])[0]
        chosen = jnp.argmax(base + rank @ correction.output.T, axis=-1)
        return jnp.sum(base > jnp.take_along_axis(base, chosen[:, None], axis=-1), axis=-1)

    return jax.lax.map(ranks, (z[0], correction.rank[0]))


@partial(jax.jit, static_argnums=(2, 3))
def _first_tokens(
    target_weights: Any, weights: Any, other: TargetConfig, config: DraftConfig, text: ReadText
) -> jax.Array:
    """The likeliest tokens by rows 0 and 1 of a block after each token of a text, and by the target: [3, S]."""
    ids = text.ids
    anchors = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    x = block.block_inputs(target_weights.embed, config, ids)
    z = block.training_blocks(weights, config, x, anchors, text.features)[:, :, :2]  # [1, S, 2, D]
    none: Any = None  # what a head does not look at
    view = View(target_weights, other, none, "xla", none, ids[0], none, none, block.draft_names(weights))
    found = []
    for row in range(2):  # each token's block is a row of its own
        states = z[0, :, row : row + 1]
        base = block.base_logits(weights, config, view, states)
        paths = head_of(config).paths(weights.head, states, base, view)
        logits, names = paths.logits(paths.start(), 0)
        found.append(choose_token(logits[:, 0], none, 0, none, other.vocab_size, names=names)[0])
    theirs = target.logits(target_weights, other, text.hidden)
    return jnp.stack([*found, theirs[0].argmax(axis=-1)])


def _free_memory() -> int | None:
    """Bytes of memory that can be had, None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
