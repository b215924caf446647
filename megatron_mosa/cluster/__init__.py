"""Programs for Slurm clusters. Nothing is imported here: the batch script must not wait for torch."""
