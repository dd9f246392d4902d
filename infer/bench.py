"""Measure decoding: the lean loop, DFlash (head off) and Domino in one run, in turn.

    python -m infer.bench --batch-sizes 1 4 --new-tokens 128 --json bench.json

Every round runs each mode once, so that a machine whose speed drifts treats them alike; figures are
medians over the rounds, and the ratios are what to quote from a shared machine. Stop tokens are
ignored, so every sequence has the same length.
"""

import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from domino_jax import cache as kv
from domino_jax import decode, draft, head, sharding, verify
from domino_jax.errors import DominoError
from domino_jax.sampling import probabilities, settings
from domino_jax.weights import Draft, flatten, unflatten
from infer.engine import Engine, Sequence, Settings, tau
from infer.models import DEMO, Loaded, load, resolve

LEAN, DFLASH, DOMINO, TRANSFORMERS = "lean", "dflash", "domino", "transformers"
REPEATS = 20  # runs of a phase inside one program, so that dispatching is not what is measured


@dataclass(frozen=True)
class Bench:
    """Measure decoding with and without speculation, in one alternating run."""

    model: str = "demo"
    """name, folder or org/repo of the target"""
    draft: str | None = None
    """name, folder or org/repo of the drafter; by default the one that belongs to --model's name"""
    batch_sizes: tuple[int, ...] = (1,)
    drafts: tuple[int | Literal["auto"], ...] = ()
    """proposals that a cycle verifies, each a mode of its own, or "auto"; all that the drafter makes when not given"""
    new_tokens: int = 64
    """tokens to generate for each prompt"""
    prompts: Path | None = None
    """JSONL of prompts ("input_ids" or "prompt"); the demo's held-out ones, or random ids, when not given"""
    prompt_tokens: int = 48
    """tokens of each prompt: longer ones are cut, shorter ones refused"""
    num_prompts: int = 8
    """prompts a round runs, batch after batch"""
    min_distinct: float = 0.0
    """leave out prompts that the target answers (greedily) with a smaller share of distinct 4-grams: small models fall
    into loops, which are easy to draft and would flatter the acceptance"""
    rounds: int = 3
    temperature: float = 0.0
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] | None = None
    """of weights and caches; by default float32 on CPU, bfloat16 elsewhere"""
    mesh: str | None = None
    """devices to spread over, "data=2,model=4"; by default those found (one CPU)"""
    transformers: bool = True
    """also run transformers' generate (greedy) on the same weights, where torch is installed"""
    json: Path | None = None
    """file for the figures: a list of flat objects, one for each batch size and mode"""


def with_drafts(loaded: Loaded, drafts: int | Literal["auto"]) -> Loaded:
    """The same model with `drafts` proposals a cycle; all where the engine chooses."""
    fixed = None if drafts == "auto" else drafts
    return dataclasses.replace(loaded, configs=dataclasses.replace(loaded.configs, drafts=fixed))


def head_off(loaded: Loaded) -> Loaded:
    """The same drafter as plain DFlash: its causal head is left out, its proposals are the base logits'."""
    config, params = loaded.configs.draft, loaded.params.draft
    assert config is not None and params is not None
    plain = dataclasses.replace(config, head=None)
    drafter: Draft = unflatten(plain, {k: v for k, v in flatten(params).items() if not k.startswith("head.")})
    return dataclasses.replace(
        loaded,
        configs=dataclasses.replace(loaded.configs, draft=plain),
        params=decode.Params(loaded.params.target, drafter),
    )


