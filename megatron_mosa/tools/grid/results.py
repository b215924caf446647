"""results.jsonl and results.csv of a grid: a row for each cell, with all that is needed to run it again."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_mosa.attention import looks_ahead
from megatron_mosa.errors import UserError
from megatron_mosa.metrics import read_journal, run_totals
from megatron_mosa.model import model_flops, paper_flops, parameter_count
from megatron_mosa.tools.grid.grid import EQUAL, Evaluation, is_name
from megatron_mosa.tools.grid.kinds import kv_bytes
from megatron_mosa.tools.grid.plan import Cell, config_hash
from megatron_mosa.utils import known_values, load_json, parse_json, read_record, write_atomically

RESULTS = "results.jsonl"
KV_TOKENS = 8192
"""The length of the sequence whose keys and values are counted."""

DONE, GAVE_UP, FAILED, MISSING = "done", "diverged", "failed", "missing"
EVALUATED = ("causal_loss", "leak", "flip_rate")
"""Fields of a row that an evaluation measures; the others besides ``decode_ms`` come from the run."""

_NOT_FINITE = "it is not a finite number"
CANNOT_DECODE = "it looks ahead, so that nothing can be decoded"
SETTLED = (DONE, GAVE_UP)
"""What a repetition would not change."""


@dataclass(frozen=True)
class Row:
    """One cell: how it was trained and what came out; None: not known."""

    cell: str
    size: str
    corpus: str
    member: str
    kind: str
    sparsity: float | None
    heads: int
    """Of the member's kind, in a layer."""

    dense_heads: int
    heads_given: bool
    """The grid gives the number of heads, instead of the budget."""

    seed: int
    learning_rate: float
    status: str
    """"done"; "diverged": the run gave up; "failed"; "missing": not run, or not to its end."""

    causal: bool
    """False: NON-CAUSAL, heads look ahead, so that no decoder reaches this loss."""

    equal: str
    relative_to: str
    budget_share: float
    """Cost as a share of the budget."""

    paper_flops: int
    """Of the forward pass of a sequence, by the paper's formulas."""

    executed_flops: int
    """Of a training step on a sequence."""

    parameters: int
    kv_bytes_8k: int | None
    """Bytes of keys and values of one sequence of 8,192 tokens in bf16, computed."""

    steps: int
    tokens: int
    loss: float | None = None
    """Of validation, at the last step."""

    perplexity: float | None = None
    train_seconds: float | None = None
    """Inside steps."""

    step_seconds: float | None = None
    """Median."""

    step_alone: bool | None = None
    """Nothing else ran on the device while the step was timed."""

    peak_memory_gib: float | None = None
    """Of a rank."""

    evaluated_loss: float | None = None
    """Loss of the model as it was trained, on the windows of ``mosa evaluate``, in nats per token."""

    causal_loss: float | None = None
    """Of the same windows, as the model can be decoded: expert choice by calibrated thresholds."""

    leak: float | None = None
    """What the loss loses without a view of the future, in nats, over all positions."""

    leak_error: float | None = None
    """Standard error."""

    flip_rate: float | None = None
    """Share of the selections in the first half of a window that change with another second half."""

    decode_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds of a step that adds a token to each sequence, by number of sequences; measured alone."""

    decode_context: int | None = None
    """Tokens of these sequences before."""

    step_device: str = ""
    """On which the step was measured alone; empty: it was not, or an earlier version did not say."""

    decode_device: str = ""

    not_measured: dict[str, str] = field(default_factory=dict)
    """Reasons why fields are empty."""

    device: str = ""
    """On which the cell was trained."""

    starts: int = 0
    reason: str = ""
    """Why the cell failed."""

    command: str = ""
    """Runs this cell again."""

    config_path: str = ""
    config_hash: str = ""
    run_directory: str = ""
    dataset: str = ""
    dataset_hash: str = ""
    processes: int = 1
    versions: dict[str, str] = field(default_factory=dict)
    finished: float | None = None
    """Unix time."""

    @property
    def is_done(self) -> bool:
        return self.status == DONE and self.loss is not None

    @property
    def label(self) -> str:
        """Member and sparsity, as a report names them."""
        return self.member if self.sparsity is None else f"{self.member} rho {self.sparsity:g}"


def planned_row(cell: Cell, folder: Path, equal: str, relative_to: str, processes: int) -> Row:
    """Return the row of a cell that has not been run."""
    config, model = cell.config(folder), cell.model
    path = folder / "configs" / f"{cell.name}.yaml"
    vocab_size = model.dataset.vocab_size
    launcher = f"torchrun --standalone --nproc-per-node {processes} -m megatron_mosa" if processes > 1 else "mosa"
    return Row(
        cell=cell.name,
        size=model.size,
        corpus=model.corpus,
        member=model.member.name,
        kind=model.member.kind,
        sparsity=model.sparsity,
        heads=model.heads,
        dense_heads=config.model.num_dense_heads,
        heads_given=model.is_given,
        seed=cell.seed,
        learning_rate=config.optimizer.learning_rate,
        status=MISSING,
        causal=not looks_ahead(config),
        equal=equal,
        relative_to=relative_to,
        budget_share=model.share,
        paper_flops=paper_flops(config),
        executed_flops=model_flops(config, vocab_size),
        parameters=parameter_count(config, vocab_size),
        kv_bytes_8k=kv_bytes(config, KV_TOKENS),
        steps=config.train.steps,
        tokens=config.train.steps * config.train.global_batch_size * config.data.sequence_length,
        command=f"{launcher} pretrain {path}",
        config_path=str(path),
        config_hash=config_hash(config),
        run_directory=str(config.run.path),
        dataset=model.dataset.path,
        dataset_hash=model.dataset.fingerprint,
        processes=processes,
    )


def measured(run: Path, steps: int, tokens_per_step: int) -> dict[str, Any] | None:
    """Return the values of a row that a run's metrics hold, or None if they do not hold the validation of its end."""
    lines = read_journal(run / "metrics.jsonl")
    last = next((line for line in reversed(lines) if "validation_loss" in line), None)
    if last is None or last["step"] < steps:
        return None
    # The first line is left out: its steps compile.
    speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
    memory = [line["peak_memory_gib"] for line in lines if line.get("peak_memory_gib")]
    found = {
        "loss": last["validation_loss"],
        "perplexity": None if last["validation_loss"] is None else last.get("validation_perplexity"),
        "causal": last.get("causal"),
        "train_seconds": run_totals(lines).seconds,
        "step_seconds": tokens_per_step / statistics.median(speeds[1:] or speeds) if speeds else None,
        "peak_memory_gib": max(memory, default=None),
    }
    with suppress(ValueError):
        return known_values(Row, found)
    return None


