"""Every mode at every context and batch size, in turn: one flat row of figures each."""

import dataclasses
import platform
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console

from convert.loading import LoadedModel
from domino_jax import decode
from domino_jax.runtime.devices import own_devices
from domino_jax.runtime.provenance import distinct_ngrams, git_commit, processor
from domino_jax.runtime.weight_forms import resolve_weights
from infer.bench import roofline
from infer.bench.memory import megabytes
from infer.bench.modes import Drafts, SimulatedAcceptance, drafting, with_drafts
from infer.bench.options import Bench
from infer.bench.parts import time_dispatch, time_phases
from infer.bench.prompts import collect_prompts
from infer.bench.rounds import batches, run_ours, transformers_runner
from infer.bench.rows import LEAN, TRANSFORMERS, Row
from infer.bench.tracing import traced
from infer.engine import Engine

Key = tuple[str, Drafts]  # a mode, and the drafts of its cycles

TRACED_TOKENS = 33  # of each sequence: enough to see cycles, and no more to wait for


def measure_sweep(options: Bench, loaded: LoadedModel, folder: Path | None, console: Console) -> Iterator[list[Row]]:
    """All modes at all contexts and batch sizes: one flat dict each, those of a context and batch size at a time.

    Args:
        folder: the target's, for transformers; None where there is none.
    """
    # No stop tokens and no text: every sequence runs to its limit, and only decoding is timed.
    engines = build(options, dataclasses.replace(loaded, stop_ids=(), tokenizer=None))
    theirs = None
    if options.transformers and folder:
        theirs = transformers_runner(folder, options, loaded.dtype.name)
    common = circumstances(options, loaded) | {
        "num_prompts": options.num_prompts,
        "min_distinct": options.min_distinct,
        "rounds": options.rounds,
    }
    machine = None
    if options.roofline:
        with console.status("measuring the device"):
            machine = roofline.measure_device(loaded.dtype, loaded.narrow)
        common |= {"bandwidth_gb_s": machine.bandwidth / 1e9, "peak_tflop_s": machine.flops / 1e12}
    first = True
    for context in options.contexts or (options.prompt_tokens,):
        here = dataclasses.replace(options, prompt_tokens=context)
        with console.status(f"context {context}: choosing prompts"):
            found = collect_prompts(here, loaded, engines[LEAN, 0])
        fields = {"context": context, "prompt_tokens": context, "looping_prompts_left_out": found.looping}
        fields = common | fields | {"prompts": found.source}
        for batch in options.batch_sizes:
            results, warm = alternate(here, engines, theirs, found.prompts, batch, console)
            new = [
                {**fields, "batch": batch, "mode": key[0], "drafts": key[1], "compile_s": warm[key]["compile"]}
                | speed(results[key], results[LEAN, 0], len(batches(found.prompts, batch)))
                for key in results
            ]
            for row, (key, rounds) in zip(new, results.items(), strict=True):
                if key not in engines:
                    continue
                row |= acceptance(rounds[0], results[LEAN, 0][0], options)
                view, choice = engines[key].loaded, key[1]
                if choice == "auto":  # what most cycles had; 0 for plain steps
                    used = sum((result["used"] for result in rounds), Counter())
                    choice = row["auto_choice"] = used.most_common(1)[0][0]
                view = with_drafts(view, choice) if choice else lean_view(view)
                row |= time_dispatch(view, found.prompts[:batch], options.sampling)
                if options.phases:
                    with console.status(f"context {context}, batch {batch}: phases of {key[0]}"):
                        row |= time_phases(view, found.prompts[:batch], options.sampling)
                row |= megabytes(view, batch, context + options.new_tokens)
                if machine:
                    row |= roofline.fields(view, batch, context, not options.sampling.greedy, machine, row)
                if options.profile and first:
                    with console.status(f"tracing {key[0]}"):
                        row |= trace(options.profile, engines[key], found.prompts[:batch], here, key)
            if machine:
                roofline.over_lean(new)
            first = False
            yield new


def build(options: Bench, loaded: LoadedModel) -> dict[Key, Engine]:
    """An engine for each of our modes: the baseline, and each kind of drafting at each number of drafts."""
    engines: dict[Key, Engine] = {(LEAN, 0): Engine(loaded)}
    for key, view in drafting(loaded, options.drafts, options.head_off).items():
        tau, auto = options.simulate_tau, key[1] == "auto"
        accept = SimulatedAcceptance(tau, view.configs.proposals) if tau is not None else decode.accept
        engines[key] = Engine(view, auto=auto, accept=accept)
    return engines


