"""Slurm jobs: submitting them, and deciding whether a run starts again.

Nothing is imported here: the batch script runs ``verdict`` between two starts, which must not wait for torch.
"""
