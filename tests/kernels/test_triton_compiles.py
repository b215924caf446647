"""Every kernel compiles for Ampere, Hopper and Blackwell, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.compile_for import GLUON, SHARED_MEMORY, WITHOUT_PRODUCTS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_mosa"
SOURCES = [*sorted((PACKAGE / "kernels" / "triton").glob("*.py")), *sorted((PACKAGE / "hf").glob("*kernels_mosa.py"))]


def functions() -> dict[str, str]:
    """The source of each of Triton's functions, by name."""
    texts = [text for source in SOURCES for text in source.read_text().split("@triton.jit")[1:]]
    return {text.partition("def ")[2].partition("(")[0]: text for text in texts}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """For each capability the shared memory of each kernel. One process, which imports and traces for all of them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    cache = str(tmp_path_factory.mktemp("cache"))
    environment |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.compile_for", ",".join(map(str, SHARED_MEMORY))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_kernel_compiles(capability: int, compiled: dict[str, dict[str, int]]) -> None:
    found = compiled[str(capability)]
    expected = {name for name in functions() if name.endswith("_kernel")}
    assert set(found) == expected | (GLUON if capability == 90 else set())
    assert max(found.values()) <= SHARED_MEMORY[capability]


def test_kernels_said_to_be_without_products_have_none() -> None:
    """Nor does what they call."""
    found = functions()
    products = {name for name, text in found.items() if "tl.dot(" in text}
    while more := {name for name, text in found.items() if any(f" {other}(" in text for other in products)} - products:
        products |= more
    assert {"_forward_kernel", "_backward_queries_kernel", "_scores_kernel"} <= products
    assert {name for name in found if name.endswith("_kernel")} - products == WITHOUT_PRODUCTS
