"""The arithmetic of MoSA heads on plain tensors; knows nothing of parallelism or modules."""

from megatron_mosa.kernels.autocast import autocast_operands, without_autocast
from megatron_mosa.kernels.backend import KernelBackend
from megatron_mosa.kernels.dispatch import BACKENDS, get_backend
from megatron_mosa.kernels.documents import AnyDocuments, Documents, PackedDocuments, document_attention
from megatron_mosa.kernels.naive import HISTOGRAM_BINS, HISTOGRAM_LOGITS, accumulation_dtype
from megatron_mosa.kernels.totals import GradientTotals
from megatron_mosa.kernels.window import sliding_window_attention

__all__ = [
    "BACKENDS",
    "HISTOGRAM_BINS",
    "HISTOGRAM_LOGITS",
    "AnyDocuments",
    "Documents",
    "GradientTotals",
    "KernelBackend",
    "PackedDocuments",
    "accumulation_dtype",
    "autocast_operands",
    "document_attention",
    "get_backend",
    "sliding_window_attention",
    "without_autocast",
]
