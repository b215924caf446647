"""Compiles all kernels for GPUs that need not be there: ``compile_for.py CAPABILITY[,CAPABILITY...] [resources]``;
90 is Hopper.

Runs the operators, forward and backward, on the CPU with every launch replaced by a compilation, and prints Triton's
version and a line of JSON: for each capability the kernels, and the most shared memory that one takes; with
``resources`` before it registers and stack of each variant (a stack is where registers are spilt to). TRITON_INTERPRET
must not be set. Another version of Triton, unpacked into a directory that PYTHONPATH begins with, takes precedence.

What is not compiled is the same program as something that is:

- Products of fp32 do not use tensor cores: instructions and shared memory are the same on every card. Only 80, except
  where later cards move tiles by descriptors.
- Gluon's kernels, for Hopper alone, are compiled for bf16 if Triton has what they need; they may spill no
  registers but for ``MOST_SPILLED``.
- Kernels without products know no type or width of heads that matters: one case of each, with all its variants for 80.
- Cards of 100 have the tiles of 90, which differ from those of 80. For 100 there is the width of heads that comes
  closest to the limit, and attention in one tile.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from megatron_mosa.hf import dense_kernels_mosa, kernels_mosa
from megatron_mosa.hf.rows_mosa import BLOCK, SelectedRows
from megatron_mosa.hf.tokens_mosa import Tokens
from megatron_mosa.kernels import Documents, naive
from megatron_mosa.kernels import triton as fused
from megatron_mosa.kernels.triton import cached, common, gathered, loss, selection, specialized, tiles
from megatron_mosa.kernels.triton.attention import rotary_table
from megatron_mosa.kernels.triton.rows import rows_of

SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
WITHOUT_PRODUCTS = {
    "_select_kernel", "_select_above_kernel", "_follow_kernel", "_count_scores_kernel", "_starts_kernel",
    "_pack_kernel", "_count_kernel", "_entries_kernel", "_tiles_kernel", "_combine_kernel", "_sum_kernel",
    "_join_kernel", "_rotate_kernel", "_cache_kernel", "_layout_kernel",
    "_score_kernel", "_project_kernel", "_attend_kernel",
    "_rotary_kernel", "_cross_entropy_kernel", "_partial_kernel", "_gradient_kernel",
    "_accumulate_kernel", "_swiglu_kernel", "_swiglu_backward_kernel",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    head_dim: int
    selected: int
    capabilities: tuple[int, ...] = (80, 90, 100)
    has_documents: bool = True
    full: tuple[int, ...] = ()
    """For which the slots are also known to be filled."""
    decodes: tuple[int, ...] = ()
    """For which a step of decoding is compiled, too."""
    alone: frozenset[str] = frozenset()
    """The kernels that are compiled, if not all."""


MOST_SPILLED = {"_qkv_kernel": 16}  # bytes of a thread in local memory: numbers that wait for the end of a tile
GLUON = {"_qkv_kernel", "_qkv_gradient_kernel", "_ragged_kernel"} if specialized.hopper() else set()
ATTENTION = frozenset({"_forward_kernel", "_backward_keys_kernel", "_backward_queries_kernel"})
SCATTERED = frozenset({"_scattered_kernel"})  # with descriptors, which 80 has not; without them, of an odd size
CASES = [
    Case(torch.bfloat16, 64, 64, (80, 90), decodes=(80, 90)),  # attention in one tile
    Case(torch.bfloat16, 128, 256, full=(80, 90), decodes=(100,)),  # in several
    Case(torch.bfloat16, 64, 64, (100,), alone=ATTENTION),
    Case(torch.bfloat16, 64, 40, (80, 100), alone=ATTENTION),  # forward in tiles of 16; of up to 32 rows, and of more
    Case(torch.bfloat16, 64, 80, (80, 90, 100), alone=ATTENTION),  # backward of more than 64 rows in tiles of 16
    Case(torch.float16, 256, 32, (80, 90), has_documents=False),  # a program for each of queries, keys and values
    Case(torch.float32, 32, 63, (80,), decodes=(80,)),  # several tiles, the last one partly filled
    *(Case(dtype, size, 63, (90, 100), alone=SCATTERED) for dtype, size in ((torch.float32, 32), (torch.bfloat16, 4))),
]


class Driver:
    """The part of Triton's driver that compilation needs."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # kernels remember by device what is compiled

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def resources(cubin: bytes) -> str:
    """Return registers and stack, from the cuobjdump in Triton's package."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return " ".join(word for word in printed.split() if word.startswith(("REG:", "STACK:")))


def decode(router: torch.Tensor, qkv: torch.Tensor, proj: torch.Tensor) -> None:
    """Store a prompt, and run a decoding step with padding and load feedback, and one without; also as if captured."""
    states, angles = router.new_zeros(4, router.shape[1]), torch.zeros(4, 1, proj.shape[1] // 4)
    size = proj.shape[1]
    _, first, _ = cached.lay_out(torch.ones(4, len(router), dtype=torch.int32), BLOCK)
    cached.store_rows(
        qkv.new_zeros(len(router), 64, 3 * size), torch.zeros(len(router), 5, dtype=torch.int32), first,
        first[..., None], *qkv.new_zeros(2, 99, BLOCK, size),
    )  # fmt: skip
    keys, values = qkv.new_zeros(2, 4, 2, 99, size)
    query, key, lengths = qkv.new_zeros(4, 4 * size), qkv.new_zeros(4, 2 * size), torch.ones(1, dtype=torch.long)
    for valid in (torch.ones(4, 99, dtype=torch.bool), None):
        rotated = dense_kernels_mosa.rotate_and_store(query, key, key, (angles, angles), lengths, keys, values)
        dense_kernels_mosa.attend_to_rows(rotated, keys, values, lengths, valid)
    for feedback, valid in ((0.1, torch.ones(4, 1, dtype=torch.bool)), (0.0, None)):
        rows = SelectedRows()
        rows.initialize(states, len(router))
        tokens = Tokens(torch.zeros(4, 1, dtype=torch.long), (angles, angles), valid)
        given = states, (router, qkv, proj), torch.full((len(router),), 0.5), tokens, rows, feedback, 1 / 32
        for residual in (None, states):
            kernels_mosa.step_in_kernels(*given, residual)


def hopper_products(case: Case) -> None:
    """Run Gluon's kernels, with and without rotation and the router's column."""
    hopper, hopper_scattered = specialized.hopper(), specialized.hopper_scattered()
    assert hopper and hopper_scattered
    states = torch.zeros(64, 512, 256, dtype=case.dtype)
    weight = states.new_zeros(9, 256, 3 * case.head_dim)
    rows = rows_of(torch.arange(case.selected).expand(64, 9, case.selected).contiguous(), 512, 64)
    for half in (0, case.head_dim // 4):
        rotation = gathered.Rotation(*rotary_table(512, half, 1e4, states.device), None)
        values = hopper.qkv_product(states, rows, weight, rotation)
    pairs = states.new_zeros(9, values.shape[1], gathered.PAIR)
    for given, sums in ((None, None), (pairs, states.new_zeros(9, 256))):
        hopper.qkv_weight_gradient(states, rows, values, weight, given, sums)
    products = states.new_empty(9, values.shape[1], 256)
    attended, proj = (states.new_zeros(9, size, case.head_dim) for size in (values.shape[1], 256))
    for left, right, added in ((attended, proj.view(9, case.head_dim, 256), None), (values, weight.mT, (pairs, sums))):
        hopper_scattered.RaggedProduct(left, right, rows, added, products, 64)(0, 0)


def layer(case: Case, capability: int) -> None:
    """Run forward and backward with as many rows as give the tiles of a large layer."""
    sizes = ((64, 512, 256), (9, 256), (9, 256, 3 * case.head_dim), (9, case.head_dim, 256))
    tensors = [torch.zeros(size, dtype=case.dtype, requires_grad=True) for size in sizes]
    starts = Documents.from_lengths([[200, 312]] * 64).starts
    thresholds = torch.full((9,), 0.5)
    scores = fused.router_scores(*tensors[:2])
    fused.select_tokens(scores, case.selected)
    for documents in (starts, None):
        fused.select_above(scores, thresholds, case.selected, documents)
        fused.select_above(scores, thresholds, case.selected, documents, 0.1, 0.1)
        fused.count_above(scores, thresholds, documents, 0.1, 0.1)
    for feedback in (0.0, 0.1):
        selection.launch_select_and_count(scores, thresholds, case.selected, feedback, 0.1)
    fused.count_scores(scores, torch.zeros(9, naive.HISTOGRAM_BINS, dtype=torch.int32))
    for documents in (starts, None):
        parts = fused.split_heads(tensors[0].view(512, 64, -1, 4, case.head_dim // 4), 0.5, 1e4, documents)
        torch.cat(parts, dim=1).sum().backward()
    fused.swiglu(tensors[0]).sum().backward()
    fused.accumulate(torch.zeros(4096), tensors[0].detach().flatten()[:4096], torch.tensor(True))
    vocabulary = torch.zeros(300, 256, dtype=case.dtype, requires_grad=True)
    targets = torch.zeros(8, dtype=torch.int64)
    loss.linear_cross_entropy(tensors[0][0, :8], vocabulary, targets, torch.ones(8)).backward()
    with torch.no_grad():
        loss.linear_cross_entropy(tensors[0][0, :8], vocabulary, targets, torch.ones(8))
    with mock.patch.object(loss.distributed, "all_gather_into_tensor"):
        ranks = mock.Mock(**{"size.return_value": 2, "rank.return_value": 1})
        loss.linear_cross_entropy(tensors[0][0, :8], vocabulary, targets, torch.ones(8), ranks).backward()
    indices = torch.arange(case.selected).expand(64, 9, case.selected)
    for is_full in (False, True) if capability in case.full else (False,):
        output = fused.selected_attention(
            *tensors[:2], scores, indices, *tensors[2:], rotary_percent=0.5, rotary_base=1e4,
            document_starts=starts if case.has_documents else None, is_full=is_full,
            addend=tensors[0] if is_full else None,
        )  # fmt: skip
        output.sum().backward()
    if capability in case.decodes:
        with torch.no_grad():
            decode(*tensors[1:])


@triton.jit
def _write_kernel(p_out, N, BLOCK: tl.constexpr):
    tl.store(p_out + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.int64) + N)


def check_kinds_of_numbers() -> None:
    """Check that numbers which ``common.launch`` does not tell apart have the same compiled kernel."""
    out = torch.zeros(16, dtype=torch.int64)
    for numbers in ((2, 3, 17, (1 << 31) - 1), (0, 16, 48, (1 << 31) - 16)):
        assert len({id(_write_kernel.warmup(out, number, grid=(1,), BLOCK=16)) for number in numbers}) == 1
    kinds = 1, 2, 16, 1 << 31
    assert len({id(_write_kernel.warmup(out, number, grid=(1,), BLOCK=16)) for number in kinds}) == len(kinds)


def compile_all(capability: int, shows_resources: bool) -> dict[str, int]:
    """Return the most shared memory that any variant of each kernel uses."""
    shared: dict[str, int] = {}
    first: dict[str, Case] = {}

    def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_only(*args: Any, **options: Any) -> None:
            name = kernel.fn.__name__
            if case.alone and name not in case.alone:
                return
            if name in WITHOUT_PRODUCTS and first.setdefault(name, case) is not case:
                return
            if name in WITHOUT_PRODUCTS and name in shared and capability != 80:
                return
            compiled = kernel.warmup(*args, grid=grid, **options)
            assert compiled.asm["cubin"]
            if name in GLUON:
                found = resources(compiled.asm["cubin"])
                spilled = int(found.split("STACK:")[1].split()[0])
                assert spilled <= MOST_SPILLED.get(name, 0), f"{name} spills: {found}"
            shared[name] = max(shared.get(name, 0), compiled.metadata.shared)
            if shows_resources:
                meta = compiled.metadata
                usage = f"warps:{meta.num_warps} shared:{meta.shared} {resources(compiled.asm['cubin'])}"
                print(capability, case.dtype, case.head_dim, case.selected, name, usage)

        return compile_only

    driver.set_active(Driver(capability))  # type: ignore[arg-type]
    check_kinds_of_numbers()
    with (
        mock.patch.object(JITFunction, "__getitem__", launcher),
        mock.patch.object(tiles, "shared_memory", lambda device: SHARED_MEMORY[capability]),
        mock.patch.object(common, "has_descriptors", lambda device: capability >= 90),
    ):
        for case in CASES:
            if capability in case.capabilities:
                layer(case, capability)
                if GLUON and capability == 90 and case.dtype == torch.bfloat16 and not case.alone:
                    hopper_products(case)
    return shared


if __name__ == "__main__":
    print("Triton", triton.__version__)
    capabilities = [int(word) for word in sys.argv[1].split(",")]
    found = {capability: compile_all(capability, sys.argv[2:] == ["resources"]) for capability in capabilities}
    print(json.dumps(found))
