"""What all commands share: how words are read, exit codes, Ctrl-C, standard streams and how a process ends.

Exit codes: 0 done, 1 failed (one sentence on standard error), 2 the words make no sense, 130 Ctrl-C. A reader of
standard output that leaves early (`| head`) is no error, nor is one that was never there (`>&-`). Of several processes
that run one model, 143 is SIGTERM, and when one ends early, all do.
"""

import io
import os
import re
import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from typing import Any, NamedTuple, NoReturn, TypeVar

import tyro

from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.extras import explain_missing_extra
from domino_jax.runtime.interrupts import careful_interrupts

DONE, FAILED, USAGE_ERROR, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

_broken_off = False  # whether the work of this process ended by an exception

T = TypeVar("T")
ESCAPES = r"\x1b\[[0-9;]*m"  # colours of a terminal


class UsageError(DominoError):
    """The words of a command line make no sense; the command ends with exit code 2."""


class Subcommand(NamedTuple):
    """A command behind a word of another command."""

    module: str  # whose function(argv, prog) runs it; imported only then
    summary: str  # one line of the other command's help
    function: str = "main"


def run_command(
    options: type[T], action: Callable[[T], int | None], argv: Sequence[str] | None = None, *, prog: str
) -> int:
    """Read the words into options, do the action, and return the exit code.

    Args:
        options: a dataclass for tyro; flags of nested dataclasses have no prefix.
        action: returns an exit code, None for 0; raises UsageError for options that make no sense together.
        argv: the words; the process's own when None.
        prog: the command as the user types it, for the help.
    """
    return exit_code(lambda: action(parse_words(options, argv, prog=prog)))


def parse_words(
    options: type[T], argv: Sequence[str] | None = None, *, prog: str, default: T | None = None, epilog: str = ""
) -> T:
    """The options that the words give.

    Args:
        default: values of what the words leave out; the dataclass's own when None.
        epilog: text of the help after the dataclass's docstring.

    Raises:
        UsageError: a word is unknown, or a value is not of its option's type.
        SystemExit: the help was asked for, and was printed.
    """
    how: dict[str, Any] = {"description": f"{options.__doc__}\n\n{epilog}"} if epilog else {}
    if default is not None:
        how["default"] = default
    said, help_text = io.StringIO(), _Captured()
    try:
        with redirect_stderr(said), redirect_stdout(help_text):
            return tyro.cli(options, args=argv, prog=prog, config=(tyro.conf.OmitArgPrefixes,), **how)
    except SystemExit as end:
        if not end.code:
            print(_wrap_help(help_text.getvalue()), end="")
            raise
        raise UsageError(_sentence(said.getvalue(), prog)) from None


def exit_code(action: Callable[[], int | None]) -> int:
    """Do the action, say in one sentence what went wrong, and return the exit code.

    Args:
        action: returns an exit code, None for 0. SystemExit, as after a help, ends it too.
    """
    global _broken_off
    code: int | None = None
    _mend_streams()
    _broken_off = True
    try:
        try:
            with explain_missing_extra(), careful_interrupts():
                code = action()
            _broken_off = False
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else DONE
            _broken_off = code == TERMINATED
        sys.stdout.flush()
    except UsageError as error:
        print_error(error)
        return USAGE_ERROR
    except DominoError as error:
        print_error(error)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # of an action that has ended, its answer holds
        _discard_output()
    except OSError as error:
        if error.filename is None:  # standard output's: a full disk behind it, say
            _discard_output()
            print_error(f"the output can't be written: {first_line(error)}.")
        else:
            print_error(f"{error.filename}: {error.strerror}.")
        return FAILED
    except Exception as error:
        problem = _device_problem() if isinstance(error, RuntimeError | AssertionError) else None
        if problem is not None:
            print_error(problem)
            return FAILED
        code = _failed_among_others(error)
        if code is None:
            raise
    return DONE if code is None else code


def _failed_among_others(error: Exception) -> int | None:
    """What to end with where several processes run one model and this one fails in its own way, or for another's end.

    None where it is on its own.
    """
    processes = sys.modules.get("domino_jax.runtime.processes")
    if processes is None or not processes.among_others():
        return None
    code = processes.code_of_others()
    if code is not None:
        print_error(processes.ENDED_EARLY)
        return code
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(error, jax.errors.JaxRuntimeError):
        print_error(f"the devices have failed, as they do when another process is gone: {first_line(error)}.")
    else:
        traceback.print_exception(error)
    return FAILED


