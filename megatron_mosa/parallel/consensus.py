"""Actions on one or all ranks whose results and errors reach every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import distributed

from megatron_mosa.errors import RunError, StorageError, UserError
from megatron_mosa.utils import file_problem, first_line

Result = TypeVar("Result")


def on_main_rank(action: Callable[[], Result], group: distributed.ProcessGroup | None = None) -> Result:
    """Run ``action`` on global rank 0 while the others wait; every rank gets its result, or raises its error.

    A collective if torch.distributed is initialized (over ``group``, which must hold all ranks, if given); otherwise a
    plain call. The result must be picklable.

    Raises:
        UserError, RunError: ``action`` raised it; marked as an error of all ranks.
        StorageError: ``action`` raised an OSError.
        RunError: ``action`` raised anything else, which rank 0 itself raises.
    """
    if not distributed.is_initialized():
        return action()
    outcome: list = [None, None]
    other: Exception | None = None
    if distributed.get_rank() == 0:
        try:
            outcome = [action(), None]
        except UserError as error:
            outcome = [None, UserError(str(error))]
        except RunError as error:
            outcome = [None, type(error)(str(error))]
        except OSError as error:
            outcome = [None, StorageError(file_problem(error, has_remedy=False))]
        except Exception as error:  # the other ranks must not wait for this one
            other, outcome = error, [None, _failure(error)]
    distributed.broadcast_object_list(outcome, src=0, group=group)
    if other is not None:
        raise other
    if outcome[1] is not None:
        outcome[1].of_all_ranks = True
        raise outcome[1]
    return outcome[0]


def on_every_rank(action: Callable[[], Result], group: distributed.ProcessGroup | None = None) -> list[Result]:
    """Run ``action`` on every rank; each rank gets all results, by rank. A collective.

    Raises:
        StorageError: on every rank, if ``action`` raised an OSError on any.
        RunError: ``action`` raised anything else on another rank; this rank's own error is raised itself.
    """
    outcome: Result | RunError
    other: Exception | None = None
    try:
        outcome = action()
    except OSError as error:
        outcome = StorageError(f"rank {distributed.get_rank()}: {file_problem(error, has_remedy=False)}")
    except Exception as error:  # the other ranks must not wait for this one
        other, outcome = error, _failure(error)
    outcomes: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(outcomes, outcome, group=group)
    if other is not None:
        raise other
    for found in outcomes:
        if isinstance(found, RunError):
            raise found
    return outcomes


def _failure(error: Exception) -> RunError:
    return RunError(f"rank {distributed.get_rank()} failed: {type(error).__name__}: {first_line(error)}")


class HostGroup:
    """A gloo group of all ranks, which needs no device, to agree on flags between steps."""

    def __init__(self) -> None:
        """Create the group. A collective."""
        self._group = cast(distributed.ProcessGroup, distributed.new_group(backend="gloo"))

    def max(self, number: int) -> int:
        """Return the largest of all ranks' numbers. A collective."""
        numbers = torch.tensor(number)
        distributed.all_reduce(numbers, distributed.ReduceOp.MAX, self._group)
        return int(numbers)
