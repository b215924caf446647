"""Compiles all kernels for a GPU that need not be there: ``compile_for.py CAPABILITY [resources]``; 90 is Hopper.

Runs the operators, forward and backward, on the CPU with every launch replaced by a compilation, and prints a line of
JSON: the kernels, and the most shared memory that one takes; with ``resources`` before it registers and stack of each
variant (a stack is where registers are spilt to). TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from megatron_mosa.attention import num_selected_tokens
from megatron_mosa.hf import kernels_mosa
from megatron_mosa.hf.rows_mosa import SelectedRows
from megatron_mosa.hf.tokens_mosa import Tokens
from megatron_mosa.kernels import naive
from megatron_mosa.kernels import triton as fused
from megatron_mosa.kernels.triton import tiles
from tests.kernels.test_documents import pack

SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
CASES = [  # dtype, h', k
    (torch.bfloat16, 64, 64),
    (torch.bfloat16, 128, 256),
    (torch.float16, 256, 31),
    (torch.float32, 64, 64),
]


class Driver:
    """What Triton asks of a device when it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def resources(cubin: bytes) -> str:
    """Registers and stack, by the cuobjdump in Triton's package."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return " ".join(word for word in printed.split() if word.startswith(("REG:", "STACK:")))


def decode(router: torch.Tensor, qkv: torch.Tensor, proj: torch.Tensor) -> None:
    """A step, with padding and load feedback, and without."""
    states, angles = router.new_zeros(4, router.shape[1]), torch.zeros(4, 1, proj.shape[1] // 4)
    for feedback, valid in ((0.0, None), (0.1, torch.ones(4, 1, dtype=torch.bool))):
        rows = SelectedRows()
        rows.begin(states, len(router))
        tokens = Tokens(torch.zeros(4, 1, dtype=torch.long), (angles, angles), valid)
        thresholds = torch.full((len(router),), 0.5)
        kernels_mosa.step_in_kernels(states, (router, qkv, proj), thresholds, tokens, rows, feedback, 1 / 32)


def compile_all(capability: int, shows_resources: bool) -> dict[str, int]:
    """Shared memory of each kernel, the largest of its variants."""
    shared: dict[str, int] = {}

    def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_only(*args: Any, **options: Any) -> None:
            compiled = kernel.warmup(*args, grid=grid, **options)
            name = kernel.fn.__name__
            shared[name] = max(shared.get(name, 0), compiled.metadata.shared)
            if shows_resources:
                meta = compiled.metadata
                print(case, name, f"warps:{meta.num_warps} shared:{meta.shared}", resources(compiled.asm["cubin"]))

        return compile_only

    driver.set_active(Driver(capability))  # type: ignore[arg-type]
    with (
        mock.patch.object(JITFunction, "__getitem__", launcher),
        mock.patch.object(tiles, "shared_memory", lambda device: SHARED_MEMORY[capability]),
    ):
        for case in CASES:
            dtype, head_dim, selected = case
            # As many rows as make the tiles of a large layer.
            sizes = ((64, 512, 256), (9, 256), (9, 256, 3 * head_dim), (9, head_dim, 256))
            tensors = [torch.zeros(size, dtype=dtype, requires_grad=True) for size in sizes]
            scores = fused.router_scores(*tensors[:2])
            fused.select_tokens(scores, selected)
            for documents in (None, pack([[200, 312]] * 64).starts):
                fused.select_above(scores, torch.full((9,), 0.5), selected, documents)
                fused.select_above(scores, torch.full((9,), 0.5), selected, documents, 0.1, 0.1)
                fused.count_above(scores, torch.full((9,), 0.5), documents, 0.1, 0.1)
            fused.count_scores(scores, torch.zeros(9, naive.HISTOGRAM_BINS, dtype=torch.int32))
            indices = torch.arange(selected).expand(64, 9, selected)
            starts = pack([[200, 312]] * 64).starts if selected > num_selected_tokens(512, 16.0) else None
            for deterministic in (True, False):
                output = fused.selected_attention(
                    *tensors[:2], scores, indices, *tensors[2:], rotary_percent=0.5, rotary_base=1e4,
                    document_starts=starts, deterministic=deterministic,
                )  # fmt: skip
                output.sum().backward()
            if head_dim < 256:  # 256 compiles for longest, and takes no path of its own
                with torch.no_grad():
                    decode(*tensors[1:])
    return shared


if __name__ == "__main__":
    found = compile_all(int(sys.argv[1]), sys.argv[2:] == ["resources"])
    limit = SHARED_MEMORY[int(sys.argv[1])]
    print(json.dumps({"kernels": sorted(found), "shared": max(found.values()), "limit": limit}))
