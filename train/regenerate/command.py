"""Let the target rewrite the answers of conversations: a drafter learns best from what its target says itself.

    python -m train regenerate --target qwen3-8b --data sharegpt.jsonl --out data.jsonl --draft qwen3-8b-domino

Data: see train.regenerate.prompts. Every assistant turn of a conversation is written anew, in order, with the new
answers as its context. OUT gets one line for each answer:

    {"row": 3, "turn": 1, "input_ids": [...], "tokens": [...], "finish_reason": "stop", "messages": [...]}

`row` is the line of the data (from 0, blank ones not counted). `input_ids` are what the target was given, in its own
template; `tokens` are what it generated, never text that was tokenised again: their loss mask is exact. One line an
answer, and not one a conversation, because templates render earlier answers otherwise than they were generated (Qwen3's
drops the empty thought that comes before an answer with thinking off): so the drafter is trained on what it will meet.
`messages` are for people. An answer that reached --max-new-tokens has no end token and finish_reason "length".

Several workers, each with `--shard I/N`, share the lines and write files of their own: data-00000-of-00004.jsonl, ...
All of them together are what one worker would have written; `python -m train --data data-*-of-00004.jsonl` takes them.

The same command goes on where it was interrupted. The answers are then those of an undisturbed run, to rounding:
beside which others a prompt runs, --batch-size, --mesh and the device change them by what rounding does to a draw.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import DisallowNone

from convert.messages import LeftOut, left_out_words
from convert.not_finite import warn_of_drafts
from convert.options import GROUP, UNSET, ProcessOptions, SamplingOptions, check_count, check_not_source, in_8_bits
from convert.registry import read_configs
from convert.tokenizer import decode, final_answer, load_tokenizer
from domino_jax.errors import DominoError
from domino_jax.runtime.auto_trees import auto_policy
from domino_jax.runtime.command import run_command, words_at_fault
from domino_jax.runtime.compile_cache import enable_compile_cache
from domino_jax.runtime.processes import join_processes, wait_for_others
from domino_jax.runtime.slots import Completion, Request, Slots, longest_first, room_after
from train.loading import PairOptions, notes
from train.regenerate.decoding import AnswerDecoding, decisive_of_all, open_decoding
from train.regenerate.output import Answers, FollowedAnswers, open_answers
from train.regenerate.prompts import WHOLE, Lines, RowShard, Source, encode_turn, parse_shard

WINDOW_BATCHES = (
    64  # batches of lines that are sorted by length together, and brought to their last turns before the next
)


@dataclass(frozen=True)
class Regenerate:
    """Let the target rewrite the answers of conversations, or continue prompts; the same command resumes."""

    data: Path
    """JSONL of conversations (messages, ShareGPT's conversations, TRL's prompts) or prompts (prompt, input_ids)"""
    out: Path
    """JSONL file to write, for --data of python -m train"""
    shard: Annotated[str | None, DisallowNone, UNSET] = None
    """I/N: every N-th line of the data alone, from line I (from 0) on, into a file of its own beside --out"""
    pair: Annotated[PairOptions, GROUP] = field(default_factory=PairOptions)
    sampling: SamplingOptions = field(default_factory=lambda: SamplingOptions(0.7, 20, 0.95))
    max_new_tokens: int = 2048
    """of an answer, at most"""
    batch_size: int = 32
    """answers that are written together"""
    thinking: bool = False
    """let a model think before it answers, if it can; public drafters are trained without"""
    processes: ProcessOptions = field(default_factory=ProcessOptions)

    @property
    def part(self) -> RowShard:
        """The lines to answer.

        Raises:
            UsageError: --shard is not of the form I/N.
        """
        with words_at_fault():
            return WHOLE if self.shard is None else parse_shard(self.shard)

    @property
    def file(self) -> Path:
        """The file to write: with --shard one of several."""
        return self.part.path(self.out)


def check_regenerate(options: Regenerate) -> None:
    """Refuse values that make no sense.

    Raises:
        UsageError: one does not.
    """
    o = options
    o.pair.model()
    o.sampling.check()
    check_count("max_new_tokens", o.max_new_tokens)
    check_count("batch_size", o.batch_size)
    check_not_source("out", o.file, o.data, o.pair.target, o.pair.drafting.draft)


def decisive(options: Regenerate, target: Path, draft: Path | None, lines: Lines) -> dict[str, Any]:
    """What decides the answers, for the file beside them."""
    o, how = options, options.pair
    return {
        **decisive_of_all(how, target, draft, o.sampling, o.max_new_tokens),
        "ngram": how.model().ngram,
        "head_candidates": how.model().head_candidates,
        # By the flag's older name, under which files were begun.
        "draft_dtype": how.drafting.draft_weights if in_8_bits(how.drafting.draft_weights) else None,
        **({"confidence_threshold": sure} if (sure := how.drafting.confidence_threshold) is not None else {}),
        **({"tree": list(how.model().tree or ())} if how.drafting.tree is not None else {}),
        "data_sha256": lines.sha256,
        **({"shard": str(o.part)} if o.part.count > 1 else {}),
        "thinking": o.thinking,
        **({"sampler": "coupled"} if o.sampling.params().coupled else {}),
    }


def run_regenerate(options: Regenerate) -> None:
    """Write what answers are missing, or those until an interruption.

    Raises:
        DominoError: something is wrong with the words, the models or the data, or the answers can't be written.
        KeyboardInterrupt: it was interrupted; what was written is kept.
    """
    check_regenerate(options)
    first = join_processes(options.processes.resolve(), saves=True)
    enable_compile_cache()
    console = notes()
    target, draft = options.pair.folders(console)
    _, config, _, warnings = read_configs(target, draft, "--target")
    for warning in warnings if first else ():
        print(f"warning: {warning}", file=sys.stderr)
    lines = Lines(options.data, config.vocab_size, options.part)
    tokenizer = load_tokenizer(target)
    source = next(lines.sources(0, len(lines)))[1]
    encode_some(
        source, tokenizer, options
    )  # a tokenizer or a template that is missing is known before a weight is read
    given = {"target": target, "draft": draft, "data": options.data}
    places = {name: str(path and path.absolute()) for name, path in given.items()}
    with open_answers(options.file, decisive(options, target, draft, lines), places) as answers:
        missing = int(lines.turns.sum()) - len(answers)
        if not missing:
            if first:
                print(f"{options.file} has all {len(answers)} answers already")
            return
        if len(answers) and first:
            print(f"{options.file} has {len(answers)} answers; {missing} are missing", file=sys.stderr)
        size = min(options.batch_size, int((lines.turns > 0).sum()))
        with open_decoding(options.pair, target, draft, "answers", missing, console) as decoding:
            tally, stopping = decoding.tally, decoding.stopping
            writer = Writer(options, decoding, lines, answers, size)
            window = size * WINDOW_BATCHES * options.part.count
            for start in range(0, len(lines), window):
                if not stopping():
                    writer.window(start, min(start + window, len(lines)))
        interrupted = stopping()
        left_out = left_out_words(lines.left_out + writer.left_out)
        summary = f"{len(answers)} answers in {options.file}{tally.summary()}{left_out}"
        if interrupted:
            if first:
                print(f"interrupted: {summary}; the same command goes on", file=sys.stderr)
            wait_for_others("written")
            raise KeyboardInterrupt
        if not len(answers):
            raise DominoError(f"nothing could be answered{left_out}.")
        if first:
            print(summary)


def encode_some(source: Source, tokenizer: Any, options: Regenerate) -> None:
    """Encode one line's first turn, for the errors; what a template refuses is left out later."""
    with suppress(LeftOut):
        encode_turn(source, 0, [], tokenizer, options.thinking)


