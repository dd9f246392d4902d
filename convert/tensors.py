"""Which tensors a Hugging Face folder has, under the table's names, and what is wrong with them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import jax
import numpy as np

from convert.fields import read_json
from convert.gguf import gguf_files, open_gguf
from convert.names import REDUCED, entries, vocabulary_tables
from convert.quantized import MARKS, QUANTIZATION, quantized_form, with_weights
from convert.safetensors import Stored, TensorFiles
from domino_jax import layers
from domino_jax.config import DecoderConfig, DraftConfig, TargetConfig
from domino_jax.drafters.dual_view import MARK, DualViewConfig
from domino_jax.drafters.heads import has_confidence, head_of
from domino_jax.drafters.heads.selector import SelectorHead
from domino_jax.errors import DominoError
from domino_jax.weights import is_table

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
INTEGERS = {"I64", "I32", "int64", "int32"}
FLOATS = {"F32", "F16", "BF16", "float32", "float16", "bfloat16"}  # dtypes, in the words of safetensors and of NumPy
# Some older drafters nest the causal head, and those of the speculators library.
HEAD_PREFIXES = ("logit_head.", "logits_correction.")
# NVIDIA's Model-Optimizer leaves out what DSpark's tensors stand in: its names, and the others'.
MARKOV, CONFIDENCE = "markov_head.", "confidence_head."
FLAT = {
    **{f"{name}.": f"{MARKOV}{name}." for name in ("markov_w1", "markov_w2", "gate_proj", "joint_proj")},
    "confidence_proj.": f"{CONFIDENCE}proj.",
}
# What the speculators library has beside a drafter's own tensors in training, and some converters leave in a file.
VERIFIER = ("verifier_lm_head.weight", "verifier_norm.weight")
# By the first part of a tensor's name: drafters whose heads have such tensors.
TOLD_BY_NAMES = {
    "prefix_gru": "Domino",
    "embed_proj": "Domino",
    MARKOV[:-1]: "DSpark",
    "candidate_selector": SelectorHead.name,
}
MODEL_PREFIX = "model."  # of a whole language model's tensors, but for its LM head; some files lack it, some add it
EMBED, LM_HEAD = "embed_tokens.weight", "lm_head.weight"
FREQUENCIES = "rotary_emb.inv_freq"  # a buffer that older versions of transformers stored with each layer
COMPARED_ROWS = 4096  # of two matrices at a time
FEW_ROWS = 16
ALIKE = 0.9  # cosine of a matrix and the same in few bits: above 0.99 with four bits a weight


def tensor_index(folder: Path) -> dict[str, Path] | None:
    """Which file holds each tensor, by a folder's index; None where there is no index, or a single file beside it.

    Raises:
        DominoError: the index is damaged, names no tensor, or names what is no safetensors file of this folder.
    """
    file = folder / INDEX
    if (folder / SINGLE).exists() or not file.exists():  # a single file first, as transformers looks
        return None
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        found = "no weight_map" if weight_map is None else f"the weight_map {json.dumps(weight_map)[:60]}"
        raise DominoError(f"{file} has {found}, expected an object that names a file for each tensor; fetch it again.")
    for name, holder in weight_map.items():
        if not isinstance(holder, str) or PurePath(holder).name != holder or not holder.endswith(".safetensors"):
            raise DominoError(
                f"{file} places {name} in {json.dumps(holder)}, expected the name of a .safetensors file beside it."
            )
    return {name: folder / holder for name, holder in weight_map.items()}


def tensor_files(folder: Path) -> list[Path]:
    """The files of a folder's weights: the single safetensors, those that its index names, all, or else GGUF files.

    Raises:
        DominoError: there are none, one that the index names is missing, or only pickles are there.
    """
    placed = tensor_index(folder)
    if (folder / SINGLE).exists():
        files = [folder / SINGLE]
    elif placed is not None:
        files = sorted(set(placed.values()))
    else:
        files = sorted(folder.glob("*.safetensors")) or gguf_files(folder)
    if not files:
        pickles = [p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"))]
        if pickles:
            raise DominoError(
                f"{folder} holds only pickles ({pickles[0]}), which can run code when opened and are never read; "
                "save the model as safetensors."
            )
        raise DominoError(f"{folder} has no {SINGLE} and no {INDEX}.")
    for file in files:
        if file.is_symlink() and not file.exists():
            raise DominoError(f"{file} is a link to a file that is gone: fetch the model again.")
        if not file.exists():
            raise DominoError(f"{folder / INDEX} names {file.name}, which is not in the folder.")
    return files


def open_tensors(folder: Path) -> TensorFiles:
    """The tensors of a folder; each is in one file, and where there is an index in the one that it names.

    What a quantized module has instead of a weight is shown as the weight that it makes, in float32.

    Raises:
        DominoError: see `tensor_files`, `TensorFiles` and `convert.quantized`; or files and index disagree.
    """
    placed, files = tensor_index(folder), tensor_files(folder)
    tensors = open_gguf(files) if is_gguf(files) else TensorFiles(files)
    if placed is not None:
        index = folder / INDEX
        for name, stored in tensors.stored.items():
            if name not in placed:
                raise DominoError(f"{index} does not name {name}, which {stored.file.name} has.")
            if placed[name] != stored.file:
                raise DominoError(
                    f"{index} places {name} in {placed[name].name}, and it is in {stored.file.name}: one is wrong."
                )
        for name, file in placed.items():
            if name not in tensors.stored:
                raise DominoError(f"{index} places {name} in {file.name}, which has no such tensor.")
    if not is_gguf(files):
        _make_weights(folder, tensors)
    return tensors


def _make_weights(folder: Path, tensors: TensorFiles) -> None:
    """Put the weights of quantized modules in the place of what they are made of.

    Raises:
        DominoError: see `convert.quantized`; or config.json does not say that the folder is quantized.
    """
    config = folder / "config.json"
    form = quantized_form(str(config), read_json(config).get(QUANTIZATION)) if config.exists() else None
    if form is not None:
        tensors.stored = with_weights(form, tensors)
    elif marked := next((name for name in tensors.stored if name.rpartition(".")[2] in MARKS), None):
        raise DominoError(
            f"{tensors.stored[marked].file} has {marked}, which is quantized, and {config} has no {QUANTIZATION} that "
            "says how."
        )


def is_gguf(files: Sequence[Path]) -> bool:
    """Whether a model's files are GGUF's."""
    return files[0].suffix == ".gguf"


def unread_files(folder: Path) -> list[str]:
    """The names of safetensors files in a folder that are not read, because another or the index comes first."""
    read = set(tensor_files(folder))
    return sorted(file.name for file in folder.glob("*.safetensors") if file not in read)


@dataclass(frozen=True)
class Account:
    """The tensors of a model, and what is wrong with them."""

    stored: dict[str, Stored]  # of the model, by the table's names
    derived: dict[str, Stored]  # that the model has by other means; by the table's prefixes
    problems: list[str]  # every missing, unexpected, misshapen tensor, and those of other dtypes, in words


def account_tensors(config: DecoderConfig, found: Mapping[str, Stored]) -> Account:
    """What of the tensors in some files belongs to a model of this config.

    Older names become today's. Some files lack the prefix "model." or add it. Left out are a tied model's LM head, the
    frequencies of RoPE, and a drafter's copies of its target's embeddings and LM head: `compare_derived` compares them.
    """
    wanted = {name: entry.hf_shape for entry in entries(config) for name in entry.hf_names}
    named: dict[str, Stored] = {}
    for name, stored in _prefixed(config, found):
        if name in named:
            return Account({}, {}, [f"{named[name].name} and {stored.name} are one tensor by two names"])
        named[name] = stored
    named = {name: stored for name, stored in named.items() if not _is_spare(config, name)}
    derived = {name: stored for name, stored in named.items() if name not in wanted and _is_derived(config, name)}
    named = {name: stored for name, stored in named.items() if name not in derived}
    if named and not named.keys() & wanted.keys():
        first = next(iter(named.values()))
        problem = (
            f"none of its {len(named)} tensors has a name of this model's: found {first.name}, expected names like"
        )
        return Account(named, derived, [f"{problem} {min(wanted)}"])
    other = _other_head(config, named.keys() - wanted.keys())
    shapes = {name: (stored.shape, stored.dtype) for name, stored in named.items()}
    miscounted = _read_layers(config, named)
    if miscounted:
        del wanted["fc.weight"], shapes["fc.weight"]
    return Account(named, derived, other + miscounted + tensor_differences(wanted, shapes))


def _prefixed(config: DecoderConfig, found: Mapping[str, Stored]) -> Iterator[tuple[str, Stored]]:
    """The tensors under the table's names."""
    bare = isinstance(config, TargetConfig) and EMBED in found and MODEL_PREFIX + EMBED not in found
    for name, stored in found.items():
        if isinstance(config, DraftConfig):
            for prefix in (MODEL_PREFIX, *HEAD_PREFIXES):
                name = name.removeprefix(prefix)
            flat = next((theirs for theirs in FLAT if name.startswith(theirs)), None)
            yield (name if flat is None else FLAT[flat] + name.removeprefix(flat)), stored
        else:
            yield (MODEL_PREFIX + name if bare and name != LM_HEAD else name), stored


