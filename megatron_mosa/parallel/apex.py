"""Optional NVIDIA apex: its fused optimizer and norms, and a check that the package is NVIDIA's."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module, metadata, util
from pathlib import Path
from types import ModuleType

import torch

from megatron_mosa.errors import UserError


@lru_cache(maxsize=1)
def apex_fused_adam() -> type[torch.optim.Optimizer] | None:
    """Return ``apex.optimizers.FusedAdam``, or None without a GPU or without an apex built for this torch."""
    module = _module("apex.optimizers", extension="amp_C")
    return None if module is None else module.FusedAdam


@lru_cache(maxsize=1)
def apex_norms() -> ModuleType | None:
    """Return the module with ``fused_layer_norm_affine`` and ``fused_rms_norm_affine``, or None likewise."""
    return _module("apex.normalization.fused_layer_norm", extension="fused_layer_norm_cuda")


def _module(name: str, extension: str) -> ModuleType | None:
    if not torch.cuda.is_available():
        return None
    try:
        import_module(extension)  # fails if it was built for another torch
        return import_module(name)
    except ImportError:
        return None


def reject_wrong_apex() -> None:
    """Reject the unrelated web toolkit that Python package registries call ``apex``.

    Megatron-core takes any importable ``apex`` for NVIDIA's and then fails in ways that do not name it.

    Raises:
        UserError: the importable ``apex`` lacks NVIDIA's optimizers.
    """
    spec = util.find_spec("apex")
    if spec is None:
        return
    # Look at the files only: importing the wrong package would run its code.
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
