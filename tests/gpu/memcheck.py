"""One small case of every kernel, for compute-sanitizer: ``make memcheck``.

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.gpu.memcheck

Memory comes from cudaMalloc directly, so that an access beyond one tensor is not one into another.
"""

from __future__ import annotations

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from megatron_mosa.attention import num_selected_tokens
from megatron_mosa.hf.modeling_mosa import CACHE
from megatron_mosa.kernels import get_backend, naive
from megatron_mosa.kernels.triton import specialized
from tests.decode.models import build, random_tokens
from tests.kernels.compile_for import decode as run_steps
from tests.kernels.test_documents import pack
from tests.kernels.test_naive import make_inputs

CASES = [  # B, T, E, h, h', k, dtype, documents
    (2, 100, 3, 72, 64, 64, torch.bfloat16, False),
    (2, 300, 2, 128, 128, 150, torch.float16, False),
    (1, 1100, 2, 40, 48, 600, torch.bfloat16, True),
    (3, 64, 5, 33, 32, 20, torch.float32, True),
    (2, 100, 3, 72, 64, 40, torch.bfloat16, False),  # attention's backward pass in a tile of 32, and in one of 64
    (2, 100, 3, 72, 64, 80, torch.bfloat16, False),  # in a tile of 64, and in tiles of 16
    (2, 300, 3, 256, 64, 150, torch.bfloat16, False),  # Gluon's kernels, as the next one
    (2, 300, 2, 512, 128, 150, torch.float16, False),
]


def main() -> None:
    """Run all cases, forward and backward."""
    specialized.FEWEST_TILES = 0  # Gluon's kernels take small layers, too
    for batch, length, heads, width, size, selected, dtype, has_documents in CASES:
        inputs = [t.detach().to("cuda", dtype).requires_grad_() for t in make_inputs(batch, length, heads, width, size)]
        fused = get_backend("triton", inputs[0])
        documents = pack([[length // 3, length - length // 3]] * batch) if has_documents else None
        starts = None if documents is None else documents.starts.cuda()
        scores = fused.router_scores(*inputs[:2])
        indices = fused.select_tokens(scores, selected)
        thresholds = torch.full((heads,), 0.5, device="cuda")
        for feedback in (0.0, 0.1):
            fused.select_above(scores, thresholds, selected, starts, feedback, 0.1)
            fused.count_above(scores, thresholds, starts, feedback, 0.1)
        fused.count_scores(scores, torch.zeros(heads, naive.HISTOGRAM_BINS, dtype=torch.int32, device="cuda"))
        if documents is not None:  # some slots are empty
            chosen = documents.selection(lambda length: num_selected_tokens(length, 2.0))
            quotas = chosen.quotas.cuda()
            indices = naive.select_tokens(scores, chosen.num_slots, True, starts, quotas)
        fewer = indices.clone()
        fewer[:, 0, selected * 3 // 4 :] = length  # the first head selects fewer tokens
        for is_full in {False, documents is None}:
            given = indices if is_full else fewer
            output = fused.selected_attention(
                *inputs[:2], scores, given, *inputs[2:], rotary_percent=0.5, rotary_base=1e4, document_starts=starts,
                restart_rotary=has_documents, is_full=is_full, addend=None if is_full else inputs[0],
            )  # fmt: skip
            gradients = torch.autograd.grad(output.float().square().sum(), inputs)
            assert all(gradient.isfinite().all() for gradient in gradients)
        print(f"B{batch} T{length} E{heads} h{width} h'{size} k{selected} {dtype}: ran", flush=True)
    for kind in ("hybrid", "followed", "many", "chosen"):
        decode(kind)


@torch.no_grad()
def decode(kind: str) -> None:
    """Read prompts, the second with guessed room, and take steps: as without a graph, and as in one."""
    model, tokens = build(kind).cuda(), random_tokens(3, 60).cuda()
    model.captures_steps = False  # graphs need memory from torch's pool
    for _ in range(2):
        cache = model.new_cache()
        model(tokens[:, :40], **{CACHE: cache})
    for column in range(40, 60):
        logits = model(tokens[:, column : column + 1], **{CACHE: cache}).logits
        assert logits.isfinite().all()
    with torch.device("cuda"):
        run_steps(*(torch.randn(size) for size in ((9, 256), (9, 256, 192), (9, 64, 256))))
    print(f"decoding, {kind}: ran", flush=True)


if __name__ == "__main__":
    main()
