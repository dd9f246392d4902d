"""The few words of a shell that docs/errors.md uses, in this process: set-up lines and our own commands."""

import contextlib
import importlib
import importlib.util
import io
import shlex
import shutil
from pathlib import Path

from convert.registry import DEMO_FOLDER


def run_line(line: str) -> tuple[str, int] | None:
    """Do what a line says in the working folder.

    Returns:
        What `python -m ...` printed on standard error, and its exit code; None for other lines.
    """
    words = shlex.split(line)
    match words:
        case ["echo", text, ">", file]:
            Path(file).write_text(text + "\n", encoding="utf-8")
        case ["mkdir", folder]:
            Path(folder).mkdir()
        case ["cp", "-r", source, destination]:
            shutil.copytree(DEMO_FOLDER / Path(source).relative_to("demo"), destination)
        case ["cp", source, destination]:
            shutil.copyfile(source, destination)
        case ["mv", source, destination]:
            Path(source).rename(destination)
        case ["python", "-m", module, *given]:
            found = importlib.util.find_spec(module)
            assert found, line
            command = importlib.import_module(f"{module}.__main__" if found.submodule_search_locations else module)
            with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
                status = command.main(given)
            return said.getvalue(), status
        case _:
            raise ValueError(f"docs/errors.md has a line that its test can't run: {line}")
    return None
