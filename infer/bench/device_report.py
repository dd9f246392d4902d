"""One page of Markdown of what `infer.bench device` has found, also where it was cut off."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from domino_jax.runtime.files import write_text
from domino_jax.runtime.parsing import parse_json, read_text
from infer.bench.markdown import markdown_table
from infer.bench.products import products_table

MAIN, REPORT = "device.json", "report.md"
DEMO = "demo"  # the shipped pair
Row = Mapping[str, Any]
Form = Callable[[Any], str]

SPEED: dict[str, tuple[str, Form]] = {
    "context": ("context", str),
    "batch": ("batch", str),
    "mode": ("mode", str),
    "J": ("drafts", str),
    "tokens/s": ("tokens_per_second", "{:,.0f}".format),
    "ms a cycle": ("ms_per_cycle", "{:.2f}".format),
    "cycle / step": ("cycle_over_step", "{:.2f}".format),
    "prefill s": ("prefill_s", "{:.3f}".format),
    "compile s": ("compile_s", "{:.0f}".format),
}
PHASES = ("draft", "head", "target", "verify", "context")
TITLES = {
    "speed": "Plain step and cycle",
    "phases": "Phases of a cycle, each alone: ms, floor and share of it",
    "batches": "Batch sizes",
    "contexts": "Contexts",
    "int8": "Drafter in int8",
    "float8": "Drafter in float8",
    "target-int8": "Target and drafter in int8",
    "products": "One product of a matrix in each form",
    "training": "Training step",
}


def write_page(folder: Path) -> None:
    """Write the page of a folder's files; those that are missing or broken are said."""
    write_text(folder / REPORT, report(folder))


def report(folder: Path) -> str:
    """The page."""
    whole = figures_in(folder / MAIN)
    whole = whole if isinstance(whole, dict) else {}
    found, parts = whole.get("found") or {}, whole.get("parts") or []
    sections = ["# What a device computes, and what that costs", introduction(found, whole)]
    checked = {name: figures_in(folder / f"{name}.json") for name in ("attention", "drafters")}
    ended = {part.get("name") for part in parts if part.get("status") == "cut off"}
    sections += ["## Correctness", correctness({name: found for name, found in checked.items() if found}, ended)]
    for name, title in TITLES.items():
        figures = figures_in(folder / f"{name}.json")
        if figures:
            made = {"phases": phase_table, "products": products_table, "training": training_table}
            make = made.get(name, speed_table)
            sections += [f"## {title}", safely(make, figures)]
    sections += ["## Parts", parts_table(parts)]
    return "\n\n".join(filter(None, sections)) + "\n"


def figures_in(path: Path) -> Any:
    """What a file holds; None where there is none, or none that can be read."""
    try:
        return parse_json(read_text(path))
    except (OSError, ValueError):
        return None


def safely(make: Callable[[Any], str], figures: Any) -> str:
    """A table, or that there is none in this file."""
    try:
        return make(figures)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return "The file can't be read."


def introduction(found: Row, whole: Row) -> str:
    """What was run on what."""
    if not found:
        return "No device was found."
    memory = found.get("memory_bytes")
    words = f"{found['devices']} x {found['device']} ({found['platform']})"
    words += f", {memory / 2**30:.1f} GiB each" if memory else ""
    words += f"; {found['processor']}, JAX {found['jax']}, commit {found['commit']}."
    shape = "the shipped pair" if found["shapes"] == DEMO else f"{found['shapes']}, random weights (speed only)"
    where = f"mesh {found['mesh']}" if found["mesh"] else "one device"
    fits = "" if found["fits"] else " By its shapes it needs more memory than there is."
    took = whole.get("took_seconds")
    ended = f" {took:,.0f} of {whole['seconds']:,} seconds." if took is not None else ""
    return (
        f"{words} Shape: {shape}, on {where}.{fits}{ended} Acceptance lengths are stated and not measured "
        "(`--simulate-tau`), so tokens/s of a cycle are those of that τ."
    )


