"""Ends a rank soon after another one has died, for which NCCL's collectives would wait without end."""

from __future__ import annotations

import os
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from megatron_mosa.errors import RunError

if TYPE_CHECKING:
    from megatron_mosa.parallel import HostGroup

CONNECT_SECONDS = 60.0
GOODBYE = -1  # said by a rank that ends in order
_NUMBER = struct.Struct("!i")
# Seconds: the kernel notices a node that is gone after idle + count * interval. A process that dies is noticed at once.
_KEEPALIVE = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}


class PeerMonitor:
    """Keeps a connection between rank 0 and each other rank, which the kernel closes when a process dies.

    Rank 0 tells all others of a death. A stopped or hanging process keeps its connection; that is the watchdog's.
    """

    def __init__(self, on_death: Callable[[int], object]) -> None:
        """
        Args:
            on_death: called once, in a thread, with the rank that has died.
        """
        self._on_death = on_death
        self._sockets: dict[int, socket.socket] = {}  # by rank
        self._is_over = threading.Event()
        os.register_at_fork(after_in_child=self._close_sockets)  # or a loader process would keep them open

    def connect(self, rank: int, world_size: int, hosts: HostGroup) -> None:
        """Connect the ranks and start to watch. A collective over all ranks.

        Args:
            rank: this process's rank.
            world_size: number of ranks.
            hosts: the group by which the others learn rank 0's port.

        Raises:
            RunError: rank 0 cannot be reached at MASTER_ADDR, or not all ranks have connected in time.
        """
        if world_size == 1:
            return
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        server = None
        if rank == 0:
            server = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=world_size)
        port = hosts.max(server.getsockname()[1] if server else 0)
        try:
            if server is not None:
                with server:
                    self._accept(server, world_size - 1)
            else:
                connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=CONNECT_SECONDS)
                connection.sendall(_NUMBER.pack(rank))
                self._sockets[0] = connection
        except OSError as error:
            raise RunError(
                f"rank {rank}: no connection between the ranks at {os.environ.get('MASTER_ADDR')}:{port} ({error}); "
                "MASTER_ADDR must be an address of rank 0's node that all nodes can reach, at any port"
            ) from None
        for connection in self._sockets.values():
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE.items():
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def _accept(self, server: socket.socket, number: int) -> None:
        """Accept the connections of so many ranks; others, such as those of a port scan, are closed."""
        server.settimeout(CONNECT_SECONDS)
        while len(self._sockets) < number:
            connection, _ = server.accept()
            connection.settimeout(1.0)
            rank = _receive(connection)
            if rank is not None and 0 < rank <= number:
                self._sockets[rank] = connection
            else:
                connection.close()

    def leave(self) -> None:
        """Stop watching, and tell the others that this rank ends in order."""
        self._is_over.set()
        self._tell(GOODBYE)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._sockets.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    connection, rank = key.fileobj, key.data
                    assert isinstance(connection, socket.socket)
                    found = _receive(connection)
                    if self._is_over.is_set():
                        return
                    if found == GOODBYE:
                        selector.unregister(connection)
                        continue
                    dead = rank if found is None else found
                    self._tell(dead)
                    self._on_death(dead)
                    return

    def _tell(self, number: int) -> None:
        for connection in self._sockets.values():
            with suppress(OSError):
                connection.sendall(_NUMBER.pack(number))

    def _close_sockets(self) -> None:
        for connection in self._sockets.values():
            connection.close()


def _receive(connection: socket.socket) -> int | None:
    """Return the next number, or None if the other end is gone."""
    data = b""
    with suppress(OSError):
        while len(data) < _NUMBER.size:
            part = connection.recv(_NUMBER.size - len(data))
            if not part:
                return None
            data += part
    return _NUMBER.unpack(data)[0] if len(data) == _NUMBER.size else None
