"""What one rank does and all ranks learn of."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import distributed

from megatron_mosa.errors import UserError

Result = TypeVar("Result")


def on_main_rank(action: Callable[[], Result]) -> Result:
    """Run ``action`` on global rank 0 while the others wait; every rank gets its result, or raises its UserError.

    A collective where torch.distributed is up, a plain call where it is not. The result must be picklable.
    """
    if not distributed.is_initialized():
        return action()
    outcome: list = [None, None]
    if distributed.get_rank() == 0:
        try:
            outcome = [action(), None]
        except UserError as error:
            outcome = [None, str(error)]
    distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]
