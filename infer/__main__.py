"""`python -m infer`: generate text with Domino, and see what it did.

Generated text, or JSON, goes to standard output; everything else to standard error.
"""

import os
import sys
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from convert import registry
from convert.progress import progress_bars
from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.command import end_process, print_error, run_command
from domino_jax.runtime.processes import join_processes
from infer.options import Generate
from infer.output import (
    Notes,
    Output,
    Printer,
    RunSummary,
    color_drafts,
    keep_silent,
    record,
    say,
    warn,
    write_svg,
)
from infer.prompts import Encoder, Prompt, parse_ids, read_prompts

if TYPE_CHECKING:  # JAX is imported once the words are known to be right
    from convert.loading import LoadedModel
    from infer import engine
    from infer.compare import Comparison
    from infer.engine import Chunk, Decoding


def main(argv: Sequence[str] | None = None, prog: str = "python -m infer") -> int:
    """Run the command line; returns the exit code."""
    return run_command(Generate, run_generate, argv, prog=prog)


def main_chat(argv: Sequence[str] | None = None, prog: str = "domino chat") -> int:
    """A chat, also where standard input is no terminal; returns the exit code."""
    return run_command(Generate, partial(run_generate, chat=True), argv, prog=prog)


def run_generate(options: Generate, chat: bool = False) -> None:
    """Generate what the options ask for.

    Args:
        chat: talk, whatever standard input is; otherwise if there is no prompt and it is a terminal.

    Raises:
        UsageError: they make no sense.
        DominoError: something of it can't be done.
        KeyboardInterrupt: the user cancelled; what was generated has been printed.
    """
    chat = chat or (not options.has_prompt and sys.stdin.isatty())
    options.check(chat)
    first = join_processes(options.processes.resolve())
    if not first:
        keep_silent()
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (for the rest of this process)
    notes = Notes(stderr=True, highlight=False, soft_wrap=True, emoji=False, quiet=not first)
    prompts = [] if chat else read_input(options)  # before loading, which takes longer
    session = Session(options, load_session(options, notes), notes)
    if chat:
        session.chat()
    else:
        session.generate(prompts)


def read_input(options: Generate) -> list[Prompt]:
    """The prompts that the options name.

    Raises:
        DominoError: a file or standard input can't be read, or a row is malformed.
    """
    if options.input.prompts:
        return read_prompts(options.input.prompts)
    if options.input.input_ids is not None:
        return [Prompt(ids=parse_ids(options.input.input_ids))]
    text = options.prompt
    if text is None or text == "-":
        try:
            text = sys.stdin.read().removeprefix("\ufeff").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DominoError(f"standard input can't be read: {first_line(error)}.") from None
    return [Prompt(text=text)]


def load_session(options: Generate, notes: Notes) -> "LoadedModel":
    """The model that the options name.

    Raises:
        DominoError: see `convert.options.load_pair`; or an option needs a drafter, and there is none.
    """
    found = registry.locate(options.model.model, options.model.draft)[1]
    if options.drafting_flags and found is None and not options.model.ngram:
        flags, are = " and ".join(options.drafting_flags), "needs" if len(options.drafting_flags) == 1 else "need"
        raise DominoError(f"{flags} {are} a drafter: give one with --draft DIR.")  # before anything is fetched
    from convert.options import load_pair
    from domino_jax.runtime.compile_cache import enable_compile_cache

    enable_compile_cache()
    fixed = options.num_draft_tokens if isinstance(options.num_draft_tokens, int) else None
    with progress_bars(notes) as progress:
        loaded = load_pair(options.model, notes, num_draft_tokens=fixed, progress=progress)
    warn(loaded.warnings)
    return loaded


