"""Decode with exported models. Nothing is imported here, because every start of the command line imports it."""
