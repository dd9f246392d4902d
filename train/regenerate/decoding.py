"""What the commands that write answers share: loading the pair, and running requests until an interruption."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from convert.identity import model_fingerprint, text_fingerprint
from convert.loading import LoadedModel, load_model
from convert.not_finite import check_finite
from convert.options import SamplingOptions
from convert.progress import progress_bars
from domino_jax.runtime.devices import own_devices
from domino_jax.runtime.precision import resolve_dtype
from domino_jax.runtime.slots import Completion, Slots
from domino_jax.runtime.weight_forms import resolve_weights
from train.loading import PairOptions
from train.monitor.decoding_progress import DecodingProgress
from train.stopping import agreed_stop, stop_signals


class AnswerDecoding(NamedTuple):
    """A loaded pair, and how its decoding is told of and stopped."""

    pair: LoadedModel
    tally: DecodingProgress
    stopping: Callable[[], bool]

    def run(self, slots: Slots, asked: Iterable[Completion]) -> Iterator[Completion]:
        """Run requests, and give each at its end; more may be admitted meanwhile.

        Raises:
            DominoError: a number of the model is not finite.
        """

        def tell(changed: list[Completion]) -> None:
            self.tally.stepped(changed)
            for answer in changed:
                check_finite(answer, self.pair.params.target, self.pair.configs.target, self.pair.dtype)

        return slots.run(asked, tell, self.stopping)


@contextmanager
def open_decoding(
    options: PairOptions, target: Path, draft: Path | None, what: str, missing: int, console: Console
) -> Iterator[AnswerDecoding]:
    """Load a pair from its folders, and run what is inside in its context.

    Args:
        what: is to come, for people, and `missing` of it.

    Raises:
        DominoError: the models can't be loaded.
    """
    with progress_bars(console) as loading:
        pair = load_model(target, draft, options.device.dtype, loading, **options.model().plan())
    drafting, quiet = pair.configs.drafter is not None, jax.process_index() > 0
    with (
        pair.context(),
        stop_signals(several=jax.process_count() > 1) as signalled,
        DecodingProgress(what, missing, drafting, quiet) as tally,
    ):
        yield AnswerDecoding(pair, tally, agreed_stop(signalled))


def decisive_of_all(
    options: PairOptions, target: Path, draft: Path | None, sampling: SamplingOptions, max_new_tokens: int
) -> dict[str, Any]:
    """What decides every answer, for the file beside them: the models, the sampling, the limit and the dtype."""
    return {
        "target_identity": model_fingerprint(target),
        "text_identity": text_fingerprint(target),  # its tokenizer, template and end tokens
        "draft_identity": model_fingerprint(draft) if draft else None,
        **{name: getattr(sampling.params(), name) for name in ("temperature", "top_k", "top_p", "min_p")},
        "seed": sampling.seed or 0,
        "max_new_tokens": max_new_tokens,
        "dtype": resolve_dtype(options.device.dtype, own_devices()[0].platform).name,
        **({"weights": form} if (form := resolve_weights(options.device.weights)) != "exact" else {}),
    }
