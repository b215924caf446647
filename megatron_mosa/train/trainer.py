"""The training loop. Everything besides taking steps is a callback."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from itertools import islice

from megatron_mosa.config import Config
from megatron_mosa.engine import Batch, StepResult, TrainingEngine
from megatron_mosa.parallel import Layout
from megatron_mosa.resilience import ResilienceServices
from megatron_mosa.train.schedule import learning_rate


@dataclass
class TrainingState:
    """How far a run has come: all that a restart needs besides the model and optimizer."""

    step: int = 0
    consumed_samples: int = 0


Rewind = Callable[[TrainingEngine, int], tuple[TrainingState, Iterator[Batch]] | None]


class Callback:
    """Hooks that do nothing by default. Every hook is called on every rank, in the order of the callbacks."""

    def on_start(self, trainer: Trainer) -> None:
        """Called once, before the first step."""

    def around_step(self, trainer: Trainer, step: int) -> AbstractContextManager[object]:
        """Return a context manager; step ``step`` is taken inside it."""
        return nullcontext()

    def after_step(self, trainer: Trainer, result: StepResult) -> bool | None:
        """Called after each step, when ``trainer.state`` includes it.

        Returns:
            True, on all ranks alike, to rewind the run to before this step and skip it. Callbacks further down the list
            are then not called, unless there is no checkpoint to rewind to.
        """

    def on_validation_batch(self, trainer: Trainer) -> None:
        """Called before each validation batch."""

    def on_save(self, trainer: Trainer) -> None:
        """Called after a save has started; the checkpoint may not be complete yet."""

    def on_end(self, trainer: Trainer) -> None:
        """Called once, after the last step, or right after ``on_start`` if there is no step to take."""


class Trainer:
    """Takes steps from ``state`` to the configured end.

    Args:
        callbacks: called on every rank, in this order; they may communicate.
        services: signals, time limit, watchdog and status of this process.
        rewind: loads the checkpoint before a step and returns the state and the batches to continue with; None if there
            is no such checkpoint or no rewind left.
        skip_steps: steps whose batches are skipped, in addition to ``train.skip_steps``.
    """

    def __init__(
        self,
        config: Config,
        engine: TrainingEngine,
        layout: Layout,
        state: TrainingState,
        callbacks: Sequence[Callback],
        services: ResilienceServices,
        rewind: Rewind = lambda engine, step: None,
        skip_steps: Iterable[int] = (),
    ) -> None:
        self.config = config
        self.engine = engine
        self.layout = layout
        self.state = state
        self.callbacks = callbacks
        self.services = services
        self.rewind = rewind
        self.skip_steps = {*config.train.skip_steps, *skip_steps}
        self.stop_reason: str | None = None
        """Why the run stops after the current step; None while it continues."""
        self.learning_rate = 0.0
        self.skipped: set[int] = set()
        """Steps since the run was last started that trained nothing: not finite, or of ``skip_steps``."""

    @property
    def last_step(self) -> int:
        """The step to train to: ``train.steps`` or ``train.stop_after_step``, whichever comes first.

        Once the run was asked to stop, it is the current step, so that callbacks do what is due at the end.
        """
        if self.stop_reason:
            return self.state.step
        return min(self.config.train.steps, self.config.train.stop_after_step or self.config.train.steps)

    @property
    def tokens(self) -> int:
        """Tokens consumed so far, over all ranks."""
        return self.state.consumed_samples * self.config.data.sequence_length

    def is_due(self, interval: int, step: int) -> bool:
        """Whether something that is done every ``interval`` steps and at the last step is due at ``step``."""
        return step % interval == 0 or step == self.last_step

    def run(self, batches: Iterator[Batch]) -> None:
        """Train on this rank's micro-batches, of which the first has sample ``state.consumed_samples``."""
        for callback in self.callbacks:
            callback.on_start(self)
        self.should_stop("getting ready")
        while self.state.step < self.last_step:
            result = self._step(batches)
            self.should_stop(f"callbacks after step {self.state.step}")
            for callback in self.callbacks:
                if not callback.after_step(self, result):
                    continue
                step = self.state.step
                if found := self.rewind(self.engine, step):
                    self.state, batches = found
                    self.skip_steps.add(step)
                    break
        for callback in self.callbacks:
            callback.on_end(self)

    def should_stop(self, activity: str) -> bool:
        """Send a heartbeat, and return whether all ranks agree to stop now. A collective.

        Args:
            activity: what the run does next, for the watchdog.
        """
        self.services.watchdog.beat(activity)
        self.stop_reason = self.stop_reason or self.services.interruption.agreed_reason()
        return self.stop_reason is not None

    def any_rank(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank. A collective."""
        hosts = self.services.interruption.hosts
        return flag if hosts is None else bool(hosts.max(int(flag)))

    def _step(self, batches: Iterator[Batch]) -> StepResult:
        train = self.config.train
        step = self.state.step + 1
        self.learning_rate = learning_rate(step, train.steps, self.config.optimizer)
        micro_batches = islice(batches, self.engine.accumulation_steps)
        with ExitStack() as stack:
            for callback in self.callbacks:
                stack.enter_context(callback.around_step(self, step))
            if step in self.skip_steps:
                deque(micro_batches, maxlen=0)
                result = StepResult(loss=math.nan, grad_norm=math.nan, skipped_by_config=True)
            else:
                result = self.engine.train_step(micro_batches, self.learning_rate)
        self.skipped = {number for number in self.skipped if number < step}  # others are repeated after a rewind
        if result.skipped_by_config or not result.is_finite:
            self.skipped.add(step)
        self.state.step = step
        self.state.consumed_samples += train.global_batch_size
        return result
