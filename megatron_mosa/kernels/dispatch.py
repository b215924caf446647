"""The one place that decides which implementation runs."""

from __future__ import annotations

from types import ModuleType

from megatron_mosa.kernels import naive

BACKENDS = {"naive": naive}


def get_backend(name: str) -> ModuleType:
    """The module that implements ``router_scores``, ``select_tokens`` and ``selected_attention``.

    Args:
        name: "auto" (the fastest that runs here) or the name of a backend.

    Raises:
        ValueError: an unknown backend.
    """
    if name == "auto":
        return naive
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is not available; legal: 'auto', {', '.join(map(repr, BACKENDS))}")
    return BACKENDS[name]
