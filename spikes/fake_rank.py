"""fake_rank.py RANKS ARGUMENT...: `mosa ARGUMENT...` as rank 0 of RANKS whose collectives are copies on this card, so that
what a rank computes is timed without the others."""
import os, sys, types
ranks = sys.argv[1]
os.environ.update(RANK="0", WORLD_SIZE=ranks, LOCAL_RANK="0", LOCAL_WORLD_SIZE=ranks, MASTER_ADDR="localhost", MASTER_PORT="1")
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
init, group = distributed.init_process_group, distributed.new_group
def fake_init(backend=None, **options):
    options.pop("device_id", None); options.pop("timeout", None)
    options["store"] = FakeStore()
    return init("fake", **options)
def fake_group(ranks=None, timeout=None, backend=None, **options):
    options.pop("device_id", None); options.pop("pg_options", None)
    return group(ranks, backend="fake", **options)
distributed.init_process_group = fake_init
distributed.new_group = distributed.distributed_c10d.new_group = fake_group
# torch 2.11's fake reduce-scatter leaves its output as it was allocated
def own(output, tensor, *a, **k):
    output.copy_(tensor.flatten()[:output.numel()].view_as(output))
    return types.SimpleNamespace(wait=lambda *a: None, is_completed=lambda: True)
distributed.reduce_scatter_tensor = own
from megatron.core.tensor_parallel import mappings
mappings.dist_reduce_scatter_func = own
@torch.library.custom_op("spike::own_slice", mutates_args=())
def own_slice(tensor: torch.Tensor, size: int) -> torch.Tensor:
    return tensor.chunk(size)[0].clone()
own_slice.register_fake(lambda tensor, size: tensor.new_empty(tensor.shape[0] // size, *tensor.shape[1:]))
torch.distributed.monitored_barrier = lambda *a, **k: None
from megatron_mosa.parallel import state
state.join_store = lambda *a, **k: FakeStore()
from megatron_mosa.parallel import regions
regions._reduce_scatter = lambda tensor, size, group: own_slice(tensor.contiguous(), size)
from megatron_mosa.resilience import peers
peers.PeerMonitor.connect = peers.PeerMonitor.leave = lambda *a, **k: None
from megatron_mosa.__main__ import main
sys.argv = ["mosa", *sys.argv[2:]]
main()
