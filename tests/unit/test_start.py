"""What is rejected before a run starts, and how programs report it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from megatron_mosa.attention.kinds import local_window
from megatron_mosa.checkpoint import FORMAT_VERSION, Metadata, check_same_model, read_metadata
from megatron_mosa.config import Config, config_to_dict, load_config
from megatron_mosa.data import build_dataset, read_manifest
from megatron_mosa.errors import UserError
from megatron_mosa.model import model_flops
from megatron_mosa.parallel import Layout
from megatron_mosa.train import check_start
from megatron_mosa.train.directory import RunDirectory
from megatron_mosa.train.plan import describe
from megatron_mosa.train.run import _training_batches
from megatron_mosa.train.sample import sample_text
from megatron_mosa.train.start import validation_samples
from megatron_mosa.train.trainer import TrainingState
from tests.loaded import loaded_python

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a small dataset and a directory for runs."""
    folder = tmp_path_factory.mktemp("start")
    texts = folder / "texts"
    texts.mkdir()
    library = Path(os.__file__).parent
    for name in ("ast.py", "argparse.py", "bdb.py", "calendar.py", "cmd.py", "copy.py"):
        (texts / name).write_text((library / name).read_text())
    chosen = [f"data.path={folder}/data", f"data.sources=[{texts}]", "data.vocab_size=300"]
    chosen += ["data.validation_fraction=0.3", "data.sequence_length=64", f"run.directory={folder}/runs"]
    build_dataset(load_config(QUICKSTART, chosen).data)
    return chosen


def write_checkpoint(config: Config, **changes: object) -> Path:
    """Publish a checkpoint of this configuration that has only metadata, in format 1, which has no manifest."""
    manifest = read_manifest(config.data.path)
    data = {
        "index_samples": 100,
        "tokenizer_hash": manifest.tokenizer_hash,
        "vocab_size": manifest.vocab_size,
        "fingerprint": manifest.fingerprint,
    }
    metadata = Metadata(
        step=3,
        consumed_samples=48,
        optimizer_step=3,
        config=config_to_dict(config),
        data=data,
        versions={},
        layout={},
        format_version=1,
    )
    folder = Path(config.run.directory) / config.run.name / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.json").write_text(json.dumps(asdict(metadata) | changes))
    return folder


def refused(config: Config, world_size: int = 2) -> str:
    with pytest.raises(UserError) as caught:
        check_start(config, world_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_valid_start(overrides: list[str]) -> None:
    config = load_config(QUICKSTART, [*overrides, "run.name=fits"])
    start = check_start(config, 4)
    assert start.checkpoint is None and start.manifest.vocab_size >= 257
    assert start.index_samples == config.train.steps * config.train.global_batch_size
    folder = write_checkpoint(config)
    (folder.parent / "step-00000007.old").mkdir()  # not the name of a checkpoint
    assert check_start(config, 2).checkpoint == folder


def test_a_resumed_run_may_take_smaller_batches(overrides: list[str], layout: Layout) -> None:
    smaller = ["run.name=smaller", "train.steps=5", "train.global_batch_size=4", "train.micro_batch_size=2"]
    config = load_config(QUICKSTART, [*overrides, *smaller, "optimizer.warmup_steps=1"])
    write_checkpoint(config)
    state = TrainingState(step=3, consumed_samples=48)
    assert len(list(_training_batches(config, check_start(config, 2), state, layout))) == 2 * 2
    assert sample_text(config, 55)
    with pytest.raises(UserError, match="sample must be 0 to 55"):
        sample_text(config, 56)


def test_initial_weights_are_only_for_a_first_start(overrides: list[str]) -> None:
    config = load_config(QUICKSTART, [*overrides, "run.name=initial", "checkpoint.initialize_from=nowhere"])
    assert "checkpoint.initialize_from: 'nowhere' does not exist" in refused(config)
    folder = write_checkpoint(config)
    start = check_start(config, 2)
    assert (start.checkpoint, start.initial) == (folder, None)


def test_world_sizes_that_do_not_fit(overrides: list[str]) -> None:
    assert "world size 3" in refused(load_config(QUICKSTART, overrides), 3)


def test_a_missing_dataset(overrides: list[str], tmp_path: Path) -> None:
    message = refused(load_config(QUICKSTART, [*overrides, f"data.path={tmp_path}/none"]))
    assert "mosa data build" in message


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("model.num_layers=5", ["model.num_layers=5, but checkpoint", "was written with 4;"]),
        ("mosa.num_heads=16", ["mosa.num_heads=16, but checkpoint", "was written with 14;"]),
        ("mosa.sparsity=8", ["mosa.sparsity"]),
        (
            "mosa.selection=threshold",
            ["mosa.selection=threshold, but checkpoint", "was written with expert_choice;"],
        ),
        ("run.seed=9", ["run.seed=9, but checkpoint", "was written with 1234;"]),
        ("data.sequence_length=32", ["data.sequence_length"]),
    ],
)
def test_another_models_checkpoints(overrides: list[str], change: str, parts: list[str]) -> None:
    write_checkpoint(load_config(QUICKSTART, [*overrides, "run.name=other"]))
    message = refused(load_config(QUICKSTART, [*overrides, "run.name=other", change]))
    for part in [*parts, "run.name"]:
        assert part in message


