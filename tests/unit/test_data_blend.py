"""Blends keep shares and order and refuse datasets that do not match; indices can be built in advance."""

import json
import math
import os
import shutil
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mosa.__main__ import main
from megatron_mosa.config import Config, load_config
from megatron_mosa.config.schema import DataSection
from megatron_mosa.data import TrainingSamples, ValidationSamples, build_dataset, open_mixture, read_manifest
from megatron_mosa.data.index import PassIndex
from megatron_mosa.data.samples import _apportion
from megatron_mosa.errors import UserError
from megatron_mosa.train import check_start
from megatron_mosa.train.start import build_index, training_samples

LENGTH = 16
INDEX = 50
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
LETTERS = {"a": "aeiou", "b": "bcdfg", "c": "12345"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build datasets a, b and c with one tokenizer, each with its own letters; x is b with another tokenizer."""
    root = tmp_path_factory.mktemp("blend")
    for name, letters in LETTERS.items():
        (root / f"{name}-texts").mkdir()
        for number in range(30):
            words = (letters[number * k % 5] + letters[k % 5] for k in range(200))
            (root / f"{name}-texts" / f"{number}.txt").write_text(letters[number % 5] * number + "".join(words))
    all_texts = [str(root / f"{name}-texts") for name in LETTERS]
    build(root, "all", all_texts)
    for name in LETTERS:
        build(root, name, [str(root / f"{name}-texts")], tokenizer=str(root / "all"))
    build(root, "x", [str(root / "b-texts")], vocab_size=260)
    return root


def build(root: Path, name: str, sources: list[str], tokenizer: str | None = None, vocab_size: int = 257) -> None:
    settings = {"vocab_size": vocab_size, "validation_fraction": 0.3}
    build_dataset(DataSection(path=str(root / name), sources=sources, tokenizer=tokenizer, **settings))


def blend(root: Path, *entries: str) -> DataSection:
    return DataSection(blend=[f"{entry.split()[0]} {root}/{entry.split()[1]}" for entry in entries])


def training(data: DataSection, seed: int = 1, index_samples: int = INDEX, **where) -> TrainingSamples:
    return TrainingSamples(
        open_mixture(data), sequence_length=LENGTH, index_samples=index_samples, seed=seed, **where
    )  # fmt: skip


def owner(tokens: torch.Tensor, root: Path) -> str:
    """Return the dataset of a sample, the only one that contains the sample's most frequent token."""
    token = Counter(tokens.tolist()).most_common(1)[0][0]
    (name,) = [name for name in LETTERS if token in np.fromfile(root / name / "train.bin", dtype=np.uint16)[:5000]]
    return name


def test_every_pass_keeps_the_shares(root: Path) -> None:
    samples = training(blend(root, "0.5 a", "0.3 b", "0.2 c"))
    for number in range(3):
        owners = [owner(samples[number * INDEX + i]["tokens"], root) for i in range(INDEX)]
        counts = Counter(owners)
        assert all(abs(counts[n] - w * INDEX) <= 1 for n, w in (("a", 0.5), ("b", 0.3), ("c", 0.2)))
        for end in range(1, INDEX):  # at any point, not only at the end
            assert abs(owners[:end].count("a") - 0.5 * end) <= 1


def test_the_samples_of_a_dataset_are_those_of_its_own_pass(root: Path) -> None:
    samples = training(blend(root, "0.6 a", "0.4 b"))
    alone = training(DataSection(path=str(root / "b")), index_samples=math.ceil(0.4 * INDEX) + 1)
    ours = [samples[i]["tokens"] for i in range(INDEX)]
    ours = [tokens for tokens in ours if owner(tokens, root) == "b"]
    assert len(ours) == 20
    assert all(torch.equal(tokens, alone[i]["tokens"]) for i, tokens in enumerate(ours))


def test_the_order_is_a_function_of_seed_weights_and_number(root: Path, tmp_path: Path) -> None:
    def order(data: DataSection, where: str, seed: int = 1) -> torch.Tensor:
        samples = training(data, seed, index_path=tmp_path / where)
        return torch.stack([samples[i]["tokens"] for i in range(2 * INDEX)])

    data = blend(root, "0.6 a", "0.4 b")
    first = order(data, "one")
    assert torch.equal(order(data, "two"), first)
    assert torch.equal(order(data, "one"), first)  # from the cache
    assert not torch.equal(first[:INDEX], first[INDEX:])
    assert not torch.equal(order(data, "one", seed=2), first)
    assert not torch.equal(order(blend(root, "0.5 a", "0.5 b"), "one"), first)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, 0.07, 0.03), (1 / 3, 1 / 3, 1 / 3), (0.001, 0.999)])
@pytest.mark.parametrize("size", [1, 2, 7, 100, 1001])
def test_no_pass_requests_more_samples_than_a_dataset_has(
    weights: tuple[float, ...], size: int, root: Path, tmp_path: Path
) -> None:
    entries = [f"{weight:.6f} {name}" for weight, name in zip(weights, LETTERS, strict=False)]
    samples = training(blend(root, *entries), index_samples=size, index_path=tmp_path)
    assert samples[size - 1]["tokens"].shape == (LENGTH,)
    drawn = samples._index.open(0)
    for number, dataset in enumerate(drawn.datasets):  # pyright: ignore
        assert dataset.num_samples > max(drawn.dataset_sample_index[drawn.dataset_index == number], default=-1)


