"""``mosa report``: what came out of a grid, as report.md and pictures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from megatron_mosa.errors import RunError, UserError
from megatron_mosa.metrics import load_pyplot
from megatron_mosa.tools.comparison.curves import plot, read_run
from megatron_mosa.tools.grid.match import matched
from megatron_mosa.tools.grid.match import table as match_table
from megatron_mosa.tools.grid.models import Place, TrainedModel, places
from megatron_mosa.tools.grid.plots import plot_costs
from megatron_mosa.tools.grid.results import DONE, Row
from megatron_mosa.utils import counted, decimals, load_json, write_atomically

_EQUAL = {
    "paper_flops": "forward FLOPs by the paper's formulas",
    "executed_flops": "executed FLOPs of a step",
    "step_time": "measured time of a step",
}
_COLUMNS = (
    "model", "heads", "budget", "seeds", "learning rate", "loss", "spread", "perplexity", "loss - reference",
    "parameters", "step, ms", "memory, GiB", "KV at 8k, MiB", "causal",
)  # fmt: skip
_MOST_NATS = 10  # difference of losses, beyond which a share of perplexity says nothing
_MEASURED = {"causal_loss": "made causal", "leak": "leak", "flip_rate": "flip rate", "decode_ms": "decoding"}
"""Fields of a row that are measured once a model is trained, and what the report calls them."""

_LEGEND = (
    "*made causal*: what the loss rises by if the model selects as a decoder must. *leak*: what it rises by without a "
    "view of later tokens (with its standard error). *flip rate*: share of the selections in the first half of a "
    "window that change with another second half."
)


def write_report(rows: Sequence[Row], folder: Path, output: Path) -> list[str]:
    """Write report.md and its pictures into a directory; return the names of the files.

    If matplotlib is not installed, this prints a line that says so and draws no pictures.

    Args:
        folder: of the grid; losses over time are read from its runs, as far as they are there.

    Raises:
        OSError: the directory cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    pictures = _plot_all(rows, folder, output)
    write_atomically(output / "report.md", markdown(rows, pictures, _command(folder)))
    return ["report.md", *(name for names in pictures.values() for name in names)]


def _plot_all(rows: Sequence[Row], folder: Path, output: Path) -> dict[tuple[str, str], list[str]]:
    """Return the names of the pictures by size and corpus."""
    try:
        load_pyplot()
    except RunError as error:
        print(f"report.md has no pictures: {error}")
        return {}
    return {(place.size, place.corpus): _plot(place, folder, output) for place in places(rows) if place.models}


