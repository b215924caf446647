"""Process groups: launch, agreement between ranks, DeepSpeed's interface, and gradients of replicated parameters."""

from typing import TYPE_CHECKING

from megatron_mosa.utils import lazy_face

if TYPE_CHECKING:
    from megatron_mosa.parallel.apex import apex_fused_adam, apex_norms, reject_wrong_apex
    from megatron_mosa.parallel.consensus import HostGroup, on_every_rank, on_main_rank
    from megatron_mosa.parallel.copies import use_lane
    from megatron_mosa.parallel.cpu import patch_cuda_for_cpu
    from megatron_mosa.parallel.failures import LOST_CONNECTION, FirstFailure, is_lost_connection
    from megatron_mosa.parallel.groups import data_parallel_group, tensor_parallel_group
    from megatron_mosa.parallel.launch import job_port, launch_environment, slurm_nodes
    from megatron_mosa.parallel.mpu import ModelParallelUnit
    from megatron_mosa.parallel.norm import SequenceParallelLayerNorm, SequenceParallelRMSNorm, norm_class
    from megatron_mosa.parallel.partition import Partition, partition_of
    from megatron_mosa.parallel.regions import TensorParallelRegion, gather_first_dim, sum_gradients
    from megatron_mosa.parallel.state import (
        Layout,
        destroy_parallel,
        initialize_parallel,
        join_store,
        use_deterministic_algorithms,
    )

__all__ = [
    "LOST_CONNECTION",
    "FirstFailure",
    "HostGroup",
    "Layout",
    "ModelParallelUnit",
    "Partition",
    "SequenceParallelLayerNorm",
    "SequenceParallelRMSNorm",
    "TensorParallelRegion",
    "apex_fused_adam",
    "apex_norms",
    "data_parallel_group",
    "destroy_parallel",
    "gather_first_dim",
    "initialize_parallel",
    "is_lost_connection",
    "job_port",
    "join_store",
    "launch_environment",
    "norm_class",
    "on_every_rank",
    "on_main_rank",
    "partition_of",
    "patch_cuda_for_cpu",
    "reject_wrong_apex",
    "slurm_nodes",
    "sum_gradients",
    "tensor_parallel_group",
    "use_deterministic_algorithms",
    "use_lane",
]

__getattr__, __dir__ = lazy_face(__name__, __file__)
