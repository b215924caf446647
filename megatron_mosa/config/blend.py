"""Parsing of ``data.blend``: weights and dataset paths."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_mosa.errors import UserError

_WEIGHT_TOLERANCE = 0.001  # '0.333' three times means a third each


def blend_parts(blend: Sequence[str]) -> list[tuple[float, str]]:
    """Return the weights and paths in ``data.blend``.

    Raises:
        UserError: an entry that is not "WEIGHT PATH", weights that do not sum to 1, or a duplicate path.
    """
    parts: list[tuple[float, str]] = []
    for entry in blend:
        number, _, path = entry.strip().partition(" ")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        path = path.strip()
        if not path or not 0.0 < weight <= 1.0:
            raise UserError(
                f"data.blend: '{entry}' is not 'WEIGHT PATH' with a weight above 0 and up to 1, such as '0.7 data/web'"
            )
        if path in (known for _, known in parts):
            raise UserError(f"data.blend names {path} twice; give it once, with the sum of its weights")
        parts.append((weight, path))
    total = math.fsum(weight for weight, _ in parts)
    if parts and abs(total - 1.0) > _WEIGHT_TOLERANCE:
        scaled = ", ".join(f"'{weight / total:.4g} {path}'" for weight, path in parts)
        raise UserError(f"the weights of data.blend must sum to 1, got {total:.6g}; scale them: {scaled}")
    return parts