def test_null_and_what_it_stands_for_are_the_same_model(overrides: list[str]) -> None:
    heads = [
        "mosa.sparsity=7.5",
        "model.num_dense_heads=4",
        *(f"model.num_{kind}_heads=2" for kind in ("local", "fixed", "routing")),
    ]
    config = load_config(QUICKSTART, [*overrides, *heads, "run.name=nulls"])
    meant = {
        "num_query_groups": config.model.num_dense_heads, "local_window": local_window(config),
        "fixed_stride": config.fixed_stride, "routing_clusters": config.routing_clusters,
    }  # fmt: skip
    given = [f"model.{name}={value}" for name, value in meant.items()]
    for first, then in (([], given), (given, [])):
        checkpoint = write_checkpoint(load_config(QUICKSTART, [*overrides, *heads, *first, "run.name=nulls"]))
        assert (
            check_start(load_config(QUICKSTART, [*overrides, *heads, *then, "run.name=nulls"]), 2).checkpoint
            == checkpoint
        )
    for name, value in meant.items():
        other = f"model.{name}={value // 2 if name == 'num_query_groups' else value + 1}"
        message = refused(load_config(QUICKSTART, [*overrides, *heads, other, "run.name=nulls"]))
        assert f"{other}, but checkpoint" in message and f"was written with {value};" in message


def test_training_options_may_change(overrides: list[str]) -> None:
    checkpoint = write_checkpoint(load_config(QUICKSTART, [*overrides, "run.name=same"]))
    changes = ["mosa.capacity_factor=3", "mosa.threshold_ema=0.2", "mosa.threshold_warmup_steps=9"]
    assert check_start(load_config(QUICKSTART, [*overrides, "run.name=same", *changes]), 2).checkpoint == checkpoint


def test_a_checkpoint_older_than_a_key_means_its_default(overrides: list[str]) -> None:
    config = load_config(QUICKSTART, [*overrides, "run.name=older"])
    checkpoint = write_checkpoint(config)
    metadata = json.loads((checkpoint / "metadata.json").read_text())
    del metadata["config"]["model"]["attend_within_documents"]
    del metadata["config"]["mosa"]["selection"]
    (checkpoint / "metadata.json").write_text(json.dumps(metadata))
    assert check_start(config, 2).checkpoint == checkpoint
    config.model.attend_within_documents = True
    assert "model.attend_within_documents=True, but checkpoint" in refused(config)


