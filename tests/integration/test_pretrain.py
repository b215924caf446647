"""pretrain_mosa.py as a user runs it: real processes and data; stopping, resuming, changing the layout."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed.pool import free_port
from tests.integration.conftest import ROOT, Runner
from tests.loaded import wait_for_ranks


@pytest.fixture(scope="module")
def whole_run(runner: Runner) -> str:
    """The name of a run of ten uninterrupted steps."""
    runner.pretrain("whole")
    return "whole"


def test_torchrun_starts_the_same_run(runner: Runner, whole_run: str) -> None:
    assert "step 2/10" in runner.launch("torchrun", "train.stop_after_step=2")
    assert runner.losses("torchrun") == runner.losses(whole_run)[:2]


def test_contents_of_a_run_directory(runner: Runner, whole_run: str) -> None:
    directory = runner.folder / "runs" / whole_run
    assert (directory / "loss.png").stat().st_size > 1000
    assert list((directory / "tensorboard").glob("events*"))
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["step-00000008", "step-00000010"]
    config = yaml.safe_load((directory / "config.yaml").read_text())
    assert config["data"]["index_samples"] == 80
    training = [line for line in runner.lines(whole_run) if "loss" in line]
    needed = {"step", "tokens", "loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu"}
    assert all(needed <= set(line) for line in training)
    assert [line["tokens"] for line in training] == [step * 8 * 64 for step in range(1, 11)]
    assert all(0 < line["mfu"] < 1.5 and line["tokens_per_second"] > 0 for line in training)
    for line in training:
        assert len(line["selected_score_mean"]) == len(line["unselected_share"]) == 2  # layers
        assert all(0 < mean < 1 for mean in line["selected_score_mean"])
        assert all(0 <= share < 1 for share in line["unselected_share"])
    validation = [line for line in runner.lines(whole_run) if "validation_loss" in line]
    assert [line["step"] for line in validation] == [5, 10]
    assert all(line["causal"] is False and line["unigram_entropy"] > 0 for line in validation)
    assert runner.losses(whole_run)[-1] < runner.losses(whole_run)[0]


def test_evaluation_of_a_checkpoint(runner: Runner, whole_run: str) -> None:
    file = runner.folder / "evaluation.json"
    done = runner.mosa("evaluate", f"runs/{whole_run}", "--samples", "6", "--lengths", "2,9999", "--output", str(file))
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    in_training = [line["validation_loss"] for line in runner.lines(whole_run) if "validation_loss" in line][-1]
    assert found["full_sequence"]["loss"] == pytest.approx(in_training, abs=1e-5)  # another program, in one process
    assert found["full_sequence"]["label"].startswith("NON-CAUSAL") and "NON-CAUSAL" in done.stdout
    assert found["causal"]["label"].startswith("causal, by thresholds") and found["causal"]["loss"] > 0
    ranges = [(row["first"], row["last"]) for row in found["by_position"]]
    assert ranges == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63)]
    assert any(row["flip_rate"] for row in found["by_position"])
    assert [row["length"] for row in found["by_length"]] == [128]
    assert list(found["left_out"]) == [str(9999 * 64)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_others_fails_with_one_line(runner: Runner, rank: int) -> None:
    world = {"RANK": f"{rank}", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port := free_port())}
    script = [str(ROOT / "pretrain_mosa.py"), runner.config, *runner.overrides, "run.name=alone"]
    begun = time.monotonic()
    done = runner.call(*script, "resilience.rendezvous_timeout=3", **world)
    assert time.monotonic() - begun < 60  # not the ten minutes of a collective
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert len(errors) == 1
    assert f"rank {rank} of 2 could not join the others at 127.0.0.1:{port} within 3 s" in errors[0]


def test_a_spike_is_skipped_by_rewinding(runner: Runner) -> None:
    common = ["parallel.tensor_model_parallel_size=1", "optimizer.learning_rate=0.01"]  # fast enough to cause a spike
    spike = ["fault_injection.fault=garbage", "fault_injection.rank=1", "fault_injection.step=8"]
    detector = ["resilience.spike_window=3", "resilience.spike_sigmas=3", "resilience.on_spike=rewind"]
    output = runner.pretrain("spike", *common, *spike, *detector)
    assert "step 8: loss" in output and "step-00000004; step 8 will be skipped" in output
    runner.pretrain("told", *common, "train.skip_steps=[8]")
    assert runner.losses("spike") == runner.losses("told")
    assert json.loads((runner.folder / "runs" / "spike" / "skip_steps.json").read_text()) == [8]


def test_stopping_and_resuming_is_bitwise_exact(runner: Runner, whole_run: str) -> None:
    runner.pretrain("halves", "train.stop_after_step=5")
    assert len(runner.losses("halves")) == 5
    output = runner.pretrain("halves")
    assert "resumed from" in output and "step-00000005" in output
    assert runner.losses("halves") == runner.losses(whole_run)
    expected, found = runner.weights(whole_run, 10), runner.weights("halves", 10)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key
    assert {key.partition(".")[0] for key in expected} == {"model", "exp_avg", "exp_avg_sq"}


def test_a_damaged_checkpoint_is_skipped_and_set_aside(runner: Runner, whole_run: str) -> None:
    runner.pretrain("damaged", "train.stop_after_step=8", "checkpoint.keep_last=3")
    checkpoints = runner.folder / "runs" / "damaged" / "checkpoints"
    newest = checkpoints / "step-00000008"
    state = sorted((newest / "state").glob("*.distcp"))[-1]
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    output = runner.pretrain("damaged", "checkpoint.keep_last=3")
    assert f"{newest} is damaged: state/{state.name} is corrupt" in output
    assert "renamed to damaged-step-00000008" in output
    assert "resumed from" in output and "step-00000004" in output
    names = ["damaged-step-00000008", "step-00000004", "step-00000008", "step-00000010"]
    assert sorted(path.name for path in checkpoints.iterdir()) == names
    assert runner.losses("damaged") == runner.losses(whole_run)[:10]


def test_a_full_disk(runner: Runner, whole_run: str) -> None:
    runner.pretrain("full", "train.stop_after_step=5")
    checkpoints = runner.folder / "runs" / "full" / "checkpoints"
    before = sorted(path.name for path in checkpoints.iterdir())
    done = runner.run("full", largest_file=100_000)  # like a full disk: some rank's state does not fit
    assert done.returncode != 0
    assert f"could not write the checkpoint of step 8 to '{checkpoints}': rank " in done.stdout
    assert "; training continues" in done.stdout
    assert f"error: could not write the checkpoint of step 10 to '{checkpoints}'" in done.stderr
    assert "free some space and start the run again" in done.stderr
    assert "Traceback" not in done.stderr.split("error: ")[0]
    assert sorted(path.name for path in checkpoints.iterdir()) == before
    assert "step-00000005" in runner.pretrain("full")
    assert runner.losses("full") == runner.losses(whole_run)[:10]


NO_SPACE = """
from pathlib import Path
opened = Path.open
def full(path, mode="r", *arguments, **options):
    if path.name == "metrics.jsonl" and "a" in mode and b'"step": 6,' in path.read_bytes():
        return opened(Path("/dev/full"), mode, *arguments, **options)
    return opened(path, mode, *arguments, **options)
