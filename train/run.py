"""One training run: from its settings to a drafter, through interruptions and bad luck.

The folder of a run holds settings.toml and config.json (the drafter's), checkpoints/, metrics.jsonl, report.md with its
curves, tensorboard/, and the drafter as Hugging Face files: drafter/ is the newest one, best/ the one with the highest
validated acceptance length.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from convert import folders, hf
from convert.drafters import make_drafter
from convert.identity import model_fingerprint
from convert.progress import progress_bars
from convert.registry import read_configs
from convert.tokenizer import end_tokens, load_tokenizer
from domino_jax import prepare as prepare_weights
from domino_jax.config import DraftConfig, TargetConfig, check_pair, last_layer_warning
from domino_jax.decode import DecodeConfig
from domino_jax.drafters.dual_view import DualViewConfig
from domino_jax.drafters.heads import head_of
from domino_jax.drafters.heads.base import under
from domino_jax.errors import DominoError
from domino_jax.moe import resolve_moe_backend
from domino_jax.runtime.command import UsageError, words_at_fault
from domino_jax.runtime.devices import own_devices
from domino_jax.runtime.extras import require
from domino_jax.runtime.files import lock_folder
from domino_jax.runtime.memory import explain_out_of_memory
from domino_jax.runtime.precision import matmul_precision, resolve_dtype
from domino_jax.runtime.processes import broadcast_from_first, wait_for_others
from domino_jax.runtime.weight_forms import resolve_weights
from domino_jax.sharding import fetch, mesh_context, parse_training_mesh
from domino_jax.weights import Params, Target, flatten, init_weights, unflatten
from train import config
from train import mesh as meshes
from train import options as settings
from train.checkpoint import Checkpoints
from train.config import Recipe, TrainConfig, TrainedConfig
from train.data import dataset
from train.data.cache import cache_folder
from train.data.corpus import Batch, Corpus
from train.evaluate.prompts import read_heldout_prompts
from train.evaluate.validate import Stopped, Validation
from train.features.store import Captured, Features
from train.init import (
    check_target_layers,
    copied_view,
    dequantized,
    from_drafter,
    from_target,
    read_first_drafter,
)
from train.loading import find
from train.loss import check_attention
from train.monitor import curves
from train.monitor.divergence import USUAL, DivergenceMonitor
from train.monitor.log import METRICS, Log
from train.monitor.progress import counting
from train.step import Metrics, TrainState, checkpoint_form, exported_weights, init_state, train_step
from train.stopping import agreed_stop, stop_signals

ORIGIN = "origin.json"  # what a run's data and target are known by
NEWEST, BEST = "drafter", "best"
AHEAD = 2  # steps that are started before the one before them has ended: the device never waits


@dataclass(frozen=True)
class Setup:
    """What a run is made of, ready to begin."""

    options: TrainConfig  # with values in the place of None: steps, dtype, mask token
    recipe: Recipe
    corpus: Corpus
    frozen: Target
    features: Features | None
    validation: Validation | None
    mesh: Mesh | None

    @contextmanager
    def context(self) -> Iterator[None]:
        """What programs of this run are run in: its mesh and the precision of its products."""
        with mesh_context(self.mesh), matmul_precision(self.recipe.dtype):
            yield


def prepare(options: TrainConfig) -> Setup:
    """Find and check everything a run needs, the cheap things first.

    Raises:
        UsageError: a setting does not fit the target.
        DominoError: something is missing, or does not fit something else.
    """
    require("grain", "matplotlib", "tomli_w")  # imported when data and weights are read
    console, wanted = Console(stderr=True), options.data
    assert options.target is not None
    folder = find(options.target)
    raw, target, _, _ = read_configs(folder, None, "--target")
    device = own_devices()[0]
    target = resolve_moe_backend(target, device.platform, differentiated=options.drafter.drafter != "block")
    if wanted.length > target.positions:
        raise UsageError(f"--length {wanted.length} is beyond the target's {target.positions} positions.")
    tokenizer = load_tokenizer(folder)
    stop_ids, guessed = end_tokens(folder, raw, tokenizer)
    options = replaced(options, "drafter", mask_token_id=mask_token(options, tokenizer))
    options, draft = settle_drafter(config.settled(options), target)
    drafter = make_drafter(draft)
    assert drafter is not None
    with words_at_fault():
        warnings = (
            guessed + check_pair(target, draft) + last_layer_warning(drafter.target_layer_ids, target.num_hidden_layers)
        )
        if options.drafter.init == "target-layers" and isinstance(draft, DraftConfig):
            check_target_layers(draft, target)
    mesh = resolve_mesh(options, target, draft)
    if options.drafter.init_from and not options.resume:  # what a run began with is needed no more
        warnings += read_first_drafter(options.drafter.init_from, draft).warnings
    for warning in warnings:
        console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    dtype = resolve_dtype(options.run.dtype, device.platform)
    check_attention(options.objective, target, draft, dtype, device, captured=wanted.features is not None)
    corpus, summary = dataset.read_corpus(
        wanted.data,
        wanted.length,
        target.vocab_size,
        tokenizer,
        split=wanted.split,
        pack=wanted.pack,
        progress=counting("lines read", say_state),
        cache=cache_folder(),
    )
    say_state(str(summary))
    check_origin(options, corpus, folder)
    steps = options.run.steps or math.ceil(options.run.epochs * len(corpus) / options.run.batch)
    weights = resolve_weights(options.run.weights)
    options = replaced(options, "run", steps=steps, dtype=dtype.name, weights=weights)
    features = None
    if wanted.features is not None:
        features = Features.open(wanted.features)
        features.check(
            model_fingerprint(folder),
            corpus.fingerprint,
            drafter.target_layer_ids,
            options.objective.reads_target,
            weights,
        )
    prompts = held_out(options, target, tokenizer)
    with (
        progress_bars() as progress,
        explain_out_of_memory(f"the device has too little memory for the target in {dtype.name}."),
    ):
        form = prepare_weights.target_form(target, weights)
        frozen = folders.load_weights(folder, target, dtype, partial(progress, "loading target"), mesh, form=form)
    frozen = meshes.place_module(frozen, target, mesh)
    recipe = Recipe(
        target,
        draft,
        options.objective,
        options.optimizer,
        steps,
        dtype.name,
        options.run.accumulate,
        options.drafter.freeze_backbone,
        options.drafter.freeze_output,
    )
    validation = None
    if prompts:
        tokens, decoded = options.run.validation_tokens, frozen
        if dtype == jnp.float32 and device.platform == "cpu":
            decoded = prepare_weights.quantized_for_cpu(Params(frozen)).target  # the same 8 bits, as infer has them
        validation = Validation(decoded, DecodeConfig(target, drafter), prompts, stop_ids, dtype, new_tokens=tokens)
    return Setup(options, recipe, corpus, frozen, features, validation, mesh)


def replaced(options: TrainConfig, group: str, **changes: Any) -> TrainConfig:
    """The options with what was found out about some of a group's: saved so, a resumed run has the same."""
    changed: Any = {group: dataclasses.replace(getattr(options, group), **changes)}
    return dataclasses.replace(options, **changed)


