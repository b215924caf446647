"""Heartbeats, non-finite steps and loss spikes."""

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
    """Reports each activity to the watchdog and status.json. Put it before all other callbacks."""

    def __init__(self, services: ResilienceServices) -> None:
        self.watchdog = services.watchdog
        self.status = services.status
        self._seconds = deque[float](maxlen=20)  # per step, including validation and saves

    def on_start(self, trainer: Trainer) -> None:
        """Report the first step."""
        self._last = time.monotonic()
        self.status.update("getting ready", step=trainer.state.step, last_step=trainer.last_step)

    def around_step(self, trainer: Trainer, step: int) -> AbstractContextManager[object]:
        """Report the step that begins."""
        self.watchdog.beat(f"taking step {step}")
        return nullcontext()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Report loss and speed."""
        now = time.monotonic()
        if not result.skipped_by_config:
            self._seconds.append(now - self._last)
        self._last = now
        speed = {}
        if self._seconds:
            seconds = fmean(self._seconds)
            tokens = trainer.config.train.global_batch_size * trainer.config.data.sequence_length
            speed = {"seconds_per_step": seconds, "tokens_per_second": tokens / seconds}
        self.status.update(
            "training", step=trainer.state.step, loss=result.loss if result.is_finite else None, tokens=trainer.tokens,
            skipped_steps=len(trainer.skipped), **speed,
        )  # fmt: skip

    def on_end(self, trainer: Trainer) -> None:
        """Report that the run waits for its last checkpoint."""
        self.watchdog.beat("writing the last checkpoint")
        self.status.update("writing the last checkpoint", step=trainer.state.step)


class StepMonitor(Callback):
    """Reports skipped steps, also non-finite ones, which the engine skips on every rank, and detects loss spikes."""

    def __init__(self, writers: Writers, section: ResilienceSection) -> None:
        self.writers = writers
        self.spikes = SpikeDetector(section.spike_sigmas, section.spike_window)
        self.limit = section.max_skipped_steps
        self.rewinds = section.on_spike == "rewind"
        self.consecutive = 0
        """Non-finite steps since the last finite one."""

    def after_step(self, trainer: Trainer, result: StepResult) -> bool:
        """Report a step that was skipped, or whose loss is a spike.

        Returns:
            True if the loss is a spike and ``resilience.on_spike`` is "rewind".

        Raises:
            UnrecoverableError: ``resilience.max_skipped_steps`` consecutive steps were not finite.
        """
        step, end = trainer.state.step, trainer.state.consumed_samples
        samples = f"samples {end - trainer.config.train.global_batch_size} to {end - 1} of the data order"
        if result.skipped_by_config:
            why = "as configured" if step in trainer.config.train.skip_steps else "after its loss was a spike"
            self.writers.note(f"step {step} skipped, {why}; {samples}")
            return False
        if result.is_finite:
            self.consecutive = 0
            excess = self.spikes.excess(step, result.loss)
            if excess is not None:
                self.writers.note(f"step {step}: loss {result.loss:.4f} is a spike of {excess:.1f} sigmas; {samples}")
            return self.rewinds and trainer.any_rank(excess is not None)
        self.consecutive += 1
        reason = f"loss {result.loss}, gradient norm {result.grad_norm}"
        if result.is_empty:
            reason = "its batch has no token that counts (loss_mask is zero)"
        self.writers.note(
            f"step {step} skipped: {reason}; {samples}; {len(trainer.skipped)} skipped since the run was started"
        )
        if self.consecutive == self.limit:
            raise UnrecoverableError(
                f"loss or gradients were not finite in {self.consecutive} consecutive steps, up to step {step}; lower "
                "optimizer.learning_rate, inspect the data, or skip these steps (train.skip_steps); the last "
                "checkpoint before them is kept"
            )
        return False
