"""Validation loss, every ``validation.interval`` steps and at the end."""

from __future__ import annotations

import math

from megatron_mosa.data import ValidationSamples, validation_batches
from megatron_mosa.engine import StepResult
from megatron_mosa.train.callbacks.base import Callback, is_due
from megatron_mosa.train.trainer import Trainer
from megatron_mosa.train.writers import Writers


class Validation(Callback):
    """Measures the loss on the same validation samples every time.

    Expert choice selects with the whole sequence in view, so the loss of a model with MoSA heads is labelled
    non-causal: no decoder could reach it.
    """

    def __init__(self, writers: Writers, samples: ValidationSamples) -> None:
        self.writers = writers
        self.samples = samples
        self.unigram_entropy = samples.unigram_entropy()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Evaluate if it is time."""
        if is_due(trainer, trainer.config.validation.interval, trainer.state.step):
            self._evaluate(trainer)

    def _evaluate(self, trainer: Trainer) -> None:
        batches = validation_batches(
            self.samples,
            micro_batch_size=trainer.config.train.micro_batch_size,
            data_parallel_rank=trainer.layout.data_parallel_rank,
            data_parallel_size=trainer.layout.data_parallel_size,
        )
        loss = trainer.engine.evaluate(batches)
        line = {
            "step": trainer.state.step,
            "tokens": trainer.tokens,
            "validation_loss": loss,
            "validation_perplexity": math.exp(min(loss, 700.0)),  # not beyond what a float holds
            "unigram_entropy": self.unigram_entropy,
            "causal": trainer.config.mosa.num_heads == 0,
        }
        self.writers.validation(line)
