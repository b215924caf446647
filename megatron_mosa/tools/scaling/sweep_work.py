"""What a sweep has measured, and what is left for which sessions."""

from __future__ import annotations

from typing import Any

from megatron_mosa.config import Config, config_to_dict
from megatron_mosa.errors import UserError
from megatron_mosa.tools.scaling.cells import Cell, fp32_reference, reference_cell
from megatron_mosa.tools.scaling.memory import Card, host_gib, least_gib
from megatron_mosa.tools.scaling.rows import Row, Sweep, make_rows
from megatron_mosa.tools.scaling.session import Session, all_results, is_measured, other_card, read_result
from megatron_mosa.tools.scaling.sweep_request import PACKAGES, Request
from megatron_mosa.utils import versions


class Work:
    """The cells of one sweep: those that are wanted, and those that earlier calls have measured.

    Raises:
        UserError: no cell fits the memory.
    """

    def __init__(self, request: Request, base: Config, vocab_size: int, here: Card | None) -> None:
        """
        Args:
            request: of the sweep.
            base: the configuration of its runs.
            vocab_size: of the tokens.
            here: the card to measure on; None: unknown, or a CPU.
        """
        self.request, self.base, self.vocab_size = request, base, vocab_size
        self.folder = request.output
        self.memory_gib = request.memory_gib or (here.gib if here else None)
        self.too_large: dict[Cell, str] = {}
        """Cells that would not fit the memory, with the reason."""
        cells = list(request.cells)
        self.reference = fp32_reference(base, cells) if request.fp32_reference else reference_cell(base, cells)
        wanted = list(dict.fromkeys([self.reference, *cells]))
        for cell in wanted:
            if not is_measured(self.folder, cell.name) and (objection := self._no_room(cell)):
                self.too_large[cell] = objection
        if self.reference in self.too_large and self.reference not in cells:
            wanted.remove(self.reference)  # the smallest cell that fits takes its place
            del self.too_large[self.reference]
        self.cells = [*wanted, *(cell for cell in self._earlier() if cell not in wanted)]
        if all(cell in self.too_large for cell in wanted):
            raise UserError(f"no layout fits the memory: {wanted[0]}: {self.too_large[wanted[0]]}; use more processes")
        self.missing = [
            cell for cell in wanted if cell not in self.too_large and not is_measured(self.folder, cell.name)
        ]

    def least(self, cell: Cell) -> float:
        """Return the GiB that a rank of a cell needs at least."""
        return least_gib(cell.apply(self.base), self.vocab_size, cell.processes)

    def _no_room(self, cell: Cell) -> str:
        room = self.memory_gib
        if room is None and self.request.device == "cpu" and not self.request.elsewhere:
            room = host_gib() / cell.processes
        needed = self.least(cell)
        if room is None or needed <= room:
            return ""
        return f"needs at least {needed:,.2f} GiB on each rank, which has {room:,.2f}"

    def _earlier(self) -> list[Cell]:
        """Return the cells measured by earlier calls, in their order."""
        cells = [cell for cell, result in all_results(self.folder) if "reason" not in result]
        return [cell for cell in cells if is_measured(self.folder, cell.name)]

    def refuse_other_cards(self, here: Card) -> None:
        """Raise a UserError if the directory holds results of another card."""
        for cell in self.cells:
            result = read_result(self.folder, cell.name)
            if result is not None and result.get("device", here.name) != here.name:
                raise UserError(other_card(self.folder, result["device"], here.name))

    def sessions(self) -> list[Session]:
        """Return what must be started: a session per number of processes, or per cell."""
        groups: dict[Any, list[Cell]] = {}
        # Without graphs DeepSpeed's ZeRO-3 keeps its memory, so that the cell after it needs new processes.
        for cell in sorted(self.missing, key=lambda cell: (cell.processes, cell.layout.zero == 3)):
            key = cell if self.request.session_per_cell else (cell.processes, cell.fp32)
            groups.setdefault(key, []).append(cell)
        return [self._session(cells) for cells in groups.values()]

    def _session(self, cells: list[Cell]) -> Session:
        name = f"processes{cells[0].processes}{'-fp32' * cells[0].fp32}"
        return Session(
            name=cells[0].name if self.request.session_per_cell else name,
            folder=str(self.folder.absolute()),
            config=config_to_dict(self.base),
            cells=[cell.to_dict() for cell in cells],
            processes=cells[0].processes,
            warmup=self.request.warmup,
            steps=self.request.steps,
            random_tokens=self.request.random_tokens,
            deterministic=cells[0].fp32 or self.base.train.deterministic,
            deadline=self.request.deadline,
        )

    def rows(self) -> list[Row]:
        """Return the rows of all cells, measured or not."""
        results = []
        for cell in self.cells:
            result = read_result(self.folder, cell.name)
            if result is None:
                result = {"status": "missing", "reason": "not measured yet"}
            if cell in self.too_large:
                result = {"status": "too large", "reason": self.too_large[cell]}
            results.append((cell, result))
        return make_rows(results, self.base.train.global_batch_size, self.request.weak, self.reference)

    def sweep(self) -> Sweep:
        """Return what the report says."""
        request = self.request
        return Sweep(
            name=request.config.run.name,
            sequence_length=request.config.data.sequence_length,
            global_batch=request.config.train.global_batch_size,
            weak=request.weak,
            precision=request.config.train.precision,
            rows=self.rows(),
            device=request.device,
            command=request.command,
            versions=versions(*PACKAGES),
            random_tokens=request.random_tokens,
        )
