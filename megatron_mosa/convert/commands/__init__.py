"""What ``mosa checkpoint`` does: one file per command or export format."""
