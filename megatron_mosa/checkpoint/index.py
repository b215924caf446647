"""Read the index of a checkpoint's state safely: a pickle, whose classes could be anything.

``StateIndex`` reads names, shapes and dtypes without torch; ``reader.SafeReader`` gives the index to torch.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any

from megatron_mosa.checkpoint.manifest import DamagedError
from megatron_mosa.utils import first_line

MOMENTS = ("exp_avg", "exp_avg_sq")

_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # only looks up a name in a table
    ("pathlib", "PosixPath"),
} | {
    ("torch.distributed.checkpoint.planner", name)  # Megatron-LM stores the ranks' plans in the index
    for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
}  # fmt: skip
_DTYPE = re.compile(r"b?float\d+\w*|q?u?int\d+x?\d*|complex\d+|bool|bits\d+\w*")


@dataclass(frozen=True)
class IndexEntry:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: str
    """Torch's name of the type, such as "bfloat16"."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class StateIndex:
    """The names, shapes and dtypes of the tensors below a folder that torch's distributed checkpoint wrote."""

    def __init__(self, folder: Path) -> None:
        """Read the index, in which stand-ins take the places of torch's classes.

        Raises:
            DamagedError: as ``load_index``.
        """
        self.folder = folder
        index = load_index(folder, _Unpickler)
        try:
            self.tensors = {
                str(key): IndexEntry(tuple(entry.size), entry.properties.dtype.name)
                for key, entry in index.state_dict_metadata.items()
                if isinstance(entry, _StandIn) and entry.kind == "TensorStorageMetadata"
            }
            self.keys = {str(item.fqn) for item in index.storage_data}
            """Of tensors and of anything else."""
            self._ends: dict[str, int] = {}  # of the last entry in each file, in bytes
            for info in index.storage_data.values():
                end = int(info.offset) + int(info.length)
                self._ends[info.relative_path] = max(end, self._ends.get(info.relative_path, 0))
        except (AttributeError, TypeError, ValueError) as error:
            raise DamagedError(f"{folder.name}/.metadata is damaged ({first_line(error)})") from None

    @property
    def weights(self) -> dict[str, IndexEntry]:
        """The tensors under ``model.``."""
        return {key: entry for key, entry in self.tensors.items() if key.startswith("model.")}

    @property
    def has_optimizer_state(self) -> bool:
        """Whether the checkpoint contains Adam's moments."""
        return any(key.partition(".")[0] in MOMENTS for key in self.tensors)

    def find_missing(self) -> str | None:
        """Describe the first data file that is missing or too short for its entries, or return None."""
        for name, end in sorted(self._ends.items()):
            file = self.folder / name
            if not file.is_file():
                return f"{self.folder.name}/{name} is missing"
            if (size := file.stat().st_size) < end:
                return f"{self.folder.name}/{name} has {size:,} bytes; its entries need {end:,}"
        return None


def load_index(folder: Path, unpickler: Callable[[IO[bytes]], pickle.Unpickler]) -> Any:
    """Load ``.metadata`` with a restricted unpickler.

    Raises:
        DamagedError: the index is missing, damaged, or refers to other classes or to files outside of its folder.
    """
    name = f"{folder.name}/.metadata"
    try:
        with (folder / ".metadata").open("rb") as stream:
            return _checked(unpickler(stream).load())
    except OSError as error:
        raise DamagedError(f"{name} cannot be read ({error.strerror})") from None
    except DamagedError as error:
        raise DamagedError(f"{name} {error}") from None
    except Exception as error:  # a broken pickle can raise anything
        raise DamagedError(f"{name} is damaged ({first_line(error)})") from None


def require_index_class(module: str, name: str, is_dtype: Callable[[str], bool]) -> None:
    """Allow only the classes of an index and torch's dtypes.

    Raises:
        DamagedError: this is another one.
    """
    if (module, name) not in _CLASSES and not (module == "torch" and is_dtype(name)):
        raise DamagedError(f"refers to {module}.{name}, which no checkpoint needs; refused to load it")


def _checked(index: Any) -> Any:
    storage = getattr(index, "storage_data", None)
    if not isinstance(storage, dict) or not isinstance(getattr(index, "state_dict_metadata", None), dict):
        raise DamagedError(f"is damaged (it holds a {getattr(index, 'kind', type(index).__name__)})")
    for info in storage.values():
        if PurePath(info.relative_path).name != info.relative_path:
            raise DamagedError(f"refers to a file outside of its folder: {info.relative_path}")
    return index


class _StandIn:
    """Has the attributes of an instance of one of torch's classes, and nothing else of it."""

    kind = ""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.kind} has no {name}")

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:  # TensorProperties pickles itself as a tuple that begins with the dtype
            self.dtype = state[0]


@dataclass(frozen=True)
class _Dtype:
    name: str


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in for a class, and the name of a dtype."""
        require_index_class(module, name, lambda name: _DTYPE.fullmatch(name) is not None)
        if module == "torch":
            return tuple if name == "Size" else _Dtype(name)
        return type(name, (_StandIn,), {"kind": name})
