"""Set-up and tear-down of the process groups."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import distributed as dist

from megatron_mosa.errors import RunError
from megatron_mosa.parallel.cpu import patch_cuda_for_cpu
from megatron_mosa.parallel.launch import launch_environment
from megatron_mosa.utils import first_line


@dataclass(frozen=True)
class Layout:
    """This process's ranks, group sizes and device."""

    rank: int
    world_size: int
    tensor_parallel_rank: int
    tensor_parallel_size: int
    data_parallel_rank: int
    data_parallel_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process is global rank 0, which prints and writes for the run."""
        return self.rank == 0


def initialize_parallel(
    tensor_model_parallel_size: int,
    seed: int,
    timeout_minutes: float = 10.0,
    store: dist.Store | None = None,
) -> Layout:
    """Join torch.distributed (NCCL on GPUs, gloo on CPU), build Megatron-core's groups and seed the generators.

    Tensor-parallel ranks are neighbors: rank = data_parallel_rank * tensor_parallel_size + tensor_parallel_rank.
    Megatron's tracker of per-rank generators is that for inference, which draws nothing: at tensor-parallel sizes above
    1, Megatron's modules need ``use_cpu_initialization=True``.

    Args:
        tensor_model_parallel_size: number of ranks that share one model.
        seed: seed of torch's generators.
        timeout_minutes: timeout of a collective.
        store: from ``join_store``, under a prefix of its own if this process has had other groups; None: join one.

    Raises:
        RunError: not all ranks joined in time.
    """
    rank, world_size, local_rank = launch_environment()
    if patch_cuda_for_cpu():
        device, backend = torch.device("cpu"), "gloo"
    else:
        device, backend = torch.device("cuda", local_rank % torch.cuda.device_count()), "nccl"
        torch.cuda.set_device(device)
        # DeepSpeed uses the device with this number. It is not the local rank where each process sees only its own GPU
        # (srun --gpus-per-task=1), or several processes share one.
        os.environ["LOCAL_RANK"] = str(device.index)
    if not dist.is_initialized():
        options: dict[str, Any] = {"device_id": device} if backend == "nccl" else {}
        timeout = timedelta(minutes=timeout_minutes)
        store = store or join_store(timeout.total_seconds())
        store.set_timeout(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout, **options)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size)
    torch.manual_seed(seed)
    # No layer of a run draws random numbers in its forward pass, so Megatron's no-op tracker of per-rank generators
    # suffices. The real one needs CUDA.
    model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True, force_reset_rng=True)
    return Layout(
        rank=rank,
        world_size=world_size,
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_parallel_size=tensor_model_parallel_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        device=device,
    )


def join_store(seconds: float) -> dist.Store:
    """Return the store that all ranks share, once they have joined; a single process needs no port.

    Raises:
        RunError: not all ranks joined within ``seconds``.
    """
    rank, world_size, _ = launch_environment()
    if world_size == 1:
        return dist.HashStore()
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timedelta(seconds=seconds)))
    except (dist.DistError, RuntimeError) as error:  # some store errors of torch are plain RuntimeErrors
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunError(
            f"rank {rank} of {world_size} could not join the others at {where} within {seconds:.0f} s "
            f"({first_line(error)}); check that all {world_size} processes were started and that MASTER_ADDR "
            "and MASTER_PORT can be reached from every node"
        ) from None
    return store


def use_deterministic_algorithms() -> None:
    """Make torch bitwise reproducible, at a cost in speed on GPUs; call it before the first matrix product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def destroy_parallel() -> None:
    """Destroy the process groups, if there are any."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
