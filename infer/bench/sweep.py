"""Every mode at every batch size, in turn: one flat row of figures each."""

import dataclasses
import platform
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from domino_jax import decode
from infer.bench.memory import megabytes
from infer.bench.modes import DFLASH, DOMINO, LEAN, TRANSFORMERS, head_off, with_drafts
from infer.bench.options import Bench
from infer.bench.parts import phases
from infer.bench.prompts import choose, distinct, read_prompts
from infer.bench.rounds import batches, run_ours, transformers_runner
from infer.engine import Engine
from infer.models import Loaded


def measure(options: Bench, loaded: Loaded, folder: Path, console: Console) -> list[dict[str, Any]]:
    """All modes at all batch sizes; one flat dict each."""
    prompts = read_prompts(options, loaded)
    # No stop tokens and no text: every sequence runs to its limit, and only decoding is timed.
    loaded = dataclasses.replace(loaded, stop_ids=(), tokenizer=None)
    engines = {(LEAN, 0): Engine(loaded)}
    with console.status("choosing prompts"):
        prompts, looping = choose(prompts, options, engines[LEAN, 0])
    if loaded.configs.draft:
        views = {DFLASH: loaded}
        if loaded.configs.draft.head:
            views = {DFLASH: head_off(loaded), DOMINO: loaded}
        for drafts in options.drafts or (loaded.configs.proposals,):
            engines |= {(mode, drafts): Engine(with_drafts(view, drafts)) for mode, view in views.items()}
    theirs = transformers_runner(folder, options, loaded.dtype.name) if options.transformers else None
    common = {
        "commit": _commit(),
        "device": jax.devices()[0].device_kind,
        "mesh": options.mesh or "",
        "platform": f"{jax.default_backend()}, {platform.machine()}, Python {platform.python_version()}",
        "jax": jax.__version__,
        "model": options.model,
        "draft": options.draft or "",
        "dtype": jnp.dtype(loaded.dtype).name,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "num_prompts": options.num_prompts,
        "min_distinct": options.min_distinct,
        "looping_prompts_left_out": looping,
        "rounds": options.rounds,
        "temperature": options.temperature,
        "seed": options.seed,
    }
    rows = []
    for batch in options.batch_sizes:
        runs: dict[tuple[str, int], Callable[[], dict[str, Any]]] = {
            key: (lambda e=engine, m=key[0], b=batch: run_ours(e, prompts, options, b, m))
            for key, engine in engines.items()
        }
        if theirs:
            runs[TRANSFORMERS, 0] = lambda b=batch: theirs(prompts, b)
        warm, rounds = {}, {key: [] for key in runs}
        with console.status(f"batch {batch}: compiling"):
            for key, run in runs.items():
                warm[key] = run()
        for number in range(options.rounds):
            with console.status(f"batch {batch}: round {number + 1} of {options.rounds}"):
                for key, run in runs.items():
                    rounds[key].append(run())
        lean = rounds[LEAN, 0]
        for key, results in rounds.items():
            mode, drafts = key
            row = {**common, "batch": batch, "mode": mode, "drafts": drafts, "compile_s": warm[key]["compile"]}
            row["tokens_per_second"] = statistics.median(r["tokens"] / r["decode"] for r in results)
            row["ms_per_cycle"] = statistics.median(r["decode"] / r["cycles"] * 1e3 for r in results)
            row["prefill_s"] = statistics.median(r["prefill"] for r in results) / len(batches(prompts, batch))
            pairs = zip(results, lean, strict=True)
            row["speed_over_lean"] = statistics.median(
                (r["tokens"] / r["decode"]) / (base["tokens"] / base["decode"]) for r, base in pairs
            )
            if key in engines:
                view = engines[key].loaded
                row["tau"] = results[0]["tau"]
                row["distinct_4"] = statistics.mean(map(distinct, results[0]["outputs"]))
                same = results[0]["outputs"] == lean[0]["outputs"]
                row["same_tokens_as_lean"] = same if options.temperature == 0 else None
                if mode == LEAN:
                    configs, params = decode.Configs(view.configs.target), decode.Params(view.params.target)
                    view = dataclasses.replace(view, configs=configs, params=params)
                with console.status(f"batch {batch}: phases of {mode}"):
                    row |= phases(view, prompts[:batch], options.temperature)
                row |= megabytes(view, batch, options.prompt_tokens + options.new_tokens)
            rows.append(row)
    return rows


def _commit() -> str:
    """The source's git commit, marked when files differ from it; empty outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
