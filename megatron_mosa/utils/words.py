"""English of messages."""


def counted(number: int, noun: str) -> str:
    """Return a number with what it counts, such as "1 step", "2,000 steps" or "3 processes"."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"
