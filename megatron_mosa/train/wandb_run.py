"""The W&B run of a run directory, and a new one when steps that W&B has already are taken again.

W&B never takes a step back: it drops rows of steps before its last. Its own rewind needs a server, so that it is no
answer offline. A new W&B run that begins with the lines kept in metrics.jsonl is right in both modes.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from megatron_mosa.config import Config, config_to_dict
from megatron_mosa.metrics import read_journal, scalars
from megatron_mosa.utils import write_atomically

RECORD = "wandb.json"
"""In the run directory: the project, name (``run.name``), id and title of its W&B run."""


class WandbRun:
    """Rows of scalars and histograms by step."""

    def __init__(self, config: Config, directory: Path, resumed_step: int) -> None:
        """Open the W&B run of this directory, or its first. metrics.jsonl must still hold what will be run again."""
        self.config = config
        self.directory = directory
        lines = read_journal(directory / "metrics.jsonl")
        record = self._recorded()
        if record is None:
            self._begin(resumed_step, config.run.name)
        elif any(line["step"] > resumed_step for line in lines):
            self._begin_again(resumed_step)
        else:
            self._open(**record)
            if self.least_step > resumed_step + 1:  # W&B has steps that a crash took from metrics.jsonl
                self._begin_again(resumed_step)
            else:
                self._catch_up(resumed_step)

    def log(self, numbers: dict[str, float], histograms: dict[str, list[float]], step: int) -> None:
        """Add to the row of a step; the numbers are in metrics.jsonl already."""
        from wandb import Histogram

        if step < self.least_step:  # as of a validation that was interrupted, when W&B is at the step after it
            self._begin_again(step)
        self._log(numbers | {name: Histogram(values) for name, values in histograms.items()}, step)

    def rewind(self, step: int) -> None:
        """Go on after ``step``."""
        if self.least_step > step:
            self._begin_again(step)

    def finish(self) -> None:
        """Wait until everything is written, or sent."""
        self.run.finish()

    def _recorded(self) -> dict[str, str] | None:
        """Id and title of this directory's W&B run; None: there is none in this project under this name."""
        name = self.config.run.name
        try:
            record = json.loads((self.directory / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:  # versions that wrote no such file gave W&B the run's name as id
            return {"run_id": name, "title": name} if (self.directory / "wandb").is_dir() else None
        except ValueError:  # a power failure left half of it
            return None
        if (record["project"], record["name"]) != (self.config.logging.wandb_project, name):
            return None
        return {"run_id": record["id"], "title": record["title"]}

    def _begin_again(self, step: int) -> None:
        self._begin(step, f"{self.config.run.name} (again from step {step + 1})")

    def _begin(self, step: int, title: str) -> None:
        """A new W&B run, with all that metrics.jsonl has up to ``step``."""
        self._open(f"{self.config.run.name[:100]}-{secrets.token_hex(4)}", title)  # W&B takes 128 characters
        self._catch_up(step)

    def _open(self, run_id: str, title: str) -> None:
        import wandb  # optional; check_start has seen to it that it is there

        project, name = self.config.logging.wandb_project, self.config.run.name
        record = {"project": project, "name": name, "id": run_id, "title": title}
        write_atomically(self.directory / RECORD, json.dumps(record) + "\n")
        wandb.finish()  # what this process has open, whose rows would go on otherwise
        self.run: Any = wandb.init(
            project=project,
            config=config_to_dict(self.config),
            id=run_id,
            name=title,
            resume="allow",
            dir=str(self.directory),
        )
        self.least_step: int = self.run.starting_step  # rows of steps before it would be dropped

    def _catch_up(self, last_step: int) -> None:
        """Log what metrics.jsonl has up to ``last_step`` and W&B has not.

        Offline that is everything: there each start is a folder of its own, and the last of those with one id has all.
        """
        for line in read_journal(self.directory / "metrics.jsonl"):
            if self.least_step <= line["step"] <= last_step:
                self._log(scalars(line), line["step"])

    def _log(self, row: dict[str, Any], step: int) -> None:
        self.run.log(row, step=step)
        self.least_step = step
