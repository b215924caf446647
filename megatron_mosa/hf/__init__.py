"""Modelling code for transformers that travels with an exported model: it knows torch, transformers, Triton if there.

The files of ``MODELLING_FILES`` are copied into every exported folder as they are.
"""

from pathlib import Path

MODELLING_FILES = tuple(
    Path(__file__).with_name(f"{name}_mosa.py")
    for name in ("configuration", "modeling", "heads", "tokens", "cache", "rows", "kernels")
)
