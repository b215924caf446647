"""The training loop; everything that is not a step is a callback."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice

from megatron_mosa.config import Config
from megatron_mosa.engine import Batch, StepResult, TrainingEngine
from megatron_mosa.errors import RunError
from megatron_mosa.parallel import Layout
from megatron_mosa.train.callbacks.base import Callback
from megatron_mosa.train.schedule import learning_rate

MAX_SKIPPED_STEPS = 5


@dataclass
class TrainingState:
    """Where a run stands: all that a restart needs beside the weights."""

    step: int = 0
    consumed_samples: int = 0


class Trainer:
    """Takes steps from where ``state`` stands to where the configuration says to stop.

    Callbacks are called on every rank, in the order given; they may communicate.
    """

    def __init__(
        self,
        config: Config,
        engine: TrainingEngine,
        layout: Layout,
        state: TrainingState,
        callbacks: Sequence[Callback],
    ) -> None:
        self.config = config
        self.engine = engine
        self.layout = layout
        self.state = state
        self.callbacks = callbacks
        self.learning_rate = 0.0

    @property
    def last_step(self) -> int:
        """The step after which this start ends: ``train.steps``, or ``train.stop_after_step`` if that comes first."""
        return min(self.config.train.steps, self.config.train.stop_after_step or self.config.train.steps)

    @property
    def tokens(self) -> int:
        """Tokens consumed so far, over all ranks."""
        return self.state.consumed_samples * self.config.data.sequence_length

    def run(self, batches: Iterator[Batch]) -> None:
        """Train on this rank's micro-batches, which must start at ``state.consumed_samples``."""
        for callback in self.callbacks:
            callback.on_start(self)
        skipped = 0
        while self.state.step < self.last_step:
            result = self._step(batches)
            for callback in self.callbacks:
                callback.after_step(self, result)
            skipped = 0 if result.is_finite else skipped + 1
            if skipped == MAX_SKIPPED_STEPS:
                raise RunError(
                    f"loss or gradients were not finite in {skipped} steps in a row, up to step {self.state.step}; "
                    "lower optimizer.learning_rate or look at the data; the last checkpoint before them is kept"
                )
        for callback in self.callbacks:
            callback.on_end(self)

    def _step(self, batches: Iterator[Batch]) -> StepResult:
        train = self.config.train
        step = self.state.step + 1
        self.learning_rate = learning_rate(step, train.steps, self.config.optimizer)
        with ExitStack() as stack:
            for callback in self.callbacks:
                stack.enter_context(callback.around_step(self, step))
            result = self.engine.train_step(islice(batches, self.engine.accumulation_steps), self.learning_rate)
        self.state.step = step
        self.state.consumed_samples += train.global_batch_size
        return result
