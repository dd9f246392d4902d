"""Capture a target's features for a corpus once, so that training reads them instead of running the target.

    python -m train capture --target target --data data.jsonl --length 3072 --out features
    python -m train --features features ...

The data options, the target layers and the drafter's layers must be those of the training. The same command continues a
capture that was interrupted.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tyro.conf import arg

from convert import folders
from convert.identity import model_fingerprint
from convert.not_finite import not_finite_error
from convert.options import UNSET, Weights, check_count, local_sources
from convert.registry import read_configs
from convert.tokenizer import load_tokenizer
from domino_jax import prepare, sharding, target
from domino_jax.config import TargetConfig, choose_target_layer_ids, last_layer_warning
from domino_jax.errors import DominoError, first_line
from domino_jax.moe import resolve_moe_backend
from domino_jax.runtime.command import UsageError, run_command, words_at_fault
from domino_jax.runtime.compile_cache import enable_compile_cache
from domino_jax.runtime.devices import own_devices
from domino_jax.runtime.files import check_output, lock_folder
from domino_jax.runtime.precision import matmul_precision
from domino_jax.runtime.precision import resolve_dtype as settle_dtype
from domino_jax.runtime.weight_forms import resolve_weights
from domino_jax.weights import Target
from train.data import dataset
from train.data.cache import cache_folder
from train.data.corpus import Corpus
from train.features import shards, store
from train.loading import find
from train.monitor.progress import Progress, counting

LINE_SECONDS = 10  # between lines of progress
HEADER_BYTES = 2**20  # what else is written, with room to spare


@dataclass(frozen=True)
class Capture:
    """Write a target's features for a corpus to disk."""

    target: str
    """a name such as qwen3-4b, a folder, or org/repo on the Hub"""
    data: tuple[str, ...]
    """training data, as the training gets it"""
    out: Path
    """folder for the features"""
    split: str = "train"
    """of a Hub dataset, as in the training"""
    length: int = 3072
    """tokens a sequence is cut to, as in the training"""
    pack: bool = False
    """put several short conversations into one sequence, as in the training"""
    target_layer_ids: Annotated[tuple[int, ...], UNSET, arg(aliases=["--taps"])] = ()
    """target layers to read; spread over the depth when not given"""
    layers: int = 5
    """layers of the drafter; they decide --target-layer-ids where those are not given"""
    hidden: bool = False
    """keep the states after the final norm as well, for --loss kl"""
    batch: int = 8
    """sequences at a time"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """of the computation: float32 on a CPU and bfloat16 elsewhere when not given"""
    weights: Weights = "auto"
    """form of the target's matrices, as in the training: exact, which auto is too, int8 or float8"""
    mesh: str | None = None
    """devices, such as data=2,model=4; one when not given"""


def corpus_to_capture(options: Capture, folder: Path, config: TargetConfig) -> Corpus:
    """The corpus that a training with the same data options reads."""
    tokenizer = load_tokenizer(folder)
    corpus, summary = dataset.read_corpus(
        options.data,
        options.length,
        config.vocab_size,
        tokenizer,
        split=options.split,
        pack=options.pack,
        progress=counting("lines read", partial(print, flush=True)),
        cache=cache_folder(),
    )
    print(summary, flush=True)
    return corpus


