"""`python -m infer`: generate text with Domino, and see what it did.

Generated text, or JSON, goes to standard output; everything else to standard error.
"""

import json
import os
import statistics
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from convert import registry
from convert.progress import progress_bars
from convert.tokenizer import final_answer, has_template
from domino_jax.errors import DominoError
from domino_jax.runtime.files import read_jsonl
from domino_jax.runtime.processes import join_processes, resolve_processes
from infer.output import Notes, Output, Printer, histogram, keep_silent, say, show_drafts, warn
from infer.rows import max_new_tokens, messages_of_row

if TYPE_CHECKING:  # JAX is imported once the words are known to be right
    from convert.loading import LoadedModel
    from infer.conversation import Conversation
    from infer.engine import Engine, Sequence

DONE, FAILED, WRONG_WORDS, CANCELLED = 0, 1, 2, 130
COMPARED_RUNS = 3


@dataclass(frozen=True)
class Generate:
    """Generate with a Qwen3 target and its Domino drafter: the target's own output, sooner."""

    prompt: Positional[str | None] = None
    """the prompt; "-" (or none, in a pipe) reads standard input without its last newline, none at a terminal chats"""
    model: Annotated[str, arg(help=registry.MODEL_HELP)] = "demo"
    draft: Annotated[str | None, arg(help=registry.DRAFT_HELP)] = None
    revision: Annotated[str | None, arg(help=registry.REVISION_HELP)] = None
    draft_revision: Annotated[str | None, arg(help=registry.DRAFT_REVISION_HELP)] = None
    drafts: int | Literal["auto"] | None = None
    """proposals that a cycle verifies, from 1 to all of a block; all when not given. "auto" goes by what they cost here
    and how many are accepted, and drafts none where that is faster; give a number for samples that a seed repeats"""
    head_candidates: int | Literal["all"] = "all"
    """tokens that the causal head scores: about so many of the highest base logits, or all of the vocabulary"""
    draft_dtype: Literal["int8", "float8"] | None = None
    """8 bits for the drafter's matrices: other drafts, the same output (of samples the distribution); --dtype when not
    given"""
    matrices: Literal["auto", "float32", "bfloat16"] = "auto"
    """of float32 runs: how matrices are held that are stored in bfloat16. So is half the memory, at the same precision;
    auto is bfloat16 where this CPU has units for it (AMX), and float32 elsewhere"""
    max_new_tokens: int = 256
    """tokens to generate at most"""
    temperature: float = 0.0
    """0 is greedy"""
    top_k: int = 0
    """draw from the k likeliest tokens; 0 is off"""
    top_p: float = 1.0
    """draw from the likeliest tokens that together have this probability; 1 is off"""
    min_p: float = 0.0
    """drop tokens below this share of the likeliest one's probability; 0 is off"""
    seed: int = 0
    """of the random keys"""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """end before this text"""
    raw: FlagCreatePairsOff[bool] = False
    """no chat template: the model continues the prompt"""
    thinking: FlagCreatePairsOff[bool] = False
    """let a model think before it answers, if it can: thoughts count among --max-new-tokens, and fewer drafts are
    accepted, since drafters are trained without"""
    system: str | None = None
    """system message"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """of weights and caches; by default float32 on CPU, bfloat16 elsewhere"""
    attention: Literal["auto", "xla", "cudnn", "pallas"] = "auto"
    """its form: xla runs anywhere, cudnn on NVIDIA GPUs in bfloat16, pallas on TPUs; auto times those that this device
    can run, and takes the fastest"""
    mesh: str | None = None
    """devices to spread over, "data=2,model=4": rows over data, weights over model; by default those found (one CPU)"""
    coordinator: str | None = None
    """host:port of process 0, where several processes run one model; on a TPU pod they find each other"""
    num_processes: int | None = None
    """how many they are"""
    process_id: int | None = None
    """which this is, from 0"""
    prompts: Path | None = None
    """a batch: JSON lines, each with "prompt", "messages" or "input_ids", and "max_new_tokens" if wanted"""
    batch_size: int = 8
    """prompts of --prompts that run together"""
    input_ids: str | None = None
    """the prompt as token ids, "1,2,3\""""
    compare: FlagCreatePairsOff[bool] = False
    """also run the lean loop without a drafter, and compare tokens and speed"""
    show_drafts: FlagCreatePairsOff[bool] = False
    """colour what was drafted and accepted, what was rejected, and what the target added"""
    json: FlagCreatePairsOff[bool] = False
    """one JSON object per sequence on standard output, and nothing else there"""


