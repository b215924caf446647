"""Validation loss, every ``validation.interval`` steps and at the end."""

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

    Expert choice selects with the whole sequence in view, so the loss of a model with such MoSA heads is labelled
    non-causal: no decoder could reach it. Heads with thresholds select by them here, in warm-up too.
    """

    def __init__(self, writers: Writers, samples: ValidationSamples, last_measured: int = 0) -> None:
        """
        Args:
            writers, samples: where lines go, and what is measured on.
            last_measured: the last step of this run that has a validation line.
        """
        self.writers = writers
        self.samples = samples
        self.last_measured = last_measured
        self.unigram_entropy = samples.unigram_entropy()

    def on_start(self, trainer: Trainer) -> None:
        """Make up for what the start before was stopped from."""
        step = trainer.state.step
        if step and self.last_measured < step and trainer.is_due(trainer.config.validation.interval, step):
            self._evaluate(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Evaluate if it is time, and there is time."""
        if trainer.is_due(trainer.config.validation.interval, trainer.state.step) and not trainer.stopping:
            self._evaluate(trainer)

    def _evaluate(self, trainer: Trainer) -> None:
        batches = validation_batches(
            self.samples,
            micro_batch_size=trainer.config.train.micro_batch_size,
            data_parallel_rank=trainer.layout.data_parallel_rank,
            data_parallel_size=trainer.layout.data_parallel_size,
        )
        loss = trainer.engine.evaluate(_until_stopped(batches, trainer))
        if trainer.stopping:
            self.writers.note(f"validation of step {trainer.state.step} broken off")
            return
        line = {
            "step": trainer.state.step,
            "tokens": trainer.tokens,
            "validation_loss": loss,
            "validation_perplexity": math.exp(min(loss, 700.0)),  # not beyond what a float holds
            "unigram_entropy": self.unigram_entropy,
            "causal": is_causal(trainer.engine.module),
        }
        self.writers.validation(line)


def _until_stopped(batches: Iterator[Batch], trainer: Trainer) -> Iterator[Batch]:
    """As many on every rank: all have the same number, and agree."""
    for number, batch in enumerate(batches):
        if trainer.should_stop(f"validating step {trainer.state.step}, batch {number}"):
            return
        for callback in trainer.callbacks:
            callback.on_validation_batch(trainer)
        yield batch
