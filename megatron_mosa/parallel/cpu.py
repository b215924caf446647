"""Running Megatron-core without a GPU.

Megatron-core allocates its communication buffers on ``torch.cuda.current_device()`` and synchronizes CUDA when it
saves. Without CUDA both calls are patched for this process to use the CPU, which is enough for tensor and sequence
parallelism and ``dist_checkpointing`` over gloo.
"""

from __future__ import annotations

import torch


def patch_cuda_for_cpu() -> bool:
    """Patch ``torch.cuda`` so that Megatron-core runs on the CPU if there is no CUDA; return whether it did so."""
    if torch.cuda.is_available():
        return False
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment]
    torch.cuda.synchronize = lambda device=None: None
    return True