Path.open = full
"""


def test_a_disk_too_full_for_metrics(runner: Runner, whole_run: str, tmp_path: Path) -> None:
    """The run ends on all ranks, with a checkpoint, and goes on later."""
    (tmp_path / "sitecustomize.py").write_text(NO_SPACE)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    checkpoint = runner.folder / "runs" / "no_space" / "checkpoints" / "step-00000008"
    ranks = runner.start("no_space", PYTHONPATH=path)
    assert wait_for_ranks(ranks) == [1, 1]
    assert "stopped at step 8: a file could not be written" in runner.printed("no_space", "out")
    assert runner.printed("no_space", "err").splitlines() == [
        f"error: could not write '{checkpoint.parents[1]}/metrics.jsonl': No space left on device; free some space and "
        f"start again; the run stopped at step 8, its last intact checkpoint is {checkpoint}"
    ]
    assert [line["step"] for line in runner.lines("no_space") if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert "step-00000008" in runner.pretrain("no_space")
    assert runner.lines("no_space")[-1]["validation_loss"] == runner.lines(whole_run)[-1]["validation_loss"]


def test_a_checkpoint_of_format_1_still_loads(runner: Runner, whole_run: str) -> None:
    runner.pretrain("old", "train.stop_after_step=5")
    folder = runner.folder / "runs" / "old" / "checkpoints" / "step-00000005"
    (folder / "manifest.json").unlink()
    metadata = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps(metadata | {"format_version": 1}))
    assert "step-00000005" in runner.pretrain("old")
    assert runner.losses("old") == runner.losses(whole_run)[:10]


def test_a_complete_run_is_reported_and_can_be_extended(runner: Runner, whole_run: str) -> None:
    before = runner.losses(whole_run)
    output = runner.pretrain(whole_run)
    assert "The run is complete: step 10 of 10" in output
    assert "is past train.steps=9" in runner.pretrain(whole_run, "train.steps=9")
    assert "Unigram entropy" in output
    assert runner.losses(whole_run) == before
    runner.pretrain(whole_run, "train.steps=11")
    assert len(runner.losses(whole_run)) == 11
    assert runner.losses(whole_run)[:10] == before
    config = yaml.safe_load((runner.folder / "runs" / whole_run / "config.yaml").read_text())
    assert config["data"]["index_samples"] == 80  # as the first start recorded it


def test_a_run_resumes_at_another_layout_and_zero_stage(runner: Runner, whole_run: str) -> None:
    expected = runner.losses(whole_run)[:10]
    for name, stop, go_on in (
        ("split", ["parallel.zero_stage=1"], ["parallel.tensor_model_parallel_size=1", "parallel.zero_stage=3"]),
        ("joined", ["parallel.tensor_model_parallel_size=1", "parallel.zero_stage=2"], ["parallel.zero_stage=0"]),
    ):
        runner.pretrain(name, "train.stop_after_step=5", *stop)
        runner.pretrain(name, *go_on)
        # A lost or misplaced moment moves the losses that follow by 5e-3.
        assert runner.losses(name) == pytest.approx(expected, rel=1e-4)


def test_attention_inside_documents(runner: Runner) -> None:
    # Some sequences of this length contain the end of a document.
    options = ["data.sequence_length=512", "model.num_local_heads=2", "train.steps=4", "validation.num_samples=2"]
    runner.pretrain("packed", *options)
    runner.pretrain("documents", *options, "model.attend_within_documents=true", "mosa.selection_scope=document")
    packed, documents = runner.losses("packed"), runner.losses("documents")
    assert documents != packed
    assert documents == pytest.approx(packed, rel=0.02)


def test_a_run_with_thresholds(runner: Runner, whole_run: str) -> None:
    """It equals expert choice only during the warm-up, and stopping and resuming it is bitwise exact."""
    options = ["mosa.selection=threshold", "mosa.threshold_warmup_steps=6"]
    runner.pretrain("thresholds", *options)
    assert runner.losses("thresholds")[:6] == runner.losses(whole_run)[:6]
    assert runner.losses("thresholds")[7:] != runner.losses(whole_run)[7:]
    lines = runner.lines("thresholds")
    assert all(line["causal"] == (line["step"] > 6) for line in lines if "loss" in line)
    assert [line["causal"] for line in lines if "validation_loss" in line] == [True, True]
    for line in (line for line in lines if "loss" in line):
        assert all(0.3 < load < 3 for load in line["selection_load"])
        assert all(0 <= share < 0.5 for share in line["overflow_share"])
        assert all(0 <= count <= 6 for name in ("dead_heads", "overloaded_heads") for count in line[name])
    assert not any("of_heads" in key for line in lines for key in line)  # values per head are only in TensorBoard
    events = EventAccumulator(str(runner.folder / "runs" / "thresholds" / "tensorboard"), {"histograms": 0}).Reload()
    for layer, load in enumerate(lines[-1 if "loss" in lines[-1] else -2]["selection_load"]):
        histogram = events.Histograms(f"train/load_of_heads/layer_{layer}")[-1].histogram_value
        assert histogram.num == 6 and histogram.sum / 6 == pytest.approx(load, rel=1e-5)  # the heads of both ranks
    runner.pretrain("threshold_halves", *options, "train.stop_after_step=7", "checkpoint.interval=7")
    runner.pretrain("threshold_halves", *options)
    assert runner.losses("threshold_halves") == runner.losses("thresholds")
    expected, found = runner.weights("thresholds", 10), runner.weights("threshold_halves", 10)
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    name = "model.decoder.layers.1.self_attention.mosa_heads.threshold"
    assert (expected[f"{name}_updates"] == 10).all() and ((expected[f"{name}s"] > 0) & (expected[f"{name}s"] < 1)).all()


def test_bf16(runner: Runner, whole_run: str) -> None:
    runner.pretrain("bf16", "train.precision=bf16", "train.stop_after_step=3")
    losses = runner.losses("bf16")
    assert losses == pytest.approx(runner.losses(whole_run)[:3], rel=5e-3)
    assert losses != runner.losses(whole_run)[:3]
    state = runner.weights("bf16", 3)
    weight = state["model.decoder.layers.0.mlp.linear_fc1.weight"]
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())  # master weights are fp32, and saved as fp32


def test_a_diverging_run_fails_and_keeps_its_last_good_checkpoint(runner: Runner) -> None:
    runner.pretrain("diverges", "train.stop_after_step=2")
    done = runner.run("diverges", "optimizer.learning_rate=1e30", "optimizer.gradient_clipping=0")
    assert done.returncode != 0
    assert "not finite in 5 consecutive steps" in done.stderr
    checkpoints = runner.folder / "runs" / "diverges" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir())[0] == "step-00000002"
    assert all(
        "loss" not in line or line["loss"] is None or line["loss"] < 1e6 for line in runner.lines("diverges")[:2]
    )


def test_a_run_starts_from_weights_exported_and_imported_again(runner: Runner, whole_run: str) -> None:
    source, folder = runner.folder / "runs" / whole_run / "checkpoints" / "step-00000010", runner.folder
    for words in (
        ["export", f"{source}", f"{folder}/hf", "--to", "hf"],
        ["import", f"{folder}/hf", f"{folder}/imported", "--from", "hf"],
    ):
        done = runner.mosa("checkpoint", *words)
        assert done.returncode == 0, done.stderr
    options = [f"checkpoint.initialize_from={folder}/imported", "train.stop_after_step=5"]
    options += ["optimizer.learning_rate=1e-12", "optimizer.min_learning_rate=0", "optimizer.weight_decay=0"]
    output = runner.pretrain("warm", "parallel.tensor_model_parallel_size=1", "parallel.zero_stage=3", *options)
    assert f"initialized the weights from {folder}/imported; the optimizer state is new" in output

    def validation_loss(name: str, step: int) -> float:
        lines = (line for line in runner.lines(name) if line["step"] == step and "validation_loss" in line)
        return next(lines)["validation_loss"]

    # At this learning rate nothing changes: the model is the final one of the first run.
    assert validation_loss("warm", 5) == pytest.approx(validation_loss(whole_run, 10), rel=1e-6)
    assert abs(validation_loss(whole_run, 5) - validation_loss(whole_run, 10)) > 1e-3
