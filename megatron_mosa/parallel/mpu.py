"""The model-parallel unit that DeepSpeed asks for, over Megatron-core's parallel_state.

DeepSpeed still calls names that Megatron-core has dropped (``get_model_parallel_rank``), so the module itself cannot
be passed. Model parallelism means tensor parallelism here: there is no pipeline.
"""

from __future__ import annotations

from megatron.core import parallel_state


class ModelParallelUnit:
    """The interface that ``deepspeed.initialize(mpu=...)`` expects."""

    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)
    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_group = get_tensor_model_parallel_group
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
