"""Resilience of a run: signals, time limits, hangs, loss spikes, a status file and node checks."""
