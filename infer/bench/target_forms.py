"""A target in other forms, beside the one that was loaded: 8 bits, or a folder that others have quantized."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from convert.loading import LoadedModel, load_model
from convert.options import resolve
from convert.tokenizer import encode
from domino_jax.decode import run_to_end
from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.parsing import read_text
from domino_jax.runtime.prompt_logprobs import prompt_logprobs
from domino_jax.runtime.weight_forms import FORMS
from infer.bench.options import Bench

WINDOW = 512  # tokens of a text that see each other, where the model has as many positions


def load_forms(options: Bench, first: LoadedModel, console: Console) -> dict[str, LoadedModel]:
    """The model of `--model` in each of the `--forms`, by their names, with the same drafter.

    Args:
        first: the model as it was loaded.

    Raises:
        DominoError: one can't be loaded, or is another model.
    """
    found = {}
    _, drafter = resolve(options.model, console)
    for form in options.questions.forms:
        asked = options.model
        if form in FORMS:
            asked = replace(asked, device=replace(asked.device, weights=form))
        else:
            drafting = asked.drafting
            if drafting.draft is None and drafter is not None:
                drafting = replace(drafting, draft=str(drafter))
            asked = replace(asked, model=form, revision=None, drafting=drafting)
        target, draft = resolve(asked, console)
        with console.status(f"loading {form}"):
            found[form] = load_model(target, draft, asked.device.dtype, **asked.plan())
        if form not in FORMS:
            ours, theirs = first.configs.target, found[form].configs.target
            sizes = [(c.vocab_size, c.hidden_size, c.num_hidden_layers) for c in (ours, theirs)]
            if sizes[0] != sizes[1] or vocabulary(first) != vocabulary(found[form]):
                raise DominoError(f"{form} of --forms is no form of {options.model.model}: sizes or tokenizer differ.")
    return found


def vocabulary(loaded: LoadedModel) -> dict[str, int] | None:
    """The ids of the tokenizer's tokens; None where there is none."""
    return None if loaded.tokenizer is None else loaded.tokenizer.get_vocab()


def perplexity(loaded: LoadedModel, ids: Sequence[int]) -> float:
    """What the target makes of a text: the exponential of its mean surprise at a token after those before it.

    The text is cut into windows, which do not see each other.
    """
    width = min(WINDOW, loaded.configs.target.positions)
    told: list[float] = []
    with loaded.context():
        for begin in range(0, len(ids), width):
            run = prompt_logprobs(loaded.params, loaded.configs, ids[begin : begin + width], loaded.dtype, 1)
            told += [token.chosen for token in run_to_end(run) if token is not None]
    return math.exp(-math.fsum(told) / len(told))


def read_plain_text(file: Path) -> str:
    """A text file's text.

    Raises:
        DominoError: it can't be read, or is no text.
    """
    try:
        return read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise DominoError(f"{file} can't be read as text: {first_line(error)}.") from None


def text_ids(file: Path, loaded: LoadedModel) -> list[int]:
    """The tokens of a text file.

    Raises:
        DominoError: it can't be read, or has fewer than two.
    """
    ids = encode(loaded.tokenizer, read_plain_text(file))
    if len(ids) < 2:
        raise DominoError(f"{file} has {len(ids)} tokens: a perplexity takes two at least.")
    return ids