def mask_token(options: TrainConfig, tokenizer: Any) -> int:
    """The id that stands for what is to be drafted.

    Raises:
        DominoError: neither the options nor the tokenizer say.
    """
    given = options.drafter.mask_token_id
    found = getattr(tokenizer, "mask_token_id", None) if given is None else given
    if found is None:
        raise DominoError(
            "the target's tokenizer has no mask token; give --mask-token-id, an unused id of its vocabulary."
        )
    return found


def settle_drafter(options: TrainConfig, target: TargetConfig) -> tuple[TrainConfig, TrainedConfig]:
    """The drafter's config, and the options with what it chose by default; a resumed run keeps its drafter.

    Raises:
        DominoError: the settings of a resumed run give another drafter than it began with.
    """
    path = options.out / "config.json"
    was = folders.read_config(options.out, target.num_hidden_layers) if options.resume and path.exists() else None
    if isinstance(was, DraftConfig) and not options.drafter.target_layer_ids:
        options = replaced(options, "drafter", target_layer_ids=was.target_layer_ids)
    with words_at_fault():  # the drafter's config is made of flags
        form = config.draft_config if options.drafter.drafter == "block" else config.view_config
        draft = form(options.drafter, target)
    if was is not None and was != draft:
        raise DominoError(
            f"{path} is of another drafter than {options.out / settings.SETTINGS} and the target give: a resumed run "
            "needs all three as they were."
        )
    if isinstance(draft, DualViewConfig):
        return options, draft
    chosen = {"target_layer_ids": draft.target_layer_ids, "shift_label": draft.shift_label}
    return replaced(options, "drafter", **chosen), draft


