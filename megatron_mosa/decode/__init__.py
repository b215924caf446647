"""Decoding with exported models. Nothing is imported here: the command line comes through."""
