"""What a sweep is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mosa.config import Config, config_to_dict
from megatron_mosa.tools.scaling.cells import Cell
from megatron_mosa.utils import versions

PACKAGES = ("torch", "megatron-core", "deepspeed")  # that, with this project, determine a result


@dataclass(frozen=True)
class Request:
    """Settings of a sweep."""

    config: Config
    cells: Sequence[Cell]
    warmup: int
    steps: int
    output: Path
    command: str
    """The command line that repeats the sweep; for the report."""

    device: str
    """"cpu" or "cuda"."""

    weak: int | None = None
    """Samples per process of weak scaling."""

    fp32_reference: bool = False
    """Compare with one process in fp32, computed deterministically, instead of the configuration's precision."""

    random_tokens: bool = False
    memory_gib: float | None = None
    """Memory of a device; None: this machine's."""

    deadline: float | None = None
    """Unix time at which the sweep stops."""

    elsewhere: bool = False
    """Measured on other machines, whose cards and memory this one does not know."""

    session_per_cell: bool = False
    beside: tuple[Path, ...] = ()
    """Directories of other sweeps to compare with."""

    def identity(self, dataset: dict[str, Any]) -> dict[str, Any]:
        """Return what all results in one directory must share; without the cells, as more may be added."""
        config = config_to_dict(self.config)
        for key in ("checkpoint", "logging", "validation"):  # no step depends on them
            del config[key]
        config["run"] = {"seed": self.config.run.seed}
        config["train"].pop("micro_batch_size")
        config["train"].pop("stop_after_step")
        config["parallel"] = {
            key: value
            for key, value in config["parallel"].items()
            if key not in ("tensor_model_parallel_size", "sequence_parallel", "zero_stage", "tensor_parallel_overlap")
        }
        numbers = {"warmup": self.warmup, "steps": self.steps, "device": self.device}
        numbers["random-tokens"] = self.random_tokens
        return {"request": numbers, **config, "dataset": dataset, "versions": versions(*PACKAGES)}