@dataclass(frozen=True)
class Prompt:
    """One thing to generate from: raw text, messages or ids, exactly one of them."""

    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    ids: list[int] | None = None
    max_new_tokens: int | None = None
    where: str = "the prompt"  # for errors


def contradictions(options: Generate, chat: bool) -> str | None:
    """What is wrong with the words of the command line, None if nothing is."""
    o = options
    sources = [o.prompt is not None, o.prompts is not None, o.input_ids is not None]
    few = o.head_candidates
    drafting = {
        "--drafts": o.drafts is not None,
        "--head-candidates": o.head_candidates != "all",
        "--draft-dtype": o.draft_dtype is not None,
        "--show-drafts": o.show_drafts,
    }
    without = o.draft == "none"
    rules = (
        (sum(sources) > 1, "give one of PROMPT, --prompts and --input-ids, not several"),
        (o.max_new_tokens < 1, f"--max-new-tokens must be at least 1, found {o.max_new_tokens}"),
        (o.batch_size < 1, f"--batch-size must be at least 1, found {o.batch_size}"),
        (not 0 <= o.temperature < float("inf"), f"--temperature must be 0 or more, found {o.temperature}"),
        (o.top_k < 0, f"--top-k must be 0 or more, found {o.top_k}"),
        (not 0 < o.top_p <= 1, f"--top-p must be above 0 and at most 1, found {o.top_p}"),
        (not 0 <= o.min_p <= 1, f"--min-p must be from 0 to 1, found {o.min_p}"),
        (not 0 <= o.seed < 2**32, f"--seed must be from 0 to 2^32 - 1, found {o.seed}"),
        ("" in o.stop, "--stop must not be empty"),
        (o.system is not None and o.raw, "--system needs the chat template, which --raw turns off"),
        (o.system is not None and o.input_ids is not None, "--system does nothing to --input-ids"),
        (o.thinking and o.raw, "--thinking needs the chat template, which --raw turns off"),
        (o.thinking and o.input_ids is not None, "--thinking does nothing to --input-ids"),
        (o.json and o.show_drafts, "--show-drafts colours text, and --json prints none"),
        (o.draft == "none" and o.compare, "--compare compares with and without a drafter, and --draft none has none"),
        (few != "all" and few < 1, f"--head-candidates must be at least 1, found {few}"),
        *((without and used, f"{flag} needs a drafter, and --draft none has none") for flag, used in drafting.items()),
        (chat and o.json, "--json needs a prompt"),
        (chat and o.compare, "--compare needs a prompt"),
    )
    wrong = next((message for broken, message in rules if broken), None)
    if wrong is None and o.input_ids is not None:
        try:
            parse_ids(o.input_ids)
        except ValueError:
            wrong = f"--input-ids takes whole numbers with commas between them, found {o.input_ids!r}"
    if wrong is None and (o.revision or o.draft_revision) is not None:
        try:
            registry.check_revisions(o.model, o.draft, o.revision, o.draft_revision)
        except DominoError as error:
            wrong = str(error).rstrip(".")
    if wrong is None and o.mesh is not None:
        try:
            parse_mesh(o.mesh)
        except DominoError as error:
            wrong = str(error).rstrip(".")
    if wrong is None:
        try:
            several = resolve_processes(o.coordinator, o.num_processes, o.process_id) is not None
        except DominoError as error:
            wrong = str(error).rstrip(".")
        else:
            if several and (o.prompt == "-" or not any(sources)):
                wrong = "every process needs the same prompt: give it as PROMPT, --prompts or --input-ids"
    return wrong


