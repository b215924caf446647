"""Whether the Hugging Face hub answers: its libraries retry for half a minute, without a word."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from megatron_mosa.errors import UserError

_SECONDS = 8.0
_unreachable: list[str] = []
"""Why the hub does not answer, once that is known."""

HOW_OFFLINE = (
    "give the path of local files, or download it once where there is a network and copy the cache (HF_HOME; "
    "HF_HUB_OFFLINE=1 then skips the network)"
)


def hub_host() -> tuple[str, int]:
    """Return the host and port that a request to the hub connects to: its own, or those of a proxy."""
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxies = getproxies()
    proxy = proxies.get(endpoint.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(endpoint.hostname or ""):
        endpoint = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    return endpoint.hostname or "", endpoint.port or (80 if endpoint.scheme == "http" else 443)


def unreachable(host: str, port: int, seconds: float = _SECONDS) -> str | None:
    """Return why no connection to a host can be made within some seconds, or None if it can."""
    found: list[str | None] = [f"no answer within {seconds:g} s"]

    def connect() -> None:
        try:
            socket.create_connection((host, port), seconds).close()
            found[:] = [None]
        except OSError as error:
            found[:] = [error.strerror or str(error)]

    thread = threading.Thread(target=connect, daemon=True)  # looking up a name has no time limit of its own
    thread.start()
    thread.join(seconds)
    return found[0]


@contextmanager
def asking_hub(what: str) -> Iterator[None]:
    """Say what is asked of the hub; where it does not answer, have its libraries look only into their cache.

    Raises:
        UserError: the hub does not answer, and the cache does not have it, either.
    """
    from huggingface_hub import constants  # slow to import

    if not constants.HF_HUB_OFFLINE:
        host, port = hub_host()
        print(f"asking the Hugging Face hub ({host}) for {what}", file=sys.stderr, flush=True)
        if (reason := unreachable(host, port)) is not None:
            _unreachable[:] = [f"{host}:{port} cannot be reached ({reason})"]
            constants.HF_HUB_OFFLINE = True  # for the rest of the program: later requests would wait, too
            if (datasets := sys.modules.get("datasets")) is not None:
                datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:  # each library raises its own
        if not _unreachable:
            raise
        raise UserError(
            f"{what} is not in the cache of the Hugging Face hub, and {_unreachable[0]}; {HOW_OFFLINE}"
        ) from error
