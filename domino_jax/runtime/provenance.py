"""Helpers shared by benchmarks: the git commit, the processor, and the share of distinct n-grams."""

import os
import platform
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


def processor() -> str:
    """The processor and its cores for this process: "AMD EPYC 9B14, 2 cores"."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        info = []
    names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def distinct_ngrams(tokens: Sequence[int], n: int = 4) -> float:
    """Distinct n-grams as a share of all: 1 where nothing repeats, near 0 in a loop."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
