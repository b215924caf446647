"""Compute all measures of a model: losses, leak and flip rates, by position and by length."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_mosa.attention import looks_ahead
from megatron_mosa.convert import ModelReader, lacks_thresholds
from megatron_mosa.data import Mixture, ValidationSamples
from megatron_mosa.errors import UserError
from megatron_mosa.metrics import causality_label
from megatron_mosa.model import CALIBRATION_PASSES, calibrate, calibration_config
from megatron_mosa.tools.evaluation.flips import flip_rates
from megatron_mosa.tools.evaluation.losses import (
    ProgressCallback,
    batches,
    chosen_positions,
    estimate,
    position_ranges,
    prefix_losses,
    token_losses,
)
from megatron_mosa.tools.evaluation.model import EvaluationModel, evaluation_model
from megatron_mosa.utils import counted


@dataclass(frozen=True)
class Settings:
    """Settings of an evaluation.

    Attributes:
        num_samples: number of validation windows.
        prefixes: positions per range whose loss is also measured with only the prefix as input; 0: none.
        lengths: multiples of the training length.
        calibration_samples: number of training windows to calibrate thresholds on.
        tokens_at_once: tokens per forward pass.
        device: device to compute on.
        dtype: dtype to compute in.
    """

    num_samples: int
    prefixes: int
    lengths: tuple[int, ...]
    calibration_samples: int
    tokens_at_once: int
    device: torch.device
    dtype: torch.dtype


def evaluate(
    model: ModelReader,
    mixture: Mixture,
    settings: Settings,
    tick: ProgressCallback,
    announce: ProgressCallback = lambda total: None,
) -> dict[str, Any]:
    """Measure a model; ``report.print_report`` prints the result.

    Args:
        tick: called with the number of tokens of each forward pass.
        announce: called once before them, with the number of tokens of all together.

    Returns:
        ``samples`` and ``calibration_samples``: numbers of windows, of which short splits have fewer than ``settings``
        asks for (None: nothing was calibrated); ``full_sequence`` and ``causal``: loss, standard error of the mean,
        label; ``by_position``: for each range of positions these losses, the prefix-only loss, the leak and the flip
        rate; ``leak``: over all positions, with its standard error (None without prefixes); ``flip_rate``: of the first
        half of the windows if the second half is replaced (None without MoSA heads); ``by_length``: the losses at
        multiples of the training length; ``left_out``: lengths skipped because the text is too short, with the reason.
        With Routing heads, which have no causal counterpart, all that is ``causal`` is None. What is not defined is
        NaN: the error of a single window, and the flip rate of heads that select nothing.

    Raises:
        UserError: the validation split has fewer than two windows.
    """
    evaluation = _Evaluation(model, mixture, settings, tick)
    announce(evaluation.planned_tokens())
    return evaluation.run()


class _Evaluation:
    def __init__(self, model: ModelReader, mixture: Mixture, settings: Settings, tick: ProgressCallback) -> None:
        self.model, self.mixture, self.settings, self.tick = model, mixture, settings, tick
        self.length = model.config.data.sequence_length
        self.samples = self._samples(1)
        if len(self.samples) < 2:
            raise UserError(
                f"the validation split must have at least 2 windows of {self.length} tokens, got {len(self.samples)}; "
                "rebuild the dataset with a larger data.validation_fraction"
            )
        self.looks_ahead = looks_ahead(model.config) or lacks_thresholds(model.weights, model.read)
        # Routing heads look ahead whatever the selection of MoSA heads.
        can_be_calibrated = self.looks_ahead and not looks_ahead(calibration_config(model.config))
        asked = settings.calibration_samples
        self.calibration = self._samples(1, "train", asked) if can_be_calibrated else None
        self.ranges = position_ranges(self.length)
        self.longer: dict[int, ValidationSamples] = {}
        self.left_out: dict[int, str] = {}
        for multiple in settings.lengths:
            try:
                self.longer[multiple] = self._samples(multiple)
            except UserError as error:
                self.left_out[multiple * self.length] = str(error)

    def planned_tokens(self) -> int:
        """Return how many tokens all passes together will process, about."""
        tokens = len(self.samples) * self.length
        passes = tokens + sum(len(samples) * n * self.length for n, samples in self.longer.items())
        if self.calibration is not None:
            passes = 2 * passes + CALIBRATION_PASSES * len(self.calibration) * self.length
        if self.settings.prefixes:
            positions = chosen_positions(self.ranges, self.settings.prefixes)
            passes += len(self.samples) * sum(position + 1 for position in positions)
        return passes + (tokens * (1 + len(self._flip_positions())) if self.model.config.mosa.num_heads else 0)

    def run(self) -> dict[str, Any]:
        label = causality_label(not self.looks_ahead)
        with self._built() as model:
            full = self._losses(model, self.samples)
            flips = self._flip_rates(model)
            ranges, leak = self._by_range(model, full, flips)
            lengths = {multiple: self._losses(model, samples) for multiple, samples in self.longer.items()}
        is_causal = self.calibration is not None or not self.looks_ahead
        causal, causal_lengths, how = full, lengths, "the model itself"
        if self.calibration is not None:
            how = f"by thresholds, calibrated on {counted(len(self.calibration), 'window')} of the training split"
            with self._built(calibrates=True) as model:
                calibrate(model.module, partial(self._run_over, self.calibration, model))
                causal = self._losses(model, self.samples)
                causal_lengths = {n: self._losses(model, samples) for n, samples in self.longer.items()}
        for part, row in zip(self.ranges, ranges, strict=True):
            row["causal"] = causal[:, part.start : part.stop].mean().item() if is_causal else None
        return {
            "samples": len(self.samples),
            "calibration_samples": len(self.calibration) if self.calibration is not None else None,
            "settings": {
                "samples": self.settings.num_samples,  # short splits have fewer
                "calibration_samples": self.settings.calibration_samples if self.calibration is not None else None,
            },
            "sequence_length": self.length,
            "full_sequence": _summary(full) | {"label": label},
            "causal": _summary(causal) | {"label": f"causal, {how}"} if is_causal else None,
            "by_position": ranges,
            "leak": leak,
            "flip_rate": flips.get(self._half),
            "by_length": [
                {
                    "length": multiple * self.length,
                    "full_sequence": _summary(lengths[multiple]) | {"label": label},
                    "causal": _summary(causal_lengths[multiple]) if is_causal else None,
                }
                for multiple in lengths
            ],
            "left_out": self.left_out,
        }

    def _built(self, *, calibrates: bool = False) -> Any:
        return evaluation_model(self.model, self.settings.device, self.settings.dtype, calibrates=calibrates)

    def _samples(self, multiple: int, split: str = "validation", count: int | None = None) -> ValidationSamples:
        """Return windows of a multiple of the training length, with about the same total number of tokens for each."""
        return ValidationSamples(
            self.mixture,
            sequence_length=multiple * self.length,
            num_samples=max(1, (count or self.settings.num_samples) // multiple),
            mark_documents=self.model.config.model.attend_within_documents,
            split=split,
        )

    def _losses(self, model: EvaluationModel, samples: ValidationSamples) -> Tensor:
        return token_losses(model, samples, self.settings.tokens_at_once, self.tick)

    @property
    def _half(self) -> int:
        """The last position of the first half."""
        return self.length // 2 - 1

    def _flip_positions(self) -> list[int]:
        """Return the positions up to which flips are counted: the ends of ranges and of the first half."""
        ends = [part.stop - 1 for part in self.ranges[:-1]]  # no tokens follow the last range that could change
        return sorted({*ends, self._half})

    def _flip_rates(self, model: EvaluationModel) -> dict[int, float]:
        """Return the flip rate up to each position; none without MoSA heads."""
        if not self.model.config.mosa.num_heads:
            return {}
        positions = self._flip_positions()
        rates = flip_rates(model, self.samples, positions, self.settings.tokens_at_once, self.tick)
        return dict(zip(positions, rates.tolist(), strict=True))

    def _by_range(
        self, model: EvaluationModel, full: Tensor, flips: dict[int, float]
    ) -> tuple[list[dict[str, Any]], dict[str, float] | None]:
        """Measure each range of positions; also return the leak over all of them, each range by its length."""
        positions = chosen_positions(self.ranges, self.settings.prefixes) if self.settings.prefixes else []
        at_once = self.settings.tokens_at_once
        prefix = prefix_losses(model, self.samples, positions, at_once, self.tick) if positions else full[:, :0]
        rows = []
        total = torch.zeros(len(full), dtype=torch.float64)  # [N], each sample's leak
        for part in self.ranges:
            columns = [i for i, position in enumerate(positions) if position in part]
            here = [positions[i] for i in columns]
            row: dict[str, Any] = {
                "first": part.start,
                "last": part.stop - 1,
                "full_sequence": full[:, part.start : part.stop].mean().item(),
                "flip_rate": flips.get(part.stop - 1),
            }
            if columns:
                leaks = (prefix[:, columns] - full[:, here]).double().mean(dim=1)
                total += leaks * len(part) / self.length
                leak = estimate(leaks)
                row |= {"positions": here, "prefix_only": prefix[:, columns].mean().item()}
                row |= {"leak": leak.mean, "leak_error": leak.error}
            rows.append(row)
        overall = estimate(total)._asdict() if positions else None
        return rows, overall

    def _run_over(self, samples: ValidationSamples, model: EvaluationModel) -> None:
        for batch in batches(samples, self.settings.tokens_at_once):
            model.forward(batch["tokens"], batch.get("document_starts"))
            self.tick(batch["tokens"].numel())


def _summary(losses: Tensor) -> dict[str, Any]:
    mean_loss = estimate(losses.double().mean(dim=1))
    return {"loss": mean_loss.mean, "error": mean_loss.error, "tokens": losses.numel()}
