"""Process groups, DeepSpeed's view of them, and gradients of replicated parameters."""

from megatron_mosa.parallel.agree import Hosts, on_every_rank, on_main_rank
from megatron_mosa.parallel.cpu import answer_cuda_with_cpu
from megatron_mosa.parallel.groups import data_parallel_group, tensor_parallel_group
from megatron_mosa.parallel.launch import launch_environment
from megatron_mosa.parallel.mpu import ModelParallelUnit
from megatron_mosa.parallel.norm import SequenceParallelLayerNorm, SequenceParallelRMSNorm, norm_class
from megatron_mosa.parallel.partition import Partition, partition_of
from megatron_mosa.parallel.state import Layout, destroy_parallel, initialize_parallel, use_deterministic_algorithms

__all__ = [
    "Hosts",
    "Layout",
    "ModelParallelUnit",
    "Partition",
    "SequenceParallelLayerNorm",
    "SequenceParallelRMSNorm",
    "answer_cuda_with_cpu",
    "data_parallel_group",
    "destroy_parallel",
    "initialize_parallel",
    "launch_environment",
    "norm_class",
    "on_every_rank",
    "on_main_rank",
    "partition_of",
    "tensor_parallel_group",
    "use_deterministic_algorithms",
]
