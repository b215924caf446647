"""Print an evaluation as tables."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_mosa.utils import decimals


def print_report(found: dict[str, Any], console: Console) -> None:
    """Print the result of ``evaluate``."""
    console.print(_losses(found))
    console.print(_positions(found))
    if found["by_length"]:
        console.print(_lengths(found))
    for length, why in found["left_out"].items():
        console.print(f"skipped length {length}: {why}", soft_wrap=True, markup=False, highlight=False)


def _losses(found: dict[str, Any]) -> Table:
    title = f"{found['samples']} windows of {found['sequence_length']} tokens, nats per token"
    table = _table(title, ("loss", "error", "perplexity"), first="")
    rows = (("full sequence", "full_sequence"), ("causal", "causal"))
    if found["causal"] is None:  # no causal counterpart
        rows = rows[:1]
    elif found["full_sequence"]["loss"] == found["causal"]["loss"]:  # causal, and measured once
        rows = rows[1:]
    for name, key in rows:
        entry = found[key]
        loss = entry["loss"]
        perplexity = decimals(math.exp(min(loss, 700))) if math.isfinite(loss) else "-"
        numbers = (_number(loss), _number(entry["error"]), perplexity)
        table.add_row(f"{name} ({entry['label']})", *numbers)
    return table


def _positions(found: dict[str, Any]) -> Table:
    columns = ("full sequence", "causal", "prefix only", "leak", "leak error", "flip rate")
    table = _table("By position", columns, first="positions")
    for row in found["by_position"]:
        first, last = row["first"], row["last"]
        numbers = [_number(row.get(key)) for key in ("full_sequence", "causal", "prefix_only", "leak", "leak_error")]
        positions = str(first) if first == last else f"{first}-{last}"
        table.add_row(positions, *numbers, _number(row["flip_rate"], ".2%"))
    table.caption = (
        "prefix only: loss at chosen positions, given only the tokens up to each. leak: prefix only minus full "
        "sequence at these positions. flip rate: share of selections up to the range's last position that change with "
        "another future." + _overall(found)
    )
    return table


def _overall(found: dict[str, Any]) -> str:
    if found["leak"] is None:
        return ""
    leak, error = (_number(found["leak"][key]) for key in ("mean", "error"))
    return f" Over all positions, each range by its length, the leak is {leak} (error {error})."


def _lengths(found: dict[str, Any]) -> Table:
    table = _table("By sequence length", ("full sequence", "error", "causal", "error"), first="tokens")
    for row in found["by_length"]:
        measured = (row[key] or {} for key in ("full_sequence", "causal"))
        cells = [_number(entry.get(part)) for entry in measured for part in ("loss", "error")]
        table.add_row(str(row["length"]), *cells)
    return table


def _table(title: str, columns: tuple[str, ...], first: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:{form}}".replace("-0.0000", "0.0000")
