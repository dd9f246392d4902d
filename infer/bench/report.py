"""The figures as tables for people."""

from rich.console import Console
from rich.table import Table

from infer.bench.rows import LEAN, TRANSFORMERS, Row
from infer.bench.tracing import SCOPES as PHASES


def label(row: Row) -> str:
    """A row's mode in words: one whose acceptance is simulated says so."""
    if row["simulated_tau"] is None or row["mode"] in (LEAN, TRANSFORMERS):
        return row["mode"]
    return f"{row['mode']}, simulated τ {row['simulated_tau']:g}"


def title(row: Row) -> str:
    """What was run, in one line; it names whatever is not real."""
    words = [row["model"] + (" shape with random weights (speed only)" if row["weights"] == "random" else "")]
    words += [row["dtype"], row["device"]]
    changed = {"target in": "target_weights", "drafter in": "draft_weights"}
    changed |= {"head candidates": "head_candidates", "attention": "attention"}
    changed |= {"chains end below a confidence of": "confidence_threshold"}
    usual = (None, "exact", "all", "xla")
    words += [f"{name} {row[key]}" for name, key in changed.items() if row.get(key) not in usual]
    words += ["bfloat16 matrices"] if row.get("matrices") != row["dtype"] else []
    if row["simulated_tau"] is not None:
        words.append(f"acceptance length simulated: {row['simulated_tau']:g}")
    return ", ".join(words)


def show_report(rows: list[Row], console: Console) -> None:
    """The figures as a table for people."""
    first = rows[0]
    looping = max(row["looping_prompts_left_out"] for row in rows)
    contexts = " or ".join(dict.fromkeys(f"{row['context']} tokens ({row['prompts']})" for row in rows))
    console.print(
        f"{title(first)}; {first['num_prompts']} prompts of {contexts}, {looping} left out for loops, "
        f"{first['new_tokens']} new, temperature {first['temperature']:g}, "
        f"median of {first['rounds']} rounds"
    )
    speeds = {
        "τ": ("tau", "{:.2f}"),
        "distinct-4": ("distinct_4", "{:.2f}"),
        "tokens/s": ("tokens_per_second", "{:,.0f}"),
        "× baseline": ("speed_over_lean", "{:.2f}"),
        "ms/cycle": ("ms_per_cycle", "{:.2f}"),
        "cycle/step": ("cycle_over_step", "{:.2f}"),
        "prefill s": ("prefill_s", "{:.3f}"),
        "compile s": ("compile_s", "{:.1f}"),
    }
    parts = {name: (f"{name}_ms", "{:.2f}") for name in PHASES}
    parts |= {"dispatch": ("dispatch_ms", "{:.2f}"), "arguments": ("arguments", "{}")}
    parts |= {"weights MB": ("weights_mb", "{:.1f}"), "caches MB": ("caches_mb", "{:.1f}")}
    for name, columns in (("Speed", speeds), ("One cycle: each phase alone, ms", parts)):
        _table(name, columns, rows, console)
    if "bandwidth_gb_s" in first:
        floors = {name: (f"{name}_floor_ms", "{:.3f}") for name in (*PHASES, "cycle")}
        floors |= {"cycle/step": ("cycle_over_step_floor", "{:.2f}")}
        rates = f"{first['bandwidth_gb_s']:,.0f} GB/s and {first['peak_tflop_s']:,.2f} TFLOP/s, measured"
        _table(f"Floor at {rates}, ms", floors, rows, console)
        shares = {name: (f"{name}_floor_share", "{:.0%}") for name in (*PHASES, "cycle")}
        _table("Share of the floor reached", shares, rows, console)
    for row in rows:
        if row.get("same_tokens_as_lean") is False:
            other, rate = row["other_answers"], row["differences_per_1000_tokens"]
            console.print(
                f"batch {row['batch']}: {label(row)} {row['drafts']} gave other tokens than the baseline in {other} "
                f"answers, {rate:.2f} first differences in 1000 tokens"
            )
    for row in rows:
        if row.get("profile"):
            named = row["profile_scopes"] or "no phase of a cycle by name"
            words = f"trace of {row['mode']} {row['drafts'] or ''}".rstrip()
            console.print(f"{words}: {row['profile']} ({named})", soft_wrap=True, markup=False)


def _table(name: str, columns: dict[str, tuple[str, str]], rows: list[Row], console: Console) -> None:
    """One table; rows that have none of the columns are left out."""
    table = Table("context", "batch", title=name, title_justify="left")
    table.add_column("mode", no_wrap=True)
    table.add_column("J")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        cells = [form.format(row[key]) if row.get(key) is not None else "" for key, form in columns.values()]
        if any(cells):
            drafts = f"auto ({row['auto_choice'] or 'plain'})" if "auto_choice" in row else str(row["drafts"] or "")
            table.add_row(str(row["context"]), str(row["batch"]), label(row), drafts, *cells)
    console.print(table)
