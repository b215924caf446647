"""The arithmetic of MoSA heads on plain tensors; knows nothing of parallelism or modules."""

from megatron_mosa.kernels.dispatch import BACKENDS, get_backend

__all__ = ["BACKENDS", "get_backend"]
