"""What people see: notes on standard error; text and its drafts, or JSON, on standard output."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from domino_jax.errors import DominoError, first_line

if TYPE_CHECKING:
    from convert.loading import LoadedModel
    from domino_jax.runtime.slots import DraftPolicy
    from infer.compare import Comparison
    from infer.engine import Chunk, Sequence

ACCEPTED, ADDED, REJECTED = "green", "yellow", "dim strike"
MARKS = {REJECTED: ("[-", "-]"), ADDED: ("{+", "+}")}  # where there is no colour

_speaks = True


def keep_silent() -> None:
    """Print no notes from here on: of several processes, only the first speaks. Errors are still printed."""
    global _speaks
    _speaks = False


def say(line: str) -> None:
    """A note on standard error, if anybody reads it."""
    with suppress(OSError):
        if _speaks:
            print(line, file=sys.stderr, flush=True)


class Output(Console):
    """Standard output: a broken pipe is an error like any other (rich would exit)."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError

    @property
    def is_colored(self) -> bool:
        """Whether who reads it sees colours: not in a file or pipe, nor with NO_COLOR or TERM=dumb."""
        return self.color_system is not None and not self.no_color


class Notes(Console):
    """Standard error: nothing depends on anybody reading it."""

    def on_broken_pipe(self) -> None:
        pass


def warn(warnings: Iterable[str], most: int = 3) -> None:
    """The first few warnings, and how many more there are."""
    for i, warning in enumerate(warnings := list(warnings)):
        if i == most:
            say(f"warning: … and {len(warnings) - most} more.")
            return
        say(f"warning: {warning}")


class Printer:
    """Prints a sequence's text as it grows."""

    def __init__(self, sequence: "Sequence", before: Callable[[], None] | None = None):
        """Args: before: called when there is text for the first time."""
        self.sequence = sequence
        self.before = before
        self.printed = 0

    def add(self, chunk: "Chunk") -> None:
        """Print what is new."""
        self._print(chunk.text)

    def end(self) -> None:
        """Print the rest, and end the line."""
        text = self.sequence.text or ""
        self._print(text[self.printed :])
        if not text.endswith("\n"):
            print(flush=True)

    def _print(self, text: str) -> None:
        if self.before:
            self.before()
            self.before = None
        print(text, end="", flush=True)
        self.printed += len(text)


def record(s: "Sequence", load_seconds: float, comparison: "Comparison | None") -> str:
    """A finished sequence as the JSON object that --json prints."""
    from infer.engine import tau

    found = {
        "row": s.row,
        "tokens": s.tokens,
        "text": s.text,
        "finish_reason": s.finish_reason,
        "prompt_tokens": len(s.prompt),
        "input_ids": s.prompt,
        "cycles": len(s.cycles),
        "accepted": s.accepted,
        "drafts": [len(cycle.drafts) for cycle in s.cycles],
        "plain_steps": s.steps,
        "tau": tau(s.accepted),
        # "calibrate" is always 0: nothing is measured beside the work any more, but scripts may read the key.
        "seconds": {"load": load_seconds, "calibrate": 0.0, **s.seconds},
        "wall_seconds": s.wall_seconds,
        "tokens_per_second": s.tokens_per_second,
    }
    if comparison:
        found["compare"] = comparison.record(s.row)
    return json.dumps(found)