def test_the_fingerprint_covers_weights_order_and_data(root: Path) -> None:
    sections = [
        blend(root, "0.6 a", "0.4 b"), blend(root, "0.4 a", "0.6 b"), blend(root, "0.4 b", "0.6 a"),
        blend(root, "0.6 a", "0.4 c"), DataSection(path=str(root / "a")),
    ]  # fmt: skip
    assert len({open_mixture(data).fingerprint for data in sections}) == len(sections)
    assert open_mixture(sections[-1]).fingerprint == read_manifest(root / "a").fingerprint


def test_validation_has_the_shares_of_the_blend(root: Path) -> None:
    samples = ValidationSamples(
        open_mixture(blend(root, "0.75 a", "0.25 c")), sequence_length=LENGTH, num_samples=20
    )  # fmt: skip
    assert len(samples) == 20
    for name, count, first in (("a", 15, 0), ("c", 5, 15)):
        stored = np.fromfile(root / name / "validation.bin", dtype=np.uint16).astype(int)
        for i in range(count):
            window = stored[i * (LENGTH + 1) : (i + 1) * (LENGTH + 1)].tolist()
            assert samples[first + i]["tokens"].tolist() == window[:-1]
    many = ValidationSamples(open_mixture(blend(root, "0.9 a", "0.1 c")), sequence_length=LENGTH, num_samples=10**6)
    available = read_manifest(root / "a").splits["validation"]["tokens"] // (LENGTH + 1)
    assert len(many) == math.floor(available / 0.9)  # all of a, and only c's share


def test_shares_by_hand() -> None:
    assert _apportion([1.0], [9], 5) == [5]
    assert _apportion([1.0], [3], 5) == [3]
    assert _apportion([0.5, 0.5], [100, 100], 7) in ([4, 3], [3, 4])
    assert _apportion([0.7, 0.2, 0.1], [100, 100, 100], 10) == [7, 2, 1]
    assert _apportion([0.7, 0.2, 0.1], [100, 100, 2], 100) == [14, 4, 2]
    assert _apportion([0.999, 0.001], [100, 100], 10) == [10, 0]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("['0.7 A', '0.2 B']", r"must sum to 1, got 0.9; scale them: '0.7778 A', '0.2222 B'"),
        ("['70 A', '30 B']", r"'70 A' is not 'WEIGHT PATH'"),
        ("['-0.5 A', '1.5 B']", r"'-0.5 A' is not 'WEIGHT PATH'"),
        ("['nan A', '1.0 B']", r"'nan A' is not 'WEIGHT PATH'"),
        ("['most A', '0.5 B']", r"'most A' is not 'WEIGHT PATH'"),
        ("['0.5', '0.5 B']", r"'0.5' is not 'WEIGHT PATH'"),
        ("['0.5 A', '0.5 A']", r"names A twice"),
        ("[]", r"data.path is missing"),
    ],
)
def test_malformed_blends_are_refused(entries: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(QUICKSTART, ["data.path=null", f"data.blend={entries}"])
    assert "\n" not in str(caught.value)


def test_datasets_in_the_home_directory_are_found(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root))
    assert open_mixture(DataSection(blend=["0.5 ~/a", "0.5 ~/b"])).paths == (root / "a", root / "b")


def test_path_and_blend_exclude_each_other() -> None:
    with pytest.raises(UserError, match=r"data.path=.* and data.blend=.* are both given"):
        load_config(QUICKSTART, ["data.blend=['1.0 A']"])
    assert load_config(QUICKSTART, ["data.path=null", "data.blend=['0.333 A', '0.333 B', '0.333 C']"]).data.blend


def test_mismatched_datasets_are_refused(root: Path) -> None:
    with pytest.raises(UserError, match=rf"{root}/a and {root}/x were built with different tokenizers; .*--force"):
        open_mixture(blend(root, "0.6 a", "0.4 x"))
    shutil.copytree(root / "a", root / "copy", dirs_exist_ok=True)
    with pytest.raises(UserError, match=rf"{root}/a and {root}/copy are the same dataset"):
        open_mixture(blend(root, "0.6 a", "0.4 copy"))
    with pytest.raises(UserError, match="none does not exist"):
        open_mixture(blend(root, "0.6 a", "0.4 none"))
    with pytest.raises(UserError, match=r"data.sequence_length must be at most .* train split of .*/a, got"):
        TrainingSamples(open_mixture(blend(root, "0.5 a", "0.5 b")), sequence_length=10**6, index_samples=1, seed=1)
    with pytest.raises(UserError, match=r"data.path=null: a build writes one dataset"):
        build_dataset(blend(root, "0.5 a", "0.5 b"))