def circumstances(options: Bench, loaded: LoadedModel) -> Row:
    """What every row says of the run, whatever it measures."""
    drafting, sampling, tree = options.model.drafting, options.sampling, options.model.tree
    device = own_devices()[0]
    return {
        "commit": git_commit(),
        "device": device.device_kind,
        "processor": processor(),
        "mesh": options.model.device.mesh or "",
        "attention": loaded.configs.attention,
        "head_candidates": str(drafting.head_candidates),
        "confidence_threshold": drafting.confidence_threshold,
        "prompt_lookup_max": drafting.prompt_lookup_max,
        "prompt_lookup_min": drafting.prompt_lookup_min,
        "target_weights": loaded.weights,
        "draft_weights": resolve_weights(drafting.draft_weights),
        **({f"tree_{name}": value for name, value in tree._asdict().items()} if tree else {}),
        "matrices": "bfloat16" if loaded.narrow else loaded.dtype.name,
        "platform": f"{device.platform}, {platform.machine()}, Python {platform.python_version()}",
        "jax": jax.__version__,
        "model": options.shapes or options.model.model,
        "draft": drafting.draft or "",
        "revision": options.model.revision or "",
        "draft_revision": drafting.draft_revision or "",
        "weights": "random" if options.random_weights else "loaded",
        "simulated_tau": options.simulate_tau,
        "dtype": jnp.dtype(loaded.dtype).name,
        "new_tokens": options.new_tokens,
        **{name: getattr(sampling.params(), name) for name in ("temperature", "top_k", "top_p", "min_p")},
        "seed": sampling.seed or 0,
    }


def alternate(
    options: Bench,
    engines: dict[Key, Engine],
    theirs: Callable[[list[list[int]], int], Row] | None,
    prompts: list[list[int]],
    batch: int,
    console: Console,
) -> tuple[dict[Key, list[Row]], dict[Key, Row]]:
    """Every mode's rounds, the modes in turn; and each mode's first run, which compiled."""
    runs: dict[Key, Callable[[], Row]] = {
        key: (lambda e=engine, m=key[0]: run_ours(e, prompts, options, batch, m)) for key, engine in engines.items()
    }
    if theirs:
        runs[TRANSFORMERS, 0] = lambda: theirs(prompts, batch)
    warm, rounds = {}, {key: [] for key in runs}
    where = f"context {options.prompt_tokens}, batch {batch}"
    with console.status(f"{where}: compiling"):
        for key, run in runs.items():
            warm[key] = run()
    for number in range(options.rounds):
        with console.status(f"{where}: round {number + 1} of {options.rounds}"):
            for key, run in runs.items():
                rounds[key].append(run())
    return rounds, warm


def speed(results: list[Row], lean: list[Row], groups: int) -> Row:
    """Medians over the rounds of one mode, and of its ratios to the autoregressive baseline of the same round.

    Args:
        groups: batches of a round.
    """
    pairs = list(zip(results, lean, strict=True))
    return {
        "tokens_per_second": statistics.median(r["tokens"] / r["decode"] for r in results),
        "ms_per_cycle": statistics.median(r["decode"] / r["cycles"] * 1e3 for r in results),
        "prefill_s": statistics.median(r["prefill"] for r in results) / groups,
        "speed_over_lean": statistics.median(
            (r["tokens"] / r["decode"]) / (base["tokens"] / base["decode"]) for r, base in pairs
        ),
        "cycle_over_step": statistics.median(
            (r["decode"] / r["cycles"]) / (base["decode"] / base["cycles"]) for r, base in pairs
        ),
    }


def acceptance(result: Row, lean: Row, options: Bench) -> Row:
    """What was accepted and written; a simulated acceptance has neither a τ of its own nor an output worth a look."""
    if options.simulate_tau is not None:
        return {"tau": None, "distinct_4": None, "same_tokens_as_lean": None}
    found: Row = {"tau": result["tau"], "distinct_4": statistics.mean(map(distinct_ngrams, result["outputs"]))}
    found["same_tokens_as_lean"] = None
    if options.sampling.greedy:
        other, rate = differences(result["outputs"], lean["outputs"])
        found |= {"same_tokens_as_lean": other == 0, "other_answers": other, "differences_per_1000_tokens": 1000 * rate}
    return found


def differences(ours: list[list[int]], lean: list[list[int]]) -> tuple[int, float]:
    """Answers that differ from the baseline's, and first differences a token: what follows one has another context.

    Where a block and a single token round differently (bfloat16), two logits that tie to rounding may swap.
    """
    other, seen = 0, 0
    for a, b in zip(ours, lean, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        other += same is not None
        seen += len(a) if same is None else same + 1
    return other, other / seen


def lean_view(loaded: LoadedModel) -> LoadedModel:
    """The target alone."""
    return dataclasses.replace(loaded, configs=loaded.configs.without_drafter, params=loaded.params.without_drafter)


def trace(folder: Path, engine: Engine, prompts: list[list[int]], options: Bench, key: Key) -> Row:
    """One more round of one batch under the profiler: where the trace lies, and the scopes that it names."""
    name = f"{key[0]}-{key[1]}" if key[1] else key[0]
    short = dataclasses.replace(options, new_tokens=min(options.new_tokens, TRACED_TOKENS))
    program = "autoregress" if key[0] == LEAN else "speculate"
    scopes = traced(folder / name, lambda: run_ours(engine, prompts, short, len(prompts), key[0]), program)
    return {"profile": str(folder / name), "profile_scopes": " ".join(scopes)}