class Session:
    """A loaded model, and what the options ask of it."""

    def __init__(self, options: Generate, loaded: "LoadedModel", notes: Notes):
        """Raises: DominoError: the model lacks the chat template that an option needs."""
        from infer.engine import Engine

        self.options = options
        self.loaded = loaded
        auto = options.num_draft_tokens in (None, "auto")
        self.engine: Engine = Engine(loaded, auto=auto, warn=lambda warning: warn([warning]))
        self.console = Output(highlight=False, soft_wrap=True, emoji=False)
        self.summary = RunSummary(loaded, notes)
        given = options.input
        self.encoder = Encoder(loaded.tokenizer, given.raw, given.thinking, given.system)
        warn(self.encoder.check(loaded.has_block_drafter))
        if loaded.tokenizer is not None:
            from infer.text import unmatched_stops

            warn(unmatched_stops(loaded.tokenizer, options.output.stop, loaded.stop_ids))

    def generate(self, prompts: list[Prompt]) -> None:
        """Generate and print all prompts, batch after batch."""
        sequences, warnings = [], []
        for row, prompt in enumerate(prompts):
            sequence, more = self._sequence(prompt, row)
            sequences.append(sequence)
            warnings += more
        warn(warnings)
        size = min(self.options.input.batch_size, len(sequences))
        how, groups = self._decoding(size), [sequences]
        if self.options.output.compare:  # what is compared runs as closed batches
            groups = [sequences[start : start + size] for start in range(0, len(sequences), size)]
        try:
            for group in groups:
                self._print_group(group, self.engine.stream(group, how), how, len(sequences))
        finally:
            self.summary.show(self.engine.auto)

    def chat(self) -> None:
        """Talk until the end of input."""
        from convert.generation import recommended_sampling
        from convert.not_finite import NotFiniteError
        from infer.chat import Chat, read_lines
        from infer.engine import Decoding

        say("Chat: Ctrl-C stops an answer, Ctrl-D ends.")
        sampling, folder = self.options.sampling, self.loaded.folder
        if self.options.generation_config == "auto" and folder is not None:
            sampling = sampling.or_else(recommended_sampling(folder))
        output, how = self.options.output, Decoding(sampling.params(), rows=1)
        chat = Chat(self.engine, self.encoder, how, output.max_new_tokens, output.stop)
        for line in read_lines():
            self.summary = RunSummary(self.loaded, self.summary.notes)
            try:
                turn, warnings = chat.begin(line)
                warn(warnings)
                with suppress(KeyboardInterrupt):
                    self._print_group([turn], chat.decode(turn), how, 1)
                self.summary.show(self.engine.auto)
            except NotFiniteError:
                raise
            except DominoError as error:
                print_error(f"{error} The conversation starts over.")
                chat.start_over()

    def _decoding(self, rows: int) -> "Decoding":
        from infer.engine import Decoding

        return Decoding(self.options.sampling.params(), rows=rows)

    def _sequence(self, prompt: Prompt, row: int) -> "tuple[engine.Sequence, list[str]]":
        """What to generate for a prompt, with warnings; errors and warnings say where in a file it stands."""
        output, where = self.options.output, f"{prompt.where}: " if prompt.where else ""
        try:
            limit = prompt.max_new_tokens or output.max_new_tokens
            sequence, warnings = self.engine.sequence(self.encoder.ids(prompt), limit, row, output.stop)
        except DominoError as error:
            raise DominoError(f"{where}{error}") from None
        return sequence, [where + warning for warning in warnings]

    def _print_group(
        self, group: "list[engine.Sequence]", chunks: "Generator[Chunk]", how: "Decoding", total: int
    ) -> None:
        """Generate sequences and print each once it and those before it are finished, also what there is when the user
        cancels, and what was done at an error.

        Args:
            total: sequences of the whole run; a single one is printed as it grows.
        """
        output, comparison = self.options.output, None
        ended: BaseException | None = None
        streamed = total == 1 and not output.json and not output.show_drafts and self.loaded.tokenizer is not None
        printer = Printer(group[0], self._print_prompt) if streamed else None
        waiting, told = list(group), 0
        try:
            try:
                with closing(chunks):
                    for chunk in chunks:
                        if printer:
                            printer.add(chunk)
                            continue
                        while not output.compare and waiting and waiting[0].finish_reason is not None:
                            self._print_finished(waiting.pop(0), None, total)
                        done = sum(s.finish_reason is not None for s in group)
                        if total > 1 and (done - told >= how.rows or told < done == len(group)):
                            told = done
                            say(f"{len(self.summary.sequences) + done}/{total} prompts")
            finally:
                self.summary.add(group, self.engine.seconds)
                if printer:
                    printer.end()
            if output.compare:
                from infer.compare import compare

                comparison = compare(self.engine, group, how, output.stop)
                self.summary.comparisons.append(comparison)
        except (KeyboardInterrupt, DominoError) as error:
            ended = error
        for s in waiting:
            if s.finish_reason is not None and not printer:  # others failed
                self._print_finished(s, comparison, total)
        if ended:
            raise ended

    def _print_prompt(self) -> None:
        """At a terminal, the prompt that a model without a template continues."""
        prompt = self.options.prompt
        if prompt not in (None, "-") and not self.encoder.is_chat and self.console.is_terminal:
            self.console.print(prompt, style="dim", end="", markup=False)

    def _print_finished(self, s: "engine.Sequence", comparison: "Comparison | None", total: int) -> None:
        """A finished sequence, as JSON or for people."""
        output = self.options.output
        if output.json:
            print(record(s, self.loaded.seconds, comparison), flush=True)
            return
        if total > 1:
            self.console.print(f"── {s.row}", style="bold")
        if not output.show_drafts:
            print(",".join(map(str, s.tokens)) if s.text is None else s.text)
            return
        self.console.print(color_drafts(s, self.loaded.tokenizer, marks=not self.console.is_colored))
        if output.svg:
            prompt = f'"{self.options.prompt}" ' if self.options.prompt else ""
            write_svg(color_drafts(s, self.loaded.tokenizer), f"python -m infer {prompt}--show-drafts", output.svg)


if __name__ == "__main__":
    end_process(main())
