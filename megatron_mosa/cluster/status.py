"""``mosa status``: the state of a run, read from the files in its run directory."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from megatron_mosa.cluster.slurm.record import Record
from megatron_mosa.errors import UserError
from megatron_mosa.exit_codes import DONE, FAILED, STOPPED
from megatron_mosa.options import bounds
from megatron_mosa.resilience import RUNNING, STATUS, read_status
from megatron_mosa.utils import counted, table_console

SILENT_SECONDS = 60.0
"""A run that has reported nothing for this long, or for ten of its steps if that is longer, may be dead."""


def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/quickstart.")],
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Refresh until the run ends, in a Slurm job also while it waits to start again; Ctrl-C to leave.",
        ),
    ] = False,
    interval: Annotated[
        float, typer.Option("--interval", callback=bounds(0.1, 86_400), help="Seconds between refreshes.")
    ] = 5.0,
) -> None:
    """Show whether a run is alive: its step, loss, speed, last checkpoint, starts and time left.

    Exit code 0: running, done, or stopped and ready to resume; 1: failed, hung or silent.
    """
    console = table_console()
    content = _read(run)
    if watch:
        with Live(console=console, auto_refresh=False) as live:
            try:
                while True:
                    content = _read(run)
                    live.update(_table(run, content), refresh=True)
                    if not goes_on(content, Record.read(run)):
                        break
                    time.sleep(interval)
            except KeyboardInterrupt:
                pass
    else:
        console.print(_table(run, content))
    if not is_well(content, time.time()):
        raise typer.Exit(FAILED)


def is_well(content: dict[str, Any], now: float) -> bool:
    """Whether a run is running, done, or stopped and ready to resume."""
    if content["state"] == RUNNING:
        return silence(content, now) is None
    return content.get("exit_code") in (DONE, STOPPED)


def goes_on(content: dict[str, Any], record: Record) -> bool:
    """Whether a run is running, or its Slurm job starts it again or has not yet said whether it does."""
    is_open = record.attempt is not None or record.verdict == "again"
    return content["state"] == RUNNING or (bool(content.get("job")) and is_open)


def silence(content: dict[str, Any], now: float) -> float | None:
    """Return the seconds since the last update if they exceed the limit, which a save or validation may do, or None."""
    silent = now - content["updated"]
    return silent if silent > max(SILENT_SECONDS, 10 * (content.get("seconds_per_step") or 0.0)) else None


def _read(run: Path) -> dict[str, Any]:
    content = read_status(run)
    if content is None or content.get("state") is None or content.get("updated") is None:
        runs = sorted(path.parent.name for path in run.parent.glob(f"*/{STATUS}")) if run.parent.is_dir() else []
        known = f"; other runs there: {', '.join(runs)}" if runs else ""
        raise UserError(f"'{run}' has no {STATUS} that can be read: it is not a run, or has not started yet{known}")
    return content


def _table(run: Path, content: dict[str, Any]) -> Table:
    now = time.time()
    table = Table(title=str(run), show_header=False, title_justify="left")
    for key, value in facts(content, now).items():
        table.add_row(key, value)
    return table


def facts(content: dict[str, Any], now: float) -> dict[str, str]:
    """Return the rows of the table: label -> text."""
    step, last, seconds = content.get("step"), content.get("last_step"), content.get("seconds_per_step")
    silent = silence(content, now)
    state = content["state"]
    if state == RUNNING:
        state = f"running: {content.get('doing', '')}"
        if silent is not None:
            state = f"no update for {_duration(silent)}; last: {content.get('doing', '')}"
    elif content.get("reason"):
        state = f"{state}: {content['reason']}"
    found = {"state": state}
    if step is not None:
        found["step"] = str(step)
        if last:
            found["step"] += f" of {last}" if step <= last else f" (past the last one asked for, {last})"
    if content.get("loss") is not None:
        found["loss"] = f"{content['loss']:.4f}"
    if content.get("skipped_steps"):
        found["skipped"] = f"{counted(content['skipped_steps'], 'step')} since this start"
    if content.get("tokens_per_second") and seconds:
        found["speed"] = f"{content['tokens_per_second']:,.0f} tokens/s, {seconds:.2f} s of wall-clock time per step"
    if content.get("checkpoint"):
        written = content.get("checkpoint_time")
        age = "" if written is None else f", {_age(now - written)}"
        found["checkpoint"] = content["checkpoint"] + age
    if state.startswith("running") and seconds and step is not None and last:
        found["time left"] = _duration((last - step) * seconds)
    found["starts"] = str(content.get("starts", 1))
    where = f"process {content.get('process')} on {content.get('host')}"
    found["where"] = f"job {content['job']}, {where}" if content.get("job") else where
    found["updated"] = _age(now - content["updated"])
    return found


def _age(seconds: float) -> str:
    if seconds <= -1:
        return f"{_duration(-seconds)} in the future, by this host's clock: clocks differ"
    return f"{_duration(max(seconds, 0))} ago"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown time"
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock
