"""Tools for people, not for a run. Nothing is imported here: the command line imports it at every start."""
