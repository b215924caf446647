"""Modelling code for transformers, which every exported model contains. It needs only torch and transformers.

An export copies the files in ``MODELLING_FILES`` unchanged.
"""

from pathlib import Path

MODELLING_FILES = tuple(sorted(Path(__file__).parent.glob("*_mosa.py")))
