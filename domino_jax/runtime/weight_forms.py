"""Forms of a model's matrices that are chosen when it is loaded; nothing here imports JAX."""

from typing import Any, Literal, get_args

from domino_jax.errors import DominoError

WeightForm = Literal["exact", "int8", "float8"]
FORMS: tuple[WeightForm, ...] = get_args(WeightForm)

NO_INT4 = "4 bits need scales for groups of inputs, whose products compiled programs run slower than those of 8 bits"


def resolve_weights(asked: Any, flag: str = "--weights") -> WeightForm:
    """The form of a model's matrices: the values of its files in the run's dtype, or 8 bits and a scale an output.

    Args:
        asked: "auto" is exact, on every device so far: 8 bits are another model, with drafts on a CPU no faster one,
            and no accelerator has shown yet what they gain.
        flag: the option's name, for errors.

    Raises:
        DominoError: there is no such form, or it runs nowhere.
    """
    if asked in ("auto", "exact"):
        return "exact"
    if asked in ("int8", "float8"):
        return asked
    if asked == "int4":
        raise DominoError(f"{flag} int4: {NO_INT4}; take int8 or float8.")
    raise DominoError(f"{flag} must be auto, exact, int8 or float8, found {str(asked)[:80]!r}.")
