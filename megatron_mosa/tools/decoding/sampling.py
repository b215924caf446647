"""Sampling parameters, checked before anything slow is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_mosa.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of ``mosa generate``."""

    max_new_tokens: int
    temperature: float
    """0: always take the most likely token."""

    top_k: int
    """Sample only from this many most likely tokens; 0: from all."""

    top_p: float
    """Sample only from the most likely tokens with this cumulative probability."""

    seed: int

    def __post_init__(self) -> None:
        """Check the ranges of all values.

        Raises:
            UserError: a value is out of range; the message names the option.
        """
        for name, is_valid, requirement in (
            ("max_new_tokens", 1 <= self.max_new_tokens <= 2**24, "between 1 and 16777216"),
            (
                "temperature",
                self.temperature == 0 or 1e-4 <= self.temperature <= 100,
                "between 0.0001 and 100, or 0 (the most likely token)",
            ),
            ("top_k", 0 <= self.top_k <= 2**31 - 1, "between 0 (all tokens) and 2147483647"),
            ("seed", 0 <= self.seed < 2**32, "between 0 and 4294967295"),
            ("top_p", 0 < self.top_p <= 1, "greater than 0 and at most 1"),
        ):
            if not is_valid:
                raise UserError(f"--{name.replace('_', '-')} must be {requirement}, got {getattr(self, name)}")

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments for transformers' ``generate``."""
        if self.temperature == 0:
            return {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        return {
            "do_sample": True,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }
