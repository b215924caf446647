"""Write DeepSpeed checkpoints in worker processes; a separate module, so that the functions can be pickled."""

from __future__ import annotations

from pathlib import Path

import deepspeed
import torch
from torch import Tensor

from tests.distributed import tasks

# ZeRO stage, precision, dtype of accumulated gradients: DeepSpeed's files differ between these
KINDS = [(1, "fp32", "fp32"), (1, "bf16", "fp32"), (1, "bf16", "bf16"), (2, "fp16", "fp16"), (3, "bf16", "bf16")]
_REORDERED = {"round_robin_gradients": True, "parameter_alignment": True}


class Net(torch.nn.Module):
    """Has sizes not divisible by two, a shared weight, a frozen weight, and a float and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(13, 7)
        self.first = torch.nn.Linear(7, 11)
        self.norm = torch.nn.LayerNorm(11)
        self.frozen = torch.nn.Linear(11, 7, bias=False)
        self.output = torch.nn.Linear(7, 13, bias=False)
        self.output.weight = self.embedding.weight
        self.frozen.weight.requires_grad_(False)
        self.register_buffer("scale", torch.full((3,), 0.1))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return a scalar loss."""
        return self.output(self.frozen(self.norm(self.first(self.embedding(tokens))))).float().square().mean()


def save_zero(folder: Path, number: int) -> dict[str, Tensor]:
    """Train and save kind ``number`` of KINDS; return the module's parameters in compute precision (ZeRO 1, 2)."""
    stage, precision, gradients = KINDS[number]
    with tasks.parallel(tasks.tiny_config()):
        torch.manual_seed(0)
        net = Net()
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        groups = [
            {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": 0.1},
            {"params": [parameter for parameter in trained if parameter.dim() == 1], "weight_decay": 0.0},
        ]
        zero = {"stage": stage, "memory_efficient_linear": False}  # True replaces torch's linear in the whole process
        settings = {
            "train_micro_batch_size_per_gpu": 2,
            # under ZeRO 2: parameters in another order, with gaps between them
            "zero_optimization": zero | (_REORDERED if stage == 2 else {}),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "data_types": {"grad_accum_dtype": gradients},
        }
        if precision != "fp32":
            settings[precision] = {"enabled": True}
        # Otherwise DeepSpeed compiles it, which takes 35 s without a cached extension; the engine skips it, too.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed refuses fp16 on CPUs without native support; torch supports it on all.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
        engine = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=settings)[0]
        for _ in range(2):
            engine.backward(engine(torch.arange(4)))
            engine.step()
        engine.save_checkpoint(str(folder), client_state={"note": 3})
        return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