def _command(folder: Path) -> str:
    """Return the command that trained the grid, as far as its folder says."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return f"mosa isoflop run {load_json(folder / 'grid.json')['file']}"
    return "mosa isoflop run"


def _plot(place: Place, folder: Path, output: Path) -> list[str]:
    stem = f"{place.size}-{place.corpus}"
    plot_costs(
        place, f"{place.size} on {place.corpus}: equal {_EQUAL[place.models[0].row.equal]}", output / f"{stem}.png"
    )
    found = []
    for model in place.models:
        with suppress(UserError):  # without losses, as when the directories of runs have been removed
            found.append((model, read_run(folder / "runs" / model.row.cell)))
    if all(model.is_alone for model, _ in found):  # otherwise, own and shared paces would stand side by side
        found = [(model, curves.at_pace(model.step_seconds or 0.0)) for model, curves in found]
    if not found:
        return [f"{stem}.png"]
    plot([curves for _, curves in found], output / f"{stem}-losses.png")
    return [f"{stem}.png", f"{stem}-losses.png"]


def markdown(
    rows: Sequence[Row], pictures: Mapping[tuple[str, str], list[str]], command: str = "mosa isoflop run"
) -> str:
    """Return the report, complete enough to be a page of its own.

    Args:
        pictures: names of files by size and corpus.
        command: what trained the models.
    """
    counts, devices = Counter(row.status for row in rows), _devices(rows)
    first = rows[0]
    lines = [
        f"# Models at equal {_EQUAL[first.equal]}",
        "",
        f"Trained by `{command}`. The budget is the cost of {first.relative_to}. "
        f"{counts[DONE]} of {counted(len(rows), 'run')} {'is' if counts[DONE] == 1 else 'are'} done"
        + "".join(f", {count} {status}" for status, count in sorted(counts.items()) if status != DONE)
        + f". Trained on {_joined(row.device for row in rows if row.device) or 'nothing yet'}, "
        f"with {_joined(_versions(row) for row in rows if row.versions) or 'nothing yet'}.{_measured_on(devices)}",
        "",
        "- Loss (nats per token) and perplexity are of validation, after the last step; the mean over seeds. *spread* "
        "is the largest difference of losses between seeds, and *loss - reference* compares means over the "
        "seeds that both have, or over all seeds if they have none in common.",
        "- **NON-CAUSAL**: heads look ahead, so no decoder reaches this loss. Keys and values are then those of causal "
        "heads of the same sparsity.",
        "- Step times with ~ were measured while other runs shared the device, and say little; `mosa isoflop run` with "
        "`--measure` replaces them.",
        "- In the picture of losses, seconds are steps times the time of one, if all models' were measured alone; "
        "otherwise they are those of the runs.",
        "- Keys and values are computed, in bf16, for the share of tokens that the sparsity asks for.",
    ]
    for place in places(rows):
        lines += ["", f"## {place.size} on {place.corpus}", "", *_section(place)]
        lines += [line for name in pictures.get((place.size, place.corpus), []) for line in ("", f"![{name}]({name})")]
    for what, names in devices.items():
        if len(names) > 1:
            lines += ["", f"**Measured on different devices: {what} cannot be compared between all models.**"]
    if searches := matched(rows):
        lines += ["", "## Equal perplexity", "", *match_table(searches)]
    lines += _failures(rows)
    lines += [
        "",
        "## To repeat",
        "",
        "Each run's command (with run.name=NAME to repeat it in a run directory of its own; the seed is in the file), "
        "and the hashes of its configuration and dataset:",
    ]
    lines += ["", "| command | configuration | dataset |", "| --- | --- | --- |"]
    lines += [f"| `{row.command}` | {row.config_hash[:12]} | {row.dataset} {row.dataset_hash[:12]} |" for row in rows]
    return "\n".join(lines) + "\n"


def _devices(rows: Sequence[Row]) -> dict[str, set[str]]:
    """Return where the times in the report were measured."""
    models = [model for place in places(rows) for model in place.models]
    found = {
        "step times": {device for model in models for device in model.step_devices},
        "decoding times": {row.decode_device for model in models for row in model.rows},
    }
    return {what: names - {""} for what, names in found.items() if names - {""}}


def _measured_on(devices: Mapping[str, set[str]]) -> str:
    parts = [f"{'; '.join(sorted(names))} ({what})" for what, names in devices.items()]
    return f" Measured on {', '.join(parts)}." if parts else ""


def _section(place: Place) -> list[str]:
    if not place.models:
        return ["No run is done."]
    reference = place.reference
    lines = [f"| {' | '.join(_COLUMNS)} |", "| --- |" + " ---: |" * (len(_COLUMNS) - 1)]
    lines += [f"| {' | '.join(_cells(model, reference))} |" for model in place.models]
    row = place.models[0].row
    lines += [
        "",
        f"{counted(row.steps, 'step')}, {row.tokens / 1e6:,.4g}M tokens of {row.dataset} "
        f"(hash {row.dataset_hash[:12]}) each.",
    ]
    noise = place.noise
    if noise is None:
        lines[-1] += " Every model has one seed, so nothing is known about the noise."
    else:
        lines[-1] += (
            f" Two seeds of one model differ by up to {noise:.4f}: smaller differences between models mean little."
        )
    return [*lines, *_evaluations(place), *_learning_rates(place)]


def _cells(model: TrainedModel, reference: TrainedModel | None) -> list[str]:
    row = model.row
    step = "" if model.milliseconds is None else f"{'' if model.is_alone else '~'}{model.milliseconds:,.1f}"
    delta = "" if reference is None or reference is model else _delta(model.above(reference))
    return [
        model.name,
        model.heads,
        f"{100 * row.budget_share:.2f} %",
        ", ".join(map(str, sorted(model.losses))),
        f"{row.learning_rate:g}",
        f"{model.loss:.4f}",
        "" if model.spread is None else f"{model.spread:.4f}",
        decimals(model.perplexity),
        delta,
        f"{row.parameters / 1e6:,.1f} M",
        step,
        "" if model.peak_memory_gib is None else f"{model.peak_memory_gib:.2f}",
        "" if model.kv_mib is None else f"{model.kv_mib:.2f}",
        "yes" if model.is_causal else "**NON-CAUSAL**",
    ]


def _evaluations(place: Place) -> list[str]:
    """Return a table of what was measured of the trained models besides the loss, with reasons for empty cells."""
    models = [m for m in place.models if m.not_measured or m.mean("evaluated_loss") is not None or m.row.decode_ms]
    if not models:
        return []
    batches = sorted({batch for model in models for row in model.rows for batch in row.decode_ms}, key=int)
    contexts = {row.decode_context for model in models for row in model.rows if row.decode_context}
    columns = ["model", "made causal", "leak", "flip rate", *(f"decoding {batch}, ms" for batch in batches)]
    lines = ["", f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    for model in models:
        leak, error, flips = (model.mean(name) for name in ("leak", "leak_error", "flip_rate"))
        cells = [
            model.name,
            _signed(model.made_causal),
            _signed(leak) + ("" if error is None else f" ({error:.4f})"),
            "" if flips is None else f"{100 * flips:.1f} %",
            *("" if (ms := model.decode_ms(batch)) is None else f"{ms:.2f}" for batch in batches),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", _LEGEND]
    if batches:
        lines[-1] += (
            f" *decoding N*: a step that adds a token to each of N sequences, after {_joined(map(str, contexts))} "
            "tokens, measured alone."
        )
    return [*lines, *_empty_cells(models)]


def _empty_cells(models: Sequence[TrainedModel]) -> list[str]:
    """Return the reasons why cells are empty, each with the models that it holds for."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for model in models:
        for name, reason in model.not_measured.items():
            reasons.setdefault((name, reason), []).append(model.name)
    lines = [f"- {_MEASURED[name]} of {', '.join(names)}: {reason}" for (name, reason), names in reasons.items()]
    return ["", "Empty cells:", "", *lines] if lines else []


