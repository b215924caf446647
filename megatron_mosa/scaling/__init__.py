"""Models of equal budget. Nothing is imported here: the command line comes through, and the solver needs torch."""
