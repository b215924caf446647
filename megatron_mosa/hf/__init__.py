"""Modeling code for transformers, which every exported model contains. It needs only torch and transformers.

An export copies the files in ``MODELING_FILES`` unchanged.
"""

from pathlib import Path

MODELING_FILES = tuple(
    Path(__file__).with_name(f"{name}_mosa.py")
    for name in ("configuration", "modeling", "heads", "fixed", "routing", "tokens", "cache", "rows", "kernels")
)
