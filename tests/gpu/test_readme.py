"""The README's model in Megatron-core's GPTModel runs on a GPU as it is printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.integration.conftest import ROOT


def test_the_snippet(tmp_path: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (code,) = (snippet for snippet in snippets if "GPTModel" in snippet)
    (tmp_path / "snippet.py").write_text(
        f"{code}assert logits.shape == (1, 256, 8064) and logits.is_cuda and logits.isfinite().all()\n"
        "logits.sum().backward()\n"
        "assert all(weight.grad.isfinite().all() for weight in model.parameters())\n",
        encoding="utf-8",
    )
    subprocess.run([sys.executable, str(tmp_path / "snippet.py")], cwd=ROOT, check=True)
