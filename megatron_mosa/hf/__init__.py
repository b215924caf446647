"""Modeling code for transformers, which every exported model contains. It needs only torch and transformers.

An export copies the files in ``MODELING_FILES`` unchanged.
"""

from pathlib import Path

MODELING_FILES = tuple(sorted(Path(__file__).parent.glob("*_mosa.py")))
