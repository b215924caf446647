"""The training loop, and the hooks around its steps: everything that is not a step is a callback."""

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
    """Where a run stands: all that a restart needs beside the weights."""

    step: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0
    """Non-finite steps since this start."""


Rewind = Callable[[TrainingEngine, int], tuple[TrainingState, Iterator[Batch]] | None]


class Callback:
    """Hooks that do nothing; override what you need. Every hook runs on every rank, in the order of the callbacks."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this start."""

    def around_step(self, trainer: Trainer, step: int) -> AbstractContextManager[object]:
        """A context in which step ``step`` is taken."""
        return nullcontext()

    def after_step(self, trainer: Trainer, result: StepResult) -> bool | None:
        """After ``trainer.state`` has moved on.

        Returns:
            True, the same on all ranks, to rewind the run to before this step and skip it. The callbacks that follow
            are not called if there is a checkpoint to go back to.
        """

    def on_validation_batch(self, trainer: Trainer) -> None:
        """Before each batch of a validation."""

    def on_save(self, trainer: Trainer) -> None:
        """After a checkpoint has begun: it may still be written."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step of this start, or at once if there was none to take."""


class Trainer:
    """Takes steps from where ``state`` stands to where the configuration says to stop.

    Callbacks are called on every rank, in the order given; they may communicate.

    Args:
        survival: signals, time limit, watchdog and status of this process.
        rewind: loads the checkpoint before a step and returns the state and the batches to continue with; None if there
            is no such checkpoint or no rewind left.
        skip_steps: steps whose batches are skipped, beside those of the configuration.
    """

    def __init__(
        self,
        config: Config,
        engine: TrainingEngine,
        layout: Layout,
        state: TrainingState,
        callbacks: Sequence[Callback],
        survival: ResilienceServices,
        rewind: Rewind = lambda engine, step: None,
        skip_steps: Iterable[int] = (),
    ) -> None:
        self.config = config
        self.engine = engine
        self.layout = layout
        self.state = state
        self.callbacks = callbacks
        self.survival = survival
        self.rewind = rewind
        self.skip_steps = {*config.train.skip_steps, *skip_steps}
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

    def is_due(self, interval: int, step: int) -> bool:
        """Whether something that happens every ``interval`` steps, and at the end of a start, happens at ``step``."""
        return step % interval == 0 or step == self.last_step

    def run(self, batches: Iterator[Batch]) -> None:
        """Train on this rank's micro-batches, which must start at ``state.consumed_samples``."""
        for callback in self.callbacks:
            callback.on_start(self)
        self.should_stop("getting ready")
        while self.state.step < self.last_step:
            result = self._step(batches)
            self.should_stop(f"what follows step {self.state.step}")
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

    def should_stop(self, doing: str) -> bool:
        """Whether the run stops now, as all ranks agree; a collective, and a heartbeat.

        Args:
            doing: what the run does next, for the watchdog.
        """
        self.survival.watchdog.beat(doing)
        self.stopping = self.stopping or self.survival.interruption.agreed_reason()
        return self.stopping is not None

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; a collective."""
        hosts = self.survival.interruption.hosts
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
        self.state.step = step
        self.state.consumed_samples += train.global_batch_size
        return result
