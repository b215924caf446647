"""Measurements on GPUs. Each checks the correctness of what it measures in the same run."""
