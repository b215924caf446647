"""Slurm jobs: submission, and the decision whether a run starts again.

This package imports nothing: the batch script runs ``verdict`` between two attempts and must not wait for torch.
"""
