"""The fewest heads that match the reference's perplexity, and what they save, beside the paper's table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_mosa.tools.grid.models import Place, TrainedModel, places
from megatron_mosa.tools.grid.results import Row
from megatron_mosa.utils import counted, decimals


@dataclass(frozen=True)
class Matched:
    """A member's search: its models by number of heads, and the first of them that matches."""

    place: Place
    member: str
    """With its sparsity."""

    tried: tuple[TrainedModel, ...]
    """From the fewest heads to the most."""

    model: TrainedModel | None
    """The one with the fewest heads whose loss is at most the reference's, over the seeds that both have; None: no
    number of heads matches."""


_PAPER_SIZES = ("Tiny", "Small", "Medium", "Large")
_Pairs = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class _Quantity:
    """A row of the table, with the paper's numbers for dense and MoSA models of equal perplexity (A100, PyTorch)."""

    name: str
    value: Callable[[TrainedModel, TrainedModel], float | None]
    """Of a model beside another."""

    decimals: int
    paper: _Pairs
    """By size. Their MoSA is not causal. Keys and values and FLOPs are not printed: both follow from the heads."""


_PAPER_HEADS = ("17 (32)", "14 (32)", "12 (32)", "16 (16)")
_QUANTITIES = (
    _Quantity(
        "perplexity", lambda model, other: model.beside(other).perplexity, 2,
        ((22.46, 22.40), (16.02, 16.01), (13.94, 13.76), (12.20, 12.16)),
    ),
    _Quantity(
        "step, ms", lambda model, _: model.milliseconds, 1,
        ((137, 127), (326, 319), (619, 592), (807, 703)),
    ),
    _Quantity(
        "peak memory, GiB (paper: GB)", lambda model, _: model.peak_memory_gib, 2,
        ((21.1, 19.0), (32.4, 31.4), (50.2, 49.4), (104.1, 94.5)),
    ),
    _Quantity(
        "KV of 8,192 tokens, MiB (paper: pairs a layer at 1,024)", lambda model, _: model.kv_mib, 2,
        ((9216, 4640), (9216, 4544), (9216, 4480), (16384, 5120)),
    ),
    _Quantity(
        "forward GFLOP of a sequence", lambda model, _: model.row.paper_flops / 1e9, 2,
        ((54.76, 39.64), (219.85, 186.02), (439.70, 371.35), (1130.65, 845.95)),
    ),
)  # fmt: skip


def matched(rows: Sequence[Row]) -> list[Matched]:
    """Return the search of each member whose numbers of heads the grid gives, at each sparsity."""
    found = []
    for place in places(rows):
        reference = place.reference
        groups: dict[str, list[TrainedModel]] = {}
        for model in place.models:
            if model.row.heads_given and model is not reference:
                groups.setdefault(model.row.label, []).append(model)
        for member, models in groups.items():
            models.sort(key=lambda model: model.row.heads)
            fits = (model for model in models if reference is not None and model.above(reference) <= 0)
            found.append(Matched(place, member, tuple(models), next(fits, None)))
    return found


def table(searches: Sequence[Matched]) -> list[str]:
    """Return the report on all searches as lines of Markdown."""
    lines: list[str] = []
    for search in searches:
        lines += [*([""] if lines else []), *_lines(search)]
    return lines


def _lines(search: Matched) -> list[str]:
    where = f"{search.member}, {search.place.size} on {search.place.corpus}"
    reference, model = search.place.reference, search.model
    if reference is None:
        return [f"{where}: {search.place.relative_to} has no result to match yet."]
    counts = ", ".join(str(tried.row.heads) for tried in search.tried)
    counts += " head" if counts == "1" else " heads"
    if model is None:
        best = max(search.tried, key=reference.above)
        reference, best = reference.beside(best), best.beside(reference)
        return [
            f"{where}: none of {counts} matches {reference.name} (perplexity {decimals(reference.perplexity)}); the "
            f"best, {counted(best.row.heads, 'head')}, has {decimals(best.perplexity)}. Add more heads to the grid."
        ]
    fewest = " This is the fewest that was tried: fewer may match, too." if model is search.tried[0] else ""
    matches = "is the fewest that matches" if model.row.heads == 1 else "are the fewest that match"
    non_causal = "" if model.is_causal else " NON-CAUSAL: no decoder reaches this perplexity."
    head = f"{where}: of {counts}, {model.row.heads} {matches} {reference.name}.{fewest}{non_causal}"
    paper = " | paper: ".join(_PAPER_SIZES)
    lines = [
        *(head, ""),
        f"| | {reference.name} | {counted(model.row.heads, 'head')} | change | paper: {paper} |",
        "| --- |" + " ---: |" * (3 + len(_PAPER_SIZES)),
        _row("heads (sparsity)", reference.heads, model.heads, "", _PAPER_HEADS),
    ]
    for quantity in _QUANTITIES:
        ours, theirs = quantity.value(model, reference), quantity.value(reference, model)
        change = f"{100 * (ours / theirs - 1):+.1f} %" if ours is not None and theirs else ""
        before, after = ("" if n is None else f"{n:,.{quantity.decimals}f}" for n in (theirs, ours))
        printed = [f"{dense:g} to {mosa:g} ({100 * (mosa / dense - 1):+.1f} %)" for dense, mosa in quantity.paper]
        lines.append(_row(quantity.name, before, after, change, printed))
    if not (model.is_alone and reference.is_alone):
        lines += [
            "",
            "Other runs shared the device while these steps were timed; mosa isoflop run --measure times them alone.",
        ]
    return lines


def _row(name: str, theirs: str, ours: str, change: str, paper: Sequence[str]) -> str:
    return "| " + " | ".join([name, theirs, ours, change, *paper]) + " |"
