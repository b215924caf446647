"""Measures the validation loss every ``validation.interval`` steps, and at the end."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_mosa.attention import is_causal
from megatron_mosa.data import ValidationSamples, validation_batches
from megatron_mosa.engine import Batch, StepResult
from megatron_mosa.train.trainer import Callback, Trainer
from megatron_mosa.train.writers import Writers


class Validation(Callback):
    """Measures the loss on the same validation samples every time.

    Expert choice selects with the whole sequence in view, so the loss of a model with such MoSA heads is labeled
    non-causal: no decoder can reach it. Heads with thresholds select by threshold here, even during warm-up.

    Args:
        last_validated: the last step of this run that has a validation line.
    """

    def __init__(self, writers: Writers, samples: ValidationSamples, last_validated: int = 0) -> None:
        self.writers = writers
        self.samples = samples
        self.last_validated = last_validated
        self.unigram_entropy = samples.unigram_entropy()

    def on_start(self, trainer: Trainer) -> None:
        """Measure what the previous start was stopped before measuring."""
        step = trainer.state.step
        is_due = trainer.is_due(trainer.config.validation.interval, step) or step > trainer.last_step
        if step and self.last_validated < step and is_due:
            self._evaluate(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Validate if it is due, unless the run is stopping."""
        if trainer.is_due(trainer.config.validation.interval, trainer.state.step) and not trainer.stop_reason:
            self._evaluate(trainer)

    def _evaluate(self, trainer: Trainer) -> None:
        batches = validation_batches(
            self.samples,
            micro_batch_size=trainer.config.train.micro_batch_size,
            data_parallel_rank=trainer.layout.data_parallel_rank,
            data_parallel_size=trainer.layout.data_parallel_size,
        )
        loss = trainer.engine.evaluate(_until_stopped(batches, trainer))
        if trainer.stop_reason:
            self.writers.note(f"validation of step {trainer.state.step} interrupted")
            return
        line = {
            "step": trainer.state.step,
            "tokens": trainer.tokens,
            "validation_loss": loss,
            "validation_perplexity": math.exp(min(loss, 700.0)),  # exp overflows a float above 709
            "unigram_entropy": self.unigram_entropy,
            "causal": is_causal(trainer.engine.module),
        }
        self.writers.validation(line)


def _until_stopped(batches: Iterator[Batch], trainer: Trainer) -> Iterator[Batch]:
    """Yield batches until the run is to stop: equally many on every rank, because all ranks agree on it."""
    for number, batch in enumerate(batches):
        if trainer.should_stop(f"validating step {trainer.state.step}, batch {number}"):
            return
        for callback in trainer.callbacks:
            callback.on_validation_batch(trainer)
        yield batch