def evaluated(path: Path, asked: Evaluation) -> tuple[dict[str, Any], dict[str, str]] | None:
    """Return the values of a row that ``mosa evaluate`` measured, and reasons for those that do not apply.

    If the file is missing or damaged, or not of as many samples as are asked for, return None; the model is then
    evaluated again.
    """
    try:
        found = load_json(path)
        if not _is_as_asked(found, asked):
            return None
        causal, leak = found["causal"], found["leak"] or {}
        measured = {
            "evaluated_loss": found["full_sequence"]["loss"],
            "causal_loss": None if causal is None else causal["loss"],
            "leak": leak.get("mean"),
            "leak_error": leak.get("error"),
            "flip_rate": found["flip_rate"],
        }
        values = known_values(Row, measured)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    reasons = {
        "causal_loss": "it has no causal counterpart" if causal is None else _NOT_FINITE,
        "leak": _NOT_FINITE,
        "flip_rate": "it has no MoSA heads that select tokens in the first half of a window",
    }
    return values, {name: reason for name, reason in reasons.items() if values[name] is None}


def _is_as_asked(found: dict[str, Any], asked: Evaluation) -> bool:
    """Return whether an evaluation has the asked numbers of samples, as far as it says."""
    settings = found.get("settings", {"samples": found.get("samples", asked.samples)})  # of an earlier version
    calibrated = settings.get("calibration_samples")  # None: not known, or nothing was calibrated
    return settings["samples"] == asked.samples and calibrated in (None, asked.calibration_samples)


def _check(row: Row) -> None:
    """Check what the types of a row leave open, and its readers rely on.

    Raises:
        ValueError: names the field.
    """
    for name in ("size", "corpus", "member"):
        if not is_name(getattr(row, name)):
            raise ValueError(f"{name} is not a name")
    if row.equal not in EQUAL:
        raise ValueError(f"equal is not one of {', '.join(EQUAL)}")
    if (row.loss is None) != (row.perplexity is None):
        raise ValueError("it has a loss without a perplexity, or a perplexity without a loss")
    if not all(number.isdecimal() for number in row.decode_ms):
        raise ValueError("decode_ms has a key that is not a number of sequences")
    if unknown := row.not_measured.keys() - {*EVALUATED, "decode_ms"}:
        raise ValueError(f"not_measured has the unknown key {min(unknown)}")


def write_results(rows: Sequence[Row], folder: Path) -> None:
    """Write results.jsonl and results.csv."""
    text = "".join(json.dumps(asdict(row), allow_nan=False) + "\n" for row in rows)
    write_atomically(folder / RESULTS, text)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    names = [item.name for item in fields(Row)]
    writer.writerow(names)
    for row in rows:
        values = asdict(row)
        cells = (json.dumps(value) if isinstance(value, dict) else value for value in map(values.get, names))
        writer.writerow("" if cell is None else cell for cell in cells)
    write_atomically(folder / "results.csv", table.getvalue())


def read_results(folder: Path) -> list[Row]:
    """Read the rows that a grid wrote into its folder.

    Raises:
        UserError: there are none, or the file is damaged or of another version.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise UserError(f"{folder} has no {RESULTS}; give the output directory of mosa isoflop run")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            rows.append(read_record(Row, parse_json(line)))
            _check(rows[-1])
        except ValueError as error:
            raise UserError(
                f"{path}, line {number} is not a result of mosa isoflop run: {' '.join(str(error).split())}; repeat "
                "that command to write the file again"
            ) from None
    if not rows:
        raise UserError(f"{path} is empty; repeat mosa isoflop run to write it again")
    return rows