def read_prompts(options: Bench, loaded: Loaded) -> list[list[int]]:
    """Prompts of exactly `prompt_tokens` ids: all that the file has, or `num_prompts` random ones.

    Raises:
        DominoError: the file is missing or malformed.
    """
    path = options.prompts
    if path is None and options.model == "demo":
        path = DEMO / "prompts.jsonl"
    if path is None:
        rng = np.random.default_rng(options.seed)
        shape = (options.num_prompts, options.prompt_tokens)
        return rng.integers(0, loaded.configs.target.vocab_size, shape).tolist()
    found: list[list[int]] = []
    try:
        for line in filter(str.strip, path.read_text(encoding="utf-8").split("\n")):
            row = json.loads(line)
            if "input_ids" not in row and loaded.tokenizer is None:
                raise DominoError(f"{path} holds text, and the model's folder has no tokenizer.")
            ids = row["input_ids"] if "input_ids" in row else loaded.tokenizer(row["prompt"])["input_ids"]
            if len(ids) >= options.prompt_tokens:
                found.append([int(i) for i in ids[: options.prompt_tokens]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DominoError(f"{path} is not a JSONL file of prompts: {error!r}.") from None
    return found


def choose(prompts: list[list[int]], options: Bench, engine: Engine) -> tuple[list[list[int]], int]:
    """The first `num_prompts` whose greedy answers are varied enough, and how many were passed over for loops.

    Raises:
        DominoError: there are too few.
    """
    chosen: list[list[int]] = []
    looping = 0
    for prompt in prompts:
        if len(chosen) == options.num_prompts:
            break
        if options.min_distinct > 0:
            sequence, _ = engine.sequence(prompt, options.new_tokens)
            engine.generate([sequence], Settings(), speculative=False)
            if distinct(sequence.tokens) < options.min_distinct:
                looping += 1
                continue
        chosen.append(prompt)
    if len(chosen) < options.num_prompts:
        raise DominoError(
            f"only {len(chosen)} prompts have {options.prompt_tokens} tokens and an answer that varied "
            f"({looping} loop), {options.num_prompts} are wanted: lower --num-prompts or --prompt-tokens."
        )
    return chosen, looping


def distinct(tokens: list[int], n: int = 4) -> float:
    """Distinct n-grams as a share of all: 1 where nothing repeats, near 0 in a loop."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def batches(items: list[Any], size: int) -> list[list[Any]]:
    """Whole batches of `size`; what is left over is not run."""
    return [items[i : i + size] for i in range(0, len(items) - size + 1, size)]


def run_ours(engine: Engine, prompts: list[list[int]], options: Bench, batch: int, mode: str) -> dict[str, Any]:
    """One round of one of our modes: times and acceptance summed over its batches."""
    seconds = {"compile": 0.0, "prefill": 0.0, "decode": 0.0}
    accepted: list[int] = []
    tokens, cycles, outputs, used = 0, 0, [], Counter()
    for number, group in enumerate(batches(prompts, batch)):
        rows: list[Sequence] = []
        for i, prompt in enumerate(group):
            sequence, warnings = engine.sequence(prompt, options.new_tokens, row=number * batch + i)
            if warnings:
                raise DominoError(f"--new-tokens {options.new_tokens}: {warnings[0]}")
            rows.append(sequence)
        engine.generate(rows, Settings(options.temperature), options.seed, speculative=mode != LEAN)
        for phase in seconds:
            seconds[phase] += max(s.seconds[phase] for s in rows)
        accepted += [m for s in rows for m in s.accepted]
        tokens += sum(len(s.tokens) - 1 for s in rows)
        cycles += max(len(s.cycles) + s.steps for s in rows)
        used += sum((Counter({0: s.steps}) + Counter(len(c.drafts) for c in s.cycles) for s in rows), Counter())
        outputs += [s.tokens for s in rows]
    figures = {**seconds, "tokens": tokens, "cycles": cycles, "tau": tau(accepted), "outputs": outputs}
    return {**figures, "used": used}


def transformers_runner(
    folder: Path, options: Bench, dtype: str
) -> Callable[[list[list[int]], int], dict[str, Any]] | None:
    """A round of transformers' greedy generate on the same weights and kind of device, in the same dtype.

    None where that is not to be had: no torch, none for this device, a sampled run, or Orbax weights.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None
    if options.temperature > 0 or not any(folder.glob("*.safetensors")):
        return None
    place = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
    if place is None or (place == "cuda" and not torch.cuda.is_available()):
        return None
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False
    )
    model = model.to(place).eval()

    def generate(ids: Any, new: int) -> Any:
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new
            )
            return out.cpu()  # waits for the device

    def run(prompts: list[list[int]], batch: int) -> dict[str, Any]:
        prefill, whole, tokens = 0.0, 0.0, 0
        for group in batches(prompts, batch):
            ids = torch.tensor(group, device=place)
            began = time.perf_counter()
            generate(ids, 1)
            prefill += time.perf_counter() - began
            began = time.perf_counter()
            generate(ids, options.new_tokens)
            whole += time.perf_counter() - began
            tokens += len(group) * (options.new_tokens - 1)
        cycles = len(batches(prompts, batch)) * (options.new_tokens - 1)
        return {"compile": 0.0, "prefill": prefill, "decode": whole - prefill, "tokens": tokens, "cycles": cycles}

    return run


