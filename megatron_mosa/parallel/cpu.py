"""Megatron-core without a GPU.

Megatron-core allocates its communication buffers on ``torch.cuda.current_device()`` and synchronises CUDA when it
saves. On a machine without CUDA both are answered by the CPU, for this process: enough for tensor and sequence
parallelism and ``dist_checkpointing`` over gloo.
"""

from __future__ import annotations

import torch


def answer_cuda_with_cpu() -> bool:
    """Let Megatron-core run on the CPU where there is no CUDA; return whether that was needed."""
    if torch.cuda.is_available():
        return False
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment]
    torch.cuda.synchronize = lambda device=None: None
    return True