def _signed(change: float | None) -> str:
    return "" if change is None else "0" if abs(change) < 5e-5 else f"{change:+.4f}"


def _delta(difference: float) -> str:
    if difference > _MOST_NATS:
        return f"{difference:+.4f}"
    return f"{difference:+.4f} ({100 * math.expm1(difference):+.1f} % perplexity)"


def _learning_rates(place: Place) -> list[str]:
    tried = [model for model in place.models if model.trials]
    if not tried:
        return []
    lines = ["", "Losses of the first seed by learning rate; the best is used for the others:", ""]
    for model in tried:
        trials = sorted(model.trials, key=lambda row: row.learning_rate)
        parts = [f"{row.learning_rate:g}: {'diverged' if row.loss is None else f'{row.loss:.4f}'}" for row in trials]
        at_edge = model.row.learning_rate in (trials[0].learning_rate, trials[-1].learning_rate)
        edge = "; the best is at an end of the list, so the optimum may lie beyond it" if at_edge else ""
        lines.append(f"- {model.name}: {', '.join(parts)}{edge}")
    if untuned := _untuned(place):
        lines += [
            "",
            f"**No learning rates were tried for {', '.join(untuned)}, but for {place.relative_to} they were: part of "
            "the difference may be the learning rate.**",
        ]
    return lines


def _untuned(place: Place) -> list[str]:
    """Return the models without a tuned learning rate, neither their own nor the reference's, although it has one."""
    reference = place.reference
    if reference is None or not reference.trials:
        return []
    tuned = {model.row.member for model in place.models if model.trials}
    rates = {model.row.learning_rate for model in place.models if model.trials}
    return [m.name for m in place.models if m.row.member not in tuned and m.row.learning_rate not in rates]


def _failures(rows: Sequence[Row]) -> list[str]:
    left = [row for row in rows if row.status != DONE]
    if not left:
        return []
    lines = ["", "## Without a result", ""]
    return lines + [f"- {row.cell}: {row.status}{f': {row.reason}' if row.reason else ''}" for row in left]


def _versions(row: Row) -> str:
    return ", ".join(f"{name} {version}" for name, version in row.versions.items() if version != "not installed")


def _joined(words: object) -> str:
    return "; ".join(dict.fromkeys(words))  # type: ignore[call-overload]
