"""The models of a grid's results: rows of the same model with the learning rate that was chosen for it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_mosa.tools.grid.results import Row
from megatron_mosa.utils import counted


@dataclass(frozen=True)
class TrainedModel:
    """A model with the results of its seeds."""

    rows: tuple[Row, ...]
    """One for each seed, all done, at the same learning rate."""

    trials: tuple[Row, ...] = ()
    """Runs of one seed at several learning rates, if there were several; also those that diverged."""

    @property
    def row(self) -> Row:
        """Any row, for what all seeds share."""
        return self.rows[0]

    @property
    def name(self) -> str:
        heads = f", {counted(self.row.heads, 'head')}" if self.row.heads_given else ""
        return f"{self.row.label}{heads}"

    @property
    def losses(self) -> dict[int, float]:
        """Validation losses by seed."""
        return {row.seed: row.loss for row in self.rows if row.loss is not None}

    @property
    def loss(self) -> float:
        return statistics.mean(self.losses.values())

    @property
    def perplexities(self) -> list[float]:
        return [row.perplexity for row in self.rows if row.perplexity is not None]

    @property
    def perplexity(self) -> float:
        return statistics.mean(self.perplexities)

    @property
    def spread(self) -> float | None:
        """The largest difference of losses between seeds; None: there is one seed."""
        losses = self.losses.values()
        return max(losses) - min(losses) if len(losses) > 1 else None

    @property
    def is_causal(self) -> bool:
        return all(row.causal for row in self.rows)

    @property
    def step_seconds(self) -> float | None:
        """Median of the seeds' step times, of those measured alone if there are any."""
        return _median([row.step_seconds for row in self._alone()])

    @property
    def milliseconds(self) -> float | None:
        return None if self.step_seconds is None else 1000 * self.step_seconds

    @property
    def step_devices(self) -> list[str]:
        """Devices on which the step times were measured."""
        return [row.step_device or row.device for row in self._alone() if row.step_seconds is not None]

    @property
    def kv_mib(self) -> float | None:
        return None if self.row.kv_bytes_8k is None else self.row.kv_bytes_8k / 2**20

    def mean(self, name: str) -> float | None:
        """Return the mean over seeds of a field of the rows, or None if no seed has it."""
        known = [value for row in self.rows if (value := getattr(row, name)) is not None]
        return statistics.mean(known) if known else None

    @property
    def made_causal(self) -> float | None:
        """By how much the loss rises if the model selects as a decoder must; None: not known."""
        changes = [
            row.causal_loss - row.evaluated_loss
            for row in self.rows
            if row.causal_loss is not None and row.evaluated_loss is not None
        ]
        return statistics.mean(changes) if changes else None

    def decode_ms(self, batch: str) -> float | None:
        """Return the milliseconds of a decoding step of a number of sequences; None: not measured."""
        return next((row.decode_ms[batch] for row in self.rows if batch in row.decode_ms), None)

    @property
    def not_measured(self) -> dict[str, str]:
        """Reasons why a field is empty, of fields that no seed has."""
        reasons = {name: reason for row in self.rows for name, reason in row.not_measured.items()}
        known = {name for name in reasons for row in self.rows if getattr(row, name) not in (None, {})}  # 0 is known
        return {name: why for name, why in reasons.items() if name not in known}

    @property
    def heads(self) -> str:
        """Heads of a layer, such as "4 + 276": dense ones, and those of the member's kind."""
        return str(self.row.heads) if self.row.kind == "dense" else f"{self.row.dense_heads} + {self.row.heads}"

    @property
    def is_alone(self) -> bool:
        """Whether the step was measured with nothing beside it."""
        return any(row.step_alone and row.step_seconds for row in self.rows)

    @property
    def peak_memory_gib(self) -> float | None:
        return max((row.peak_memory_gib for row in self._alone() if row.peak_memory_gib), default=None)

    def _alone(self) -> Sequence[Row]:
        return [row for row in self.rows if row.step_alone] or self.rows

    def beside(self, other: TrainedModel) -> TrainedModel:
        """Return this model with only the seeds that the other has, too; with all of them if no seed is common."""
        common = tuple(row for row in self.rows if row.seed in other.losses)
        return replace(self, rows=common) if common else self

    def above(self, other: TrainedModel) -> float:
        """Return the loss less the other's, over the seeds that both have (see ``beside``)."""
        return self.beside(other).loss - other.beside(self).loss


@dataclass(frozen=True)
class Place:
    """A size on a corpus, where models can be compared."""

    size: str
    corpus: str
    models: tuple[TrainedModel, ...]
    relative_to: str
    """The member whose cost is the budget."""

    @property
    def reference(self) -> TrainedModel | None:
        return next((model for model in self.models if model.row.member == self.relative_to), None)

    @property
    def noise(self) -> float | None:
        """The largest spread over seeds of any model."""
        return max((model.spread for model in self.models if model.spread is not None), default=None)


def places(rows: Sequence[Row]) -> list[Place]:
    """Sort the rows of a grid that are done into models, in the order of the rows."""
    found: dict[tuple[str, str], dict[tuple[str, float | None, int], list[Row]]] = {}
    for row in rows:
        place = found.setdefault((row.size, row.corpus), {})
        if row.is_done or row.status == "diverged":
            place.setdefault((row.member, row.sparsity, row.heads), []).append(row)
    return [
        Place(size, corpus, tuple(filter(None, map(_model, groups.values()))), rows[0].relative_to)
        for (size, corpus), groups in found.items()
    ]


def _model(rows: list[Row]) -> TrainedModel | None:
    done = [row for row in rows if row.is_done]
    if not done:
        return None
    first = rows[0].seed
    trials = [row for row in rows if row.seed == first]
    tried = [row for row in trials if row.is_done] or done
    rate = min(tried, key=lambda row: row.loss or 0.0).learning_rate
    return TrainedModel(
        tuple(row for row in done if row.learning_rate == rate), tuple(trials) if len(trials) > 1 else ()
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
