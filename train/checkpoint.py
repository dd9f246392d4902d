"""Training states on disk, through Orbax: written whole or not at all, the newest few kept, and the best."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from domino_jax.errors import DominoError, first_line
from train.step import TrainState

TAU = "tau"  # what a checkpoint's validation found; 0 where there was none, less than any acceptance length


class Checkpoints:
    """The checkpoints of one run; saving happens while training goes on."""

    def __init__(self, folder: Path, keep: int = 3):
        """Args:
        folder: made where it is missing; what a killed process left unfinished in it is removed.
        keep: newest checkpoints that stay. The one with the highest validated acceptance length stays besides.

        Raises:
            DominoError: the folder can't be made.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DominoError(f"{folder} can't be made: {error}.") from None
        best = policies.BestN(get_metric_fn=lambda metrics: metrics[TAU], n=1)  # ties: keep the newest
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            best_fn=lambda metrics: metrics[TAU],
            create=True,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """The newest whole checkpoint's step, or None."""
        return self._manager.latest_step()

    def best(self) -> tuple[int, float] | None:
        """The step with the highest validated acceptance length, and that; None before a validation."""
        step = self._manager.best_step()
        metrics = {} if step is None else self._manager.metrics(step) or {}
        return (step, float(metrics[TAU])) if step is not None and metrics.get(TAU) else None

    def save(self, state: TrainState, tau: float | None = None) -> None:
        """Write `state` under its step, unless that step is there already.

        Args:
            tau: the acceptance length that validation found at this step.

        Raises:
            DominoError: it could not be written; earlier checkpoints are untouched.
        """
        step = int(state.step)
        if step == self.latest():
            return
        try:
            self._manager.save(
                step,
                args=ocp.args.StandardSave(state),  # type: ignore[call-arg]
                metrics={TAU: tau or 0.0},
            )
        except Exception as error:  # the array storage behind Orbax raises several kinds
            raise DominoError(self._failed(step, error)) from error

    def restore(self, like: TrainState) -> TrainState:
        """The newest checkpoint, in the form of `like` and where its arrays are, which may be on any mesh.

        Raises:
            DominoError: there is none, or it does not fit.
        """
        step = self.latest()
        if step is None:
            raise DominoError(f"there is no checkpoint in {self.folder} to resume from.")
        form: Any = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(form))  # type: ignore[call-arg]
        except Exception as error:
            raise DominoError(
                f"the checkpoint of step {step} in {self.folder} can't be read: {first_line(error)}; without "
                f"its folder {self.folder / str(step)} the run goes on from the one before."
            ) from error

    def finish(self) -> None:
        """Wait until everything is on disk.

        Raises:
            DominoError: the last save failed; earlier checkpoints are untouched.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise DominoError(self._failed(None, error)) from error

    def _failed(self, step: int | None, error: Exception) -> str:
        what = "the last checkpoint" if step is None else f"the checkpoint of step {step}"
        good = self.latest()
        return f"{what} can't be written to {self.folder} ({error}); " + (
            "no earlier one exists."
            if good is None
            else f"the one of step {good} is whole: free some space and --resume."
        )
