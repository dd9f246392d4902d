"""Questions that a model asks itself: the user's turn, sampled after the header of its chat template.

python -m train instructions --target smollm2-135m --count 20000 --out questions.jsonl --held-out held.jsonl
python -m train regenerate --target smollm2-135m --data questions.jsonl --out data.jsonl

An instruction-tuned model writes what its users may ask where its template lets a user speak (Magpie,
arXiv 2406.08464). Each question is one line, {"row": 3, "messages": [{"role": "user", "content": "..."}]}. Left out are
those that are cut, short, of other scripts, repeat themselves, have special tokens, or came before, also nearly. By its
text a question belongs to --out or to --held-out, in whatever run it comes.

All samples go to OUT's name with .samples.jsonl, line by line. The same command goes on where it was interrupted, and
writes OUT when all are there.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import DisallowNone

from convert.not_finite import warn_of_drafts
from convert.options import (
    GROUP,
    UNSET,
    ProcessOptions,
    SamplingOptions,
    check_count,
    check_file,
    check_not_source,
    check_real,
)
from convert.registry import read_configs
from convert.tokenizer import decode, encode, load_tokenizer, render, special_tokens
from domino_jax.errors import DominoError
from domino_jax.runtime.command import UsageError, run_command
from domino_jax.runtime.compile_cache import enable_compile_cache
from domino_jax.runtime.files import read_jsonl, write_text
from domino_jax.runtime.processes import join_processes, wait_for_others
from domino_jax.runtime.slots import Completion, Request, Slots, room_after
from train.loading import PairOptions, notes
from train.regenerate.decoding import AnswerDecoding, decisive_of_all, open_decoding
from train.regenerate.output import Answers, FollowedAnswers, open_answers
from train.regenerate.selection import Rules, Selection, ending, header_of, is_held_out

MARK = "question-goes-here"  # in the place of a user's text


@dataclass(frozen=True)
class Instructions:
    """Let a model ask itself questions, for it to answer; the same command resumes."""

    out: Path
    """JSONL file of questions to write, for --data of python -m train regenerate"""
    pair: Annotated[PairOptions, GROUP] = field(default_factory=PairOptions)
    count: int = 1000
    """questions to sample; fewer remain"""
    held_out: Annotated[Path | None, DisallowNone, UNSET] = None
    """file for questions that are not to be trained on"""
    held_out_share: float = 0.02
    """share of the questions that go to --held-out"""
    system: Annotated[str | None, DisallowNone, UNSET] = None
    """system message before the question (default: what the template writes by itself)"""
    sampling: SamplingOptions = field(default_factory=lambda: SamplingOptions(1.0, 0, 0.95))
    max_new_tokens: int = 256
    """of a question, at most; longer ones are left out"""
    min_tokens: int = 4
    """of a question, at least"""
    min_ascii: float = 0.95
    """share of a question's characters that are ASCII; 0 takes any script"""
    most_alike: int = 20
    """questions with the same first six words, at most"""
    batch_size: int = 32
    """questions that are written together"""
    processes: ProcessOptions = field(default_factory=ProcessOptions)

    @property
    def samples(self) -> Path:
        """The file of everything that was sampled."""
        return self.out.with_name(f"{self.out.stem}.samples.jsonl")


def check_instructions(options: Instructions) -> None:
    """Refuse values that make no sense.

    Raises:
        UsageError: one does not.
    """
    o = options
    o.pair.model()
    o.sampling.check()
    for name in ("count", "max_new_tokens", "min_tokens", "most_alike", "batch_size"):
        check_count(name, getattr(o, name))
    check_real("min_ascii", o.min_ascii, "from 0 to 1")
    check_real("held_out_share", o.held_out_share, "from 0 to 1")
    if o.min_tokens > o.max_new_tokens:
        raise UsageError(f"--min-tokens {o.min_tokens} is more than --max-new-tokens {o.max_new_tokens}.")
    if o.held_out is not None and o.held_out.absolute() in (o.out.absolute(), o.samples.absolute()):
        raise UsageError("--held-out and --out must be different files.")
    models = o.pair.target, o.pair.drafting.draft
    check_not_source("out", o.samples, *models)
    for name, path in (("out", o.out), ("held_out", o.held_out)):
        check_file(name, path, *models)


def run_instructions(options: Instructions) -> None:
    """Sample the questions that are missing, and write those that are worth an answer.

    Raises:
        DominoError: something is wrong with the words or the models, or the files can't be written.
        KeyboardInterrupt: it was interrupted; what was sampled is kept.
    """
    check_instructions(options)
    first = join_processes(options.processes.resolve(), saves=True)
    enable_compile_cache()
    console = notes()
    target, draft = options.pair.folders(console)
    for warning in read_configs(target, draft, "--target")[3] if first else ():
        print(f"warning: {warning}", file=sys.stderr)
    tokenizer = load_tokenizer(target)
    ids, end = user_turn(tokenizer, options.system)
    with open_answers(
        options.samples, decisive_of_questions(options, target, draft, ids, end), {"target": str(target)}
    ) as samples:
        missing = [row for row in range(options.count) if (row, 0) not in samples]
        if missing:
            with open_decoding(options.pair, target, draft, "questions", len(missing), console) as decoding:
                tally, stopping = decoding.tally, decoding.stopping
                sampler = Sampler(options, decoding, ids, end, samples)
                for start in range(0, len(missing), options.batch_size * 64):
                    if not stopping():
                        sampler.run(missing[start : start + options.batch_size * 64])
            if stopping():
                if first:
                    summary = f"{len(samples)} questions in {options.samples}{tally.summary()}"
                    print(f"interrupted: {summary}; the same command goes on", file=sys.stderr)
                wait_for_others("sampled")
                raise KeyboardInterrupt
    if first:
        print(write_questions(options, {number for _, number in special_tokens(tokenizer).items()}, end))


