"""The model-parallel unit that DeepSpeed asks for, over Megatron-core's parallel_state.

DeepSpeed still calls names that Megatron-core has dropped (``get_model_parallel_rank``), so the module itself cannot
be passed. Model parallelism means tensor parallelism here: there is no pipeline.
"""

from __future__ import annotations

from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from megatron_mosa.parallel.groups import data_parallel_group, tensor_parallel_group


class ModelParallelUnit:
    """The interface that ``deepspeed.initialize(mpu=...)`` expects."""

    def get_model_parallel_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    def get_model_parallel_world_size(self) -> int:
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_model_parallel_group(self) -> ProcessGroup:
        return tensor_parallel_group()

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_src_rank()

    def get_data_parallel_rank(self) -> int:
        return parallel_state.get_data_parallel_rank()

    def get_data_parallel_world_size(self) -> int:
        return parallel_state.get_data_parallel_world_size()

    def get_data_parallel_group(self) -> ProcessGroup:
        return data_parallel_group()
