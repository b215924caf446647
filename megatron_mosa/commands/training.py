"""Start a training process; shared by ``mosa pretrain`` and pretrain_mosa.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_mosa.config import check_plan, check_world_size, load_config, origins
from megatron_mosa.entry import quick_imports
from megatron_mosa.errors import UserError
from megatron_mosa.exit_codes import DONE
from megatron_mosa.parallel import launch_environment
from megatron_mosa.resilience import block_sigusr1


def start_training(
    path: str | Path, overrides: Sequence[str], *, check_only: bool = False, world_size: int | None = None
) -> int:
    """Check the configuration and, without ``check_only``, train; return the exit code.

    Args:
        path: a YAML file.
        overrides: ``section.key=value``.
        check_only: check the configuration, the layout and the data, and do not train.
        world_size: with ``check_only``: number of processes to check for; None: 1.

    Raises:
        UserError: whatever ``train.check_start`` rejects.
    """
    if world_size is not None:
        from megatron_mosa.options import MOST_PROCESSES  # imports typer, which pretrain_mosa.py does without

        if not (1 <= world_size <= MOST_PROCESSES and check_only):
            raise UserError(
                f"--world-size must be at least 1, at most {MOST_PROCESSES}, and needs --check-only, got {world_size}"
            )
    config = load_config(path, overrides, checks_batches=False)  # pretrain checks them
    check_plan(config, origins(path, overrides))
    if check_only:
        check_world_size(config, world_size or 1)
    else:
        launch_environment()  # mistakes in it would else show after all imports, or as a hang of the other ranks
        block_sigusr1()
    with quick_imports():
        if check_only:
            # slow to import, so mistakes are reported first
            from megatron_mosa.train import check_start, describe, refuse_impossible

            start = check_start(config, world_size or 1)
            if world_size is None:  # otherwise the run may be meant for other machines
                refuse_impossible(config, start.manifest.vocab_size)
            print(describe(config, start, world_size or 1))
            return DONE
        from megatron_mosa.train import pretrain
    return pretrain(config)