def _is_derived(config: DecoderConfig, name: str) -> bool:
    if name.endswith(FREQUENCIES):
        return True
    if isinstance(config, TargetConfig):
        return config.tie_word_embeddings and name == LM_HEAD
    return name in (EMBED, LM_HEAD, REDUCED[1])


def _is_spare(config: DecoderConfig, name: str) -> bool:
    """Whether a tensor is not used, whatever it holds.

    Of a drafter a confidence head that the config does not have; of a target and its second view what is the other's.
    """
    if isinstance(config, TargetConfig | DualViewConfig):
        return (MARK in name) == isinstance(config, TargetConfig)
    if not isinstance(config, DraftConfig):
        return False
    whole = REDUCED if config.draft_vocab_size is None else ()  # what some files have beside a whole vocabulary
    return name in (*VERIFIER, *whole) or (name.startswith(CONFIDENCE) and not has_confidence(config))


def _other_head(config: DecoderConfig, unexpected: set[str]) -> list[str]:
    """Whether a drafter's tensors are of another head than its config says, in words."""
    if not isinstance(config, DraftConfig):
        return []
    for name in sorted(unexpected):
        told = TOLD_BY_NAMES.get(name.split(".")[0])
        ours = head_of(config).name
        if name.endswith("_conv.base_kernel") or (told == SelectorHead.name and told != ours):
            return [
                f"{name} is of a {SelectorHead.name} drafter, and its config.json has no such part: give "
                "conv_kernel_size, conv_group_size, selector_rank and selector_top_k there"
            ]
        if told and told != ours:
            return [
                f"{name} is of a {told} drafter's head, and its config.json is a {ours} drafter's: correct "
                "projector_type (and markov_rank) there"
            ]
    return []


