"""``mosa isoflop run``: trains the cells of a grid, each in processes of its own, and keeps their results.

    grid.json          what all results in the folder share
    configs/CELL.yaml  the resolved configuration of a cell
    runs/CELL/         its run directory
    logs/CELL.log      the output of its starts
    cells/CELL.json    its result, once it has ended
    evaluations/       what mosa evaluate measured of it
    starts.jsonl       every start of a cell
    timings/           steps and decoding, measured alone

A cell without a result is started again, and continues from its checkpoint if it has one.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path

from megatron_mosa.errors import RunError, UserError
from megatron_mosa.tools.grid import results
from megatron_mosa.tools.grid.grid import Grid
from megatron_mosa.tools.grid.plan import Plan
from megatron_mosa.tools.grid.request import Request
from megatron_mosa.tools.grid.results import Row, write_results
from megatron_mosa.tools.grid.work import Work
from megatron_mosa.tools.processes import alone_in, signals_as_interrupt
from megatron_mosa.utils import counted, load_json, say, write_atomically


def run_grid(request: Request) -> list[Row]:
    """Train, evaluate and measure what has not been yet, write the results, and return their rows.

    However it ends, results stay, and cells that were stopped continue in the next call.

    Raises:
        UserError: the grid cannot work, or the folder holds something else.
        RunError: it was stopped, or cells, evaluations or measurements failed.
    """
    plan = None if request.measures_first else request.plan()  # mistakes come before anything is written
    with alone_in(request.output, "mosa isoflop run"), signals_as_interrupt() as check_interruption:
        prepare_output(request.output, request.grid)
        work = Work(request, plan or request.plan(), check_interruption)
        work.refuse_other_results()
        stopped = ""
        try:
            say(table(work.plan))
            say(work.summary())
            work.remove_checkpoints()  # of an earlier call, which may have kept them
            stopped = work.train()
            if request.measures and not stopped:
                stopped = work.measure()
        except KeyboardInterrupt:
            stopped = "stopped"
        finally:
            rows = work.rows()
            write_results(rows, request.output)
    say(f"Wrote {results.RESULTS} and results.csv to {request.output}; mosa report {request.output} reports on them")
    _refuse_unfinished(work, rows, stopped)
    return rows


def _refuse_unfinished(work: Work, rows: Sequence[Row], stopped: str) -> None:
    again, later = "run the same command again to continue", work.later()
    missing = sum(row.status == results.MISSING for row in rows) + later
    if stopped and work.unmeasured:
        raise RunError(f"{stopped} with {counted(work.unmeasured, 'measurement')} left; {again}")
    if stopped:
        raise RunError(f"{stopped} with {missing} of {counted(len(rows) + later, 'cell')} left; {again}")
    if failed := [row for row in rows if row.status == results.FAILED]:
        first = failed[0]
        raise RunError(
            f"{len(failed)} of {counted(len(rows), 'cell')} failed; {first.cell}: {first.reason}; fix it, and {again}"
        )
    if work.failures:
        raise RunError(
            f"{counted(len(work.failures), 'measurement')} failed; the first: {work.failures[0]}; fix it, and {again}"
        )
    if without_a_rate := work.without_a_rate():
        raise RunError(f"all learning rates of {', '.join(without_a_rate)} diverged; add lower ones, and {again}")
    if missing and work.request.trains:
        raise RunError(f"no result of {missing} of {counted(len(rows) + later, 'cell')}; {again}")


def prepare_output(folder: Path, grid: Grid) -> None:
    """Create the folder of a grid, or check that it is this grid's.

    Raises:
        UserError: it holds something else, or cannot be written.
    """
    file, identity = folder / "grid.json", {"name": grid.name, "equal": grid.equal, "relative_to": grid.relative_to}
    fix = "give another --output, or remove the directory"
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output={folder} is a file; give a directory")
        if file.is_file():
            try:
                earlier = load_json(file)
                differ = [key for key, value in identity.items() if earlier[key] != value]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"--output={folder}: its grid.json is damaged; {fix}") from None
            for key in differ:
                raise UserError(
                    f"--output={folder} holds another grid's results: {key}={earlier[key]}, now {identity[key]}; {fix}"
                )
        elif folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"--output={folder} is not empty and does not hold a grid; give another directory")
        for name in ("configs", "cells", "evaluations", "logs", "runs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(identity | {"file": str(grid.path)}, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"could not write to --output={folder} ({error.strerror}); give another directory") from None


def table(plan: Plan) -> str:
    """Return a line for each model: heads, and how far it is from equal."""
    names = [model.name for model in plan.models]
    width = max(map(len, names))
    lines = [f"{'model':{width}}  {'heads':>12}  of the budget  runs"]
    for model, name in zip(plan.models, names, strict=True):
        dense = model.config.model.num_dense_heads
        heads = f"{dense} + {model.heads}" if model.is_sparse else str(model.heads)
        cells, later = plan.cells(model, lambda trials: None)
        count = len(cells) + later
        lines.append(f"{name:{width}}  {heads:>12}  {100 * model.share:11.2f} %  {count:4}")
    return "\n".join(lines)


def cpu_name() -> str:
    """Return the name of this machine's processor."""
    return platform.processor() or platform.machine() or "cpu"
