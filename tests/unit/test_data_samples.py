"""Samples and batches: the order depends on seed and sample number only, not on layout or length of the run."""

import math
import multiprocessing
import os
import shutil
import signal
import string
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mosa.config.schema import DataSection
from megatron_mosa.data import (
    Mixture,
    TrainingSamples,
    ValidationSamples,
    build_dataset,
    loader,
    open_mixture,
    training_batches,
    validation_batches,
)
from megatron_mosa.data.samples import document_starts
from megatron_mosa.errors import UserError

LENGTH = 16
INDEX = 24  # samples per pass


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    (root / "texts").mkdir()
    for number in range(40):
        (root / "texts" / f"{number}.txt").write_text(string.printable + " ".join(str(number * k) for k in range(60)))
    settings = {"vocab_size": 270, "validation_fraction": 0.3, "sequence_length": LENGTH}
    build_dataset(DataSection(path=str(root / "set"), sources=[str(root / "texts")], **settings))
    return root / "set"


def mixture(path: Path) -> Mixture:
    return open_mixture(DataSection(path=str(path)))


def training(path: Path, seed: int = 1, index_samples: int = INDEX) -> TrainingSamples:
    return TrainingSamples(mixture(path), sequence_length=LENGTH, index_samples=index_samples, seed=seed)


