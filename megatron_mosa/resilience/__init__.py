"""What a run needs to survive: signals, time limits, hangs, and a file that says how it is."""