def phases(loaded: Loaded, prompts: list[list[int]], temperature: float) -> dict[str, float]:
    """Milliseconds of each part of one cycle, each alone in a program that repeats it.

    The parts: draft (backbone and base logits), head, target (the verification pass with its LM head),
    verify (accept and commit), context (the drafter's keys and values of what was verified). Their sum is
    close to a cycle but not equal to it, since one program overlaps them.
    """
    configs, params = loaded.configs, loaded.params
    config, drafter = configs.draft, params.draft
    batch = len(prompts)
    keys = jax.random.split(jax.random.key(0), batch)
    stop = jnp.full(1, -1, jnp.int32)
    sampling = settings(batch, temperature)
    limits = [1 << 20] * batch
    state = decode.begin(params, configs, prompts, keys, limits, sampling, stop, loaded.dtype)
    greedy = temperature == 0
    none = jnp.zeros((batch, 0), jnp.int32)

    def timed(run: Callable[[decode.Params, decode.DecodeState], tuple[decode.DecodeState, Any]]) -> float:
        def body(_: int, carry: tuple[decode.Params, decode.DecodeState, jax.Array]) -> Any:
            params, state, used = carry
            # Behind a barrier, every result is used and the next repetition depends on it: nothing is dropped,
            # hoisted, or computed only in the part that is looked at.
            state, out = jax.lax.optimization_barrier(run(params, state))
            for leaf in filter(lambda x: x.size, jax.tree.leaves(out)):
                used += leaf[(0,) * leaf.ndim].astype(jnp.float32)
            return params, state._replace(token=state.token + (used < -1e30).astype(jnp.int32)), used

        # The state is donated, as in decoding: otherwise the caches are copied before they are written.
        program = jax.jit(
            lambda state, params: jax.lax.fori_loop(0, REPEATS, body, (params, state, jnp.float32(0)))[1:],
            donate_argnums=0,
        )
        mine, _ = program(jax.tree.map(jnp.copy, state), params)
        times = []
        for _ in range(5):
            jax.block_until_ready(mine)
            began = time.perf_counter()
            mine, _ = jax.block_until_ready(program(mine, params))
            times.append((time.perf_counter() - began) / REPEATS)
        return statistics.median(times) * 1e3

    def verified_by(drafts: jax.Array) -> Callable[[decode.Params, decode.DecodeState], Any]:
        def run(p: decode.Params, s: decode.DecodeState) -> Any:
            logits, features, cache = decode.run_target(p, configs, s, drafts)
            return s._replace(cache=cache), (logits, features)

        return run

    if config is None or drafter is None:
        return {"target_ms": timed(verified_by(none))}
    z, base, _ = decode.draft_block(params, configs, state)
    draft_keys = None if greedy else keys
    drafts, q = head.propose(drafter, config, params.target.embed, z, base, state.token, sampling, draft_keys)
    logits, features, _ = decode.run_target(params, configs, state, drafts)

    def anew(x: jax.Array, s: decode.DecodeState) -> jax.Array:
        """`x`, in a form that the compiler must take for another one in each repetition."""
        return x + 0 * s.token.astype(x.dtype)[:, None, None]

    def drafted(p: decode.Params, s: decode.DecodeState) -> Any:
        z, base, context = decode.draft_block(p, configs, s)
        return s._replace(context=context), (z, base)

    def proposed(p: decode.Params, s: decode.DecodeState) -> Any:
        assert p.draft is not None
        how = s.sampling, None if greedy else s.keys
        return s, head.propose(p.draft, config, p.target.embed, anew(z, s), anew(base, s), s.token, *how)

    def verified(p: decode.Params, s: decode.DecodeState) -> Any:
        seen = anew(logits, s)
        if q is None:
            count, bonus = verify.greedy(drafts, seen)
        else:
            count, bonus = verify.speculative(s.keys, drafts, q, probabilities(seen, s.sampling))
        return s, decode.commit(s, jnp.concatenate([drafts, bonus[:, None]], axis=1), count + 1, stop)[1]

    def remembered(p: decode.Params, s: decode.DecodeState) -> Any:
        assert p.draft is not None and s.context is not None
        return s._replace(context=draft.append_context(p.draft, config, s.context, anew(features, s), s.length)), ()

    parts = {"draft": drafted, "head": proposed, "target": verified_by(drafts), "verify": verified}
    return {f"{name}_ms": timed(run) for name, run in (parts | {"context": remembered}).items()}


def megabytes(loaded: Loaded, batch: int, positions: int) -> dict[str, float]:
    """Weights and caches of one mode, from the arrays' sizes; what the device says it holds, where it does."""
    configs = loaded.configs
    capacity = kv.bucket(positions + configs.reach)
    held: dict[str, float] = {"weights_mb": _mb(loaded.params)}
    caches = [jax.eval_shape(lambda: kv.init(configs.target, batch, capacity, loaded.dtype))]
    drafter = configs.draft
    if drafter is not None:
        caches.append(jax.eval_shape(lambda: kv.init(drafter, batch, capacity, loaded.dtype)))
    held["caches_mb"] = _mb(caches)
    stats = jax.devices()[0].memory_stats()
    if stats:
        held["device_peak_mb"] = stats.get("peak_bytes_in_use", 0) / 1e6
    return held


def _mb(tree: Any) -> float:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 1e6


