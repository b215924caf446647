"""Process groups, DeepSpeed's view of them, and gradients of replicated parameters."""

from megatron_mosa.parallel.agree import on_main_rank
from megatron_mosa.parallel.cpu import answer_cuda_with_cpu
from megatron_mosa.parallel.groups import data_parallel_group, partition_dim, tensor_parallel_group
from megatron_mosa.parallel.launch import launch_environment
from megatron_mosa.parallel.mpu import ModelParallelUnit
from megatron_mosa.parallel.norm import SequenceParallelLayerNorm
from megatron_mosa.parallel.state import Layout, destroy_parallel, initialize_parallel

__all__ = [
    "Layout",
    "ModelParallelUnit",
    "SequenceParallelLayerNorm",
    "answer_cuda_with_cpu",
    "data_parallel_group",
    "destroy_parallel",
    "initialize_parallel",
    "launch_environment",
    "on_main_rank",
    "partition_dim",
    "tensor_parallel_group",
]
