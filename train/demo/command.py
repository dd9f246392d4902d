"""Make the shipped pair, or its drafter alone, from nothing: one command for the commands of its model card.

    python -m train demo --out work                     # target, data, drafter: three to four hours on two cores
    python -m train demo --out work --target demo       # data and drafter for the target that is shipped

Each command is printed before it runs. What an earlier start has finished is not run again, and what it began goes on.
"""

import dataclasses
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from convert.options import absolute, check_count, local_sources
from domino_jax.runtime.command import own_command, own_environment, run_command
from domino_jax.runtime.files import lock_folder
from train.begun import keep_settings
from train.options import SETTINGS

# glibc gives XLA's large buffers back to the system after every step, and asks for them again at the next.
ALLOCATOR = (
    "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"
)
TEMPERATURES = (0.7, 0.3)  # of the answers, half each


@dataclass(frozen=True)
class Demo:
    """Make a small Qwen3 target and its Domino drafter from nothing."""

    out: Path
    """folder for all of it"""
    target: str | None = None
    """the target to train a drafter for (demo: the shipped one); pre-trained first when not given"""
    text: Path | None = None
    """folder of text files to learn from; transformers' own model code when not given"""
    files: str = "modeling_*.py"
    """pattern for the names of the files to read in it"""
    pretrain_steps: int = 700
    prompts: int = 12800
    """for the target to continue: the drafter's data"""
    held_out: int = 160
    """prompts to measure with"""
    new_tokens: int = 144
    """of each continuation"""
    steps: int = 6200
    """of the drafter"""


class Stage(NamedTuple):
    """One command."""

    words: list[str]  # after python -m
    done: tuple[Path, ...]  # are there once it has ended well; a command that goes on by itself names the run's end


def stages(options: Demo) -> Iterator[Stage]:
    """The commands, in order."""
    o, out = options, options.out
    text = [*(["--text", str(o.text)] if o.text else []), "--files", o.files]
    target = o.target or str(out / "target")
    if o.target is None:
        words = ["train.pretrain", "--out", target, "--steps", str(o.pretrain_steps), *text]
        yield Stage(words, (out / "target" / "generation_config.json",))
    each = o.prompts // len(TEMPERATURES)
    prompts = [out / f"prompts{i}.jsonl" for i in range(len(TEMPERATURES))]
    held = out / "heldout.jsonl"
    cut = ["train.prompts", "--tokenizer", target, *text]
    for seed, path in enumerate(prompts):
        yield Stage([*cut, "--out", str(path), "--count", str(each), "--seed", str(seed)], (path,))
    seed = len(prompts)
    yield Stage([*cut, "--out", str(held), "--count", str(o.held_out), "--seed", str(seed), "--held-out"], (held,))
    answers = [out / f"answers{i}.jsonl" for i in range(len(TEMPERATURES))]
    # An interrupted training leaves a drafter too; the last step's checkpoint is there when it has ended.
    trained = out / "run" / "checkpoints" / str(o.steps), out / "run" / "drafter" / "config.json"
    for seed, (temperature, source, path) in enumerate(zip(TEMPERATURES, prompts, answers, strict=True)):
        words = ["train.regenerate", "--target", target, "--data", str(source), "--out", str(path), "--seed", str(seed)]
        words += ["--temperature", str(temperature), "--top-k", "0", "--top-p", "1", "--draft", "none"]
        yield Stage([*words, "--max-new-tokens", str(o.new_tokens)], trained)
    if (out / "run" / SETTINGS).exists():
        words = ["train", "--resume", "--out", str(out / "run")]
    else:
        words = ["train", "--config", "demo", "--target", target, "--data", *map(str, answers), "--steps", str(o.steps)]
        words += ["--validation", str(held), "--out", str(out / "run")]
    yield Stage(words, trained)
    seed, other, drafter = seed + 1, out / "calibration.jsonl", out / "draft"
    words = [*cut, "--out", str(other), "--count", str(2 * o.held_out), "--seed", str(seed), "--held-out"]
    yield Stage(words, (other,))
    words = ["train", "calibrate", "--target", target, "--draft", str(out / "run" / "drafter"), "--out", str(drafter)]
    yield Stage([*words, "--prompts", str(other), "--min-distinct", "0.8"], (drafter / "calibration.json",))
    words = ["train.validate", "--target", target, "--draft", str(drafter), "--prompts", str(held)]
    yield Stage([*words, "--min-distinct", "0.8"], (out / "never",))


def run_demo(options: Demo) -> int:
    """Run what is missing; the first exit status that is not 0.

    Raises:
        UsageError: a number makes no sense.
    """
    least = {"prompts": len(TEMPERATURES), "pretrain_steps": 1, "held_out": 1, "new_tokens": 2, "steps": 1}
    for name, low in least.items():
        check_count(name, getattr(options, name), low)
    o = options
    with lock_folder(o.out, "a demo", local_sources(o.target, o.text)):
        settings = dataclasses.asdict(o) | {"target": absolute(o.target), "text": absolute(o.text)}
        del settings["out"]
        keep_settings(o.out / "demo.settings.json", o.out, settings)
        return _run(o)


def _run(options: Demo) -> int:
    environment = {"GLIBC_TUNABLES": ALLOCATOR} | own_environment()
    for stage in stages(options):
        if all(path.exists() for path in stage.done):
            continue
        print("\n$ python -m " + " ".join(stage.words), flush=True)
        status = subprocess.run(own_command(stage.words), env=environment).returncode
        if status:
            return status
    return 0


def main(argv: Sequence[str] | None = None, prog: str = "python -m train demo") -> int:
    """Run the command line; returns the exit code."""
    return run_command(Demo, run_demo, argv, prog=prog)