def end_process(code: int) -> NoReturn:
    """End this process with an exit code; where the work was broken into, without taking Python apart.

    A device may still run what was dispatched, and its threads must not outlive what they use. Of several processes,
    the others are told, since they would wait for this one.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the work is over: no traceback from what is left to do
    if not _broken_off:
        sys.exit(code)
    processes = sys.modules.get("domino_jax.runtime.processes")
    if processes is not None and code != DONE:
        processes.end_others(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _mend_streams() -> None:
    """Standard streams that can be read and written: closed ones lead nowhere, and what can't be encoded is escaped."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        number = 0
        while number <= 2:  # their numbers must not become those of files that are opened later
            number = os.open(os.devnull, os.O_RDWR)
        os.close(number)
        sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8")
        sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
        sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _device_problem() -> str | None:
    """Why JAX has no devices, in a sentence; None where it has, or where nothing asked for them."""
    jax = sys.modules.get("jax")
    if jax is None:
        return None
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS")
        reason = first_line(error).partition(" (set JAX_PLATFORMS")[0] if str(error) else "no such device is found"
        if asked:
            return f"JAX_PLATFORMS={asked} can't be used: {reason}; unset it, or set another, such as cpu."
        return f"JAX can't use the devices here: {reason}; JAX_PLATFORMS=cpu does without them."
    return None


def run_module(module: str) -> int:
    """Import a command's module, call its main(), and return the exit code; also where an import fails."""
    return exit_code(lambda: import_module(module).main())


@contextmanager
def words_at_fault() -> Iterator[None]:
    """Inside, a DominoError says what is wrong with the words of the command line: it becomes a UsageError."""
    try:
        yield
    except DominoError as error:
        raise UsageError(str(error)) from None


def own_command(words: Sequence[str]) -> list[str]:
    """The words of a process that runs a module of ours, whatever files the working folder holds.

    Args:
        words: as after `python -m`; the process needs the environment of `own_environment`.
    """
    return [sys.executable, "-P", "-m", *words]


def own_environment() -> dict[str, str]:
    """This process's environment, with the modules that it finds."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}  # noqa: PTH109


def print_error(error: object) -> None:
    """One line on standard error, if anybody reads it."""
    with suppress(OSError):
        print(f"error: {error}", file=sys.stderr, flush=True)


def find_subcommand(table: Mapping[str, Subcommand], argv: Sequence[str] | None, prog: str) -> Callable[[], int] | None:
    """What runs the subcommand that the first word names; None if the first word names none.

    Args:
        argv: the words; the process's own when None.
        prog: the command that has the subcommands.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in table:
        return None
    name, rest = words[0], words[1:]
    command = table[name]

    def run() -> int:
        main = getattr(import_module(command.module), command.function)
        return main(rest, prog=f"{prog} {name}")

    return lambda: exit_code(run)  # the import may fail too


def list_subcommands(table: Mapping[str, Subcommand]) -> str:
    """Lines for a help: each subcommand and what it does."""
    width = max(map(len, table))
    return "\n".join(f"  {name:{width}}  {command.summary}" for name, command in table.items())


class _Captured(io.StringIO):
    """Standard output while a help is written: as colourful and wide as the real one."""

    encoding = property(lambda _: getattr(sys.__stdout__, "encoding", None) or "utf-8")  # type: ignore[assignment]

    def isatty(self) -> bool:
        return sys.__stdout__ is not None and sys.__stdout__.isatty()


def _wrap_help(text: str) -> str:
    """A help no wider than the terminal: tyro wraps what stands in its boxes, and not the usage and description."""
    width, lines = shutil.get_terminal_size().columns, []
    for line in text.split("\n"):
        plain = re.sub(ESCAPES, "", line)
        if len(plain) > width and not plain.startswith(("│", "╭", "╰")):
            indent = " " * 7 if plain.startswith("usage:") else ""
            line = textwrap.fill(plain, width, subsequent_indent=indent, break_on_hyphens=False)
        lines.append(line)
    return "\n".join(lines)


def _sentence(box: str, prog: str) -> str:
    """Tyro's error, which it draws in a box of several lines, as one sentence."""
    plain = re.sub(ESCAPES, "", box)
    rows = [line.strip("│").rstrip() for line in plain.splitlines() if not re.match("[╭╰]", line)]
    if len(rows) > 1 and set(rows[1].strip()) == {"-"}:  # not UTF-8: no box, but a line under the title
        rows = rows[2:]
    text = " ".join(" ".join(rows).split())
    said = re.split("[─-]{3,}|For full helptext", text)[0].strip().rstrip(".")
    unknown = next((i for i, row in enumerate(rows) if row.strip() == "Unrecognized options:"), len(rows))
    flags = ", ".join(row.strip() for row in rows[:unknown] if re.match(" {4,6}-", row) and not row.endswith("--help"))
    values = re.search(r"(?:from|arguments:|base 10:|float:) (\[.*?\]|'.*?')", said)
    choice = re.match(r"invalid choice (.+) for argument '(.+)'. Expected one of \((.+)\)", said)
    if said.startswith("Missing from"):
        said = f"missing {flags}"
    elif said.startswith("Error parsing") and flags and values:
        said = f"{flags} is expected, found {values[1].strip('[]')}"
    elif choice:
        names = sorted(name.strip(" ,'") for name in choice[3].split(",") if name.strip(" ,'") not in ("None", ""))
        said = f"{choice[2]} is one of {', '.join(names)}, found {choice[1]}"
    said = said or "the words can't be read"
    return f"{said[0].lower()}{said[1:]}; see {prog} --help."


def _discard_output() -> None:
    """Let what standard output still holds go nowhere: Python would fail on it once more in its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
