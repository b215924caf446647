"""Modelling code for transformers that travels with an exported model: it knows torch and transformers, nothing else.

``configuration_mosa.py`` and ``modeling_mosa.py`` are copied into every exported folder as they are.
"""

from pathlib import Path

MODELLING_FILES = tuple(Path(__file__).with_name(name) for name in ("configuration_mosa.py", "modeling_mosa.py"))
