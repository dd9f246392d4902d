"""How curves and bars look: each is told from the others without its colour, too."""

STYLES = ("solid", "dashed", "dashdot", "dotted", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "X", "P")
HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "--", "++", "**", "OO")
COLOURS = 10  # of matplotlib's default cycle


def line_style(number: int, marker: bool = False) -> dict[str, object]:
    """Arguments of matplotlib's plot() for a curve.

    Args:
        number: of the curve among those of its panel.
        marker: the curve has few points, and each is marked.
    """
    style: dict[str, object] = {"color": f"C{number % COLOURS}", "linestyle": STYLES[number % len(STYLES)]}
    return style | {"marker": MARKERS[number % len(MARKERS)]} if marker else style


def bar_style(number: int) -> dict[str, object]:
    """Arguments of matplotlib's bar() for the bars of one kind, by its number among the kinds."""
    return {"color": f"C{number % COLOURS}", "hatch": HATCHES[number % len(HATCHES)], "edgecolor": "white"}