def resolve_mesh(options: TrainConfig, target: TargetConfig, draft: TrainedConfig) -> Mesh | None:
    """The mesh to train on; None for one device.

    Raises:
        UsageError: it is malformed, or does not fit the batch.
        DominoError: it does not fit the devices or the models.
    """
    words = options.run.mesh
    if words is None:
        devices = own_devices()
        alone = devices[0].platform == "cpu" and jax.process_count() == 1  # a CPU's devices are one and the same
        words = f"fsdp={1 if alone else len(devices)}"
    with words_at_fault():
        parse_training_mesh(words)
    mesh = meshes.make_training_mesh(words, [target, draft])
    rows, parts = mesh.shape["data"] * mesh.shape["fsdp"], options.run.accumulate
    if options.run.batch % (rows * parts):
        raise UsageError(
            f"--batch {options.run.batch} can't be divided into --accumulate {parts} parts over {rows} devices: give a "
            f"multiple of {rows * parts}."
        )
    return mesh if mesh.size > 1 else None


def check_origin(options: TrainConfig, corpus: Corpus, target: Path) -> None:
    """Note what the run learns from, and whose words; a resumed run must have the same.

    Raises:
        DominoError: it has not.
    """
    path = options.out / ORIGIN
    now = {"data": corpus.fingerprint, "target": model_fingerprint(target)}
    if options.resume and path.exists():
        was = hf.read_json(path)
        given = {"data": " ".join(options.data.data), "target": str(target)}
        for what, words in given.items():
            if was.get(what) != now[what]:
                raise DominoError(f"{words} is not what this run began with: a resumed run needs the same {what}.")
    elif jax.process_index() == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        hf.write_json(path, now)


def held_out(options: TrainConfig, target: TargetConfig, tokenizer: Any) -> list[Any]:
    """The prompts to validate with; none without --validation."""
    if options.data.validation is None:
        return []
    tokens = options.run.validation_tokens
    found = read_heldout_prompts(options.data.validation, target.vocab_size, target.positions, tokenizer, tokens)
    return found[: options.run.validation_prompts]


def initial_state(setup: Setup, checkpoints: Checkpoints) -> TrainState:
    """The state to go on from: the newest checkpoint's where a run is resumed and has one, else a fresh one."""
    options, draft = setup.options, setup.recipe.draft
    if options.resume and checkpoints.latest() is not None:
        return checkpoints.restore(checkpoint_form(setup.recipe))
    weights = flatten(init_weights(draft, jax.random.key(options.run.seed)))
    if isinstance(draft, DualViewConfig):
        weights = copied_view(weights, dequantized(fetch(setup.frozen)))
    for path in under("head", head_of(draft).zero_at_first):  # no correction to begin with
        weights[path] = jnp.zeros_like(weights[path])
    if isinstance(draft, DraftConfig) and draft.convolution:
        weights |= draft.convolution.at_first(weights)
    if options.drafter.init == "target-layers" and isinstance(draft, DraftConfig):
        weights = from_target(weights, draft, setup.recipe.target, dequantized(fetch(setup.frozen)))
    if options.drafter.init_from:
        weights = from_drafter(weights, draft, options.drafter.init_from)
    return init_state(setup.recipe, fetch(weights), options.run.seed)


def run_training(options: TrainConfig) -> None:
    """Train to the end, or to an interruption, which saves first.

    Raises:
        DominoError: the settings, the data or the machine don't allow it, or the training diverged.
        KeyboardInterrupt: it was interrupted, and what was reached is saved.
    """
    chief = jax.process_index() == 0
    with lock_folder(options.out, "a training run") if chief else nullcontext():
        train_prepared(prepare(options))


def train_prepared(setup: Setup) -> None:
    """Train a run that is ready to begin; see `run_training`."""
    with (
        setup.context(),
        explain_out_of_memory(
            "the device has too little memory for a step: raise --accumulate, add --remat, or lower --batch, --anchors "
            "or --chunk."
        ),
    ):
        Loop(setup).run()