def vocabulary_tensor(target: TensorFiles, name: str) -> Stored | None:
    """A target's EMBED or LM_HEAD; where embeddings are tied the LM head is they."""
    known = {stored.removeprefix(MODEL_PREFIX): tensor for stored, tensor in target.stored.items()}
    return known.get(name) or known.get(EMBED)


def compare_derived(
    config: DecoderConfig, account: Account, files: TensorFiles, target: Path | None = None, whole: bool = True
) -> list[str]:
    """What of the derived tensors is not what the model has by other means, in words.

    Args:
        target: the folder of a drafter's target, with whose embeddings and LM head the drafter's copies are compared.
        whole: compare all rows of those copies; else some, since they are as large as the drafter.
    """
    problems = []
    if REDUCED[0] in account.stored:
        problems += _vocabulary(config, account, files)
    for name, stored in account.derived.items():
        if name == REDUCED[1]:
            continue
        if name.endswith(FREQUENCIES):
            same, other = _same_frequencies(config, stored, files), "the frequencies of its config.json"
        elif isinstance(config, TargetConfig):
            other = f"its {EMBED}"
            same = _same(files, stored, files, account.stored.get(MODEL_PREFIX + EMBED))
        elif target is None:
            problems.append(
                f"{stored.name} is a copy of the target's, and can't be compared with it here: give --target DIR, or "
                "leave the tensor out of the file"
            )
            continue
        else:
            other = f"that of {target}"
            theirs = open_tensors(target)
            same = _same(files, stored, theirs, vocabulary_tensor(theirs, name), whole)
        if not same:
            tied = ", and tie_word_embeddings is true" if isinstance(config, TargetConfig) and name == LM_HEAD else ""
            problems.append(f"{stored.name} is not {other}{tied}: it would be left out, and the output be another")
    return problems


