"""Versions of the software in use."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from megatron_mosa import __version__


def versions(*packages: str) -> dict[str, str]:
    """The version of this project and of each package, "not installed" where there is none."""
    found = {"megatron_mosa": __version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