class RunSummary:
    """What a run did: printed in the end, on standard error."""

    def __init__(self, loaded: "LoadedModel", notes: Notes):
        from domino_jax.runtime.timing import no_seconds

        self.loaded = loaded
        self.notes = notes
        self.sequences: list[Sequence] = []
        self.seconds = no_seconds()
        self.wall_seconds = 0.0
        self.comparisons: list[Comparison] = []

    def add(self, sequences: "list[Sequence]", seconds: dict[str, float]) -> None:
        """Note what was generated together, and the time of each phase."""
        self.sequences += [s for s in sequences if s.tokens]
        self.seconds = {phase: spent + seconds[phase] for phase, spent in self.seconds.items()}
        self.wall_seconds += max((s.wall_seconds for s in sequences), default=0.0)

    def show(self, auto: "DraftPolicy | None") -> None:
        """Print the times, τ, the accepted lengths, what --num-draft-tokens auto chose, and the comparison."""
        from infer.engine import tau, tokens_per_second

        sequences = self.sequences
        if not sequences:
            return
        show, total = self.notes.print, self.seconds
        tokens, reused = sum(len(s.tokens) for s in sequences), sum(s.reused for s in sequences)
        run = sum(len(s.prompt) for s in sequences) - reused
        rate = tokens_per_second(sequences, total["decode"])
        show(f"\n{tokens} tokens" + (f", decoded at [bold]{rate:.1f} tokens/s[/]" if rate else ""))
        show(
            f"load {self.loaded.seconds:.2f} s · compile {total['compile']:.2f} s · "
            f"prefill {total['prefill']:.3f} s ({run} tokens{f', {reused} reused' if reused else ''}) · "
            f"decode {total['decode']:.3f} s · wall time without loading {self.wall_seconds:.2f} s",
            style="dim",
        )
        if auto:
            show(f"draft tokens: auto, {auto}", style="dim")
        accepted = [n for s in sequences for n in s.accepted]
        if accepted:
            show(f"τ = [bold]{tau(accepted):.2f}[/] tokens a cycle, over {len(accepted)} cycles; drafts accepted:")
            for line in histogram(accepted, self.loaded.configs.depth):
                show(line)
        if self.comparisons:
            self._show_comparisons()

    def _show_comparisons(self) -> None:
        from infer.compare import RUNS

        show = self.notes.print
        runs = [c for c in self.comparisons if c.speedup]
        for c in runs:
            show(
                f"with drafts {c.tokens_per_second:.1f} tokens/s · "
                f"autoregressive baseline {c.baseline_tokens_per_second:.1f} tokens/s · "
                f"[bold]{c.speedup:.2f}×[/] (median of {RUNS} runs in turns)"
            )
        if not runs:
            show("one token comes from the prefill: there is no decoding to compare.")
        if any(c.identical is None for c in self.comparisons):
            show(
                "samples by rejection differ with and without drafts (same distribution): only the speed is compared. "
                "--sampler coupled gives the same samples."
            )
            return
        different = [row for c in self.comparisons for row, same in (c.identical or {}).items() if not same]
        if not different:
            show("tokens: [bold green]identical[/]")
            return
        show(f"tokens: [bold red]different[/] in {len(different)} sequences (the first: {different[0]})")
        if self.loaded.dtype != "float32":
            show("in bfloat16 two logits can tie to rounding, and the two ways may then break the tie differently.")


def histogram(accepted: list[int], proposals: int, width: int = 40) -> list[str]:
    """Lines with a bar for each number of accepted drafts from 0 to `proposals`."""
    counts = Counter(accepted)
    most = max(counts.values())
    return [
        f"{n:3} {'█' * round(width * counts[n] / most) or ('▏' if counts[n] else '')} {counts[n]}"
        for n in range(proposals + 1)
    ]


def color_drafts(s: "Sequence", tokenizer: Any, marks: bool = False) -> Text:
    """A sequence with each token's origin in its colour, and a legend.

    Text appears with the token that completes its characters. A text that a stop string cut is
    shown whole here, as drafted.

    Args:
        marks: show origins by brackets too, as `git diff --word-diff` does: for where colours can't be seen.
    """
    from convert.tokenizer import decode
    from infer.text import Detokenizer

    stream = Detokenizer(tokenizer) if tokenizer is not None else None
    parts: list[tuple[str, str]] = []  # texts and their styles

    def add(text: str, style: str) -> None:
        if parts and parts[-1][1] == style:
            parts[-1] = parts[-1][0] + text, style
        elif text:
            parts.append((text, style))

    def kept(tokens: list[int], style: str) -> None:
        for token in tokens:
            add(stream.feed([token]) if stream else f"{token} ", style)

    place = 0
    for cycle in s.cycles:
        kept(s.tokens[place : cycle.start], ADDED)  # the prefill's token, or plain steps
        place = cycle.start + len(cycle.tokens)
        kept(cycle.tokens[: cycle.accepted], ACCEPTED)
        rejected = cycle.drafts[cycle.accepted :]
        if rejected and len(cycle.tokens) > cycle.accepted:
            text = decode(tokenizer, rejected) if stream else " ".join(map(str, rejected)) + " "
            add(text.replace("\n", "⏎").replace("\r", "␍"), REJECTED)
        kept(cycle.tokens[cycle.accepted :], ADDED)
    kept(s.tokens[place:], ADDED)
    if stream:
        add(stream.finish(), ADDED)
    out = Text()
    for text, style in parts:
        if marks and style in MARKS:
            begin, end = MARKS[style]
            shown = text if stream else text[:-1]
            out.append(f"{begin}{shown}{end}{text[len(shown) :]}", style)
        else:
            out.append(text, style)
    legend = Text("\n")
    for text, style in (("drafted and accepted", ACCEPTED), ("rejected", REJECTED), ("the target's own", ADDED)):
        begin, end = MARKS.get(style, ("", "")) if marks else ("", "")
        legend += Text(" · ") if len(legend) > 1 else Text()
        legend += Text(f"{begin}{text}{end}", style)
    return out + legend


def write_svg(colored: Text, title: str, path: Path, columns: int = 96) -> None:
    """Write coloured text as a picture of a terminal.

    Raises:
        DominoError: the file can't be written.
    """
    with Path("/dev/null").open("w") as nowhere:
        console = Console(record=True, width=columns, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(colored)
    try:
        console.save_svg(str(path), title=title)
    except OSError as error:
        raise DominoError(f"{path} can't be written: {first_line(error)}.") from None
