"""A changed bit anywhere in a dataset is found before or during a run, and the error names the file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_mosa.config import Config, load_config
from megatron_mosa.config.schema import DataSection
from megatron_mosa.data import TrainingSamples, build_dataset, hashing, integrity, load_tokenizer, open_mixture
from megatron_mosa.data.commands import dataset_folders, inspect, verify
from megatron_mosa.data.integrity import HashingProcess, open_indexed, recorded_hashes
from megatron_mosa.data.manifest import load_manifest
from megatron_mosa.data.tokenizer import END_OF_TEXT
from megatron_mosa.errors import RunError, UserError
from megatron_mosa.train.callbacks.data_check import DataCheck
from megatron_mosa.train.sample import DOCUMENT_END, sample_text

ROOT = Path(__file__).parents[2]
TEXTS = [f"Document {number}: " + "some words of it, " * (number % 7 + 1) for number in range(60)]
FILES = ("manifest.json", "tokenizer.json", "train.bin", "train.idx", "validation.bin", "validation.idx")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    (root / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    build_dataset(
        DataSection(path=str(root / "set"), sources=[str(root / "a.jsonl")], vocab_size=300, validation_fraction=0.3)
    )
    return root / "set"


@pytest.fixture
def dataset(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "set")


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def sampled_bits(file: Path) -> list[int]:
    """Return numbers of bits at the beginning, at the end, and spread over the file."""
    bits = 8 * file.stat().st_size
    return sorted({*range(0, min(bits, 8 * 40), 3), *range(0, bits, max(1, bits // 60) | 1), bits - 1})


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_reported_in_one_line_that_names_the_file(
    name: str, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "CHUNK", 1000)  # several per file
    section = DataSection(path=str(dataset))
    file = dataset / name
    for bit in sampled_bits(file):
        flip(file, bit)
        for read, error in ((lambda: open_mixture(section), UserError), (lambda: verify(dataset), RunError)):
            with pytest.raises((UserError, RunError)) as caught:
                read()
            assert name in str(caught.value) and "\n" not in str(caught.value), bit
            looks_newer = "has format version" in str(caught.value)
            assert caught.type is UserError if looks_newer else issubclass(caught.type, error), bit
        flip(file, bit)
    open_mixture(section)
    verify(dataset)


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("size", [None, -1, 1])
def test_a_missing_file_or_another_size_is_damage(name: str, size: int | None, dataset: Path) -> None:
    file = dataset / name
    content = file.read_bytes()
    file.unlink()
    if size is not None:
        file.write_bytes((content + b"\0")[: len(content) + size])
    reason = "is damaged or was replaced" if name == "tokenizer.json" else "has .* bytes instead of"
    with pytest.raises(UserError, match=f"{name} {'is missing' if size is None else reason}") as refused:
        open_mixture(DataSection(path=str(dataset)))
    with pytest.raises(RunError) as found:  # exit code 1, as for a flipped bit
        verify(dataset)
    assert str(found.value) == str(refused.value) and "\n" not in str(found.value)
    with pytest.raises(UserError, match="it has no manifest.json"):
        verify(dataset.parent)


def test_a_damaged_index_header_is_reported_in_one_line(dataset: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """This also protects large datasets and ranks other than the main one, for which hashes are not compared."""
    for bit in range(8 * 34):  # header and counts
        flip(dataset / "train.idx", bit)
        try:
            open_indexed(dataset / "train")
        except UserError as error:
            assert "train.idx is damaged" in str(error) and "\n" not in str(error)
        else:  # another dtype of the same size
            assert bit // 8 == 17
        flip(dataset / "train.idx", bit)
    assert capfd.readouterr().err == ""


def samples(dataset: Path) -> TrainingSamples:
    mixture = open_mixture(DataSection(path=str(dataset)))
    return TrainingSamples(mixture, sequence_length=16, index_samples=40, seed=1)


def test_a_flipped_bit_in_a_sample_index_is_reported(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "FOREGROUND_BYTES", 0)  # not a limit of indices, which no other process hashes
    (folder,) = samples(dataset).prepare(0, 3)
    stored = [file for file in folder.iterdir() if file.suffix == ".npy"]
    assert stored
    for file in stored:
        for bit in sampled_bits(file)[::20]:
            flip(file, bit)
            with pytest.raises(UserError, match=f"{file.name} is damaged: .*remove the folder .*rebuilt"):
                samples(dataset).prepare(0, 3)
            flip(file, bit)
    samples(dataset).prepare(0, 3)
    (folder / "hashes.json").unlink()  # as in an index of an earlier version
    samples(dataset).prepare(0, 3)


def test_a_manifest_without_hashes_of_indices_is_still_verified(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((dataset / "manifest.json").read_text(encoding="utf-8"))
    for name in ("checksum", "encoding_hash", "special_tokens", "left_out"):
        del manifest[name]
    for counts in manifest["splits"].values():
        del counts["idx_sha256"]
    old = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    (dataset / "manifest.json").write_text(old, encoding="utf-8")
    assert load_manifest(dataset).to_json() == old  # so that its runs find the same fingerprint
    verify(dataset)
    assert "only the structure of train.idx and validation.idx was checked" in capsys.readouterr().out
    file = dataset / "train.idx"
    for bit in range(8 * 34, 8 * file.stat().st_size, 29):  # lengths, offsets and document starts
        flip(file, bit)
        with pytest.raises(RunError, match=r"train.idx is damaged"):
            verify(dataset)
        flip(file, bit)


def wait_for(process: HashingProcess) -> None:
    deadline = time.monotonic() + 60
    while not process.is_over:
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Notes(list[str]):
    """Replaces the writers of the main rank."""

    is_main = True

    def note(self, text: str) -> None:
        self.append(text)


def trainer(step: int) -> Any:
    return SimpleNamespace(state=SimpleNamespace(step=step), any_rank=lambda flag: flag)


def test_a_large_dataset_is_hashed_during_the_run(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "FOREGROUND_BYTES", 0)
    files = recorded_hashes(dataset, load_manifest(dataset))
    notes = Notes()
    check = DataCheck(notes, files, lambda: "its last intact checkpoint is step-7")  # type: ignore[arg-type]
    assert check._process is not None
    wait_for(check._process)
    check.after_step(trainer(1), None)  # type: ignore[arg-type]
    assert notes[-1].startswith("the dataset is intact") and not check.is_running

    flip(dataset / "train.bin", 8 * 100)
    open_mixture(DataSection(path=str(dataset)))  # too large to be hashed here
    check = DataCheck(notes, files, lambda: "its last intact checkpoint is step-7")  # type: ignore[arg-type]
    assert check._process is not None
    wait_for(check._process)
    with pytest.raises(
        UserError, match=r"train.bin is damaged: .*stopped at step 9, its last intact .* step-7"
    ) as caught:
        check.after_step(trainer(9), None)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    (dataset / "train.idx").unlink()
    process = HashingProcess(files)
    wait_for(process)
    assert "damaged" in str(process.damage())  # the first file in order
    process.close()
    flip(dataset / "train.bin", 8 * 100)
    process = HashingProcess(files)
    wait_for(process)
    assert process.damage() == f"could not read {dataset}/train.idx: No such file or directory"
    process.close()


def test_the_end_of_the_hashing_process_is_not_damage(tmp_path: Path) -> None:
    """Signals to the whole job do not end it: until the run has saved and exits, there may be damage to find."""
    pipe, nothing = tmp_path / "pipe", hashlib.sha256().hexdigest()
    os.mkfifo(pipe)
    notes, files = Notes(), [integrity.FileHash(pipe, nothing)]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGKILL):
        check = DataCheck(notes, files, lambda: "")  # type: ignore[arg-type]
        assert check._process is not None
        with pipe.open("wb"):  # once the process has opened it, too
            check._process._process.send_signal(number)
        wait_for(check._process)
        check.after_step(trainer(1), None)  # type: ignore[arg-type]
        outcome = "not verified: hashing it ended with exit code -9" if number == signal.SIGKILL else "intact"
        assert outcome in notes[-1], number


def test_hashes_are_not_compared_if_switched_off(dataset: Path) -> None:
    flip(dataset / "train.bin", 8 * 100)
    open_mixture(DataSection(path=str(dataset), check_hashes=False))


def config_of(dataset: Path, tmp_path: Path) -> Config:
    values = [
        f"data.path={dataset}", f"run.directory={tmp_path / 'runs'}", "data.sequence_length=32", "train.steps=2",
        "train.global_batch_size=4", "train.micro_batch_size=4",
    ]  # fmt: skip
    return load_config(ROOT / "configs" / "quickstart.yaml", values)


def test_a_sample_is_the_text_that_training_sees(dataset: Path, tmp_path: Path) -> None:
    config = config_of(dataset, tmp_path)
    order = TrainingSamples(open_mixture(config.data), sequence_length=32, index_samples=8, seed=config.run.seed)
    order.prepare(0, 7)
    tokenizer = load_tokenizer(str(dataset))
    found = [sample_text(config, number) for number in range(8)]
    for number, text in enumerate(found):
        decoded = tokenizer.decode(order[number]["tokens"].tolist(), skip_special_tokens=False)
        assert text == decoded.replace(END_OF_TEXT, f"\n{DOCUMENT_END}\n").removesuffix("\n")
        for piece in filter(None, text.replace(DOCUMENT_END, "").split("\n")):
            assert any(piece in original for original in TEXTS)
    assert len(set(found)) == 8 and any(DOCUMENT_END in text for text in found)
    with pytest.raises(UserError, match="sample must be 0 to 7 .* got 8"):
        sample_text(config, 8)


def test_inspect_describes_a_dataset(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dataset_folders(dataset, []) == [dataset]
    inspect(dataset)
    shown = capsys.readouterr().out
    tokens = sum(counts["tokens"] for counts in load_manifest(dataset).splits.values())
    assert f"60 documents, {tokens:,} tokens" in shown and "a.jsonl (file, 1 file," in shown
    assert "special tokens: none but the end-of-document token" in shown
    with pytest.raises(UserError, match="overrides such as data.path=x require a configuration file"):
        dataset_folders(dataset, ["data.path=x"])
    missing = rf"^'.*/sett' does not exist \(did you mean '{dataset}'\?\); pass a dataset, or a configuration file"
    with pytest.raises(UserError, match=missing):
        dataset_folders(dataset.with_name("sett"), [])
