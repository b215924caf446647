"""Verification, publishing and pruning of checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import distributed
from torch.distributed import checkpoint as dcp

from megatron_mosa.checkpoint import FORMAT_VERSION, CheckpointStore, Metadata, check_resumable, read_metadata
from megatron_mosa.checkpoint import store as store_module
from megatron_mosa.checkpoint.format import _load
from megatron_mosa.checkpoint.host_memory import HostMemory
from megatron_mosa.checkpoint.manifest import MANIFEST, files_below, find_damage, hash_files, write_manifest
from megatron_mosa.convert.target import atomic_folder
from megatron_mosa.errors import StorageError, UserError
from tests.disk import Disk


def publish(folder: Path, step: int, **changes: object) -> Path:
    """Write a checkpoint that passes verification, with dummy content."""
    path = folder / f"step-{step:08d}"
    (path / "state").mkdir(parents=True)
    (path / "state" / "__0_0.distcp").write_bytes(bytes(range(256)) * 50)
    (path / "state" / "empty").touch()
    (path / "metadata.json").write_text(json.dumps(asdict(metadata(step)) | changes))
    write_manifest(path, hash_files(path, files_below(path)))
    return path


def flip_a_bit(path: Path) -> None:
    content = bytearray((path / "state" / "__0_0.distcp").read_bytes())
    content[777] ^= 8
    (path / "state" / "__0_0.distcp").write_bytes(content)


def truncate(path: Path) -> None:
    (path / "state" / "__0_0.distcp").write_bytes(b"short")


def remove(path: Path) -> None:
    (path / "state" / "__0_0.distcp").unlink()


def remove_the_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def truncate_the_manifest(path: Path) -> None:
    content = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(content[: len(content) // 2])


def truncate_the_metadata(path: Path) -> None:
    (path / "metadata.json").write_text("{")


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (truncate, "state/__0_0.distcp has 5 bytes instead of 12800"),
    (remove, "state/__0_0.distcp cannot be read (No such file or directory)"),
    (remove_the_manifest, "manifest.json cannot be read (No such file or directory)"),
    (truncate_the_manifest, "manifest.json is damaged (JSONDecodeError: "),
    (truncate_the_metadata, "metadata.json is damaged (JSONDecodeError: "),
]


def test_an_intact_checkpoint_passes_verification(tmp_path: Path) -> None:
    path = publish(tmp_path, 3)
    assert files_below(path) == ["metadata.json", "state/__0_0.distcp", "state/empty"]
    assert find_damage(path, reads_all=True) is None
    assert CheckpointStore(tmp_path, 2).newest(reads_all=True) == (path, ())
    assert CheckpointStore(tmp_path / "nothing", 2).newest() == (None, ())


@pytest.mark.parametrize(("damage", "what"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_checkpoints_with_obvious_damage_are_skipped(tmp_path: Path, damage: Callable, what: str) -> None:
    older, newer = publish(tmp_path, 3), publish(tmp_path, 12)
    damage(newer)
    found = CheckpointStore(tmp_path, 2).newest()
    assert found.path == older
    assert [(path, text.startswith(what)) for path, text in found.damaged] == [(newer, True)], found.damaged


def test_a_flipped_bit_is_found_by_reading_all_files(tmp_path: Path) -> None:
    older, newer = publish(tmp_path, 3), publish(tmp_path, 12)
    flip_a_bit(newer)
    store = CheckpointStore(tmp_path, 2)
    assert store.newest().path == newer
    found = store.newest(reads_all=True)
    assert found.path == older
    assert found.damaged[0][1].startswith("state/__0_0.distcp is corrupt: its hash is ")


def test_a_run_does_not_silently_restart_if_all_checkpoints_are_damaged(tmp_path: Path) -> None:
    truncate(publish(tmp_path, 3))
    remove(publish(tmp_path, 12))
    newest = "the newest is 'step-00000012': state/__0_0.distcp cannot be read"
    message = f"all checkpoints in '{tmp_path}' are damaged; {newest} .*step 0$"
    with pytest.raises(UserError, match=message):
        CheckpointStore(tmp_path, 2).newest()


def test_the_newest_has_the_largest_step_whatever_its_number_of_digits(tmp_path: Path) -> None:
    paths = [publish(tmp_path, step) for step in (100_000_000, 99_999_999)]
    assert CheckpointStore(tmp_path, 2).published() == paths[::-1]


def test_a_newer_format_is_not_skipped_as_damage(tmp_path: Path) -> None:
    publish(tmp_path, 3)
    publish(tmp_path, 12, format_version=FORMAT_VERSION + 1)
    message = f"format version {FORMAT_VERSION + 1}, but this megatron_mosa reads versions up to {FORMAT_VERSION}"
    with pytest.raises(UserError, match=message):
        CheckpointStore(tmp_path, 2).newest()


def test_format_1_has_no_manifest(tmp_path: Path) -> None:
    path = publish(tmp_path, 3, format_version=1)
    remove_the_manifest(path)
    assert CheckpointStore(tmp_path, 2).newest(reads_all=True) == (path, ())


def test_a_checkpoint_that_was_set_aside_is_ignored(tmp_path: Path) -> None:
    older, newer = publish(tmp_path, 3), publish(tmp_path, 12)
    truncate(newer)
    store = CheckpointStore(tmp_path, 2)
    assert store.set_aside(newer) == tmp_path / "damaged-step-00000012"
    assert store.newest() == (older, ())
    publish(tmp_path, 12)
    assert store.set_aside(newer) == tmp_path / "damaged-step-00000012"  # also when it already exists


@pytest.mark.parametrize(
    ("permanent_interval", "keep_permanent", "kept"),
    [
        (None, None, [16, 20]),
        (8, None, [8, 12, 16, 20]),  # 8 and 16 are permanent; 12 and 20 are the last two others
        (8, 1, [12, 16, 20]),
        (1, 2, [16, 20]),
    ],
)
def test_pruning_keeps_the_last_and_the_permanent_ones(
    tmp_path: Path, permanent_interval: int | None, keep_permanent: int | None, kept: list[int]
) -> None:
    for step in (4, 8, 12, 16, 20):
        publish(tmp_path, step)
    (tmp_path / ".writing-step-00000024").mkdir()  # left by a run that was killed
    CheckpointStore(tmp_path, 2, permanent_interval, keep_permanent)._prune()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in kept]


def test_what_was_saved_as_permanent_stays_so(tmp_path: Path) -> None:
    """Also if the run goes on with another interval, or by mistake without one."""
    saved = asdict(metadata(4))["config"]
    for step in (4, 6, 8, 12):
        publish(tmp_path, step, config=saved | {"checkpoint": {"permanent_interval": 4 if step < 12 else None}})
    for interval, kept in ((None, [4, 8, 12]), (6, [4, 8, 12])):
        CheckpointStore(tmp_path, 1, interval)._prune()
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in kept]
    CheckpointStore(tmp_path, 1, None, 1)._prune()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000008", "step-00000012"]


def test_a_state_that_cannot_be_read_is_an_error_of_one_line(tmp_path: Path) -> None:
    """What torch raises is no Exception, so no handler would report it."""
    dcp.save({"model.a": torch.ones(3)}, checkpoint_id=tmp_path / "state", no_dist=True)
    loaded = {"model.a": torch.zeros(3)}
    _load(loaded, tmp_path)
    assert torch.equal(loaded["model.a"], torch.ones(3))
    with pytest.raises(
        StorageError, match=r"^rank 0 could not read checkpoint '.*' \(.*exp_avg.a.*\); mosa checkpoint "
    ):
        _load({"exp_avg.a": torch.zeros(3)}, tmp_path)
    next((tmp_path / "state").glob("*.distcp")).write_bytes(b"")
    with pytest.raises(StorageError, match=r"^rank 0 could not read checkpoint '.*' \(.+\); mosa checkpoint verify"):
        _load(loaded, tmp_path)


def test_weights_alone_cannot_be_resumed(tmp_path: Path) -> None:
    for names, message in ((["model.a"], "has no optimizer state, so a run cannot resume"), ([], "cannot be read")):
        folder = tmp_path / str(len(names))
        if names:
            dcp.save(dict.fromkeys(names, torch.ones(3)), checkpoint_id=folder / "state", no_dist=True)
        with pytest.raises(UserError, match=message):
            check_resumable(folder)
    dcp.save({"model.a": torch.ones(3), "exp_avg.a": torch.ones(3)}, checkpoint_id=tmp_path / "state", no_dist=True)
    check_resumable(tmp_path)


def test_host_memory_reuses_the_buffer_of_each_key() -> None:
    memory, generator = HostMemory(), torch.Generator().manual_seed(0)
    first = {f"{n}": torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (5, 1000, 1, 70)}
    copies = {key: memory.copy(key, tensor) for key, tensor in first.items()}
    assert all(torch.equal(copies[key], tensor.float()) for key, tensor in first.items())
    assert all(copy.untyped_storage().nbytes() == 4 * copy.numel() for copy in copies.values())
    again = {key: memory.copy(key, -tensor) for key, tensor in first.items()}
    assert all(torch.equal(again[key], -tensor.float()) for key, tensor in first.items())
    assert all(again[key].data_ptr() == copy.data_ptr() for key, copy in copies.items())


@pytest.fixture
def single_process() -> Iterator[None]:
    """Initialize a process group of world size 1."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def metadata(step: int) -> Metadata:
    config = {
        "run": {"seed": 1}, "model": {"num_layers": 1, "hidden_size": 8, "num_dense_heads": 1},
        "mosa": {"num_heads": 0}, "data": {"sequence_length": 8},
    }  # fmt: skip
    return Metadata(step, consumed_samples=0, optimizer_step=step, config=config, data={}, versions={}, layout={})


