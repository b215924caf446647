"""What the tests spend their CPU time on: ``python -m tests.causes stacks.txt``.

``stacks.txt`` has the stacks that py-spy (to be installed separately) samples of pytest and all its descendants::

    py-spy record --subprocesses --format raw --rate 10 --output stacks.txt -- .venv/bin/python -m pytest -n 2 tests

Each line is a stack and the number of samples in which it was running. A stack counts for the first cause below of
which it contains a mark. Programs that are not Python (Slurm, ptxas, the linker) are not sampled.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

CAUSES = {
    "interpreting kernels": ("triton/runtime/interpreter.py",),
    "importing": ("<frozen importlib._bootstrap>",),
    "compiling": ("triton/compiler/", "triton/backends/", "torch/_inductor/", "torch/_dynamo/", "torch/_functorch/"),
    "starting processes": ("_execute_child", "multiprocessing/popen"),
}
THE_REST = "the tests and what they test"


def cause(stack: str) -> str:
    return next((name for name, marks in CAUSES.items() if any(mark in stack for mark in marks)), THE_REST)


def main(path: str) -> None:
    samples: Counter[str] = Counter()
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        stack, _, number = line.rpartition(" ")
        if number.isdecimal():  # a command line in a stack may contain line breaks
            samples[cause(stack)] += int(number)
    total = samples.total()
    for name in [*CAUSES, THE_REST]:
        print(f"{samples[name]:8d} {samples[name] / max(total, 1):6.1%}  {name}")
    print(f"{total:8d}  samples in all")


if __name__ == "__main__":
    main(sys.argv[1])
