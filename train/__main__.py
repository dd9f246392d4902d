"""Train a Domino drafter for a frozen Qwen3 target.

    python -m train --target target --data data.jsonl --out runs/drafter
    python -m train --resume --out runs/drafter

The run's folder holds settings.json, checkpoints/, metrics.jsonl, curves.png and, at the end or when
interrupted, the drafter as a Hugging Face folder, drafter/.
"""

import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

from convert import hf
from convert.precision import settle as settle_dtype
from convert.programs import keep_programs
from convert.tokenizer import load_tokenizer
from domino_jax.config import DraftConfig, HeadConfig, TargetConfig, check_pair, default_taps
from domino_jax.errors import DominoError
from domino_jax.weights import flatten, init, unflatten
from train import curves, data
from train.checkpoint import Checkpoints
from train.step import Metrics, Recipe, TrainState, start, train_step
from train.stopping import stop_signals
from train.warm import from_drafter, from_target


@dataclass(frozen=True)
class Train:
    """Train a Domino drafter for a frozen Qwen3 target (base-anchored curriculum)."""

    target: Path | None = None
    """folder of the target, Hugging Face files"""
    data: Path | None = None
    """JSONL of sequences, best written by the target itself (see train.prompts)"""
    out: Path = Path("runs/drafter")
    """folder of the run"""
    resume: bool = False
    """continue the run in --out, with its own settings"""

    layers: int = 5
    """layers of the drafter"""
    block_size: int = 16
    """M, rows of a block"""
    taps: tuple[int, ...] = ()
    """target layers to read; spread over the depth when not given"""
    intermediate_size: int | None = None
    """MLP width of the drafter; the target's when not given"""
    head: bool = True
    """train the causal head; --no-head is plain DFlash"""
    gru_hidden_dim: int = 1024
    emb_dim: int = 256
    """rank of the head's vocabulary projection"""
    pure_draft_prefix_len: int = 1
    """first proposals that the head leaves alone"""
    shift_label: bool = True
    """the anchor's own row makes the first proposal"""
    warm: bool = False
    """begin as the target's last layers instead of at random"""
    begin_as: Path | None = None
    """begin as the drafter of this folder; one without a head (DFlash) gets a head at zero correction"""
    mask_token_id: int | None = None
    """the tokenizer's mask token when not given"""

    steps: int = 1000
    batch: int = 8
    """sequences a step"""
    length: int = 3072
    """tokens a sequence is cut to"""
    anchors: int = 256
    """A, blocks a sequence"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for the matrices, with AdamW for the rest"""
    lr: float = 6e-4
    """of AdamW"""
    muon_lr: float = 0.02
    warmup: float = 0.04
    """share of the steps with a rising learning rate"""
    weight_decay: float = 0.01
    clip: float = 1.0
    """largest gradient norm"""
    gamma: float = 7.0
    """γ, decay of the weights over a block"""
    lambda_base_start: float = 1.0
    lambda_base_decay_ratio: float = 1.0
    """share of the steps over which λ falls to 0"""
    chunk: int = 1024
    """proposals whose logits exist at a time"""
    dtype: str | None = None
    """of the computation (masters are float32): float32 on a CPU and bfloat16 elsewhere when not given"""
    seed: int = 0
    log_every: int = 10
    save_every: int = 200


def draft_config(options: Train, target: TargetConfig, mask_token_id: int) -> DraftConfig:
    """The drafter's config: its layers have the target's geometry."""
    return DraftConfig(
        **target.geometry(
            num_hidden_layers=options.layers,
            intermediate_size=options.intermediate_size or target.intermediate_size,
        ),
        block_size=options.block_size,
        mask_token_id=mask_token_id,
        target_layer_ids=options.taps or default_taps(target.num_hidden_layers, options.layers),
        num_target_layers=target.num_hidden_layers,
        shift_label=options.shift_label,
        head=HeadConfig(options.gru_hidden_dim, options.emb_dim, options.pure_draft_prefix_len)
        if options.head
        else None,
    )


# What a resumed run may change: a run that diverged goes on from its last good checkpoint with gentler ones.
CHANGEABLE = ("lr", "muon_lr", "clip", "log_every", "save_every")


