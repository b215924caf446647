"""Cells of a sweep: which layout is measured on how many processes, at which global batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_mosa.config import Config, check_world_size
from megatron_mosa.errors import UserError
from megatron_mosa.tools.scaling.layouts import SweepLayout, check_layouts, default_layouts, objection_to
from megatron_mosa.utils import counted


@dataclass(frozen=True)
class Cell:
    """One measurement of a sweep, and one row of its tables."""

    layout: SweepLayout
    processes: int
    global_batch: int
    """Samples per step."""

    fp32: bool = False
    """The reference in fp32, computed deterministically; all others have the configuration's precision."""

    def __str__(self) -> str:
        text = f"{self.layout} on {counted(self.processes, 'process')}"
        return f"{text} in fp32" if self.fp32 else text

    @property
    def name(self) -> str:
        """Part of file names, such as ``tp2-sp-zero1-micro4-processes4-batch64``."""
        name = f"{self.layout.name}-processes{self.processes}-batch{self.global_batch}"
        return f"{name}-fp32" if self.fp32 else name

    @property
    def data_parallel_size(self) -> int:
        return self.processes // self.layout.tp

    def apply(self, config: Config) -> Config:
        """Return the configuration of this cell.

        Raises:
            UserError: it breaks a rule, or does not fit the processes.
        """
        train = replace(config.train, global_batch_size=self.global_batch)
        if self.fp32:
            train = replace(train, precision="fp32", deterministic=True)
        applied = self.layout.apply(replace(config, train=train))
        check_world_size(applied, self.processes)
        return applied

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, for ``from_dict``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Cell:
        """Return the cell that ``to_dict`` was called on."""
        layout = SweepLayout(**({"overlap": False} | tree["layout"]))  # the first version did not know overlap
        layout = replace(layout, overlap=layout.overlap or layout.tp == 1)  # the second had it false at tp=1
        return cls(layout, **{key: value for key, value in tree.items() if key != "layout"})


def plan_cells(
    config: Config, layouts: Sequence[SweepLayout], counts: Sequence[int], weak: int | None = None
) -> list[Cell]:
    """Return the cells to measure: fewest processes first, strong before weak scaling, layouts in the given order.

    With several counts, a layout is measured on those that it fits, and without data parallelism only up to ZeRO-1, as
    there is nothing to partition. A layout with a number of processes of its own is measured on that alone.

    Args:
        layouts: empty: the default ones of each count.
        counts: numbers of processes.
        weak: samples per process and step, to measure weak scaling, too; None: only strong scaling, at
            ``train.global_batch_size``.

    Raises:
        UserError: a layout that fits no count, or is given twice; a weak batch that no layout can divide.
    """
    cells: dict[Cell, None] = {}
    own = {layout.processes for layout in layouts if layout.processes}
    unpinned = [layout for layout in layouts if layout.processes is None]
    if layouts:
        _check(config, layouts, counts)
    for count in sorted({*counts, *own}):
        chosen = layouts or default_layouts(config, count)
        wanted = [layout for layout in chosen if _is_for(layout, count, counts, is_only=len(counts) == 1)]
        batches = [config.train.global_batch_size] + ([weak * count] if weak else [])
        for batch in batches:
            sized = replace(config, train=replace(config.train, global_batch_size=batch))
            fitting = [layout for layout in wanted if objection_to(sized, layout, count) is None]
            cells |= dict.fromkeys(Cell(replace(layout, processes=None), count, batch) for layout in fitting)
            if wanted and not fitting and batch != config.train.global_batch_size:
                objection = objection_to(sized, wanted[0], count)
                raise UserError(
                    f"--weak={weak}: no layout fits {weak} samples on each of {count} processes: {objection}"
                )
    missing = [count for count in counts if unpinned and not any(cell.processes == count for cell in cells)]
    if missing:
        raise UserError(
            f"no --layout fits --processes={missing[0]}; leave that count out, or give a layout for it "
            f"(--layout tp=N,processes={missing[0]})"
        )
    return list(cells)


def reference_cell(config: Config, cells: Sequence[Cell]) -> Cell:
    """Return the cell of one process to compare with: one of ``cells`` if possible, or else one to add."""
    batch = config.train.global_batch_size
    alone = [cell for cell in cells if cell.processes == 1 and cell.global_batch == batch]
    if alone:
        return alone[0]
    micros = sorted({cell.layout.micro for cell in cells} | {config.train.micro_batch_size})
    fitting = [micro for micro in micros if batch % micro == 0]
    micro = config.train.micro_batch_size if config.train.micro_batch_size in fitting else fitting[0]
    stage = 1 if config.train.precision == "bf16" or config.parallel.offload_optimizer else 0
    return Cell(SweepLayout(1, False, stage, micro), 1, batch)


def fp32_reference(config: Config, cells: Sequence[Cell]) -> Cell:
    """Return the reference that is computed in fp32, with the smallest micro-batch of the cells."""
    micro = min(cell.layout.micro for cell in cells)
    stage = 1 if config.parallel.offload_optimizer else 0
    return Cell(SweepLayout(1, False, stage, micro), 1, config.train.global_batch_size, fp32=True)


def _check(config: Config, layouts: Sequence[SweepLayout], counts: Sequence[int]) -> None:
    for count in sorted({layout.processes for layout in layouts if layout.processes}):
        check_layouts(config, [layout for layout in layouts if layout.processes == count], count)
    unpinned = [layout for layout in layouts if layout.processes is None]
    if len(counts) == 1:
        check_layouts(config, unpinned, counts[0])
        return
    for number, layout in enumerate(unpinned):
        fitting = [count for count in counts if objection_to(config, layout, count) is None]
        # Alone, so that its objection is raised, or together with the earlier ones, to find duplicates.
        check_layouts(config, [layout], fitting[0] if fitting else max(counts))
        if layout in unpinned[:number]:
            check_layouts(config, [layout, layout], fitting[0])


def _is_for(layout: SweepLayout, count: int, counts: Sequence[int], *, is_only: bool) -> bool:
    if layout.processes is not None:
        return layout.processes == count
    if count not in counts:
        return False
    return is_only or layout.zero <= 1 or count > layout.tp
