"""Measurements on GPUs; every one checks what it measures in the same run."""
