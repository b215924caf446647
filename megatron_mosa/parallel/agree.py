"""What one rank does and all ranks learn of."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import distributed

from megatron_mosa.errors import StorageError, UserError

Result = TypeVar("Result")


def on_main_rank(action: Callable[[], Result], group: distributed.ProcessGroup | None = None) -> Result:
    """Run ``action`` on global rank 0 while the others wait; every rank gets its result, or raises its error.

    A collective where torch.distributed is up, over all ranks in a group of their own if one is given; a plain call
    where it is not. The result must be picklable.

    Raises:
        UserError: that ``action`` raised.
        StorageError: in place of an OSError.
    """
    if not distributed.is_initialized():
        return action()
    outcome: list = [None, None]
    if distributed.get_rank() == 0:
        try:
            outcome = [action(), None]
        except UserError as error:
            outcome = [None, UserError(str(error))]
        except OSError as error:
            outcome = [None, StorageError(str(error))]
    distributed.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_every_rank(action: Callable[[], Result], group: distributed.ProcessGroup | None = None) -> list[Result]:
    """Run ``action`` on every rank; each gets the results of all, by rank. A collective.

    Raises:
        StorageError: on every rank, if ``action`` raised an OSError on one.
    """
    outcome: Result | StorageError
    try:
        outcome = action()
    except OSError as error:
        outcome = StorageError(f"rank {distributed.get_rank()}: {error}")
    outcomes: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(outcomes, outcome, group=group)
    for found in outcomes:
        if isinstance(found, StorageError):
            raise found
    return outcomes


class Hosts:
    """All ranks, in a group of their own that needs no device (gloo): for what must be agreed upon between steps."""

    def __init__(self) -> None:
        """A collective."""
        self._group = cast(distributed.ProcessGroup, distributed.new_group(backend="gloo"))

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers; a collective."""
        numbers = torch.tensor(number)
        distributed.all_reduce(numbers, distributed.ReduceOp.MAX, self._group)
        return int(numbers)
