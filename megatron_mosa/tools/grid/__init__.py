"""Grids of models that are trained at an equal budget and compared: ``mosa isoflop run`` and ``mosa report``."""
