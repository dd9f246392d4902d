"""What measurements of both rooms have in common: whose figures they are, and which answers say something."""

import subprocess
from collections.abc import Sequence
from pathlib import Path


def git_commit() -> str:
    """The source's git commit, marked when files differ from it; empty outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def distinct_ngrams(tokens: Sequence[int], n: int = 4) -> float:
    """Distinct n-grams as a share of all: 1 where nothing repeats, near 0 in a loop."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
