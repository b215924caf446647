"""The W&B run of a run directory, replaced by a new one when steps are repeated that W&B already has.

W&B drops rows of steps before its last one, and its own rewind needs a server. A new W&B run that begins with the lines
of metrics.jsonl is correct both online and offline.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from megatron_mosa.config import Config, config_to_dict
from megatron_mosa.metrics import read_journal, scalars
from megatron_mosa.utils import load_json, write_atomically

RECORD = "wandb.json"
"""File in the run directory with the project, name (``run.name``), id and title of its W&B run."""


class WandbRun:
    """Logs scalars and histograms by step.

    Create it before lines of repeated steps are removed from metrics.jsonl.
    """

    def __init__(self, config: Config, directory: Path, resumed_step: int) -> None:
        self.config = config
        self.directory = directory
        lines = read_journal(directory / "metrics.jsonl")
        record = self._recorded()
        if record is None:
            self._create(resumed_step, config.run.name)
        elif any(line["step"] > resumed_step for line in lines):
            self._replace(resumed_step)
        else:
            self._open(**record)
            if self.next_step > resumed_step + 1:  # W&B has steps that metrics.jsonl lost in a crash
                self._replace(resumed_step)
            else:
                self._catch_up(resumed_step)

    def log(self, numbers: dict[str, float], histograms: dict[str, list[float]], step: int) -> None:
        """Add to the row of a step. Its numbers must be in metrics.jsonl already."""
        from wandb import Histogram

        if step < self.next_step:  # as for a validation that was interrupted and is repeated at the next start
            self._replace(step)
        self._log(numbers | {name: Histogram(values) for name, values in histograms.items()}, step)

    def rewind(self, step: int) -> None:
        """Continue after ``step``."""
        if self.next_step > step:
            self._replace(step)

    def finish(self) -> None:
        """Wait until everything is written or sent."""
        self.run.finish()

    def _recorded(self) -> dict[str, str] | None:
        """Return id and title of this directory's W&B run; None if it has none in this project under this name."""
        name = self.config.run.name
        try:
            record = load_json(self.directory / RECORD)
            if (record["project"], record["name"]) != (self.config.logging.wandb_project, name):
                return None
            return {"run_id": record["id"], "title": record["title"]}
        except FileNotFoundError:  # earlier versions wrote no such file, and used the run's name as id
            return {"run_id": name, "title": name} if (self.directory / "wandb").is_dir() else None
        except (ValueError, KeyError, TypeError):  # a power failure left half of it
            return None

    def _replace(self, step: int) -> None:
        self._create(step, f"{self.config.run.name} (again from step {step + 1})")

    def _create(self, step: int, title: str) -> None:
        """Create a W&B run with the lines of metrics.jsonl up to ``step``."""
        self._open(f"{self.config.run.name[:100]}-{secrets.token_hex(4)}", title)  # W&B allows 128 characters
        self._catch_up(step)

    def _open(self, run_id: str, title: str) -> None:
        import wandb  # optional; check_start has checked that it is installed

        project, name = self.config.logging.wandb_project, self.config.run.name
        record = {"project": project, "name": name, "id": run_id, "title": title}
        write_atomically(self.directory / RECORD, json.dumps(record) + "\n")
        wandb.finish()  # or init would return the run that this process has open
        self.run: Any = wandb.init(
            project=project,
            config=config_to_dict(self.config),
            id=run_id,
            name=title,
            resume="allow",
            dir=str(self.directory),
        )
        self.next_step: int = self.run.starting_step  # W&B drops rows of earlier steps

    def _catch_up(self, last_step: int) -> None:
        """Log the lines of metrics.jsonl up to ``last_step`` that W&B lacks.

        Offline these are all lines: each start writes its own folder, and the last folder of an id must be complete.
        """
        for line in read_journal(self.directory / "metrics.jsonl"):
            if self.next_step <= line["step"] <= last_step:
                self._log(scalars(line), line["step"])

    def _log(self, row: dict[str, Any], step: int) -> None:
        self.run.log(row, step=step)
        self.next_step = step