def parse_mesh(text: str) -> tuple[int, int]:
    """ "data=2,model=4" as (2, 4); raises DominoError."""
    from domino_jax import sharding

    return sharding.parse_mesh(text)


def parse_ids(text: str) -> list[int]:
    """ "1,2,3" as a list; raises ValueError."""
    return [int(part) for part in text.split(",")]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = tyro.cli(Generate, args=argv, prog="python -m infer")
    no_prompt = options.prompt is None and options.prompts is None and options.input_ids is None
    chat = no_prompt and sys.stdin.isatty()
    wrong = contradictions(options, chat)
    if wrong:
        say(f"error: {wrong}.")
        return WRONG_WORDS
    try:
        Session(options).run(chat)
        sys.stdout.flush()
    except DominoError as error:
        say(f"error: {error}")
        return FAILED
    except KeyboardInterrupt:
        return CANCELLED
    except BrokenPipeError:  # whoever read the output has seen enough
        drop_output()
    except OSError as error:  # a full disk behind standard output, say
        drop_output()
        say(f"error: the output can't be written: {error}.")
        return FAILED
    return DONE


def drop_output() -> None:
    """Let what standard output still holds go nowhere: Python would fail on it once more at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_prompts(path: Path) -> list[Prompt]:
    """The rows of a JSON lines file.

    Raises:
        DominoError: it can't be read, or a row is not of the form that --prompts takes.
    """
    return [_parse_row(line.value, line.where) for line in read_jsonl(path, "prompts")]


def _parse_row(row: Any, where: str) -> Prompt:
    kinds = {
        "prompt": lambda v: isinstance(v, str),
        "messages": lambda v: isinstance(v, list) and bool(v) and all(isinstance(m, dict) for m in v),
        "input_ids": lambda v: isinstance(v, list) and all(type(i) is int for i in v),
    }
    given = [key for key in kinds if isinstance(row, dict) and key in row]
    if len(given) != 1 or not kinds[given[0]](row[given[0]]):
        raise DominoError(
            f'{where} must have one of "prompt" (a string), "messages" (a list of objects) and "input_ids" (integers).'
        )
    limit = max_new_tokens(row, where)
    messages = messages_of_row(row, where) if "messages" in row else None
    return Prompt(row.get("prompt"), messages, row.get("input_ids"), limit, where)


class Session:
    """One run of the command: a loaded model, and what the options ask of it."""

    engine: "Engine"
    loaded: "LoadedModel"

    def __init__(self, options: Generate):
        self.options = o = options
        first = join_processes(resolve_processes(o.coordinator, o.num_processes, o.process_id))
        if not first:
            keep_silent()
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (for the rest of this process)
        self.console = Output(highlight=False, soft_wrap=True, emoji=False)
        self.notes = Notes(stderr=True, highlight=False, soft_wrap=True, emoji=False, quiet=not first)
        self.finished: list[list[Sequence]] = []  # batch after batch, for the summary
        self.comparison: list[dict[str, Any]] = []

    def run(self, chat: bool) -> None:
        """Generate what the options ask for."""
        prompts = [] if chat else self._read()  # before loading, which takes longer
        self._load()
        if chat:
            self._chat()
            return
        sequences, warnings = [], []
        for row, prompt in enumerate(prompts):
            sequence, more = self._sequence(prompt, row)
            sequences.append(sequence)
            warnings += more
        warn(warnings)
        size = min(self.options.batch_size, len(sequences))
        try:
            for start in range(0, len(sequences), size):
                self._batch(sequences[start : start + size], size, len(sequences))
        finally:
            self._summary()

    def _read(self) -> list[Prompt]:
        o = self.options
        if o.prompts:
            return read_prompts(o.prompts)
        if o.input_ids is not None:
            return [Prompt(ids=parse_ids(o.input_ids))]
        text = o.prompt
        if text is None or text == "-":
            try:
                text = sys.stdin.read().removesuffix("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise DominoError(f"standard input can't be read: {error}.") from None
        return [Prompt(text=text)]

    def _load(self) -> None:
        o = self.options
        fewer = o.head_candidates != "all" or o.draft_dtype is not None
        drafting = o.compare or o.show_drafts or o.drafts is not None or fewer
        if drafting and registry.locate(o.model, o.draft)[1] is None:  # before anything is fetched
            raise DominoError(
                "--compare, --show-drafts, --drafts, --head-candidates and --draft-dtype need a drafter: give one with "
                "--draft DIR."
            )
        from convert import loading
        from domino_jax.runtime.compile_cache import enable_compile_cache
        from infer.engine import Engine

        enable_compile_cache()
        how: dict[str, Any] = {
            "dtype": o.dtype,
            "drafts": None if o.drafts == "auto" else o.drafts,
            "mesh": parse_mesh(o.mesh) if o.mesh is not None else None,
            "attention": o.attention,
            "candidates": None if o.head_candidates == "all" else o.head_candidates,
            "draft_dtype": o.draft_dtype,
            "matrices": o.matrices,
        }
        check = partial(loading.plan_load, **how)
        target, draft = registry.resolve_folders(o.model, o.draft, self.notes, o.revision, o.draft_revision, check)
        with progress_bars(self.notes) as progress:
            self.loaded = loading.load_model(target, draft, progress=progress, **how)
        warn(self.loaded.warnings)
        self.engine = Engine(self.loaded, auto=o.drafts == "auto", report=say)
        if o.system is not None and not self._is_chat():
            raise DominoError("this model has no chat template, so --system has no place to go.")
        if o.thinking:
            warn(self._thinking())

    def _thinking(self) -> list[str]:
        """What to know about --thinking with this model.

        Raises:
            DominoError: it has no chat template.
        """
        from infer import text

        if not self._is_chat():
            raise DominoError("this model has no chat template, which --thinking needs.")
        if not text.knows_thinking(self.loaded.tokenizer):
            return ["--thinking changes nothing: this model's chat template knows no enable_thinking."]
        if self.loaded.configs.draft:
            return ["drafters are trained with thinking off: with --thinking fewer drafts will be accepted."]
        return []

    def _is_chat(self) -> bool:
        """Whether prompts go through the model's chat template."""
        return not self.options.raw and has_template(self.loaded.tokenizer)

    def _ids(self, prompt: Prompt) -> list[int]:
        """The ids that the model is given."""
        from infer import text

        if prompt.ids is not None:
            return prompt.ids
        if self.loaded.tokenizer is None:
            raise DominoError("the model's folder has no tokenizer: give the prompt with --input-ids.")
        messages = prompt.messages
        if messages is None:
            if not prompt.text:
                raise DominoError("the prompt is empty.")
            if not self._is_chat():
                return text.encode(self.loaded.tokenizer, prompt.text)
            messages = [{"role": "user", "content": prompt.text}]
        elif self.options.raw:
            raise DominoError("messages need the chat template, which --raw turns off.")
        if self.options.system is not None and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": self.options.system}, *messages]
        return text.encode_chat(self.loaded.tokenizer, messages, self.options.thinking)

    def _sequence(self, prompt: Prompt, row: int) -> "tuple[Sequence, list[str]]":
        """What to generate for a prompt, with warnings; errors and warnings say where in a file it stands."""
        o = self.options
        where = f"{prompt.where}: " if o.prompts else ""
        try:
            limit = prompt.max_new_tokens or o.max_new_tokens
            sequence, warnings = self.engine.sequence(self._ids(prompt), limit, row, o.stop)
        except DominoError as error:
            raise DominoError(f"{where}{error}") from None
        return sequence, [where + warning for warning in warnings]

    def _generate(self, sequences: "list[Sequence]", **how: Any) -> None:
        from domino_jax.sampling import SamplingParams

        o = self.options
        self.engine.generate(sequences, SamplingParams(o.temperature, o.top_k, o.top_p, o.min_p), o.seed, **how)

    def _batch(
        self, sequences: "list[Sequence]", size: int, total: int, conversation: "Conversation | None" = None
    ) -> None:
        """Generate and print one batch; also what there is of it when the user cancels."""
        o = self.options
        single = total == 1
        stream = single and not o.json and not o.show_drafts and self.loaded.tokenizer is not None
        before = None
        if stream and not self._is_chat() and o.prompt not in (None, "-") and self.console.is_terminal:
            before = partial(self.console.print, o.prompt, style="dim", end="", markup=False)
        printed = Printer(sequences[0], before)
        self.finished.append(sequences)
        cancelled, result = False, None
        try:
            try:
                update = printed.more if stream else None
                self._generate(sequences, update=update, batch=size, conversation=conversation)
            finally:
                if stream:
                    printed.end()
            result = self._compare(sequences, size) if o.compare else None
        except KeyboardInterrupt:
            cancelled = True
        for s in sequences:
            if o.json:
                print(json.dumps(self._record(s, result)), flush=True)
            elif not stream:
                self._show(s, None if single else s.row)
        if not single:
            self._progress(total)
        if cancelled:
            raise KeyboardInterrupt

    def _record(self, s: "Sequence", comparison: dict[str, Any] | None) -> dict[str, Any]:
        """What --json prints of a sequence."""
        from infer.engine import tau

        record = {
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
            "seconds": {"load": self.loaded.seconds, **s.seconds},
            "tokens_per_second": s.tokens_per_second,
        }
        if comparison:
            identical = comparison["identical"]
            record["compare"] = comparison | {"identical": identical and identical[s.row]}
        return record

    def _show(self, s: "Sequence", row: int | None) -> None:
        """A finished sequence for people."""
        if row is not None:
            self.console.print(f"── {row}", style="bold")
        if self.options.show_drafts:
            show_drafts(self.console, s, self.loaded.tokenizer)
        else:
            print(",".join(map(str, s.tokens)) if s.text is None else s.text)

    def _compare(self, sequences: "list[Sequence]", size: int) -> dict[str, Any]:
        """Time both loops in turns, warmed up, on the same prompts.

        The tokens of the sampling loops differ by design: they follow the same distribution, but
        use their random numbers differently. Only greedy ones are compared.
        """
        from infer.engine import tokens_per_second

        def again(speculative: bool) -> "list[Sequence]":
            fresh = [self.engine.sequence(s.prompt, s.limit, s.row, self.options.stop)[0] for s in sequences]
            self._generate(fresh, speculative=speculative, batch=size)
            return fresh

        lean = again(False)
        rates: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(COMPARED_RUNS):
            for speculative, collected in rates.items():
                rate = tokens_per_second(again(speculative))
                if rate is not None:
                    collected.append(rate)
        ours, plain = (statistics.median(r) if r else None for r in rates.values())
        identical = None
        if self.options.temperature == 0:
            identical = {s.row: s.tokens == other.tokens for s, other in zip(sequences, lean, strict=True)}
        result = {
            "tokens_per_second": ours,
            "lean_tokens_per_second": plain,
            "speedup": ours / plain if ours and plain else None,
            "identical": identical,
        }
        self.comparison.append(result)
        return result

    def _progress(self, total: int) -> None:
        """Where a file of prompts stands."""
        done = sum(map(len, self.finished))
        tokens = sum(len(s.tokens) for batch in self.finished for s in batch)
        rate = _overall_rate(self.finished)
        say(f"{done}/{total} prompts, {tokens} tokens" + (f", {rate:.0f} tokens/s" if rate else ""))

    def _summary(self) -> None:
        """τ, accepted lengths, speed and the comparison, on standard error."""
        from infer.engine import PHASES, tau

        sequences = [s for batch in self.finished for s in batch]
        if not sequences:
            return
        show = self.notes.print
        total = {phase: sum(max(s.seconds[phase] for s in batch) for batch in self.finished) for phase in PHASES}
        tokens, reused = sum(len(s.tokens) for s in sequences), sum(s.reused for s in sequences)
        run = sum(len(s.prompt) for s in sequences) - reused
        rate = _overall_rate(self.finished)
        show(f"\n{tokens} tokens" + (f", decoded at [bold]{rate:.1f} tokens/s[/]" if rate else ""))
        show(
            f"load {self.loaded.seconds:.2f} s · compile {total['compile']:.2f} s · "
            f"prefill {total['prefill']:.3f} s ({run} tokens{f', {reused} reused' if reused else ''}) · "
            + (f"calibrate {total['calibrate']:.2f} s · " if total["calibrate"] else "")
            + f"decode {total['decode']:.3f} s",
            style="dim",
        )
        for chooser in self.engine.choosers.values():
            show(f"drafts auto: {chooser}")
        accepted = [n for s in sequences for n in s.accepted]
        if accepted:
            show(f"τ = [bold]{tau(accepted):.2f}[/] tokens a cycle, over {len(accepted)} cycles; drafts accepted:")
            for line in histogram(accepted, self.loaded.configs.proposals):
                show(line)
        if self.comparison:
            self._summarise_comparison()

    def _summarise_comparison(self) -> None:
        show = self.notes.print
        runs = [c for c in self.comparison if c["speedup"]]
        for c in runs:
            show(
                f"with drafts {c['tokens_per_second']:.1f} tokens/s · "
                f"lean loop {c['lean_tokens_per_second']:.1f} tokens/s · "
                f"[bold]{c['speedup']:.2f}×[/] (median of {COMPARED_RUNS} runs in turns)"
            )
        if not runs:
            show("one token comes from the prefill: there is no decoding to compare.")
        if self.options.temperature > 0:
            show("samples of the two loops differ by design (same distribution): only the speed is compared.")
            return
        different = [row for c in self.comparison for row, same in c["identical"].items() if not same]
        if not different:
            show("tokens: [bold green]identical[/]")
            return
        show(f"tokens: [bold red]different[/] in {len(different)} sequences (the first: {different[0]})")
        if self.loaded.dtype != "float32":
            show("in bfloat16 two logits can tie to rounding, and the two loops may then break the tie differently.")

    def _chat(self) -> None:
        """Talk until the end of input: the whole conversation is the prompt of every turn, and what of it an earlier
        turn has run is not run again.

        A model without a chat template continues each line by itself.
        """
        from infer import chat
        from infer.conversation import Conversation

        say("Chat: Ctrl-C stops an answer, Ctrl-D ends.")
        messages: list[dict[str, str]] = []
        conversation = Conversation()
        for line in chat.lines():
            self.finished, self.comparison = [], []
            messages.append({"role": "user", "content": line})
            try:
                prompt = Prompt(messages=list(messages)) if self._is_chat() else Prompt(text=line)
                sequence, warnings = self._sequence(prompt, 0)
                warn(warnings)
                with suppress(KeyboardInterrupt):
                    self._batch([sequence], 1, 1, conversation)
                self._summary()
                said = sequence.text or ""
                answer = final_answer(said) if self.options.thinking else said
                messages.append({"role": "assistant", "content": answer})
            except DominoError as error:
                say(f"error: {error} The conversation starts over.")
                messages = []


def _overall_rate(batches: "list[list[Sequence]]") -> float | None:
    """Decoded tokens per second over batches that ran one after another."""
    seconds = sum(max(s.seconds["decode"] for s in batch) for batch in batches)
    tokens = sum(max(len(s.tokens) - 1, 0) for batch in batches for s in batch)
    return tokens / seconds if seconds else None


if __name__ == "__main__":
    sys.exit(main())