class Loop:
    """The steps of a run, and what is done between them."""

    def __init__(self, setup: Setup):
        self.setup, self.options = setup, setup.options.run
        self.folder = setup.options.out
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.options.keep)
        self.best = (
            self.checkpoints.best()
        )  # asked once: of a checkpoint that is still being written Orbax knows nothing
        self.state = initial_state(setup, self.checkpoints)
        self.first = self.done = int(fetch(self.state.step))
        assert self.options.steps is not None
        self.steps = self.options.steps
        self.divergence = DivergenceMonitor(self.options.max_grad_norm_ratio, self.norms())
        self.pending: list[Metrics] = []  # of steps that were started and not looked at
        self.clock = Clock()
        if setup.features is not None and setup.validation is None:
            setup.frozen.layers = nnx.List([])  # of the target only embeddings and LM head are used from here on

    def norms(self) -> list[float]:
        """The newest gradient norms in the run's metrics, as its first process has them."""
        rows = [row for row in curves.read_metrics(self.folder / METRICS) if row["step"] <= self.done]
        found = [row["gradient_norm"] for row in rows if row.get("gradient_norm")][-USUAL:]
        return [norm for norm in broadcast_from_first([*found, *[0.0] * (USUAL - len(found))]) if norm]

    def run(self) -> None:
        """From where the state is to the last step, or to a signal."""
        setup, chief = self.setup, jax.process_index() == 0
        if chief:
            settings.write_recipe(setup.options, self.folder)
            hf.write_json(self.folder / "config.json", setup.recipe.draft.to_hf())  # all that convert needs beside it
        count = sum(w.size for w in self.state.weights.values())
        say_state(
            f"drafter of {count / 1e6:.1f}M parameters, {setup.recipe.draft.num_proposals} proposals a block; "
            f"{self.steps * self.options.batch / len(setup.corpus):.1f} epochs; from step {self.done} to {self.steps}"
        )
        with ExitStack() as stack:
            self.log = None
            if chief:
                values = config.flat(setup.options)
                self.log = stack.enter_context(
                    Log(self.folder, values, self.steps, self.done, self.options.tensorboard)
                )
            piece = meshes.piece(setup.mesh)
            batches = stack.enter_context(
                closing(setup.corpus.batches(self.done, self.options.batch, self.options.seed, piece))
            )
            if setup.features:
                pairs = stack.enter_context(closing(setup.features.read_ahead(batches)))
            else:
                pairs = ((batch, None) for batch in batches)
            stopping = agreed_stop(stack.enter_context(stop_signals(several=jax.process_count() > 1)))
            stopped = False
            while self.done < self.steps and not stopped:
                self.step(*next(pairs))
                stopped = self.between(stopping)
            self.look()
            self.save(None)
            self.checkpoints.finish()
            self.export(NEWEST)
            self.tell("interrupted" if self.done < self.steps else "finished")
        if self.done < self.steps:
            command = f"python -m train --resume --out {self.folder}"
            say_state(f"interrupted at step {self.done}; continue with: {command}", sys.stderr)
            wait_for_others("saved")
            raise KeyboardInterrupt
        say_state(f"wrote {self.folder / NEWEST}; {self.folder / 'report.md'} shows how it went")

    def step(self, batch: Batch, captured: Captured | None) -> None:
        """Start one step; nothing waits for it but the steps after the next, so that a signal is heard soon."""
        setup = self.setup
        features = captured.features if captured else None
        hidden = captured.hidden if captured and setup.recipe.objective.reads_target else None
        inputs = meshes.put_batch(batch, setup.mesh, features, hidden)
        if not setup.options.data.pack:
            inputs = inputs._replace(starts=None)  # a row is one sequence
        self.state, metrics = train_step(setup.recipe, self.state, setup.frozen, inputs)
        self.pending.append(metrics)
        if len(self.pending) > AHEAD:
            jax.block_until_ready(self.pending[-1 - AHEAD])
        self.done += 1
        if self.done == self.first + 1:
            jax.block_until_ready(self.state)
            self.clock.start()  # compiling is not part of the speed

    def between(self, stopping: Callable[[], bool]) -> bool:
        """What is due after a step: figures, a validation, a checkpoint. Returns whether to stop."""
        o, last = self.options, self.done == self.steps
        logs = last or self.done % o.log_every == 0
        validates = self.setup.validation is not None and (last or self.done % (o.validate_every or o.save_every) == 0)
        saves = validates or self.done % o.save_every == 0
        if logs or saves:
            metrics = self.look()
            self.clock.stop(self.done - self.first - 1)
            if logs and self.log:
                self.log.add(
                    metrics_row(
                        metrics, self.done, self.clock.pace, self.options.batch * self.setup.options.data.length
                    )
                )
            tau = self.validate(metrics, stopping) if validates else None
            if saves:
                self.save(tau)
                self.tell("running")
            self.clock.start()
        elif self.log:
            self.log.progress.advance(self.done)
        return stopping()

    def look(self) -> Metrics:
        """What the steps since the last look reported, fetched; the last one's.

        Raises:
            DominoError: one of them went wrong. What it did is not saved.
        """
        pending, self.pending = fetch(self.pending), []
        for number, metrics in enumerate(pending, self.done - len(pending) + 1):
            norm, loss = float(metrics.gradient_norm), float(metrics.report.loss)
            problem = self.divergence.problem(bool(metrics.finite), loss, norm)
            if problem:
                self.checkpoints.finish()
                good = self.checkpoints.latest()
                self.tell("diverged")
                raise DominoError(
                    f"{problem} at step {number}; --resume from "
                    + ("the beginning" if good is None else f"the good checkpoint of step {good}")
                    + " with a lower --lr, --muon-lr or --clip."
                )
        return pending[-1] if pending else None  # type: ignore[return-value]  # after a step there is one

    def validate(self, metrics: Metrics, stopping: Callable[[], bool]) -> float | None:
        """Decode the held-out prompts with the drafter as it is; the acceptance length, and a new best is written.

        None where a signal came: what was reached is to be saved soon.
        """
        assert self.setup.validation is not None
        try:
            found = self.setup.validation.run(exported_weights(self.state), stopping)
        except Stopped:
            return None
        tau = found.final.tau
        if self.log:
            figures = {"validation_tau": tau, "validation_tau_error": found.final.error}
            if found.base is not None:
                figures |= {"validation_tau_base": found.base.tau, "validation_tau_base_error": found.base.error}
            estimated = float(metrics.report.final.acceptance)
            self.log.add(
                {"step": self.done, **figures, "validation_estimated": estimated, "validation_seconds": found.seconds}
            )
        if tau is not None and (self.best is None or tau > self.best[1]):
            self.export(BEST)
            self.best = self.done, tau
        return tau

    def save(self, tau: float | None) -> None:
        """A checkpoint of the state as it is; the run goes on while it is written."""
        self.checkpoints.save(self.state, tau)

    def export(self, name: str) -> None:
        """The drafter as Hugging Face files."""
        weights, draft = fetch(exported_weights(self.state)), self.setup.recipe.draft
        if jax.process_index() == 0:
            hf.save_hf(self.folder / name, unflatten(draft, weights), draft, draft.to_hf(), jnp.bfloat16)

    def tell(self, state: str) -> None:
        """Write the report anew."""
        if self.log:
            self.log.report(state)


