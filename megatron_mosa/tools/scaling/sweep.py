"""``mosa sweep``: layouts and numbers of processes compared on one model, from the same weights on the same data.

The weights are a function of ``run.seed`` alone (``model.initial_weights``), so every cell draws the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from megatron_mosa.config import Config
from megatron_mosa.errors import RunError
from megatron_mosa.tools.processes import alone_in, signals_as_interrupt
from megatron_mosa.tools.scaling.cells import Cell
from megatron_mosa.tools.scaling.memory import card
from megatron_mosa.tools.scaling.rows import Sweep
from megatron_mosa.tools.scaling.session import LocalLaunch, Session, Watch, supervise
from megatron_mosa.tools.scaling.sweep_checks import refuse_deviations, refuse_unfinished
from megatron_mosa.tools.scaling.sweep_directory import prepare_output, read_sweep
from megatron_mosa.tools.scaling.sweep_progress import Progress
from megatron_mosa.tools.scaling.sweep_report import write_report
from megatron_mosa.tools.scaling.sweep_request import Request
from megatron_mosa.tools.scaling.sweep_work import Work
from megatron_mosa.utils import say, usable_processors

Run = Callable[[list[Session], Watch], None]
"""Has the sessions measured, one after the other or at once, and reports their events."""


def run_sweep(request: Request, run: Run | None = None, force: bool = False) -> Sweep:
    """Measure the cells that have no result yet, write the report, and return it.

    However it ends, finished cells stay and are in the report.

    Args:
        request: what to measure.
        run: by default one session after the other, on this machine.
        force: remove the results of another sweep from the output directory.

    Raises:
        UserError: a problem with the dataset, or an output directory that holds something else.
        RunError: no cell could be measured, time ran out, or losses or gradient norms deviate from the reference's.
    """
    base = replace(
        request.config, run=replace(request.config.run, directory=str(request.output.absolute()), name="sweep")
    )
    dataset, vocab_size = _dataset(request, base)
    identity = request.identity(dataset)
    here = card() if request.device == "cuda" and not request.elsewhere else None
    others = tuple((path, read_sweep(path, request, identity)) for path in request.beside)
    with alone_in(request.output, "mosa sweep"):
        prepare_output(request.output, identity, force)
        work = Work(request, base, vocab_size, here)
        progress = Progress(work)
        if here is not None:
            work.refuse_other_cards(here)
        progress.print_known()
        error: BaseException | None = None
        try:
            with signals_as_interrupt() as check_interruption:
                if sessions := work.sessions():
                    (run or _run_here(sessions, check_interruption))(sessions, progress.watch)
        except (KeyboardInterrupt, RunError) as caught:
            error = caught
        sweep = replace(work.sweep(), beside=others)
        files = write_report(sweep, request.output)
    say(f"Wrote {', '.join(files[:-1])} and {files[-1]} to {request.output}")
    if isinstance(error, KeyboardInterrupt):
        raise RunError("stopped; run the same command again to measure what is missing") from None
    if error is not None:
        raise error
    refuse_unfinished(sweep)
    refuse_deviations(sweep)
    return sweep


def plan(request: Request) -> list[tuple[Cell, float, str]]:
    """Return every cell of a sweep with the GiB that a rank needs at least, and why it will not be run, if so."""
    here = card() if request.device == "cuda" and not request.elsewhere else None
    work = Work(request, request.config, request.config.data.vocab_size, here)
    return [(cell, work.least(cell), work.too_large.get(cell, "")) for cell in work.cells]


def _dataset(request: Request, base: Config) -> tuple[dict[str, Any], int]:
    """Check the dataset; return its identity and its vocabulary."""
    if request.random_tokens:
        return {}, base.data.vocab_size
    from megatron_mosa.train import check_start

    cell = request.cells[0]
    # On a GPU the workers check it: here it would take some of the memory that they measure.
    start = check_start(cell.apply(base), cell.processes, checks_devices=request.device == "cpu")
    return start.data_identity, start.manifest.vocab_size


def _run_here(sessions: Sequence[Session], check_interruption: Callable[[], None] = lambda: None) -> Run:
    # A session of one process uses as few threads per rank as the largest: with one per core, a busy machine slows it
    # down twenty-fold.
    launch = LocalLaunch(max(1, usable_processors() // max(session.processes for session in sessions)))

    def run(sessions: list[Session], watch: Watch) -> None:
        for session in sessions:
            supervise(session, launch, watch, check_interruption)

    return run
