"""Scaling studies: models of equal budget, and sweeps over parallel layouts.

This package imports nothing: the command line imports it, and the solver needs torch.
"""
