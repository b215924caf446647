"""Speed of a plain GPT under torch.compile, the reference for the speed of a dense model's step.

``python -m benchmarks.control``: 24 layers, h 2048, 16 heads of 128, GELU 8192, RMSNorm, vocabulary 50,304, 8 sequences
of 2048 tokens per step. Parameters, gradients and Adam's state are bf16, so a step moves fewer bytes than a run that
keeps fp32 master weights.
"""

from __future__ import annotations

import json
import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.step import CASES, CONFIGS, PEAK
from benchmarks.timing import require_gpu

LAYERS, WIDTH, HEADS, SIZE, MLP, VOCABULARY, LENGTH, BATCH = 24, 2048, 16, 128, 8192, 50304, 2048, 8


class Layer(nn.Module):
    """A pre-norm layer of attention and MLP, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * HEADS * SIZE, bias=False), nn.Linear(HEADS * SIZE, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, MLP, bias=False), nn.Linear(MLP, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map [B, T, h] to [B, T, h]."""
        parts = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)  # [3, B, H, T, d]
        query, key, value = (part for part in parts)
        query, key = (_rotated(part, cos, sin) for part in (query, key))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Model(nn.Module):
    """A GPT that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.layers, self.norm = nn.ModuleList(Layer() for _ in range(LAYERS)), nn.RMSNorm(WIDTH)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the mean loss."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.cross_entropy(self.output(self.norm(x)).flatten(0, 1).float(), labels.flatten())


def main() -> None:
    """Time the step, and print the result."""
    from megatron_mosa.config import load_config
    from megatron_mosa.model import model_flops

    require_gpu()
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    torch.set_float32_matmul_precision("high")
    model = Model().bfloat16()
    compiled = torch.compile(model, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2.5e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    angles = torch.arange(LENGTH)[:, None] * 10000.0 ** (-torch.arange(SIZE // 2) / (SIZE // 2))
    cos, sin = angles.cos(), angles.sin()
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1))

    def step() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = compiled(tokens[:, :-1], tokens[:, 1:], cos, sin)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)

    for _ in range(4):
        step()
    times = sorted(step() for _ in range(20))
    file, overrides = CASES["dense_1b4"]
    flops = model_flops(load_config(CONFIGS / file, overrides), VOCABULARY) * BATCH
    median = statistics.median(times)
    found = {"name": "control", "milliseconds": median, "lowest": times[0], "highest": times[-1]}
    found |= {"mfu": 1000 * flops / median / PEAK, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
