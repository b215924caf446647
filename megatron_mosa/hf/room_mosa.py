"""Room for what MoSA heads select of a prompt, as much as for earlier ones, so that no layer waits for their number.

How many tokens a head selects is known on the device only, and a host that asks for it in each layer cannot launch the
next one meanwhile. So a layer that knows an earlier prompt of similar length guesses, all layers are launched, and
the model compares the guesses with the numbers once. If one was too small, it reads the prompt again, without guesses.
Among several ranks no layer guesses: if weights are sharded, each call of a layer gathers them, and the other ranks
would not join in a second call.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import distributed as dist

from .rows_mosa import SelectedRows

MORE_ROWS = 1.5  # times the largest number of an earlier prompt, which varies; costs memory while a layer is computed
MORE_BLOCKS = 1.125  # times those of all heads, which vary less; costs memory of the cache, which can grow into it
FORGETTING = 1 / 8  # of what exceeds the latest prompt, at each; slow, because a prompt that does not fit is read twice


def may_read_twice() -> bool:
    """Return whether this is the only rank."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


class Room(NamedTuple):
    """Room in the cache of a layer."""

    rows: int
    """Tokens of a head and sequence, at most."""

    blocks: int
    """Blocks of the pool, including block 0."""

    def holds(self, totals: list[int], is_stored: bool = True) -> bool:
        """Return whether there was room for such ``SelectedRows.totals``; what is not stored needs no blocks."""
        return totals[1] <= self.rows and (totals[0] <= self.blocks or not is_stored)


class Prompts:
    """What the heads of a layer selected of earlier prompts, by the number of bits of their length.

    Shares of the tokens are comparable among similar lengths only: short prompts vary more.

    Args:
        heads: E.
    """

    def __init__(self, heads: int) -> None:
        self.heads = heads
        # Per token of a sequence: rows of the head with the most; full blocks of all heads.
        self.shares: dict[int, tuple[float, float]] = {}

    def learn(self, batch: int, length: int, totals: list[int]) -> None:
        """Remember the ``SelectedRows.totals`` of a prompt [B, T]."""
        blocks, largest, _ = totals
        partial = batch * self.heads / 2  # the last block of each head and sequence is half full
        latest = largest / length, max(0.0, blocks - 1 - partial) / (batch * length)
        before = self.shares.get(length.bit_length(), latest)
        rows, full = (max(new, old - FORGETTING * (old - new)) for new, old in zip(latest, before, strict=True))
        self.shares[length.bit_length()] = rows, full

    def guess(self, batch: int, length: int) -> Room | None:
        """Return room for a prompt [B, T] that is probably large enough; None: no similar one is known."""
        if (shares := self.shares.get(length.bit_length())) is None:
            return None
        rows = min(length, int(MORE_ROWS * shares[0] * length) + 16)
        blocks = max(self.heads, MORE_BLOCKS * shares[1] * length + self.heads / 2)  # heads select the first token
        return Room(rows, int(batch * blocks) + 2)


class Trial:
    """A prompt whose layers may have guessed."""

    def __init__(self) -> None:
        self.layers: list[tuple[Prompts, SelectedRows, Room]] = []

    def succeeded(self, batch: int, length: int) -> bool:
        """Return whether all guesses were large enough, and learn from them; caches keep little more than they need.

        Waits until the last layer has counted.
        """
        counted = [rows.host_totals() for _, rows, _ in self.layers]
        known = zip(self.layers, counted, strict=True)
        if not all(room.holds(totals, rows.keys is not None) for (_, rows, room), totals in known):
            return False  # after the first guess that was not, states were wrong, and so were the numbers
        for (prompts, rows, _), totals in zip(self.layers, counted, strict=True):
            prompts.learn(batch, length, totals)
            rows.shrink(totals[0])
        return True
