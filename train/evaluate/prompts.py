"""Held-out prompts that a drafter is measured with."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
from tyro.conf import DisallowNone

from convert.loading import LoadedModel
from convert.messages import LeftOut, left_out_words
from convert.not_finite import check_finite, warn_of_drafts
from convert.options import UNSET, check_count, check_real
from domino_jax.decode import DecodeConfig
from domino_jax.errors import DominoError
from domino_jax.runtime.provenance import distinct_ngrams
from domino_jax.runtime.slots import Completion, Request, Slots, longest_first, room_after
from domino_jax.sampling import SamplingParams
from domino_jax.weights import Params
from train.monitor.decoding_progress import DecodingProgress
from train.regenerate.prompts import Lines, encode_turn


def read_heldout_prompts(
    path: Path, vocab_size: int, positions: int, tokenizer: Any, new_tokens: int, cut: int | None = None
) -> list[list[int]]:
    """The prompts of a JSONL file (see train.regenerate.prompts; of a conversation, what precedes the first answer).

    Args:
        positions: the target's; prompts without room for `new_tokens` are left out.
        cut: ids to keep of each prompt; all when None.

    Raises:
        DominoError: the file can't be read, a line is of no known form, or no prompt is left.
    """
    lines = Lines(path, vocab_size)
    left_out, prompts = lines.left_out, []
    for _, source in lines.sources(0, len(lines)):
        try:
            ids = encode_turn(source, 0, [], tokenizer, thinking=False)[:cut]
        except LeftOut as reason:
            left_out[str(reason)] += 1
            continue
        if new_tokens <= room_after(ids, positions):
            prompts.append(ids)
        else:
            left_out[f"have no room for {new_tokens} new tokens in {positions} positions"] += 1
    if not prompts:
        raise DominoError(f"{path} has no prompt to validate with{left_out_words(left_out)}.")
    if left_out and jax.process_index() == 0:
        print(f"warning: {len(prompts)} prompts of {path}{left_out_words(left_out)}", file=sys.stderr)
    return prompts


@dataclass(frozen=True)
class HeldOutOptions:
    """Held-out prompts, and how their target answers them."""

    prompts: Path
    """JSONL of held-out prompts: input_ids, prompt or messages"""
    num_prompts: Annotated[int | None, DisallowNone, UNSET] = None
    """use so many prompts, from the file's beginning; all when not given"""
    prompt_tokens: Annotated[int | None, DisallowNone, UNSET] = None
    """tokens that a prompt is cut to; none are cut when not given"""
    new_tokens: int = 64
    """of an answer, at most"""
    min_distinct: float = 0.0
    """leave out prompts that the target answers with a smaller share of distinct 4-grams: it loops there"""
    batch_size: int = 16
    """prompts that are answered together"""

    def check_numbers(self) -> None:
        """Raises: UsageError: a number makes no sense."""
        for name in ("num_prompts", "prompt_tokens", "new_tokens", "batch_size"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_real("min_distinct", self.min_distinct, "from 0 to 1")


def chosen_prompts(options: HeldOutOptions, pair: LoadedModel) -> list[list[int]]:
    """The prompts that a command asks for, in the context of its models.

    Raises:
        DominoError: fewer are left than were asked for, or none; see `read_heldout_prompts`.
    """
    o, config = options, pair.configs.target
    prompts = read_heldout_prompts(
        o.prompts, config.vocab_size, config.positions, pair.tokenizer, o.new_tokens, o.prompt_tokens
    )
    found = len(prompts)
    if o.min_distinct > 0:
        prompts = varied(
            pair.params,
            pair.configs,
            prompts,
            pair.stop_ids,
            pair.dtype,
            new_tokens=o.new_tokens,
            batch=min(o.batch_size, len(prompts)),
            least=o.min_distinct,
            count=o.num_prompts,
        )
    prompts = prompts[: o.num_prompts]
    if not prompts or len(prompts) < (o.num_prompts or 0):
        raise DominoError(
            f"{o.prompts} has {len(prompts)} prompts whose answers vary, of {found} that fit: lower --num-prompts "
            "or --min-distinct."
        )
    return prompts


def answered(
    params: Params,
    configs: DecodeConfig,
    dtype: Any,
    requests: Sequence[Request],
    batch: int,
    what: str,
    *,
    quiet: bool,
    stopping: Callable[[], bool] | None = None,
) -> list[Completion]:
    """The answers to requests, in their order, where nothing stops them before.

    Args:
        batch: requests that run together, at most.
        what: they are, for people who watch.
        quiet: show no progress.

    Raises:
        DominoError: a number of the target is not finite.
    """
    answers = [Completion(request) for request in requests]
    slots = Slots(params, configs, min(batch, len(answers)), dtype, warn=warn_of_drafts)
    with DecodingProgress(what, len(answers), drafting=True, quiet=quiet) as progress:
        for answer in slots.run(longest_first(answers), progress.stepped, stopping):
            check_finite(answer, params.target, configs.target, dtype)
            progress.done()
    return answers


def varied(
    params: Params,
    configs: DecodeConfig,
    prompts: Sequence[list[int]],
    stop_ids: Sequence[int],
    dtype: Any,
    *,
    new_tokens: int,
    batch: int,
    least: float,
    count: int | None = None,
) -> list[list[int]]:
    """The first `count` (all when None) of the prompts that the target answers, greedily, without going round in loops.

    Small models fall into loops, and a loop is easy to draft.

    Args:
        least: distinct 4-grams of an answer, as a share of all.
    """
    chosen: list[list[int]] = []
    slots = Slots(params.without_drafter, configs.without_drafter, batch, dtype)
    how = SamplingParams(max_tokens=new_tokens, stop_token_ids=tuple(stop_ids))
    for first in range(0, len(prompts), batch):
        group = [Completion(Request(ids, how, (row,))) for row, ids in enumerate(prompts[first : first + batch])]
        for answer in slots.run(group):
            check_finite(answer, params.target, configs.target, dtype)
        chosen += [list(c.request.prompt) for c in group if distinct_ngrams(c.tokens) >= least]
        if count is not None and len(chosen) >= count:
            return chosen[:count]
    return chosen