@dataclass
class Writer:
    """What is needed to answer lines of the data and write them down."""

    options: Regenerate
    decoding: AnswerDecoding
    lines: Lines
    answers: Answers | FollowedAnswers
    batch: int

    def __post_init__(self) -> None:
        self.left_out: Counter[str] = Counter()  # conversations, or the rest of one, by reason
        self.pair, self.tally = self.decoding.pair, self.decoding.tally
        pair, how = self.pair, self.options.sampling.params()
        # What samples by rejection depends on how many drafts a cycle has, and a resumed run is to go on alike.
        free = pair.configs.drafter is not None and (how.temperature == 0 or how.coupled)
        policy = auto_policy(pair.configs) if free else None
        self.slots = Slots(pair.params, pair.configs, self.batch, pair.dtype, policy=policy, warn=warn_of_drafts)

    def window(self, first: int, end: int) -> None:
        """Answer what is missing of the lines first ... end - 1."""
        counts = self.lines.turns[first:end]
        numbers = ((first + int(row), turn) for row in np.flatnonzero(counts) for turn in range(counts[row]))
        if all(number in self.answers for number in numbers):
            return
        sources = dict(self.lines.sources(first, end))
        told: dict[int, list[str]] = {row: [] for row in sources}
        asked = [self._ask(row, 0, source, told[row]) for row, source in sources.items()]
        for answer in self.decoding.run(self.slots, longest_first(c for c in asked if c is not None)):
            row, turn = answer.request.numbers
            self._write(answer, sources[row], told[row])
            self.tally.done()
            following = self._ask(row, turn, sources[row], told[row])
            if following is not None:
                self.slots.admit(following)

    def _ask(self, row: int, turn: int, source: Source, told: list[str]) -> Completion | None:
        """The first turn from `turn` on that is missing; None where there is none, or it can't be answered."""
        while turn < source.turns and (row, turn) in self.answers:
            if turn + 1 < source.turns:  # as a resumed run would know it
                told.append(turns_text(self.pair.tokenizer, self.answers.tokens((row, turn))))
            turn += 1
        if turn == source.turns:
            return None
        try:
            return Completion(self._request(row, turn, source, told))
        except LeftOut as reason:
            self.left_out[str(reason)] += 1
            self.tally.fewer(sum((row, t) not in self.answers for t in range(turn, source.turns)))
            return None

    def _request(self, row: int, turn: int, source: Source, told: list[str]) -> Request:
        ids = encode_turn(source, turn, told, self.pair.tokenizer, self.options.thinking)
        positions = self.pair.configs.target.positions
        if len(ids) > positions:
            raise LeftOut(f"are too long for the target's {positions} positions")
        limit = min(self.options.max_new_tokens, room_after(ids, positions))
        how = replace(self.options.sampling.params(), max_tokens=limit, stop_token_ids=tuple(self.pair.stop_ids))
        return Request(ids, how, (row, turn))

    def _write(self, answer: Completion, source: Source, told: list[str]) -> None:
        (row, turn), ids = answer.request.numbers, list(answer.request.prompt)
        values = {"input_ids": ids, "tokens": answer.tokens, "finish_reason": answer.finish_reason}
        if source.given is not None:
            text = decode(self.pair.tokenizer, answer.tokens)
            values["messages"] = [*source.messages(turn, told), {"role": "assistant", "content": text}]
        self.answers.add((row, turn), values)


def turns_text(tokenizer: Any, tokens: list[int]) -> str:
    """What later turns are told of an answer."""
    return final_answer(decode(tokenizer, tokens))


def _regenerate(options: Regenerate) -> None:
    try:
        run_regenerate(options)
    except OSError as error:
        raise DominoError(f"{error}; the answers in {options.file} are kept.") from None


def main(argv: Sequence[str] | None = None, prog: str = "python -m train regenerate") -> int:
    """Run the command line; returns the exit code."""
    return run_command(Regenerate, _regenerate, argv, prog=prog)
