"""What is installed, and whether it is what it seems."""

from __future__ import annotations

from importlib import metadata, util
from pathlib import Path

from megatron_mosa.errors import UserError


def refuse_wrong_apex() -> None:
    """Refuse the web toolkit that goes by the name ``apex`` in Python package registries.

    Megatron-core takes any importable ``apex`` for NVIDIA's and then fails in ways that do not name it.

    Raises:
        UserError: an ``apex`` without NVIDIA's optimizers is importable.
    """
    spec = util.find_spec("apex")
    if spec is None:
        return
    # Looked up as files: importing the wrong package would run its code.
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "optimizers").is_dir() for folder in folders):
        return
    try:
        version = f" {metadata.version('apex')}"
    except metadata.PackageNotFoundError:
        version = ""
    raise UserError(
        f"the installed 'apex'{version} is not NVIDIA apex but an unrelated package of that name; remove it "
        "(pip uninstall apex); NVIDIA apex is optional and is built from its source"
    )
