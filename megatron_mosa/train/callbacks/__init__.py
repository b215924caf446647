"""Everything a run does besides taking steps, one concern per file."""