@partial(jax.jit, static_argnums=(1, 2, 3))
def observe(
    frozen: Target,
    config: TargetConfig,
    target_layer_ids: tuple[int, ...],
    hidden: bool,
    ids: jax.Array,
    starts: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """What is kept of B rows: [B, S, LD (+ D)] bfloat16, the features and with `hidden` the final states.

    And whether it is finite, [B, S] bool.

    Args:
        ids: [B, S].
        starts: [B, S], the first position that each token sees, where rows are packed; else None.
    """
    states, features, _ = target.forward(frozen, config, ids, target_layer_ids=target_layer_ids, starts=starts)
    kept = jnp.concatenate([features, states], axis=-1) if hidden else features
    kept = kept.astype(jnp.bfloat16)
    return sharding.constrain(kept, "B T -"), sharding.constrain(jnp.isfinite(kept).all(axis=-1), "B T")


def computed(
    frozen: Target, config: TargetConfig, plan: shards.ShardPlan, corpus: Corpus, rows: slice, batch: int
) -> Iterator[np.ndarray]:
    """What is kept of each of these rows, [tokens, LD (+ D)]; the device is a batch ahead of whoever takes them.

    Raises:
        DominoError: the target's numbers are not finite.
    """
    packed, last = corpus.packed(rows), rows.stop - 1

    def dispatch(at: int) -> tuple[jax.Array, jax.Array]:
        taken = corpus.take(np.minimum(np.arange(at, at + batch), last))  # of one size: the last row stands in
        ids = sharding.shard_copy(taken.ids, "B T")
        starts = sharding.shard_copy(taken.starts, "B T") if packed else None
        return observe(frozen, config, plan.target_layer_ids, bool(plan.hidden), ids, starts)

    lengths = corpus.lengths
    ahead = dispatch(rows.start)
    for at in range(rows.start, rows.stop, batch):
        current, ahead = ahead, dispatch(at + batch) if at + batch < rows.stop else ahead
        held, finite = map(np.asarray, sharding.fetch(current))
        for i, length in enumerate(lengths[at : min(at + batch, rows.stop)]):
            if not finite[i, :length].all():
                ids = corpus.take([at + i]).ids[0, :length].tolist()
                raise not_finite_error(frozen, config, ids, frozen.norm.dtype)
            yield held[i, :length]


def check_space(folder: Path, plan: shards.ShardPlan) -> str:
    """The disk space that the capture needs, in words.

    Raises:
        DominoError: there is less.
    """
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    needed = sum(len(plan.head(i)) + plan.body(i) for i in plan.missing) + HEADER_BYTES
    free = shutil.disk_usage(place).free
    words = f"{sum(plan.tokens):,} tokens of {plan.token_bytes:,} bytes need {gib(plan.size)}"
    if len(plan.missing) < len(plan.rows):
        words += f", of which {gib(plan.size + HEADER_BYTES - needed)} are there"
    words += f"; {gib(free)} are free at {place}"
    if needed > free:
        raise DominoError(f"the disk is too small: {words}; give another --out or fewer --target-layer-ids.")
    return words


def gib(size: int) -> str:
    """Bytes for people."""
    unit, power = next((u, p) for u, p in (("GiB", 30), ("MiB", 20), ("KiB", 10)) if size >= 2**p or p == 10)
    return f"{size / 2**power:,.1f} {unit}"


def run_capture(options: Capture) -> None:
    """Capture what is missing.

    Raises:
        UsageError: an option makes no sense, or does not fit the target.
        DominoError: something does not fit, or can't be read or written; what is finished stays.
        KeyboardInterrupt: it was interrupted; what is finished stays.
    """
    for name in ("batch", "length", "layers"):
        check_count(name, getattr(options, name))
    for layer in options.target_layer_ids:
        check_count("target_layer_ids", layer, least=0)
    with words_at_fault():
        rows_at_once, model = sharding.parse_mesh(options.mesh) if options.mesh else (1, 1)
        weights = resolve_weights(options.weights)
    if options.batch % rows_at_once:
        raise UsageError(f"mesh axis data={rows_at_once} does not divide --batch {options.batch}.")
    sources = local_sources(options.target, *options.data)
    check_output(options.out, "captured features", sources)
    enable_compile_cache()
    folder = find(options.target)
    _, config, _, _ = read_configs(folder, None, "--target")
    platform = own_devices()[0].platform
    config = resolve_moe_backend(config, platform)
    if options.length > config.positions:
        raise UsageError(f"--length {options.length} is beyond the target's {config.positions} positions.")
    depth = config.num_hidden_layers
    target_layer_ids = options.target_layer_ids or choose_target_layer_ids(depth, options.layers)
    if not all(0 <= i < depth for i in target_layer_ids):
        raise UsageError(f"--target-layer-ids must name layers 0 to {depth - 1}, found {list(target_layer_ids)}.")
    for warning in last_layer_warning(target_layer_ids, depth):
        print(f"warning: {warning}", file=sys.stderr)
    dtype = settle_dtype(options.dtype, platform)
    mesh = sharding.make_mesh(rows_at_once, model) if options.mesh else None
    fitted = sharding.fit_to_mesh(config, model)
    corpus = corpus_to_capture(options, folder, config)
    lengths = corpus.lengths
    plan = shards.plan_shards(
        lengths,
        target=model_fingerprint(folder),
        corpus=corpus.fingerprint,
        target_layer_ids=target_layer_ids,
        width=len(target_layer_ids) * config.hidden_size,
        hidden=config.hidden_size if options.hidden else 0,
        dtype=dtype.name,
        length=corpus.length,
        weights=weights,
    )
    if not options.out.exists():  # a disk that is too small is left as it was
        check_space(options.out, plan)
    with lock_folder(options.out, "captured features", sources):
        plan = store.resume_capture(options.out, plan)
        for left in options.out.glob("features-*.tmp"):  # by a process that was killed
            left.unlink()
        print(check_space(options.out, plan), flush=True)
        if not plan.missing:
            print(f"{options.out} is complete")
            return
        frozen = folders.load_weights(folder, config, dtype, mesh=mesh, form=prepare.target_form(config, weights))
        shards.write_header(options.out, plan)

        def rows_of(part: slice) -> Iterator[np.ndarray]:
            return computed(frozen, fitted, plan, corpus, part, options.batch)

        with sharding.mesh_context(mesh), matmul_precision(dtype):
            write_missing(options.out, plan, rows_of)
    print(f"wrote {options.out}: {sum(plan.rows)} rows, {gib(plan.size)}")


def write_missing(folder: Path, plan: shards.ShardPlan, rows_of: Callable[[slice], Iterator[np.ndarray]]) -> None:
    """Write the shards that a plan lacks, with progress.

    Args:
        rows_of: what is kept of each row of a part of the corpus, [tokens, LD (+ D)].

    Raises:
        DominoError: the disk is full, say; what is finished stays.
        KeyboardInterrupt: it was interrupted; what is finished stays.
    """
    missing, total = plan.missing, len(plan.rows)
    done = sum(plan.rows) - sum(plan.rows[i] for i in missing)
    begun = printed = time.perf_counter()
    tokens = 0
    with Progress("row") as progress:
        progress.start(sum(plan.rows), done)

        def shown(rows: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
            nonlocal done, tokens, printed
            for row in rows:
                yield row
                done, tokens = done + 1, tokens + len(row)
                progress.advance(done)
                if (now := time.perf_counter()) - printed > LINE_SECONDS:
                    printed = now
                    progress.update({"step": done, "tokens_per_second": tokens / (now - begun)})

        try:
            for shard in missing:
                part = slice(plan.first(shard), plan.first(shard) + plan.rows[shard])
                plan = shards.write_shard(folder, plan, shard, shown(rows_of(part)))
        except OSError as error:
            raise DominoError(
                f"{folder} can't be written: {first_line(error)}; {total - len(plan.missing)} of {total} shards are "
                "finished: free some space and give the same command again."
            ) from None
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{total - len(plan.missing)} of {total} shards are finished") from None


def _capture(options: Capture) -> None:
    try:
        run_capture(options)
    except KeyboardInterrupt as stop:
        print(f"interrupted: {stop or 'nothing was written'}; the same command goes on.", file=sys.stderr)
        raise


def main(argv: Sequence[str] | None = None, prog: str = "python -m train capture") -> int:
    """Run the command line; returns the exit code."""
    return run_command(Capture, _capture, argv, prog=prog)
