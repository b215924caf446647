"""Distributed pretraining of language models whose attention is MoSA (arXiv 2505.00315)."""

__version__ = "0.1.0"