def run_config(root: Path, *changes: str) -> Config:
    entries = f"data.blend=['0.6 {root}/a', '0.4 {root}/b']"
    sizes = ["train.steps=10", "train.global_batch_size=16", "data.index_samples=50", f"data.sequence_length={LENGTH}"]
    return load_config(QUICKSTART, ["data.path=null", entries, *sizes, f"run.directory={root}/runs", *changes])


def test_a_run_is_tied_to_its_blend(root: Path) -> None:
    config = run_config(root)
    start = check_start(config, 2)
    assert start.data_identity["fingerprint"] == open_mixture(config.data).fingerprint
    assert start.data_identity["vocab_size"] == read_manifest(root / "b").vocab_size
    changed = check_start(run_config(root, f"data.blend=['0.5 {root}/a', '0.5 {root}/b']"), 2)
    assert changed.data_identity["fingerprint"] != start.data_identity["fingerprint"]


def tree(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in (folder, *sorted(folder.rglob("*")))}


@pytest.mark.parametrize("several", [True, False])
def test_training_writes_nothing_once_the_index_is_built(
    several: bool, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("index_cache"))
    changes = [] if several else [f"data.path={tmp_path}/a", "data.blend=[]", f"data.tokenizer={root}/all"]
    config = run_config(tmp_path, f"data.index_path={tmp_path}/indices", *changes)
    datasets = [tree(tmp_path / name) for name in "ab"]
    folders = build_index(config)
    assert [folder.name[-3:] for folder in folders] == ["-p0", "-p1", "-p2", "-p3"]  # 160 samples, 50 a pass
    assert [tree(tmp_path / name) for name in "ab"] == datasets
    indices = tree(tmp_path / "indices")
    monkeypatch.setattr(PassIndex, "build", None)
    monkeypatch.setattr(np, "save", None)
    samples = training_samples(config, open_mixture(config.data), 50)
    samples.prepare(0, 160)
    assert all(samples[i]["tokens"].shape == (LENGTH,) for i in range(161))
    assert tree(tmp_path / "indices") == indices and [tree(tmp_path / name) for name in "ab"] == datasets
    assert build_index(config) == folders  # nothing to do the second time


def test_the_index_is_stored_in_the_first_dataset_by_default(root: Path, tmp_path: Path) -> None:
    for name in "ab":
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("index_cache"))
    build_index(run_config(tmp_path))
    assert (tmp_path / "a" / "index_cache").is_dir() and not (tmp_path / "b" / "index_cache").exists()


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mosa", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_data_commands_accept_blends(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    overrides = ["data.path=null", "train.steps=3", f"data.index_path={tmp_path}/i", f"run.directory={tmp_path}"]
    fits = f"data.blend=['0.6 {root}/a', '0.4 {root}/b']"
    assert command(monkeypatch, "data", "index", str(QUICKSTART), *overrides, fits) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(folder) for folder in sorted((tmp_path / "i").iterdir())] and len(printed) == 1
    mixed = f"data.blend=['0.6 {root}/a', '0.4 {root}/x']"
    for arguments in (["index", fits.replace("0.6", "0.7")], ["index", mixed], ["build", fits]):
        assert command(monkeypatch, "data", arguments[0], str(QUICKSTART), *overrides, *arguments[1:]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and "\n" not in error


def test_the_index_has_the_pass_size_recorded_in_a_checkpoint(root: Path, tmp_path: Path) -> None:
    config = run_config(root, "data.index_samples=null", f"data.index_path={tmp_path}/i", f"run.directory={tmp_path}")
    folder = Path(config.run.directory) / config.run.name / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True)
    metadata = {"format_version": 1, "step": 3, "consumed_samples": 48, "optimizer_step": 3, "config": asdict(config)}
    (folder / "metadata.json").write_text(
        json.dumps(metadata | {"data": {"index_samples": 40}, "versions": {}, "layout": {}})
    )
    assert [f"-n40-s{config.run.seed}-p{i}" in str(f) for i, f in enumerate(build_index(config))] == [True] * 4
    assert os.listdir(tmp_path / "i")


def test_a_short_run_may_be_extended_without_a_change_of_the_shares(root: Path, tmp_path: Path) -> None:
    """Each pass begins with a sample of every dataset, so small passes would give small weights too much."""
    blend = f"data.blend=['0.99 {root}/a', '0.01 {root}/b']"
    at = [f"run.directory={tmp_path}", f"data.index_path={tmp_path}/i", "data.index_samples=null", blend]
    (folder,) = build_index(run_config(root, *at, "train.steps=1", "optimizer.warmup_steps=1"))
    assert "-n10000-" in folder.name
    (owners,) = (np.load(file) for file in folder.glob("*-dataset_index.npy"))
    assert abs(int((owners == 1).sum()) - 100) <= 1
    (folder,) = build_index(run_config(root, *at, "train.steps=1000"))
    assert "-n16000-" in folder.name
    alone = [*at[:3], f"data.path={root}/a", "data.blend=[]", "train.steps=1", "optimizer.warmup_steps=1"]
    (folder,) = build_index(run_config(root, *alone))
    assert "-n16-" in folder.name
