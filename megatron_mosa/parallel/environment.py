"""What is installed, and whether it is what it seems."""

from __future__ import annotations

from importlib import metadata, util

from megatron_mosa.errors import UserError


def refuse_wrong_apex() -> None:
    """Refuse the web toolkit that goes by the name ``apex`` in Python package registries.

    Megatron-core takes any importable ``apex`` for NVIDIA's and then fails in ways that do not name it.

    Raises:
        UserError: an ``apex`` without NVIDIA's optimizers is importable.
    """
    if util.find_spec("apex") is None:
        return
    try:
        if util.find_spec("apex.optimizers") is not None:
            return
    except ImportError:
        pass
    try:
        version = f" {metadata.version('apex')}"
    except metadata.PackageNotFoundError:
        version = ""
    raise UserError(
        f"the installed 'apex'{version} is not NVIDIA apex but an unrelated package of that name; remove it (pip uninstall "
        "apex); NVIDIA apex is optional and is built from its source"
    )
