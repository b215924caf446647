"""The pictures of a grid: perplexity against what a model costs, at one size on one corpus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_mosa.metrics import load_pyplot, save_figure
from megatron_mosa.tools.grid.models import Place, TrainedModel

_Value = Callable[[TrainedModel], "float | None"]
_PANELS: tuple[tuple[str, _Value], ...] = (
    ("sparsity rho", lambda model: model.row.sparsity),
    ("parameters, millions", lambda model: model.row.parameters / 1e6),
    ("step measured alone, ms", lambda model: model.milliseconds if model.is_alone else None),
    ("peak memory, GiB", lambda model: model.peak_memory_gib),
    ("keys and values of 8,192 tokens, MiB", lambda model: model.kv_mib),
)


def plot_costs(place: Place, title: str, path: Path) -> None:
    """Plot perplexity over sparsity, parameters, step time, memory and cache: a color per member, a bar over its seeds.

    Hollow points are NON-CAUSAL. Models without sparsity are horizontal lines in the first panel.

    Raises:
        RunError: matplotlib is not installed.
    """
    plt = load_pyplot()
    figure, panels = plt.subplots(2, 3, figsize=(15, 8.5), sharey=True, layout="constrained")
    members = list(dict.fromkeys(model.row.member for model in place.models))
    for axes, (label, value) in zip(panels.flat, _PANELS, strict=False):
        for number, member in enumerate(members):
            models = [model for model in place.models if model.row.member == member]
            _plot_member(axes, models, value, f"C{number % 10}")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        if label.startswith("sparsity") and any(model.row.sparsity for model in place.models):
            rhos = sorted({model.row.sparsity for model in place.models if model.row.sparsity})
            axes.set_xscale("log", base=2)
            axes.set_xticks(rhos, [f"{rho:g}" for rho in rhos])
            axes.minorticks_off()
    for row in panels:
        row[0].set_ylabel("perplexity of validation")
    panels.flat[-1].axis("off")
    labels = {member: next(m for m in place.models if m.row.member == member).is_causal for member in members}
    for number, (member, is_causal) in enumerate(labels.items()):
        style = {"markerfacecolor": "none"} if not is_causal else {}
        name = member if is_causal else f"{member}, NON-CAUSAL"
        panels.flat[-1].plot([], [], "o-", color=f"C{number % 10}", label=name, **style)
    panels.flat[-1].legend(loc="center", fontsize=9)
    figure.suptitle(title, fontsize="medium")
    save_figure(figure, path, dpi=110)


def _plot_member(axes: Any, models: list[TrainedModel], value: _Value, color: str) -> None:
    points = sorted(
        ((x, model) for model in models if (x := value(model)) is not None), key=lambda point: (point[0], point[1].name)
    )
    if not points and value is _PANELS[0][1]:
        for model in models:
            axes.axhline(model.perplexity, color=color, linewidth=1, linestyle="--")
        return
    if not points:
        return
    middles = [model.perplexity for _, model in points]
    below = [model.perplexity - min(model.perplexities) for _, model in points]
    above = [max(model.perplexities) - model.perplexity for _, model in points]
    fill = color if all(model.is_causal for _, model in points) else "none"
    axes.errorbar(
        [x for x, _ in points], middles, yerr=[below, above], fmt="o-", color=color, markerfacecolor=fill, capsize=3,
        linewidth=1,
    )  # fmt: skip
