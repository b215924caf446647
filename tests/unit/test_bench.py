"""``mosa bench``: what it makes of kernels, what it prints and compares, and the command on a CPU."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from megatron_mosa import kernels
from megatron_mosa.config import Config
from megatron_mosa.engine import Batch, StepResult, TrainingEngine
from megatron_mosa.model import model_flops, usual_flops
from megatron_mosa.parallel import Layout
from megatron_mosa.tools.bench import loop, measure, report
from megatron_mosa.tools.bench.measurement import Measurement
from megatron_mosa.tools.bench.profile import Kernel, kind_of, profile_steps, summarize
from megatron_mosa.tools.bench.samples import random_batches
from megatron_mosa.train import StepMonitor, Writers
from tests.distributed.tasks import tiny_config

MS = 1_000_000  # nanoseconds


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NTN", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "attention"),
        ("_scattered_kernel", "MoSA"),
        ("_tiles_kernel", "MoSA"),
        ("_swiglu_backward_kernel", "elementwise"),
        ("_accumulate_kernel", "elementwise"),
        ("triton_poi_fused__unsafe_view_gelu_gelu_backward_view_0", "elementwise"),
        ("triton_poi_fused_add_copy_copy__div_lerp_mul_pow_rsub_sqrt_sub_where_0", "optimizer"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
    ],
)
def test_a_kernels_name_tells_its_kind(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_every_kernel_of_this_project_has_a_kind() -> None:
    """Also those that need a newer Triton than this machine has."""
    of_files = {"elementwise.py": "elementwise", "rotary.py": "rotary embedding", "loss.py": "cross entropy"}
    found = {}
    for file in Path(kernels.__file__).parent.glob("triton/*.py"):
        names = re.findall(r"^def (_\w+_kernel)\(", file.read_text(encoding="utf-8"), re.MULTILINE)
        found |= {name: (kind_of(name), of_files.get(file.name, "MoSA")) for name in names}
    assert len(found) > 25
    assert [name for name, (kind, expected) in found.items() if kind != expected] == []


def test_overlapping_kernels_are_busy_once() -> None:
    kernels = [
        Kernel(0, 4 * MS, "gemm"), Kernel(2 * MS, 5 * MS, "ncclDevKernel_AllReduce"), Kernel(8 * MS, 9 * MS, "gemm"),
        Kernel(8 * MS, 8 * MS + 1, "gemm"),
    ]  # fmt: skip
    found = summarize(kernels, steps=2)
    assert found.busy == pytest.approx(3.0) and found.span == pytest.approx(4.5) and found.kernels == 2
    assert found.kinds["matrix products"] == pytest.approx(2.5) and found.kinds["collectives"] == pytest.approx(1.5)
    assert found.longest[0] == ("gemm", pytest.approx(2.5), 1.5)


def test_communication_is_counted_once_and_told_apart_from_what_hides_it() -> None:
    kernels = [
        Kernel(0, 4 * MS, "gemm"), Kernel(3 * MS, 6 * MS, "ncclDevKernel_AllReduce"),
        Kernel(5 * MS, 7 * MS, "ncclDevKernel_AllGather"), Kernel(5 * MS, 7 * MS, "nccl:_all_gather_base"),
    ]  # fmt: skip
    found = summarize(kernels, steps=1)
    assert (found.communicating, found.exposed, found.busy) == pytest.approx((4.0, 3.0, 7.0))
    assert found.kinds["collectives"] == pytest.approx(5.0)
    assert replace(found, wall=8.0).communication_share == 0.5 and found.communication_share == 0.0


def test_on_a_cpu_only_collectives_are_told_apart(layout: Layout) -> None:
    found = profile_steps(lambda: torch.distributed.all_reduce(torch.ones(100_000)), steps=2, warmup=0, on_gpu=False)
    assert set(found.kinds) == {"computation", "collectives"} and 0 < found.communicating < found.wall == found.busy
    assert sum(found.kinds.values()) == pytest.approx(found.wall)


def test_a_failed_step_is_reported_before_the_engine_is_destroyed(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Destroying may wait for other ranks, but without it NCCL would wait for ever for the engine's graphs."""
    order: list[str] = []

    class Engine:
        accumulation_steps = 2
        acceleration = SimpleNamespace(compiles_layers=False)

        def train_step(self, batches: list[Batch], learning_rate: float) -> StepResult:
            order.append(f"step of {len(batches)}")
            raise RuntimeError("out of memory")

        def destroy(self) -> None:
            order.append("destroyed")

    monkeypatch.setattr(measure, "DeepSpeedEngine", lambda *arguments: Engine())
    config = tiny_config(train__global_batch_size=8)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure.measure(
            config, layout, 1, 1, watch=lambda phase, step, of: order.append(phase),
            on_failure=lambda error: order.append(f"told: {error}"),
        )  # fmt: skip
    assert order == ["building", "warming up", "step of 2", "told: out of memory", "destroyed"]