def _vocabulary(config: DecoderConfig, account: Account, files: TensorFiles) -> list[str]:
    """What is wrong with the tensors of a reduced vocabulary, in words."""
    offsets, size = np.asarray(files.read(account.stored[REDUCED[0]])), config.vocab_size
    ids = np.arange(len(offsets)) + offsets
    outside = ids[(ids < 0) | (ids >= size)]
    if outside.size:
        return [f"{REDUCED[0]} names token {outside[0]}, outside the target's vocabulary of {size}: it holds offsets"]
    if len(np.unique(ids)) < len(ids):
        return [f"{REDUCED[0]} names {len(ids) - len(np.unique(ids))} tokens twice"]
    other = account.derived.get(REDUCED[1])
    if other is None:
        return []
    said = np.asarray(files.read(other)) if other.dtype == "BOOL" and other.shape == (size,) else None
    if said is None or not np.array_equal(said, vocabulary_tables(offsets, size)[REDUCED[1]]):
        return [f"{REDUCED[1]} does not name the tokens that {REDUCED[0]} does, as BOOL of [{size}]"]
    return []


def _same(files: TensorFiles, one: Stored, others: TensorFiles, other: Stored | None, whole: bool = True) -> bool:
    """Whether two matrices have the same values; unless `whole`, in some rows at the beginning, middle and end.

    The blocks of a GGUF file and quantized weights hold few bits: they are the same where they point the same way.
    """
    if other is None or one.shape != other.shape:
        return False
    rounded = is_gguf([other.file]) or len(other.sources) > 1
    count = one.shape[0]
    starts = range(0, count, COMPARED_ROWS) if whole else {0, count // 2, max(0, count - FEW_ROWS)}
    for start in starts:
        end = min(start + (COMPARED_ROWS if whole else FEW_ROWS), count)
        rows = (slice(start, end), *(slice(None),) * (len(one.shape) - 1))
        a, b = (np.asarray(of.read(tensor, rows)).astype(np.float32) for of, tensor in ((files, one), (others, other)))
        near = rounded and float((a * b).sum()) > ALIKE * float(np.linalg.norm(a)) * float(np.linalg.norm(b))
        if not near and not np.array_equal(a, b):
            return False
    return True


def _same_frequencies(config: DecoderConfig, stored: Stored, files: TensorFiles) -> bool:
    found = np.asarray(files.read(stored)).astype(np.float32)
    if found.shape != (config.head_dim // 2,):
        return False
    with jax.default_device(jax.devices("cpu")[0]):
        ours = np.asarray(layers.frequencies(config))
    rounding = {"F32": 1e-5}.get(stored.dtype, 2.0**-7)
    return bool(np.allclose(found, ours, rtol=rounding, atol=0))


def _read_layers(config: DecoderConfig, where: Mapping[str, Stored]) -> list[str]:
    """Whether a drafter's fc takes as many of the target's layers as its config names, where it takes whole ones."""
    shape = where["fc.weight"].shape if "fc.weight" in where else ()
    if not isinstance(config, DraftConfig) or len(shape) != 2 or shape[1] % config.hidden_size:
        return []
    count, target_layer_ids = shape[1] // config.hidden_size, list(config.target_layer_ids)
    if count == len(target_layer_ids):
        return []
    return [
        f"fc.weight takes {count} layers, target_layer_ids (by the public formula, where none are given) are "
        f"{target_layer_ids}"
    ]


def tensor_differences(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[tuple[int, ...], str]]
) -> list[str]:
    """Every missing, unexpected and misshapen tensor, and those that are no floats of 16 or 32 bits, in words.

    Args:
        wanted: shapes by name.
        found: shapes and dtypes by name.
    """
    both = [name for name in wanted if name in found]
    return [
        *(f"missing {name}" for name in sorted(wanted.keys() - found.keys())),
        *(f"unexpected {name}" for name in sorted(found.keys() - wanted.keys())),
        *(
            f"{name} has shape {list(found[name][0])}, expected {list(wanted[name])}"
            for name in both
            if found[name][0] != wanted[name]
        ),
        *(
            f"{name} holds {found[name][1]}, expected {'I64' if is_table(name) else 'F32, F16 or BF16'}"
            for name in both
            if found[name][1] not in (INTEGERS if is_table(name) else FLOATS)
        ),
    ]


def some(problems: Sequence[str], most: int = 8) -> str:
    """The first of a list of problems, and how many more there are."""
    more = f" and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more
