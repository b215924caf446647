"""The arithmetic of MoSA heads on plain tensors; knows nothing of parallelism or modules."""

from megatron_mosa.kernels.backend import KernelBackend
from megatron_mosa.kernels.dispatch import BACKENDS, get_backend
from megatron_mosa.kernels.documents import Documents

__all__ = ["BACKENDS", "Documents", "KernelBackend", "get_backend"]
