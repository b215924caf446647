"""English and numbers of messages."""


def counted(number: int, noun: str) -> str:
    """Return a number with what it counts, such as "1 step", "2,000 steps" or "3 processes"."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def decimals(value: float) -> str:
    """Return a perplexity with two decimals; a huge one, of a run that has diverged, as a power of ten."""
    return f"{value:.2f}" if abs(value) < 1e6 else f"{value:.2e}"
