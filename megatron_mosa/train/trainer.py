"""The training loop; everything that is not a step is a callback."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from megatron_mosa.config import Config
from megatron_mosa.engine import Batch, StepResult, TrainingEngine
from megatron_mosa.parallel import Layout
from megatron_mosa.resilience.survival import Survival
from megatron_mosa.train.callbacks.base import Callback
from megatron_mosa.train.schedule import learning_rate

if TYPE_CHECKING:
    from megatron_mosa.train.rewind import Rewinder


class Spike(Exception):
    """Raised by a callback: the run is to go back to before the step that was just taken, and leave it out."""


@dataclass
class TrainingState:
    """Where a run stands: all that a restart needs beside the weights."""

    step: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0
    """Not finite, since this start."""


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
        survival: Survival | None = None,
        rewinder: Rewinder | None = None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.layout = layout
        self.state = state
        self.callbacks = callbacks
        self.survival = survival
        self.rewinder = rewinder
        self.stopping: str | None = None
        """Why the run stops after the step that was just taken; None: it goes on."""
        self.learning_rate = 0.0

    @property
    def last_step(self) -> int:
        """The step after which this start ends: ``train.steps``, or ``train.stop_after_step`` if that comes first.

        Where the run was asked to stop, it is the step that was just taken: what happens at an end happens then.
        """
        if self.stopping:
            return self.state.step
        return min(self.config.train.steps, self.config.train.stop_after_step or self.config.train.steps)

    @property
    def tokens(self) -> int:
        """Tokens consumed so far, over all ranks."""
        return self.state.consumed_samples * self.config.data.sequence_length

    def run(self, batches: Iterator[Batch]) -> None:
        """Train on this rank's micro-batches, which must start at ``state.consumed_samples``."""
        for callback in self.callbacks:
            callback.on_start(self)
        self.is_to_stop("getting ready")
        while self.state.step < self.last_step:
            result = self._step(batches)
            self.is_to_stop(f"what follows step {self.state.step}")
            batches = self._after_step(result, batches)
        for callback in self.callbacks:
            callback.on_end(self)

    def _after_step(self, result: StepResult, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Call the callbacks; the batches to go on with, others than before if a spike takes the run back."""
        for callback in self.callbacks:
            try:
                callback.after_step(self, result)
            except Spike:
                spike = self.state.step
                found = self.rewinder.rewind(self.engine, spike) if self.rewinder is not None else None
                if found is not None:
                    self.state, batches = found
                    self.config.train.skip_steps = [*self.config.train.skip_steps, spike]
                    break
        return batches

    def is_to_stop(self, doing: str) -> bool:
        """Whether the run stops now, as all ranks agree; a collective, and a sign of life.

        Args:
            doing: what the run does next, for the watchdog.
        """
        self.beat(doing)
        if self.survival is not None:
            self.stopping = self.stopping or self.survival.interruption.agreed()
        return self.stopping is not None

    def any_rank(self, flag: bool) -> bool:
        """Whether it is so on any rank; a collective."""
        hosts = self.survival.interruption.hosts if self.survival is not None else None
        return flag if hosts is None else bool(hosts.largest(int(flag)))

    def beat(self, doing: str) -> None:
        """A sign of life for the watchdog, and what the run does next."""
        if self.survival is not None:
            self.survival.watchdog.beat(doing)

    def strike(self, place: str, step: int) -> None:
        """Have an injected fault, if one is asked for here."""
        if self.survival is not None:
            self.survival.faults.strike(place, step)

    def _step(self, batches: Iterator[Batch]) -> StepResult:
        train = self.config.train
        step = self.state.step + 1
        self.learning_rate = learning_rate(step, train.steps, self.config.optimizer)
        with ExitStack() as stack:
            for callback in self.callbacks:
                stack.enter_context(callback.around_step(self, step))
            result = self._train(islice(batches, self.engine.accumulation_steps), step)
        self.state.step = step
        self.state.consumed_samples += train.global_batch_size
        return result

    def _train(self, batches: Iterator[Batch], step: int) -> StepResult:
        if step in self.config.train.skip_steps:
            deque(batches, maxlen=0)
            return StepResult(loss=math.nan, grad_norm=math.nan, was_asked=True)
        self.strike("step", step)
        if self.survival is not None:
            batches = self.survival.faults.poisoned(batches, step)
        return self.engine.train_step(batches, self.learning_rate)
