"""Every kernel compiles for Ampere, Hopper and Blackwell, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_kernel_compiles(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.compile_for", str(capability)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    package = ROOT / "megatron_mosa"
    sources = [*(package / "kernels" / "triton").glob("*.py"), package / "hf" / "kernels_mosa.py"]
    kernels = {
        line.split("(")[0].strip().removeprefix("def ")
        for source in sources
        for line in source.read_text().splitlines()
        if line.strip().startswith("def _") and "_kernel(" in line
    }
    assert set(found["kernels"]) == kernels
    assert found["shared"] <= found["limit"]