def correctness(checked: Mapping[str, list[dict[str, Any]]], ended: Collection[Any] = ()) -> str:
    """What was equal, in a table; each form that was not, in a line.

    Args:
        ended: the parts whose time was over: what they were at has not failed.
    """
    counts: dict[tuple[str, str, str], dict[str, int]] = {}
    lines, largest = [], {}
    for part, check in ((part, check) for part, found in checked.items() if isinstance(found, list) for check in found):
        if not isinstance(check, dict):
            continue
        what = " ".join(str(check.get(name, "")) for name in ("group", "case", "backend", "dtype"))
        if part in ended and check.get("status") == "begun":
            lines.append(f"- {' '.join(what.split())}: its time was over")
            continue
        status = {"begun": "failed"}.get(check.get("status", ""), check.get("status", ""))
        drafter = check.get("group") == "drafters"
        key = check.get("group", ""), check.get("case" if drafter else "backend", ""), check.get("dtype", "")
        counts.setdefault(key, dict.fromkeys(STATUSES, 0))
        if status in STATUSES:
            counts[key][status] += 1
        largest[key] = max(largest.get(key, 0.0), check.get("error", 0.0))
        if status in ("differs", "failed"):
            said = check.get("reason") or ("it had not come to its end" if "error" not in check else "")
            said = said or f"error {check['error']:.1e}, at most {check['bound']:.0e}"
            lines.append(f"- **{' '.join(what.split())}: {status}** ({said})")
    if not counts:
        return "Nothing was checked."
    rows = [
        (*key, *(str(found[status] or "") for status in STATUSES), f"{largest[key]:.1e}" if largest[key] else "")
        for key, found in counts.items()
    ]
    reasons = {
        f"{check['backend']}: {check['reason']}"
        for found in checked.values()
        for check in found
        if isinstance(check, dict) and check.get("status") == "refused" and check.get("reason") and "backend" in check
    }
    table = markdown_table(("what", "form", "dtype", *STATUSES, "largest error"), rows)
    return "\n\n".join(filter(None, [table, "\n".join(lines), "\n".join(f"- not here: {x}" for x in sorted(reasons))]))


STATUSES = ("equal", "differs", "failed", "refused")


def speed_table(rows: Sequence[Row]) -> str:
    """Rows of `infer.bench`."""
    cells = [[form(row[key]) if row.get(key) is not None else "" for key, form in SPEED.values()] for row in rows]
    return markdown_table(tuple(SPEED), cells)


def phase_table(rows: Sequence[Row]) -> str:
    """The parts of a cycle beside their floors."""
    cells = []
    for row in rows:
        parts = [
            f"{row[f'{name}_ms']:.2f} ({row[f'{name}_floor_ms']:.2f}, {row[f'{name}_floor_share']:.0%})"
            if row.get(f"{name}_ms") is not None and row.get(f"{name}_floor_ms")
            else ""
            for name in PHASES
        ]
        whole = f"{row['ms_per_cycle']:.2f} ({row.get('cycle_floor_ms') or 0:.2f})"
        cells.append([row["mode"], str(row["batch"]), *parts, whole, f"{row.get('dispatch_ms') or 0:.2f}"])
    first = rows[0]
    rates = ""
    if "bandwidth_gb_s" in first:
        rates = f"Measured: {first['bandwidth_gb_s']:,.0f} GB/s and {first['peak_tflop_s']:,.1f} TFLOP/s a device.\n\n"
    return rates + markdown_table(("mode", "batch", *PHASES, "cycle or step", "dispatch"), cells)


def training_table(row: Row) -> str:
    """A row of `train bench`."""
    cells = [
        f"{row['batch']} x {row['length']}",
        f"{row['step_ms']:,.1f}",
        f"{row['samples_per_second']:,.2f}",
        f"{row['tflops_per_device']:,.1f}",
        f"{row['mfu']:.1%} of {row['peak_tflops']:,.0f} ({row['peak_source']})",
        f"{row['compile_s']:.0f}",
    ]
    return markdown_table(("batch", "ms a step", "samples/s", "TFLOP/s a device", "MFU", "compile s"), [cells])


def parts_table(parts: Sequence[Row]) -> str:
    """What became of each part, and its command."""
    rows = [
        (
            str(part.get("name", "")),
            str(part.get("status", "")),
            f"{part['seconds']:.0f}" if "seconds" in part else "",
            str(part.get("reason", "")),
            f"`{part.get('command', '')}`",
        )
        for part in parts
    ]
    return markdown_table(("part", "status", "seconds", "why", "command"), rows) if rows else "None was begun."
