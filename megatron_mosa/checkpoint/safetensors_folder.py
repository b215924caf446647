"""The safetensors of a Hugging Face folder: what is in them, and one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mosa.checkpoint.manifest import DamagedError
from megatron_mosa.errors import UserError

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    """In the words of safetensors, such as "BF16"."""

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return torch.Size(self.shape).numel()


class SafetensorsFolder:
    """All files that ``model.safetensors.index.json`` names, or ``model.safetensors`` alone."""

    def __init__(self, folder: Path) -> None:
        """Read index and headers alone.

        Raises:
            UserError: there are no safetensors.
            DamagedError: a file is missing or damaged; says which.
        """
        self._folder = folder
        if (folder / INDEX).is_file():
            names = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
        elif (folder / _SINGLE).is_file():
            names = [_SINGLE]
        else:
            raise UserError(f"'{folder}' holds neither {INDEX} nor {_SINGLE}; save the model with safetensors")
        self.tensors: dict[str, Header] = {}
        for name in names:
            if Path(name).name != name:
                raise DamagedError(f"{INDEX} names a file outside of the folder: {name}")
            with self._open(name) as file:
                for key in file.keys():  # noqa: SIM118
                    view = file.get_slice(key)
                    self.tensors[key] = Header(name, tuple(view.get_shape()), view.get_dtype())

    def read(self, key: str) -> Tensor:
        """One tensor, as it is kept."""
        # Opened anew each time: what an open file has read stays in memory.
        with self._open(self.tensors[key].file) as file:
            return file.get_tensor(key)

    @contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._folder / name, framework="pt") as file:
                yield file
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error.strerror or error})") from None
        except SafetensorError as error:
            raise DamagedError(f"{name} is damaged ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file.

    Raises:
        DamagedError: it cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DamagedError(f"{path.name} is damaged ({error})") from None
    if not isinstance(content, dict):
        raise DamagedError(f"{path.name} is damaged (it holds a {type(content).__name__})")
    return content