def user_turn(tokenizer: Any, system: str | None) -> tuple[list[int], int]:
    """The ids of all that stands before a user's text, and the token that ends it.

    Raises:
        DominoError: there is no chat template, or its user's turn has no token at its end.
    """
    if tokenizer is None:
        raise DominoError("the model's folder has no tokenizer, so it can't be asked for text.")
    given = [] if system is None else [{"role": "system", "content": system}]
    rendered = render(tokenizer, [*given, {"role": "user", "content": MARK}], ask=False)
    try:
        before, after = header_of(rendered, MARK)
    except ValueError as error:
        raise DominoError(f"{error}: it can't be sampled.") from None
    end = ending(encode(tokenizer, after, special=False), list(special_tokens(tokenizer).values()))
    if end is None:
        raise DominoError(f"the chat template ends a user's turn with {after[:20]!r}, expected a special token.")
    return encode(tokenizer, before, special=False), end


def decisive_of_questions(
    options: Instructions, target: Path, draft: Path | None, ids: list[int], end: int
) -> dict[str, Any]:
    """What decides the samples, for the file beside them."""
    return {
        **decisive_of_all(options.pair, target, draft, options.sampling, options.max_new_tokens),
        "drafting": repr(options.pair.drafting),
        "prompt": ids,
        "end": end,
        "coupled": options.sampling.params().coupled,
    }


class Sampler:
    """What is needed to sample questions and write them down."""

    def __init__(
        self,
        options: Instructions,
        decoding: AnswerDecoding,
        ids: list[int],
        end: int,
        samples: Answers | FollowedAnswers,
    ):
        self.decoding, self.ids, self.samples = decoding, ids, samples
        pair = decoding.pair
        limit = min(options.max_new_tokens, room_after(ids, pair.configs.target.positions))
        ends = tuple(dict.fromkeys((end, *pair.stop_ids)))
        self.params = replace(options.sampling.params(), max_tokens=limit, stop_token_ids=ends)
        size = min(options.batch_size, options.count)
        self.slots = Slots(pair.params, pair.configs, size, pair.dtype, warn=warn_of_drafts)

    def run(self, rows: Sequence[int]) -> None:
        """Sample the questions of these numbers, or those until an interruption."""
        asked = (Completion(Request(self.ids, self.params, (row, 0))) for row in rows)
        for sample in self.decoding.run(self.slots, asked):
            values = {"tokens": sample.tokens, "finish_reason": sample.finish_reason}
            values["text"] = decode(self.decoding.pair.tokenizer, sample.tokens)
            self.samples.add(sample.request.numbers, values)  # type: ignore[arg-type]
            self.decoding.tally.done()


def write_questions(options: Instructions, special: set[int], end: int) -> str:
    """Write the questions that are worth an answer; returns what became of the samples, in words."""
    o = options
    selection = Selection(Rules(o.min_tokens, o.min_ascii, o.most_alike))
    written = (line.value for line in read_jsonl(o.samples))
    samples = sorted((one for one in written if one["row"] < o.count), key=lambda one: one["row"])
    reasons: Counter[str] = Counter()
    lines: dict[bool, list[str]] = {False: [], True: []}
    for sample in samples:
        *tokens, last = sample["tokens"]
        whole, text = last == end, sample["text"].strip()
        reason = selection.refusal(text, len(tokens), whole, not special.isdisjoint(tokens))
        if reason is not None:
            reasons[reason] += 1
            continue
        held = o.held_out is not None and is_held_out(text, o.held_out_share)
        question = {"row": sample["row"], "messages": [{"role": "user", "content": text}]}
        lines[held].append(json.dumps(question, ensure_ascii=False) + "\n")
    write_text(o.out, "".join(lines[False]))
    if o.held_out is not None:
        write_text(o.held_out, "".join(lines[True]))
    where = f"{len(lines[False])} in {o.out}" + (f", {len(lines[True])} in {o.held_out}" if o.held_out else "")
    left = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return f"of {len(samples)} questions {where}" + (f"; left out: {left}" if left else "")


def _instructions(options: Instructions) -> None:
    try:
        run_instructions(options)
    except OSError as error:
        raise DominoError(f"{error}; the questions in {options.samples} are kept.") from None


def main(argv: Sequence[str] | None = None, prog: str = "python -m train instructions") -> int:
    """Run the command line; returns the exit code."""
    return run_command(Instructions, _instructions, argv, prog=prog)