def measure(options: Bench, loaded: Loaded, folder: Path, console: Console) -> list[dict[str, Any]]:
    """All modes at all batch sizes; one flat dict each."""
    prompts = read_prompts(options, loaded)
    # No stop tokens and no text: every sequence runs to its limit, and only decoding is timed.
    loaded = dataclasses.replace(loaded, stop_ids=(), tokenizer=None)
    engines: dict[tuple[str, int | Literal["auto"]], Engine] = {(LEAN, 0): Engine(loaded)}
    with console.status("choosing prompts"):
        prompts, looping = choose(prompts, options, engines[LEAN, 0])
    if loaded.configs.draft:
        views = {DFLASH: loaded}
        if loaded.configs.draft.head:
            views = {DFLASH: head_off(loaded), DOMINO: loaded}
        for drafts in options.drafts or (loaded.configs.proposals,):
            for mode, view in views.items():
                if drafts != "auto" or view is loaded:
                    engines[mode, drafts] = Engine(with_drafts(view, drafts), auto=drafts == "auto")
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
        runs: dict[tuple[str, int | Literal["auto"]], Callable[[], dict[str, Any]]] = {
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
                choice = drafts
                if drafts == "auto":  # what most cycles had; 0 for plain steps
                    choice = row["auto_choice"] = sum((r["used"] for r in results), Counter()).most_common(1)[0][0]
                    view = with_drafts(view, choice or "auto")
                if choice == 0:
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


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The figures as a table for people."""
    first = rows[0]
    console.print(
        f"{first['model']}, {first['dtype']}, {first['device']}; {first['num_prompts']} prompts of "
        f"{first['prompt_tokens']} tokens ({first['looping_prompts_left_out']} left out for loops), "
        f"{first['new_tokens']} new, temperature {first['temperature']:g}, "
        f"median of {first['rounds']} rounds"
    )
    speeds = {
        "τ": ("tau", "{:.2f}"),
        "distinct-4": ("distinct_4", "{:.2f}"),
        "tokens/s": ("tokens_per_second", "{:,.0f}"),
        "× lean": ("speed_over_lean", "{:.2f}"),
        "ms/cycle": ("ms_per_cycle", "{:.2f}"),
        "prefill s": ("prefill_s", "{:.3f}"),
        "compile s": ("compile_s", "{:.1f}"),
    }
    parts = {name: (f"{name}_ms", "{:.2f}") for name in ("draft", "head", "target", "verify", "context")}
    parts |= {"weights MB": ("weights_mb", "{:.1f}"), "caches MB": ("caches_mb", "{:.1f}")}
    for title, columns in (("Speed", speeds), ("One cycle: each phase alone, ms", parts)):
        table = Table("batch", "mode", "J", title=title, title_justify="left")
        for column in columns:
            table.add_column(column, justify="right")
        for row in rows:
            cells = [form.format(row[key]) if row.get(key) is not None else "" for key, form in columns.values()]
            if any(cells):
                drafts = f"auto ({row['auto_choice'] or 'plain'})" if "auto_choice" in row else row["drafts"] or ""
                table.add_row(str(row["batch"]), row["mode"], str(drafts), *cells)
        console.print(table)
    for row in rows:
        if row.get("same_tokens_as_lean") is False:
            console.print(f"batch {row['batch']}: {row['mode']} gave other tokens than the lean loop")


def main(argv: list[str] | None = None) -> int:
    options = tyro.cli(Bench, args=argv, prog="python -m infer.bench")
    console = Console(stderr=True)
    try:
        if min(*options.batch_sizes, options.new_tokens - 1, options.rounds, options.prompt_tokens) < 1:
            raise DominoError(
                "--batch-sizes, --rounds and --prompt-tokens must be at least 1, --new-tokens at least 2."
            )
        if max(options.batch_sizes) > options.num_prompts:
            raise DominoError(f"--num-prompts {options.num_prompts} is less than the largest of --batch-sizes.")
        if not 0 <= options.temperature < float("inf") or options.seed < 0:
            raise DominoError("--temperature and --seed must be 0 or more.")
        if options.json and not options.json.absolute().parent.is_dir():
            raise DominoError(f"{options.json.absolute().parent} is not a folder; --json is to be written there.")
        target, drafter = resolve(options.model, options.draft)
        with console.status("loading"):
            mesh = sharding.parse(options.mesh) if options.mesh else None
            loaded = load(target, drafter, options.dtype, mesh=mesh)
        if loaded.mesh and any(batch % loaded.mesh.shape[sharding.DATA] for batch in options.batch_sizes):
            raise DominoError("--batch-sizes must be multiples of the mesh's data axis.")
        if options.drafts and loaded.configs.draft is None:
            raise DominoError("--drafts needs a drafter: give one with --draft DIR.")
        for warning in loaded.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        with loaded.context():
            rows = measure(options, loaded, target, console)
        try:
            show(rows, Console())
        finally:  # neither a full disk nor a closed pipe loses both
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    except (DominoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
