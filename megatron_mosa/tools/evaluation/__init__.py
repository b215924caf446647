"""Evaluate trained models: losses with and without access to future tokens, by position and by sequence length."""
