"""The figures as tables for people."""

from typing import Any

from rich.console import Console
from rich.table import Table


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
                table.add_row(str(row["batch"]), row["mode"], str(row["drafts"] or ""), *cells)
        console.print(table)
    for row in rows:
        if row.get("same_tokens_as_lean") is False:
            console.print(f"batch {row['batch']}: {row['mode']} gave other tokens than the lean loop")