def steps(samples: TrainingSamples, count: int, size: int, micro: int, consumed: int = 0, workers: int = 0):
    """Return tokens [count * 8, T] of ``count`` steps of 8 samples, gathered from all simulated ranks."""
    ranks = [
        training_batches(
            samples, consumed_samples=consumed, global_batch_size=8, micro_batch_size=micro, data_parallel_rank=rank,
            data_parallel_size=size, num_workers=workers,
        )
        for rank in range(size)
    ]  # fmt: skip
    rows = []
    for _ in range(count):
        for batches in ranks:
            for batch in islice(batches, 8 // size // micro):
                assert batch["tokens"].shape == (micro, LENGTH)
                rows.append(batch["tokens"])
    return torch.cat(rows)


def test_samples_are_windows_of_the_text_with_shifted_labels(dataset: Path) -> None:
    samples = training(dataset)
    assert (samples[0]["tokens"].dtype, samples[0]["loss_mask"].dtype) == (torch.int64, torch.float32)
    for index in (0, 5, INDEX - 1, INDEX, 3 * INDEX + 2):
        item = samples[index]
        assert set(item) == {"tokens", "labels", "loss_mask"}
        assert item["tokens"].shape == item["labels"].shape == item["loss_mask"].shape == (LENGTH,)
        assert torch.equal(item["labels"][:-1], item["tokens"][1:])
        assert (item["loss_mask"] == 1).all()  # no padding, also not for token 0 and end-of-document tokens


def test_document_starts_follow_end_tokens(dataset: Path) -> None:
    assert document_starts(torch.tensor([5, 9, 9, 1, 2, 9]), 9).tolist() == [0, 0, 2, 3, 3, 3]
    assert document_starts(torch.tensor([9]), 9).tolist() == [0]
    data = mixture(dataset)
    end = data.manifest.end_of_document_id
    training_set = TrainingSamples(data, sequence_length=LENGTH, index_samples=200, seed=1, mark_documents=True)
    validation_set = ValidationSamples(data, sequence_length=LENGTH, num_samples=10**6, mark_documents=True)
    items = [training_set[i] for i in range(200)] + [validation_set[i] for i in range(len(validation_set))]
    assert sum(end in item["tokens"][:-1] for item in items) > 10
    for item in items:
        starts = item["document_starts"].tolist()
        for t in range(1, LENGTH):
            assert starts[t] == (t if item["tokens"][t - 1] == end else starts[t - 1])
    lengths = validation_set.document_lengths()
    assert [sum(row) for row in lengths] == [LENGTH] * len(validation_set)
    ends = sum((validation_set[i]["tokens"][:-1] == end).sum().item() for i in range(len(validation_set)))
    assert sum(map(len, lengths)) == len(validation_set) + ends


def test_no_token_counts_as_padding(dataset: Path) -> None:
    samples = training(dataset, index_samples=400)
    items = [samples[i] for i in range(400)]
    labels = torch.cat([item["labels"] for item in items])
    assert (
        samples.mixture.manifest.end_of_document_id in labels and len(labels.unique()) > 100
    )  # most of the vocabulary
    assert all((item["loss_mask"] == 1).all() for item in items)


def test_one_pass_over_the_split_has_every_window_once(dataset: Path) -> None:
    tokens = training(dataset).mixture.manifest.splits["train"]["tokens"]
    whole = (tokens - 1) // LENGTH
    samples = training(dataset, index_samples=whole)
    seen = Counter(token for i in range(whole) for token in samples[i]["tokens"].tolist())
    stored = Counter(np.fromfile(dataset / "train.bin", dtype=np.uint16).tolist())
    assert seen <= stored and stored.total() - seen.total() <= LENGTH


def test_order_is_the_same_for_every_layout(dataset: Path) -> None:
    samples = training(dataset)
    expected = torch.stack([samples[i]["tokens"] for i in range(32)])
    for size, micro in ((1, 8), (1, 1), (2, 4), (2, 2), (4, 1), (8, 1)):
        assert torch.equal(steps(samples, 4, size, micro), expected)
    assert torch.equal(steps(samples, 4, 2, 2, workers=2), expected)


def test_resuming_continues_exactly(dataset: Path) -> None:
    whole = steps(training(dataset), 6, 2, 2)
    assert torch.equal(steps(training(dataset), 2, 1, 4, consumed=32, workers=1), whole[32:])


def test_a_longer_run_adds_passes_and_keeps_the_earlier_ones(dataset: Path) -> None:
    short = training(dataset)
    before = [short[i]["tokens"] for i in range(INDEX)]
    long = training(dataset)
    passes = [[long[p * INDEX + i]["tokens"] for i in range(INDEX)] for p in (2, 1, 0)]
    assert all(map(torch.equal, passes[2], before))
    assert not all(map(torch.equal, passes[2], passes[1])) and not all(map(torch.equal, passes[1], passes[0]))


def test_order_survives_a_lost_cache_and_depends_on_the_seed(dataset: Path, tmp_path: Path) -> None:
    before = [training(dataset)[i]["tokens"] for i in range(INDEX)]
    moved = Path(shutil.copytree(dataset, tmp_path / "moved", ignore=shutil.ignore_patterns("index_cache")))
    again = training(moved)
    assert all(torch.equal(again[i]["tokens"], before[i]) for i in range(INDEX))
    other = training(moved, seed=77)
    assert not all(torch.equal(other[i]["tokens"], before[i]) for i in range(INDEX))


def test_prepare_builds_the_passes_of_the_samples(dataset: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy", ignore=shutil.ignore_patterns("index_cache")))
    training(copy).prepare(INDEX - 1, 2 * INDEX)
    assert sorted(folder.name[-3:] for folder in (copy / "index_cache").iterdir()) == ["-p0", "-p1", "-p2"]


def test_an_unwritable_index_cache_is_refused(dataset: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy", ignore=shutil.ignore_patterns("index_cache")))
    (copy / "index_cache").write_text("a file in place of the folder, which also stops root")
    with pytest.raises(UserError, match=r"could not write the sample index.*must be writable"):
        training(copy).prepare(0, 1)


def batches_of_a_rank(path: Path, workers: int) -> Iterator[dict[str, torch.Tensor]]:
    """Load the batches of rank 1 of two, four micro-batches per step."""
    return training_batches(
        training(path), consumed_samples=0, global_batch_size=8, micro_batch_size=1, data_parallel_rank=1,
        data_parallel_size=2, num_workers=workers,
    )  # fmt: skip


def test_loading_does_not_change_the_global_random_state(dataset: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    steps(training(dataset), 1, 1, 4, workers=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_of_loader_processes_hold_no_shared_memory(dataset: Path) -> None:
    """Each tensor there would hold a file descriptor, and a step keeps all its micro-batches."""
    step, expected = (list(islice(batches_of_a_rank(dataset, workers), 4)) for workers in (1, 0))
    assert not any(tensor.is_shared() for batch in step for tensor in batch.values())
    for batch, here in zip(step, expected, strict=True):
        assert all(torch.equal(batch[name], here[name]) for name in here)


@pytest.mark.parametrize(
    ("workers", "has_cuda", "prefetch"), [(0, True, None), (3, True, 6), (9, True, 2), (3, False, 2)]
)
def test_on_gpus_a_whole_step_is_prefetched(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, workers: int, has_cuda: bool, prefetch: int | None
) -> None:
    options: dict = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(loader, "DataLoader", lambda samples, **given: options.update(given) or [])
    training_batches(
        training(dataset), consumed_samples=0, global_batch_size=64, micro_batch_size=2, data_parallel_rank=0,
        data_parallel_size=2, num_workers=workers,
    )  # fmt: skip
    assert (options["prefetch_factor"], options["pin_memory"]) == (prefetch, has_cuda)


def test_loading_ends_with_the_run(dataset: Path) -> None:
    batches = training_batches(
        training(dataset), consumed_samples=8, global_batch_size=8, micro_batch_size=2, data_parallel_rank=1,
        data_parallel_size=2, num_workers=0, end=24,
    )  # fmt: skip
    assert len(list(batches)) == 2 * 2  # steps of 8 from 8 to 24, of which this rank takes 4 samples each


def test_loader_process_outlives_a_signal_to_the_job(dataset: Path) -> None:
    others = set(multiprocessing.active_children())
    batches = training_batches(
        training(dataset), consumed_samples=0, global_batch_size=4, micro_batch_size=4, data_parallel_rank=0,
        data_parallel_size=1, num_workers=1,
    )  # fmt: skip
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    # From another process, like a scheduler's signals.
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    subprocess.run(["kill", "-INT", str(worker.pid)], check=True)
    subprocess.run(["kill", "-HUP", str(worker.pid)], check=True)
    time.sleep(0.3)
    assert worker.is_alive()
    for _ in range(4):
        next(batches)
    os.kill(worker.pid or 0, signal.SIGTERM)  # from the trainer
    worker.join(timeout=5)
    assert not worker.is_alive()


def test_process_with_a_live_loader_can_exit(dataset: Path) -> None:
    code = (
        "from megatron_mosa.config.schema import DataSection;"
        "from megatron_mosa.data import TrainingSamples, open_mixture, training_batches;"
        f"m = open_mixture(DataSection(path={str(dataset)!r}));"
        f"s = TrainingSamples(m, sequence_length={LENGTH}, index_samples={INDEX}, seed=1);"
        "b = training_batches(s, consumed_samples=0, global_batch_size=2, micro_batch_size=2,"
        "data_parallel_rank=0, data_parallel_size=1, num_workers=1); next(b)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False, timeout=240)
    assert done.returncode == 0


def test_validation_reads_the_file_in_order_and_computes_its_entropy(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = ValidationSamples(mixture(dataset), sequence_length=LENGTH, num_samples=7)
    stored = np.fromfile(dataset / "validation.bin", dtype=np.uint16).astype(int).tolist()
    labels: list[int] = []
    for i in range(7):
        window = stored[i * (LENGTH + 1) : (i + 1) * (LENGTH + 1)]
        assert samples[i]["tokens"].tolist() == window[:-1] and samples[i]["labels"].tolist() == window[1:]
        labels += window[1:]
    counts = Counter(labels)
    expected = -sum(c / len(labels) * math.log(c / len(labels)) for c in counts.values())
    assert len(samples) == 7 and samples.unigram_entropy() == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(samples, "_window", lambda index: np.array([5] + [1] * LENGTH))
    assert samples.unigram_entropy() == 0  # the first token of a window is no label
    everything = ValidationSamples(mixture(dataset), sequence_length=LENGTH, num_samples=10**6)
    assert len(everything) == len(stored) // (LENGTH + 1)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("micro", [1, 3, 4])
def test_validation_batches_have_each_sample_once(dataset: Path, size: int, micro: int) -> None:
    samples = ValidationSamples(mixture(dataset), sequence_length=LENGTH, num_samples=10)
    ranks = [
        list(validation_batches(samples, micro_batch_size=micro, data_parallel_rank=rank, data_parallel_size=size))
        for rank in range(size)
    ]
    shapes = [[tuple(batch["tokens"].shape) for batch in batches] for batches in ranks]
    assert all(shape == shapes[0] for shape in shapes)
    counted = [
        row.tolist()
        for batches in ranks
        for batch in batches
        for row, mask in zip(batch["tokens"], batch["loss_mask"], strict=True)
        if mask.all()
    ]
    assert counted == [samples[i]["tokens"].tolist() for i in range(10)]
    assert sum(batch["loss_mask"].sum() for batches in ranks for batch in batches) == 10 * LENGTH


def test_a_sequence_longer_than_a_split_is_refused(dataset: Path) -> None:
    tokens = training(dataset).mixture.manifest.splits["train"]["tokens"]
    with pytest.raises(UserError, match=f"data.sequence_length must be at most {tokens - 1}, .*, got {tokens};"):
        TrainingSamples(mixture(dataset), sequence_length=tokens, index_samples=1, seed=1)
    longest = TrainingSamples(mixture(dataset), sequence_length=tokens - 1, index_samples=1, seed=1)
    assert longest[0]["tokens"].shape == (tokens - 1,)
    with pytest.raises(UserError, match="validation split"):
        ValidationSamples(mixture(dataset), sequence_length=10**6, num_samples=1)