def test_thresholds_are_measured_after_their_warm_up(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of the warm-up, 250 by default, select by expert choice and cost less than all later ones."""
    built: list[Config] = []

    def build(config: Config, *arguments: object) -> None:
        built.append(config)
        raise RuntimeError("built")

    monkeypatch.setattr(measure, "DeepSpeedEngine", build)
    with pytest.raises(RuntimeError, match="built"):
        measure.measure(tiny_config(mosa__selection="threshold"), layout, 1, 1)
    assert built[0].mosa.threshold_warmup_steps == 1


def test_flops_are_counted_by_the_documents_of_the_steps(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    result = StepResult(loss=1.0, grad_norm=1.0)
    engine = SimpleNamespace(
        accumulation_steps=1, acceleration=SimpleNamespace(compiles_layers=False), destroy=lambda: None,
        train_step=lambda batches, learning_rate: result,
    )  # fmt: skip
    monkeypatch.setattr(measure, "DeepSpeedEngine", lambda *arguments: engine)
    config = tiny_config(model__attend_within_documents=True, train__global_batch_size=2, train__micro_batch_size=2)
    length = config.data.sequence_length
    starts = torch.stack([torch.zeros(length, dtype=torch.int64), torch.arange(length) // 4 * 4])
    found = measure.measure(config, layout, 1, 0, batches=lambda step: [{"document_starts": starts}], times_loop=False)
    counted = model_flops(config, config.data.vocab_size, [[length], [4] * (length // 4)])
    assert found.flops_per_step["executed"] == 2 * counted < 2 * model_flops(config, config.data.vocab_size)


def measurement(**changes: object) -> Measurement:
    profile = {"busy": 80.0, "kinds": {"matrix products": 60.0, "MoSA": 20.0}, "kernels": 900, "host_calls": 40}
    found = Measurement(
        name="model", layout="TP 1 x DP 1", device="GPU", versions={}, acceleration="acceleration: none",
        milliseconds=[90.0, 100.0, 140.0], tokens_per_step=5000, flops_per_step={"executed": 4e12, "usual": 5e12},
        peak_flops=1e14, parameters=1_500_000, allocated_gib=3.0, reserved_gib=4.0, seconds_to_build=1.0,
        seconds_of_first_steps=[7.0, 0.2], losses=[4.1], profile=profile,
    )  # fmt: skip
    return replace(found, **changes)  # type: ignore[arg-type]


def test_the_report_says_how_fast_and_where_the_time_goes() -> None:
    text = report.text(measurement())
    for part in (
        "100.0 ms (median of 3; 90.0 to 140.0)", "tokens/s 50,000", "MFU      40.0 % of 100 TFLOP/s",
        "50.0 % by the usual rule", "1.5 M parameters", "4.0 reserved", "900 kernels, 40 calls from the host",
        "7.0, 0.2 s",
    ):  # fmt: skip
        assert part in text
    rows = [line.split() for line in text.splitlines()[-4:-1]]
    assert rows == [
        ["matrix", "products", "60.0", "60.0", "%"],
        ["MoSA", "20.0", "20.0", "%"],
        ["idle", "20.0", "20.0", "%"],
    ]


def test_what_became_slower_by_over_5_percent_of_a_step_is_named() -> None:
    before = measurement()
    assert report.slower(measurement(milliseconds=[104.0]), before) == []
    kinds = {"matrix products": 64.0, "MoSA": 26.0}
    slower = measurement(milliseconds=[110.0], profile={**(before.profile or {}), "kinds": kinds})
    assert report.slower(slower, before) == [
        "step: 100.0 -> 110.0 ms (+10.0%)",
        "MoSA: 20.0 -> 26.0 ms",
        "idle: 20.0 -> 30.0 ms",
    ]
    for one, other in ((slower, replace(before, profile=None)), (replace(slower, profile=None), before)):
        assert report.slower(one, other) == ["step: 100.0 -> 110.0 ms (+10.0%)"]  # nobody knows what else


def test_only_the_same_step_on_the_same_device_is_compared(layout: Layout) -> None:
    config, count = tiny_config(data__vocab_size=100), measure.parameter_count(tiny_config(), 100)
    model = {"model": asdict(config.model), "mosa": asdict(config.mosa)}
    here = measure.describe(config, layout)
    known = measurement(device="cpu", layout=here, parameters=count, model=model)
    other = {"model": model["model"] | {"num_layers": 7}, "mosa": {"selection": "threshold", "of_later": 1}}
    for changes, differs in (
        ({}, ""),
        ({"acceleration": "acceleration: compiled", "versions": {"torch": "2.13.0"}, "name": "other"}, ""),
        ({"device": "GPU"}, "device=GPU (now cpu)"),
        ({"layout": "TP 2 x DP 1"}, f"layout=TP 2 x DP 1 (now {here})"),
        ({"model": other}, "model.num_layers=7 (now 2); mosa.selection=threshold (now expert_choice)"),
        ({"parameters": 7}, f"parameters=7 (now {count})"),
    ):
        assert measure.difference(replace(known, **changes), config, layout) == differs
    flops = model_flops(config, 100) * config.train.global_batch_size
    earlier = replace(known, model=None, flops_per_step={"executed": flops, "usual": flops})  # it wrote no model
    assert measure.difference(earlier, config, layout) == ""
    fewer = replace(earlier, flops_per_step={"executed": 1.0, "usual": 1.0})
    assert measure.difference(fewer, config, layout) == f"FLOPs=1.0 (now {float(flops)})"


def test_a_picture_is_written(tmp_path: Path) -> None:
    report.plot(measurement(), tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_usual_rule_counts_what_others_count() -> None:
    config = tiny_config(mosa__num_heads=0)
    length, head_dim, layers, heads = 24, 8, 2, 4
    attention = 3 * 4 * head_dim * heads * layers * (length**2 - length * (length + 1) / 2)  # keys after a query
    embedding = 3 * 2 * 24 * 100 * length
    assert usual_flops(config, 100) - model_flops(config, 100) == attention + embedding


def test_what_is_not_training_is_told_apart(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock moves by 40 ms in a step, 3 for each of two batches, 5 in a callback, and when a line is written by 70.

    The first line takes 500.
    """
    now = [0.0]

    def passes(milliseconds: float) -> None:
        now[0] += milliseconds / 1000

    class Engine:
        accumulation_steps = 2
        module = torch.nn.Module()

        def train_step(self, batches: Iterable[Batch], learning_rate: float) -> StepResult:
            assert [tuple(batch["tokens"].shape) for batch in batches] == [(4, 24)] * 2
            passes(40)
            return StepResult(loss=2.0, grad_norm=1.0)

    def slow(*args: object) -> Iterator[Batch]:
        for batch in random_batches(config, layout):
            passes(3)
            yield batch

    config = tiny_config(train__global_batch_size=8)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(loop, "random_batches", slow)
    monkeypatch.setattr(StepMonitor, "after_step", lambda *args: passes(5))
    lines = iter((500, 70))
    monkeypatch.setattr(Writers, "training", lambda *args: passes(next(lines)))
    found = loop.time_loop(config, cast(TrainingEngine, Engine()), layout, steps=3)
    assert (found.loading, found.between, found.logging, found.step) == pytest.approx((6, 5, 70, 51))
    assert found.share == pytest.approx(11 / 51)
    line = report.text(measurement(loop=asdict(found))).splitlines()
    assert any(part.startswith("in a run 21.6 % of a step is not training: 6.0 ms") for part in line)
