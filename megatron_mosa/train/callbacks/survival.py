"""Signs of life, and steps that went wrong."""

from __future__ import annotations

import time
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from statistics import fmean

from megatron_mosa.config import ResilienceSection
from megatron_mosa.engine import StepResult
from megatron_mosa.errors import UnrecoverableError
from megatron_mosa.resilience import ResilienceServices, SpikeDetector
from megatron_mosa.train.trainer import Callback, Trainer
from megatron_mosa.train.writers import Writers


class Heartbeat(Callback):
    """Tells the watchdog and status.json what the run does; before all other callbacks."""

    def __init__(self, survival: ResilienceServices) -> None:
        self.watchdog = survival.watchdog
        self.status = survival.status
        self._seconds = deque[float](maxlen=20)  # from step to step, with what lies between

    def on_start(self, trainer: Trainer) -> None:
        """Say where the run begins."""
        self._last = time.monotonic()
        self.status.update("getting ready", step=trainer.state.step, last_step=trainer.last_step)

    def around_step(self, trainer: Trainer, step: int) -> AbstractContextManager[object]:
        """Say which step is taken."""
        self.watchdog.beat(f"taking step {step}")
        return nullcontext()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Say what came of it."""
        now = time.monotonic()
        self._seconds.append(now - self._last)
        self._last = now
        seconds = fmean(self._seconds)
        tokens = trainer.config.train.global_batch_size * trainer.config.data.sequence_length
        self.status.update(
            "training", step=trainer.state.step, loss=result.loss if result.is_finite else None, tokens=trainer.tokens,
            seconds_per_step=seconds, tokens_per_second=tokens / seconds, skipped_steps=trainer.state.skipped_steps,
        )  # fmt: skip

    def on_end(self, trainer: Trainer) -> None:
        """Say that the run waits for its last checkpoint."""
        self.watchdog.beat("writing the last checkpoint")
        self.status.update("writing the last checkpoint", step=trainer.state.step)


class StepMonitor(Callback):
    """Counts steps that are not finite, which the engine has skipped on every rank; notes losses that jump."""

    def __init__(self, writers: Writers, section: ResilienceSection) -> None:
        self.writers = writers
        self.spikes = SpikeDetector(section.spike_sigmas, section.spike_window)
        self.limit = section.max_skipped_steps
        self.rewinds = section.on_spike == "rewind"
        self.in_a_row = 0

    def after_step(self, trainer: Trainer, result: StepResult) -> bool:
        """Note what was wrong with the step.

        Returns:
            True if the loss has jumped, and ``resilience.on_spike`` is "rewind".

        Raises:
            UnrecoverableError: too many in a row were not finite.
        """
        step, end = trainer.state.step, trainer.state.consumed_samples
        samples = f"samples {end - trainer.config.train.global_batch_size} to {end - 1} of the data order"
        if result.skipped_by_config:
            self.writers.note(f"step {step} left out, as train.skip_steps asks; {samples}")
            return False
        if result.is_finite:
            self.in_a_row = 0
            excess = self.spikes.excess(result.loss)
            if excess is not None:
                self.writers.note(f"step {step}: loss {result.loss:.4f} is a spike of {excess:.1f} sigmas; {samples}")
            return self.rewinds and trainer.any_rank(excess is not None)
        self.in_a_row += 1
        trainer.state.skipped_steps += 1
        reason = f"loss {result.loss}, gradient norm {result.grad_norm}"
        if result.is_empty:
            reason = "no token of its batch counts (loss_mask is zero)"
        self.writers.note(
            f"step {step} skipped: {reason}; {samples}; {trainer.state.skipped_steps} skipped since this start"
        )
        if self.in_a_row == self.limit:
            raise UnrecoverableError(
                f"loss or gradients were not finite in {self.in_a_row} steps in a row, up to step {step}; lower "
                "optimizer.learning_rate, look at the data, or leave steps out (train.skip_steps); the last "
                "checkpoint before them is kept"
            )
        return False
