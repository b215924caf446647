"""The command ``mosa bench``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_mosa.config import check_world_size, load_config
from megatron_mosa.entry import check_output
from megatron_mosa.errors import UserError
from megatron_mosa.options import MOST_STEPS, bounds
from megatron_mosa.utils import finite, load_json, write_atomically

if TYPE_CHECKING:
    from megatron_mosa.tools.bench.measurement import Measurement


def bench(
    config: Annotated[Path, typer.Argument(help="YAML file, such as configs/first_gpu_run.yaml; no dataset is read")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="values that override the file's")
    ] = None,
    steps: Annotated[
        int, typer.Option("--steps", metavar="N", callback=bounds(1, MOST_STEPS), help="Measured steps.")
    ] = 20,
    warmup: Annotated[
        int,
        typer.Option("--warmup", metavar="N", callback=bounds(1, MOST_STEPS), help="Steps before them, which compile."),
    ] = 5,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE.json", help="Write all numbers, and FILE.png on a GPU.")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option("--compare", metavar="FILE.json", help="Name what became slower by over 5 %; exit with 1 if so."),
    ] = None,
) -> None:
    """Measure the training step of a configuration on this machine's devices; under torchrun, on several."""
    check_output("--output", output, suffix=".json")
    settings = load_config(config, overrides or [])
    before = None if compare is None else read(compare)
    from megatron_mosa.parallel import destroy_parallel, initialize_parallel, launch_environment  # slow to import
    from megatron_mosa.tools.bench import report
    from megatron_mosa.tools.bench.measure import difference, measure
    from megatron_mosa.train import refuse_impossible

    check_world_size(settings, launch_environment()[1])
    refuse_impossible(settings, settings.data.vocab_size)
    layout = initialize_parallel(settings.parallel.tensor_model_parallel_size, settings.run.seed)
    try:
        if before is not None and (differs := difference(before, settings, layout)):
            raise UserError(
                f"{compare} was measured with {differs}; compare the same model, batch and layout on one device"
            )
        found = measure(settings, layout, steps, warmup)
    finally:
        destroy_parallel()
    if not layout.is_main:
        return
    print(report.text(found))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, json.dumps(finite(asdict(found)), indent=1, allow_nan=False))
        if found.profile is not None:
            report.plot(found, output.with_suffix(".png"))
    if before is not None:
        _compare(found, before, compare)


def read(path: Path) -> Measurement:
    """Read what ``--output`` wrote.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    from megatron_mosa.tools.bench.measurement import read_measurement

    try:
        return read_measurement(load_json(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not a result of mosa bench --output: {error}"
        raise UserError(f"cannot read {path}: {reason}; give a file that mosa bench --output wrote") from None


def _compare(found: Measurement, before: Measurement, path: Path | None) -> None:
    from megatron_mosa.tools.bench import report

    lines = report.slower(found, before)
    print(f"\nagainst {path}: {before.median:.1f} ms then, {found.median:.1f} ms now")
    print("\n".join(f"slower: {line}" for line in lines) or "nothing is slower by more than 5 % of a step")
    if lines:
        raise typer.Exit(1)