def settle(options: Train) -> Train:
    """The options to run with: a resumed run's own, with those of CHANGEABLE that were given anew.

    Raises:
        DominoError: there is nothing to resume, another setting differs, a value makes no sense, or what is
            needed was not given.
    """
    path = options.out / "settings.json"
    if options.resume:
        saved = hf.read_json(path)
        given = _plain(options)
        defaults = _plain(Train())
        changed = [k for k in given if k not in ("out", "resume") and given[k] not in (defaults[k], saved.get(k))]
        kept = [k for k in changed if k not in CHANGEABLE]
        if kept:
            raise DominoError(f"a resumed run keeps its settings; leave out --{', --'.join(kept).replace('_', '-')}.")
        fields: dict[str, Any] = {f.name: saved[f.name] for f in dataclasses.fields(Train) if f.name in saved}
        fields |= {k: given[k] for k in changed}
        fields |= {"taps": tuple(fields["taps"]), "out": options.out, "resume": True}
        fields |= {key: Path(fields[key]) for key in ("target", "data", "begin_as") if fields.get(key)}
        return check(Train(**fields))
    if options.warm and options.begin_as:
        raise DominoError("a drafter begins in one way: give --warm or --begin-as, not both.")
    if options.target is None or options.data is None:
        raise DominoError("give --target (a model's folder) and --data (a JSONL file), or --resume with --out.")
    if path.exists():
        raise DominoError(f"{options.out} already holds a run; continue it with --resume, or give another --out.")
    return check(options)


def check(options: Train) -> Train:
    """The options, if their values make sense.

    Raises:
        DominoError: one does not.
    """
    rules: dict[str, Callable[[Any], bool]] = dict.fromkeys(
        ("steps", "batch", "length", "anchors", "chunk", "log_every", "save_every", "layers"), lambda x: x >= 1
    )
    rules |= dict.fromkeys(("lr", "muon_lr", "clip", "gamma"), lambda x: 0 < x < math.inf)
    rules |= dict.fromkeys(("warmup", "lambda_base_start"), lambda x: 0 <= x <= 1)
    rules |= dict.fromkeys(("weight_decay", "lambda_base_decay_ratio"), lambda x: 0 <= x < math.inf)
    rules |= {"intermediate_size": lambda x: x is None or x >= 1}
    for name, holds in rules.items():
        if not holds(getattr(options, name)):
            raise DominoError(f"--{name.replace('_', '-')} can't be {getattr(options, name)}.")
    return options


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DominoError(f"the training data {path} can't be read: {error}.") from None


def _plain(options: Train) -> dict[str, Any]:
    """The options as JSON holds them."""
    values = dataclasses.asdict(options)
    return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def row(metrics: Metrics, step: int, speed: float | None) -> dict[str, Any]:
    """One line of metrics.jsonl; `speed` in tokens/s with padding, None before a second step was timed."""
    report = metrics.report
    return {
        "step": step,
        "loss": float(report.loss),
        "final_loss": float(report.final.loss),
        "base_loss": float(report.base.loss),
        "final_acceptance": float(report.final.acceptance),
        "base_acceptance": float(report.base.acceptance),
        "final_accuracy": float(report.final.accuracy),
        "base_accuracy": float(report.base.accuracy),
        "lambda": float(metrics.lam),
        "lr": float(metrics.lr),
        "gradient_norm": float(metrics.gradient_norm),
        "tokens_per_second": speed,
    }