def test_a_plan_counts_flops_by_the_documents(overrides: list[str], tmp_path: Path) -> None:
    """The plan counts attention within documents, here of about ten tokens, as the MFU of a run does."""
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(400)))
    within = [f"data.sources=[{source}]", f"data.path={tmp_path}/data", "model.attend_within_documents=true"]
    flops = []
    for config in (load_config(QUICKSTART, [*overrides, *within[:count]]) for count in (2, 3)):
        build_dataset(config.data)
        start = check_start(config, 2)
        lengths = validation_samples(config, start.data).document_lengths()
        flops.append(model_flops(config, start.manifest.vocab_size, lengths) * config.train.global_batch_size / 1e9)
        assert f"tokens, {flops[-1]:.3g} GFLOP on 2 processes" in describe(config, start, 2)
    assert [bool(lengths), max(map(max, lengths)) < 20] == [True, True] and flops[1] < flops[0]


def test_kernels_that_this_machine_does_not_support(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(QUICKSTART, [*overrides, "run.name=kernels"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("MOSA_BACKEND", "cuda")
    assert (
        "mosa.backend=auto with MOSA_BACKEND=cuda in the environment is not known; expected 'auto', 'naive', 'triton'"
        in refused(config)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config.mosa.backend = "triton"
    assert "mosa.backend='triton' does not run here: " in refused(config)


def test_apex_that_is_not_installed(overrides: list[str]) -> None:
    # on a GPU, the message names the extension instead
    message = refused(load_config(QUICKSTART, [*overrides, "run.name=apex", "train.apex=always"]))
    assert message.startswith("train.apex=always") and message.endswith("set train.apex=auto")


def test_the_recorded_number_of_index_samples_is_kept(overrides: list[str]) -> None:
    config = load_config(QUICKSTART, [*overrides, "run.name=index", "train.steps=1000"])
    write_checkpoint(config)
    assert check_start(config, 2).index_samples == 100
    config.data.index_samples = 7
    assert "data.index_samples=7" in refused(config)


def test_sequences_longer_than_the_data(overrides: list[str]) -> None:
    config = load_config(QUICKSTART, [*overrides, "run.name=long", "data.sequence_length=10000000"])
    assert "data.sequence_length must be at most " in refused(config)


def test_run_directories_that_cannot_be_written(overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "is not a directory" in refused(load_config(QUICKSTART, [*overrides, f"run.directory={place}"]))


def test_a_run_directory_belongs_to_one_job_at_a_time(overrides: list[str], tmp_path: Path) -> None:
    config = load_config(QUICKSTART, [*overrides, f"run.directory={tmp_path}"])
    holds, says = os.pipe()
    holder = os.fork()
    if holder == 0:
        try:
            directory = RunDirectory(tmp_path / "run")
            directory.prepare(config)
            if loader := os.fork():  # like a data loader process
                os.write(says, f"{loader}\n".encode())
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(says)
    with open(holds) as told:
        loader = int(told.readline())
    with pytest.raises(UserError, match="in use by another job"):
        RunDirectory(tmp_path / "run").prepare(config)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    os.kill(loader, 0)
    RunDirectory(tmp_path / "run").prepare(config)  # although the loader process is still alive
    os.kill(loader, signal.SIGKILL)


def test_never_resuming_also_protects_a_run_without_checkpoints(overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "metrics.jsonl").write_text("")
    chosen = [*overrides, f"run.directory={tmp_path}"]
    check_start(load_config(QUICKSTART, chosen), 2)
    assert "checkpoint.resume=never" in refused(load_config(QUICKSTART, [*chosen, "checkpoint.resume=never"]))


def test_weights_and_biases_without_its_package(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_mosa.train.start.find_spec", lambda name: None)
    assert "logging.wandb_project=mine" in refused(load_config(QUICKSTART, [*overrides, "logging.wandb_project=mine"]))


def test_a_backend_may_change(overrides: list[str]) -> None:
    write_checkpoint(load_config(QUICKSTART, [*overrides, "run.name=backend"]))
    check_start(load_config(QUICKSTART, [*overrides, "run.name=backend", "mosa.backend=naive"]), 2)


def test_another_tokenizer_or_dataset(overrides: list[str]) -> None:
    config = load_config(QUICKSTART, [*overrides, "run.name=identity"])
    folder = write_checkpoint(config)
    content = json.loads((folder / "metadata.json").read_text())
    for key in ("tokenizer_hash", "fingerprint"):
        changed = content | {"data": content["data"] | {key: "0" * 64}}
        (folder / "metadata.json").write_text(json.dumps(changed))
        what = "tokenizer hash" if key == "tokenizer_hash" else "dataset fingerprint"
        message = refused(config)
        assert f"data.path has {what} " in message and f"was written with {'0' * 64};" in message
    for ids, same in ((read_manifest(config.data.path).encoding_hash, True), ("1" * 64, False)):
        changed = content | {"data": content["data"] | {"tokenizer_hash": "0" * 64, "encoding_hash": ids}}
        (folder / "metadata.json").write_text(json.dumps(changed))
        if same:  # the same tokenizer in a file that was saved again
            check_start(config, 2)
        else:
            assert f"was written with {'0' * 64};" in refused(config)


def test_another_blend_is_named(overrides: list[str]) -> None:
    config = load_config(QUICKSTART, [*overrides, "run.name=blended"])
    folder, ours = write_checkpoint(config), config_to_dict(config)
    ours["data"] |= {"path": None, "blend": ["1 a", "2 b"]}
    metadata = read_metadata(folder)
    for recorded, message in (
        (["2 a", "1 b"], r"=\['1 a', '2 b'\], but .* with \['2 a', '1 b'\];"),
        (["1 a", "2 b"], " has dataset fingerprint 222"),
    ):
        written = replace(metadata, config=ours | {"data": ours["data"] | {"blend": recorded}})
        with pytest.raises(UserError, match=f"^data.blend{message}"):
            check_same_model(written, folder, ours, metadata.data | {"fingerprint": "2" * 64})


def test_a_dataset_built_with_another_tokenizer(overrides: list[str]) -> None:
    message = refused(load_config(QUICKSTART, [*overrides, "data.tokenizer=gpt2"]))
    assert "data.tokenizer=gpt2" in message and "another tokenizer" in message and "--force" in message


def test_checkpoints_that_must_not_be_resumed_or_cannot_be_read(overrides: list[str]) -> None:
    config = load_config(QUICKSTART, [*overrides, "run.name=never", "checkpoint.resume=never"])
    folder = write_checkpoint(config)
    assert "checkpoint.resume=never" in refused(config)
    config = load_config(QUICKSTART, [*overrides, "run.name=never"])
    write_checkpoint(config, format_version=FORMAT_VERSION + 1)
    assert f"format version {FORMAT_VERSION + 1}" in refused(config)
    (folder / "metadata.json").write_text("{")
    assert "metadata.json is damaged" in refused(config)
    (folder / "metadata.json").write_text('["a list"]')
    assert "metadata.json is damaged" in refused(config)
    (folder / "metadata.json").write_text('{"format_version": 1, "step": 3}')
    assert "metadata.json is damaged" in refused(config)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["pretrain_mosa.py", "configs/quickstart.yaml", "train.stps=3"], "did you mean 'steps'"),
        (["pretrain_mosa.py", "none.yaml"], "none.yaml"),
        (["-m", "megatron_mosa", "data", "build", "configs/quickstart.yaml", "data.sources=[nowhere]"], "nowhere"),
    ],
)
def test_the_programs_print_one_line_and_exit_with_2(command: list[str], expected: str, tmp_path: Path) -> None:
    if "build" in command:
        command = [*command, f"data.path={tmp_path}/data"]
    python = sys.executable if command[0] == "pretrain_mosa.py" else loaded_python()  # it fails before its slow imports
    done = subprocess.run([python, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert expected in line
    assert "Traceback" not in done.stderr
