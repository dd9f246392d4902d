"""The options of `python -m infer`, and what of them makes no sense together."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import DisallowNone, Positional, UseAppendAction, arg

from convert.options import (
    GROUP,
    UNSET,
    Flag,
    ModelOptions,
    ProcessOptions,
    SamplingOptions,
    check_count,
    check_file,
    in_8_bits,
)
from convert.values import shown
from domino_jax.runtime.command import UsageError
from infer.prompts import parse_ids

NumDraftTokens = int | Literal["auto"]
# --drafts is the older name of the flag.
NUM_DRAFT_TOKENS = arg(name="drafts", aliases=("--num-draft-tokens",))  # the help puts aliases first


@dataclass(frozen=True)
class InputOptions:
    """Prompts."""

    prompts: Annotated[Path | None, DisallowNone, UNSET] = None
    """a batch: JSON lines with "prompt", "messages" or "input_ids", and "max_new_tokens" if wanted"""
    batch_size: int = 8
    """prompts of --prompts that run together"""
    input_ids: Annotated[str | None, DisallowNone, UNSET] = None
    """the prompt as token ids, such as 1,2,3"""
    raw: Flag = False
    """do not apply the chat template: the model continues the prompt"""
    system: Annotated[str | None, DisallowNone, UNSET] = None
    """system message"""
    thinking: Flag = False
    """let the model think before it answers; thoughts count as new tokens, and fewer drafts are accepted"""


@dataclass(frozen=True)
class OutputOptions:
    """What is generated and printed."""

    max_new_tokens: int = 256
    """most tokens to generate"""
    stop: Annotated[UseAppendAction[tuple[str, ...]], UNSET] = ()
    """end before this text; may be given several times"""
    json: Flag = False
    """print one JSON object per sequence on standard output, and nothing else there"""
    compare: Flag = False
    """also run the autoregressive baseline, and compare tokens and speed"""
    show_drafts: Flag = False
    """colour the tokens: drafted and accepted, rejected, or the target's own (brackets where there are no colours)"""
    svg: Annotated[Path | None, DisallowNone, UNSET] = None
    """with --show-drafts: also write the coloured text to this file"""


@dataclass(frozen=True)
class Generate:
    """Generate with a target and its Domino drafter: the same output, sooner."""

    prompt: Annotated[Positional[str | None], UNSET, arg(metavar="PROMPT")] = None
    """the prompt. "-", or none in a pipe, reads standard input; none at a terminal starts a chat"""
    model: Annotated[ModelOptions, GROUP] = field(default_factory=ModelOptions)
    num_draft_tokens: Annotated[NumDraftTokens | None, DisallowNone, UNSET, NUM_DRAFT_TOKENS] = None
    """draft tokens verified per cycle; auto, the default, chooses by measured time and acceptance"""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    generation_config: Literal["auto", "none"] = "auto"
    """in a chat without sampling options: sample as the checkpoint's generation_config.json says, or not"""
    input: InputOptions = field(default_factory=InputOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    processes: ProcessOptions = field(default_factory=ProcessOptions)

    @property
    def has_prompt(self) -> bool:
        """Whether the words name a prompt."""
        return any(given is not None for given in (self.prompt, self.input.prompts, self.input.input_ids))

    def check(self, chat: bool) -> None:
        """Check the options before anything is loaded.

        Args:
            chat: the prompts will be typed at the terminal.

        Raises:
            UsageError: they contradict each other, or a value is out of range.
        """
        self.model.check()
        self.sampling.check()
        given, output, few = self.input, self.output, self.num_draft_tokens
        sources = [self.prompt is not None, given.prompts is not None, given.input_ids is not None]
        without = self.model.plain
        check_count("max_new_tokens", output.max_new_tokens)
        check_count("batch_size", given.batch_size)
        check_file("svg", output.svg, given.prompts, self.model.model, self.model.draft)
        rules = (
            (sum(sources) > 1, "give one of PROMPT, --prompts and --input-ids, not several"),
            (
                isinstance(few, int) and few < 1,
                f"--num-draft-tokens must be at least 1, found {few}; --draft none decodes without drafts",
            ),
            ("" in output.stop, "--stop must not be empty"),
            (given.system is not None and given.raw, "--system needs the chat template, which --raw turns off"),
            (given.system is not None and given.input_ids is not None, "--system does nothing to --input-ids"),
            (given.thinking and given.raw, "--thinking needs the chat template, which --raw turns off"),
            (given.thinking and given.input_ids is not None, "--thinking does nothing to --input-ids"),
            (output.json and output.show_drafts, "--show-drafts colours text, and --json prints none"),
            (output.svg and not output.show_drafts, "--svg writes what --show-drafts shows: add --show-drafts"),
            (output.svg and chat, "--svg needs a prompt"),
            (without and output.compare, "--compare needs a drafter, and --draft none has none"),
            (without and few is not None, "--num-draft-tokens (--drafts) needs a drafter, and --draft none has none"),
            (
                isinstance(few, int) and self.model.drafting.tree is not None,
                "--tree says how many drafts a cycle verifies: leave --num-draft-tokens (--drafts) out",
            ),
            (without and output.show_drafts, "--show-drafts needs a drafter, and --draft none has none"),
            (chat and self.has_prompt, "a chat reads its prompts line by line: leave the prompt out"),
            (chat and output.json, "--json needs a prompt"),
            (chat and output.compare, "--compare needs a prompt"),
        )
        for broken, message in rules:
            if broken:
                raise UsageError(f"{message}.")
        if given.input_ids is not None:
            try:
                parse_ids(given.input_ids)
            except ValueError:
                raise UsageError(
                    f"--input-ids takes whole numbers with commas between them, found {shown(given.input_ids)}."
                ) from None
        if self.processes.resolve() is not None and (self.prompt == "-" or not self.has_prompt):
            raise UsageError("every process needs the same prompt: give it as PROMPT, --prompts or --input-ids.")

    @property
    def drafting_flags(self) -> list[str]:
        """The flags given that need a drafter."""
        drafting = self.model.drafting
        flags = {
            "--compare": self.output.compare,
            "--show-drafts": self.output.show_drafts,
            "--num-draft-tokens": self.num_draft_tokens is not None,
            "--head-candidates": drafting.head_candidates != "all",
            "--draft-weights": in_8_bits(drafting.draft_weights),
            "--tree": drafting.tree is not None,
            "--confidence-threshold": drafting.confidence_threshold is not None,
        }
        return [flag for flag, given in flags.items() if given]