def save(store: CheckpointStore, step: int) -> None:
    """Publish a checkpoint with one tensor, as a run does."""
    store._publish({"model.weight": torch.full((50,), float(step))}, metadata(step))


@pytest.mark.usefixtures("single_process")
def test_saves_do_not_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save copies into memory that the thread allocates and that the previous save is written from."""
    done: list[str] = []

    def slowly(what: str) -> None:
        time.sleep(0.1)
        done.append(what)

    def snapshot(engine: object, memory: HostMemory) -> dict[str, torch.Tensor]:
        done.append("copied")
        return {"model.weight": torch.ones(3)}

    monkeypatch.setattr(store_module, "reserve", lambda engine, memory: slowly("reserved"))
    monkeypatch.setattr(store_module, "snapshot", snapshot)
    write = store_module.write_state
    monkeypatch.setattr(store_module, "write_state", lambda *args: (write(*args), slowly("written")))
    store, engine = CheckpointStore(tmp_path, keep_last=9), cast(Any, None)
    store.prepare(engine)
    saves = [store.begin_save(engine, metadata(step)) for step in (4, 8)]
    store.close()
    assert done == ["reserved", "copied", "written", "copied", "written"]
    assert [save.result() for save in saves] == store.published()


@pytest.mark.parametrize(
    ("before", "step", "keep_last"), [([4], 8, 1), ([4, 8], 12, 2), ([4, 8], 8, 2)], ids=["first", "third", "again"]
)
@pytest.mark.usefixtures("single_process")
def test_an_interrupted_save_always_leaves_an_intact_checkpoint(
    tmp_path: Path, before: list[int], step: int, keep_last: int
) -> None:
    """And no damaged one, whether the process was killed or the machine lost power."""
    store = CheckpointStore(tmp_path / "checkpoints", keep_last)
    for earlier in before:
        save(store, earlier)
    with Disk(store.folder, tmp_path) as disk:
        save(store, step)
    found = []
    for how, folder in disk.states():
        newest = CheckpointStore(folder, keep_last).newest(reads_all=True)
        assert newest.path is not None and newest.damaged == (), how
        found.append(read_metadata(newest.path).step)
    assert set(found[:3]) == {before[-1]}  # before the first operation
    assert set(found[-3:]) == {step}  # after the last


@pytest.mark.parametrize("replaces", [False, True])
def test_an_interrupted_conversion_always_leaves_a_complete_model(tmp_path: Path, replaces: bool) -> None:
    def convert(number: int) -> None:
        with atomic_folder(tmp_path / "models" / "out", force=replaces) as writing:
            (writing / "state").mkdir()
            for name in ("config", "state/weights"):
                (writing / name).write_text(f"{number}" * 9)

    (tmp_path / "models").mkdir()
    if replaces:
        convert(1)
    with Disk(tmp_path / "models", tmp_path) as disk:
        convert(2)
    found = []
    for how, folder in disk.states():
        models = {}
        for name in ("out", ".replaced-out"):
            files = [path for path in (folder / name).rglob("*") if path.is_file()]
            if files:
                assert sorted(file.name for file in files) == ["config", "weights"], how
                (models[name],) = {file.read_text() for file in files}  # all from the same model
                assert models[name] in ("1" * 9, "2" * 9), how
        assert models or not replaces, how
        found.append(models.get("out"))
    assert set(found[:3]) == {"1" * 9 if replaces else None}
    assert set(found[-3:]) == {"2" * 9}


def test_conversions_to_one_folder_do_not_meet(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / ".writing-out" / "folder").mkdir(parents=True)  # left by a process that was killed
    (tmp_path / ".writing-out" / "file").touch()
    with atomic_folder(out, force=False) as writing:
        assert not list(writing.iterdir())
        (writing / "weights").touch()
        with (
            pytest.raises(UserError, match=f"another conversion is writing to OUT={out}"),
            atomic_folder(out, force=True),
        ):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "weights"]
    new = tmp_path / "new"
    with (
        pytest.raises(UserError, match=f"OUT={new} has been created by something else"),
        atomic_folder(new, force=False),
    ):
        new.mkdir()
    assert new.is_dir() and not (tmp_path / ".writing-new").exists()
    with atomic_folder(out, force=True) as writing:
        (writing / "others").touch()
    assert [path.name for path in out.iterdir()] == ["others"]
