"""What a call of ``mosa isoflop run`` asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_mosa.config import Config, summary
from megatron_mosa.tools.grid.budget import Cost
from megatron_mosa.tools.grid.grid import Grid
from megatron_mosa.tools.grid.launch import LocalLauncher, SlurmLauncher
from megatron_mosa.tools.grid.plan import Corpus, Plan, plan_models
from megatron_mosa.tools.grid.timing import Timings
from megatron_mosa.utils import say


@dataclass(frozen=True)
class Request:
    """Settings of a call; they do not change what a cell computes."""

    grid: Grid
    output: Path
    jobs: int
    """Cells at once."""

    local: LocalLauncher
    """Of this machine; it also evaluates models, and measures what is measured alone."""

    slurm: SlurmLauncher | None = None
    """Where cells run instead."""

    deadline: float | None = None
    """Unix time at which cells are stopped."""

    trains: bool = True
    """False: only evaluate and measure what has been trained."""

    measures: bool = False
    """Measure the step and decoding of each model alone, once all cells are done."""

    removes_checkpoints: bool = False
    """Remove the checkpoints of a cell when nothing is left to be measured with them."""

    steps: int = 20
    warmup: int = 5
    """Of measured steps."""

    @property
    def timings(self) -> Timings:
        local = self.local
        return Timings(
            self.output,
            local.device,
            local.processes,
            self.steps,
            self.warmup,
            lambda arguments, slot, ranks: local.command(arguments, slot, len(local.slots), ranks),
        )

    def plan(self) -> Plan:
        """Return all models; if they are to take equal time, it is measured now.

        Raises:
            UserError: as ``plan_models``.
        """

        def seconds(config: Config, vocab_size: int) -> float:
            known = self.timings.find(config, vocab_size)
            found = self.timings.measure(config, vocab_size, self.local.slots[0]).seconds
            if known is None:
                say(f"{summary(config)}: {1000 * found:.1f} ms a step")
            return found

        def cost_of(equal: str, data: Corpus) -> Cost:
            return Cost(equal, lambda config: seconds(config, data.vocab_size))

        return Plan(plan_models(self.grid, cost_of if self.measures_first else None))

    @property
    def measures_first(self) -> bool:
        """Whether numbers of heads depend on measurements."""
        return self.grid.equal == "step_time"
