"""What ``train.acceleration: auto`` comes to, as far as that can be told without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_mosa.engine.acceleration import Acceleration, choose_acceleration
from megatron_mosa.parallel import Layout
from tests.distributed.tasks import tiny_config


def test_runs_on_the_cpu_stay_as_they_are(layout: Layout) -> None:
    assert str(choose_acceleration(tiny_config(), layout)) == "acceleration: none: on cpu"


@pytest.mark.parametrize(
    ("changes", "hindrance"),
    [
        ({"train__acceleration": "none"}, "train.acceleration=none"),
        ({"model__attend_within_documents": True}, "model.attend_within_documents=true"),
        ({"train__apex": "always"}, "train.apex=always asks for apex's norms"),
    ],
)
def test_what_hinders_is_named(layout: Layout, changes: dict, hindrance: str) -> None:
    on_gpu = replace(layout, device=torch.device("cuda"))
    assert choose_acceleration(tiny_config(**changes), on_gpu) == Acceleration(hindrance=hindrance)


def test_the_line_says_how_far_it_goes() -> None:
    assert str(Acceleration(True, True)) == "acceleration: compiled layers, each micro-batch one CUDA graph"
    some = Acceleration(compiles_layers=True, hindrance="parallel.zero_stage=2")
    assert str(some) == "acceleration: compiled layers, no CUDA graphs: parallel.zero_stage=2"
