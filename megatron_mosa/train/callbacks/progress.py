"""Measures steps and reports them to the writers, every ``logging.interval`` steps."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from megatron_mosa.attention import is_causal
from megatron_mosa.engine import StepResult
from megatron_mosa.metrics import peak_flops, peak_memory_gib, recorded_selection, selection_statistics
from megatron_mosa.model import model_flops
from megatron_mosa.train.trainer import Callback, Trainer
from megatron_mosa.train.writers import Writers


class Progress(Callback):
    """Writes one training line every ``logging.interval`` steps.

    Only time inside steps that were taken counts, not validation, checkpoints and steps of ``skip_steps``. MFU is
    ``model_flops`` over the peak of all ranks' devices. Where attention stays within documents, FLOPs are averaged over
    ``document_lengths``: the lengths of the documents in each of some typical sequences.
    """

    def __init__(self, writers: Writers, vocab_size: int, document_lengths: Sequence[Sequence[int]] = ()) -> None:
        self.writers = writers
        self.vocab_size = vocab_size
        self.document_lengths = document_lengths
        self.seconds = 0.0
        self.steps = 0
        self.is_causal = False

    def on_start(self, trainer: Trainer) -> None:
        """Determine the peak of the hardware and the FLOPs of a step."""
        config = trainer.config
        peak, origin = peak_flops(trainer.layout.device, config.train.precision, config.logging.peak_tflops)
        self.peak = peak
        self.flops_per_step = (
            model_flops(config, self.vocab_size, self.document_lengths) * config.train.global_batch_size
        )
        self.writers.note(f"MFU is relative to {peak / 1e12:.3g} TFLOP/s per rank ({origin}, {config.train.precision})")

    def around_step(self, trainer: Trainer, step: int) -> AbstractContextManager[object]:
        """Start the clock; in a step that will be reported, make MoSA layers keep their selection."""
        reported = trainer.is_due(trainer.config.logging.interval, step)
        self.is_causal = is_causal(trainer.engine.module, training=True)
        self.started = time.perf_counter()
        return recorded_selection(trainer.engine.module) if reported else nullcontext()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Stop the clock, and write the line if it is due."""
        if not result.skipped_by_config:
            self.seconds += time.perf_counter() - self.started
            self.steps += 1
        if not trainer.is_due(trainer.config.logging.interval, trainer.state.step):
            return
        batch_tokens = trainer.config.train.global_batch_size * trainer.config.data.sequence_length
        since, step = self.writers.last_training_step, trainer.state.step
        skipped = sum(since < number <= step for number in trainer.skip_steps)
        steps_per_second = self.steps / self.seconds if self.steps else math.nan
        line = {
            "step": trainer.state.step,
            "tokens": trainer.tokens,
            "skipped_tokens": skipped * batch_tokens,
            "loss": result.loss,
            "causal": self.is_causal,
            "grad_norm": result.grad_norm,
            "learning_rate": trainer.learning_rate,
            "tokens_per_second": batch_tokens * steps_per_second,
            "model_tflops_per_second": self.flops_per_step * steps_per_second / 1e12,
            "mfu": self.flops_per_step * steps_per_second / (self.peak * trainer.layout.world_size),
            "peak_memory_gib": peak_memory_gib(trainer.layout.device),
            **selection_statistics(trainer.engine.module),
        }
        self.writers.training(line, (trainer.last_step - trainer.state.step) / steps_per_second)
        self.seconds, self.steps = 0.0, 0