class Clock:
    """The time of steps alone, without what is done between them."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._seconds = 0.0
        self.pace: float | None = None  # seconds a step, None before a second step was timed

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self, steps: int) -> None:
        """Args: steps: that were run since the first start."""
        if self._began is not None:
            self._seconds += time.perf_counter() - self._began
        self._began = None
        self.pace = self._seconds / steps if steps else None


def metrics_row(metrics: Metrics, step: int, pace: float | None, tokens: int) -> dict[str, Any]:
    """One line of metrics.jsonl.

    Args:
        pace: seconds a step.
        tokens: of a step, with padding.
    """
    report = metrics.report
    found: dict[str, Any] = {"step": step, "loss": float(report.loss)}
    for name, branch in (("final", report.final), ("base", report.base)):
        found |= {
            f"{name}_loss": float(branch.loss),
            f"{name}_ce": float(branch.ce),
            f"{name}_acceptance": float(branch.acceptance),
            f"{name}_accuracy": float(branch.accuracy),
            f"{name}_accuracy_by_position": np.asarray(branch.position_accuracy, float).tolist(),
        }
    if report.confidence_loss is not None:
        found["confidence_loss"] = float(report.confidence_loss)
    return found | {
        "lambda": float(metrics.lam),
        "lr": float(metrics.lr),
        "gradient_norm": float(metrics.gradient_norm),
        "tokens_per_second": tokens / pace if pace else None,
    }


def say_state(line: str, where: Any = None) -> None:
    """A line, of the first process."""
    if jax.process_index() == 0:
        print(line, file=where or sys.stdout, flush=True)