def run(options: Train) -> None:
    """Train to the end, or to an interruption, which saves first."""
    keep_programs()
    options = settle(options)
    assert options.target is not None and options.data is not None
    raw = hf.read_json(options.target / "config.json")
    target = hf.parse_config(raw)
    if not isinstance(target, TargetConfig):
        raise DominoError(f"{options.target} is a drafter; --target takes the target model.")
    if options.length > target.positions:
        raise DominoError(f"--length {options.length} is beyond the target's {target.positions} positions.")
    tokenizer = load_tokenizer(options.target)
    mask_token_id = options.mask_token_id
    if mask_token_id is None:
        mask_token_id = getattr(tokenizer, "mask_token_id", None)
        if mask_token_id is None:
            raise DominoError(
                "the target's tokenizer has no mask token; give --mask-token-id, an unused id of its vocabulary."
            )
    draft = draft_config(options, target, mask_token_id)
    for warning in check_pair(target, draft):
        print(f"warning: {warning}", file=sys.stderr)
    dataset, skipped = data.read(options.data, options.length, target.vocab_size, tokenizer, options.seed)
    if options.dtype not in (None, "float32", "bfloat16"):
        raise DominoError(f"--dtype is float32 or bfloat16, found {options.dtype!r}.")
    dtype = settle_dtype(options.dtype)
    frozen = hf.load(options.target, target, dtype)
    fingerprint = _sha256(options.data)
    if options.resume and fingerprint != hf.read_json(options.out / "settings.json").get("data_sha256"):
        raise DominoError(f"{options.data} is not what this run began with: a resumed run needs the same data.")
    options = dataclasses.replace(options, dtype=dtype.name, mask_token_id=mask_token_id)  # a resumed run has the same
    own = {name: getattr(options, name) for name in Recipe._fields if name not in ("target", "draft")}
    recipe = Recipe(target, draft, **own)
    weights = flatten(init(draft, jax.random.key(options.seed)))
    if draft.head:
        weights["head.proj_out"] = jnp.zeros_like(weights["head.proj_out"])  # no correction to begin with
    if options.warm:
        weights = from_target(weights, draft, target, frozen)
    checkpoints = Checkpoints(options.out / "checkpoints")
    goes_on = options.resume and checkpoints.latest() is not None
    if options.begin_as and not goes_on:
        weights = from_drafter(weights, draft, options.begin_as)
    state = start(recipe, weights, options.seed)
    if goes_on:
        state = checkpoints.restore(state)
    hf.write_json(options.out / "settings.json", _plain(options) | {"data_sha256": fingerprint})
    hf.write_json(options.out / "config.json", draft.to_hf())  # with the checkpoints all that convert needs
    done = int(state.step)
    count = sum(w.size for w in state.weights.values())
    epochs = options.steps * options.batch / len(dataset)
    print(
        f"{len(dataset)} sequences ({skipped} without an anchor left out), {epochs:.1f} epochs; "
        f"drafter of {count / 1e6:.1f}M parameters, {draft.num_proposals} proposals a block; from step {done}",
        flush=True,
    )
    metrics_path = options.out / "metrics.jsonl"
    rows = [r for r in curves.read(metrics_path) if r["step"] <= done]
    curves.write(rows, metrics_path)

    def save(state: TrainState, last: bool) -> None:
        checkpoints.save(state)
        if rows:
            curves.draw(rows, options.out / "curves.png")
        if last:
            checkpoints.finish()
            hf.save(options.out / "drafter", unflatten(draft, state.weights), draft, draft.to_hf(), jnp.bfloat16)

    def finite(pending: list[Metrics]) -> list[Metrics]:
        """What the last steps reported, fetched; stops at the first that was not finite."""
        pending = jax.device_get(pending)
        for number, metrics in enumerate(pending, done - len(pending) + 1):
            if not metrics.finite:
                checkpoints.finish()
                good = checkpoints.latest()
                raise DominoError(
                    f"the loss or its gradient is not finite at step {number} (loss {float(metrics.report.loss)}, "
                    f"gradient norm {float(metrics.gradient_norm)}); --resume from "
                    + ("the beginning" if good is None else f"the good checkpoint of step {good}")
                    + " with a lower --lr, --muon-lr or --clip."
                )
        return pending

    def log(metrics: Metrics, per_step: float | None, batch_tokens: int) -> None:
        """One line of metrics.jsonl, and one for people."""
        rows.append(row(metrics, done, batch_tokens / per_step if per_step else None))
        with metrics_path.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        r = rows[-1]
        rate = (
            f"{r['tokens_per_second']:,.0f} tokens/s  {_clock(per_step * (options.steps - done))} left"
            if per_step
            else ""
        )
        print(
            f"step {done}/{options.steps}  loss {r['loss']:.3f}  "
            f"final {r['final_loss']:.3f}  base {r['base_loss']:.3f}  "
            f"acceptance {r['final_acceptance']:.2f} (base {r['base_acceptance']:.2f})  λ {r['lambda']:.2f}  "
            f"lr {r['lr']:.1e}  {rate}",
            flush=True,
        )

    pending: list[Metrics] = []
    with stop_signals() as stopping:
        began, begun_at = time.perf_counter(), done
        while done < options.steps and not stopping.is_set():
            batch = dataset.batch(done, options.batch)
            state, metrics = train_step(recipe, state, frozen, jnp.asarray(batch.ids), jnp.asarray(batch.mask))
            pending.append(metrics)
            done += 1
            if done - begun_at == 1:  # compiling is not part of the speed
                jax.block_until_ready(state)
                began = time.perf_counter()
            logs = done % options.log_every == 0 or done == options.steps
            saves = done % options.save_every == 0
            if logs or saves:
                jax.block_until_ready(state)
                steps_timed = done - begun_at - 1
                per_step = (time.perf_counter() - began) / steps_timed if steps_timed else None
                fetched, pending = finite(pending), []
            if logs:
                log(fetched[-1], per_step, batch.ids.size)
            if saves:
                save(state, last=False)
        finite(pending)
        save(state, last=True)
    if done < options.steps:
        print(
            f"interrupted at step {done}; continue with: python -m train --resume --out {options.out}", file=sys.stderr
        )
        raise KeyboardInterrupt
    print(f"wrote {options.out / 'drafter'}")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def main(argv: list[str] | None = None) -> int:
    options = tyro.cli(Train, args=argv, prog="python -m train")
    try:
        run(options)
    except DominoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"error: {error}; the checkpoints in {options.out} are as they were.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
