"""Assemble fp32 weights from the shards of a DeepSpeed ZeRO 1, 2 or 3 checkpoint, one tensor at a time.

It reads the following, as DeepSpeed 0.19 writes it. ``*mp_rank_00_model_states.pt`` contains ``param_shapes`` (for each
optimizer group, the shapes of its parameters by name and in order), ``shared_params`` (additional names of parameters)
and ``module`` with the buffers. ``*zero_pp_rank_N_mp_rank_00_optim_states.pt`` contains rank N's partition of each
group. Under ZeRO 1 and 2 a group is one vector that concatenates its parameters and is split into one partition per
rank. Under ZeRO 3 each parameter is split, and a rank's partition concatenates its slices of all parameters. Ends are
padded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from megatron_mosa.checkpoint import DamagedError, TensorInfo, find_corrupt_file
from megatron_mosa.convert.formats.safe_load import safe_load
from megatron_mosa.convert.locate import deepspeed_tag
from megatron_mosa.errors import UserError

_HARMLESS = (
    "argparse.Namespace",
    "deepspeed.",
    "numpy._core.multiarray._reconstruct",  # for states of random number generators
    "numpy.core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
)
_WHOLE_MODEL = "mp_rank_00_model_states.pt"
_MAPPED_BYTES = 1 << 28  # bytes to read before closing mapped files: until then, pages that were read stay in memory

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ShardSlice:
    """A range of elements in one rank's partition of one optimizer group."""

    rank: int
    group: int
    start: int
    stop: int


class ZeroReader:
    """Reads the tensors of a DeepSpeed tag folder with one model-parallel rank."""

    def __init__(self, path: Path) -> None:
        """Read all files once to verify their checksums, and locate every parameter.

        Args:
            path: the folder with ``latest``, or one of the tag folders in it.

        Raises:
            UserError: the checkpoint has several model-parallel ranks, experts, or pipeline stages.
            DamagedError: a file is missing, damaged, not written by ZeRO, or would run code.
        """
        self.folder = deepspeed_tag(path)
        _check_single_model_parallel_rank(self.folder)
        self._mapped: dict[str, dict[str, Any]] = {}
        self._mapped_bytes = 0
        first = _one(self.folder, "*zero_pp_rank_0_mp_rank_00_optim_states.pt")
        self._optimizer_file = first.name.replace("rank_0_mp", "rank_{}_mp", 1)
        self._is_partitioned = not (self.folder / _WHOLE_MODEL).is_file()  # ZeRO 3
        self._groups_key = "fp32_flat_groups" if self._is_partitioned else "single_partition_of_fp32_groups"
        self._check_files(first)
        model = self._load(self._model_file(0))
        self._shapes = [{name: tuple(shape) for name, shape in group.items()} for group in _get(model, "param_shapes")]
        self._shared: dict[str, str] = dict(_get(model, "shared_params"))
        self._frozen: dict[str, Shape] = {k: tuple(v) for k, v in (model.get("frozen_param_shapes") or {}).items()}
        try:
            self._ranges = dict(self._partitioned() if self._is_partitioned else self._consecutive())
        except (IndexError, TypeError, ValueError) as error:
            raise DamagedError(f"its files do not belong to the same checkpoint ({error})") from None
        self.tensors = self._infos(model)

    def read(self, name: str) -> Tensor:
        """Read a whole tensor, in fp32 if it has a floating-point dtype.

        Raises:
            KeyError: unknown name.
            DamagedError: a file has changed since the checksums were verified.
        """
        info = self.tensors[name]
        name = self._shared.get(name, name)
        if name in self._ranges:
            parts = [self._read_range(part) for part in self._ranges[name]]
        elif name in self._frozen and self._is_partitioned:
            parts = [self._load(self._model_file(rank))["frozen_param_fragments"][name] for rank in range(self.ranks)]
        else:
            parts = [self._load(self._model_file(0))["module"][name].flatten()]
        whole = torch.cat(parts or [torch.empty(0)])[: info.elements].view(info.shape).to(info.dtype)
        self._mapped_bytes += whole.nbytes
        if self._mapped_bytes > _MAPPED_BYTES:
            self._mapped.clear()
            self._mapped_bytes = 0
        return whole

    def _check_files(self, first: Path) -> None:
        count = _get(_get(self._load(first.name), "optimizer_state_dict"), "partition_count")
        counts = set(count) if isinstance(count, list) else {count}
        if len(counts) > 1:
            raise UserError(
                f"'{self.folder}' has expert parameters, which are partitioned over {min(counts)} instead of "
                f"{max(counts)} ranks; only models whose parameters are all partitioned over all data-parallel ranks "
                "can be merged"
            )
        self.ranks: int = counts.pop()
        names = [self._optimizer_file.format(rank) for rank in range(self.ranks)]
        names += [self._model_file(rank) for rank in range(self.ranks if self._is_partitioned else 1)]
        for name in names:
            if not (self.folder / name).is_file():
                raise DamagedError(f"{name} is missing; {self.ranks} data-parallel ranks wrote this checkpoint")
        if damage := find_corrupt_file(self.folder, names):
            raise DamagedError(damage)

    def _model_file(self, rank: int) -> str:
        return f"zero_pp_rank_{rank}_{_WHOLE_MODEL}" if self._is_partitioned else _WHOLE_MODEL

    def _load(self, name: str) -> dict[str, Any]:
        if name not in self._mapped:
            self._mapped[name] = safe_load(self.folder / name, name, _HARMLESS)
        return self._mapped[name]

    def _groups(self, rank: int) -> list[Tensor]:
        """Return rank ``rank``'s partition of each group, fp32 [n]."""
        name = self._optimizer_file.format(rank)
        groups = _get(_get(self._load(name), "optimizer_state_dict"), self._groups_key)
        if not all(isinstance(group, Tensor) and group.dim() == 1 for group in groups):
            raise DamagedError(f"{name}: {self._groups_key} contains something other than vectors")
        return [group.detach() for group in groups]

    def _read_range(self, part: ShardSlice) -> Tensor:
        return self._groups(part.rank)[part.group][part.start : part.stop]

    def _consecutive(self) -> Iterator[tuple[str, list[ShardSlice]]]:
        """Locate each parameter under ZeRO 1 and 2."""
        first = _get(self._load(self._optimizer_file.format(0)), "optimizer_state_dict")
        paddings = first.get("param_alignment_paddings") or [[0] * len(shapes) for shapes in self._shapes]
        sizes = [[len(group) for group in self._groups(rank)] for rank in range(self.ranks)]
        for group, (shapes, padding) in enumerate(zip(self._shapes, paddings, strict=True)):
            bounds = list(accumulate((sizes[rank][group] for rank in range(self.ranks)), initial=0))
            start = 0
            for (name, shape), pad in zip(shapes.items(), padding, strict=True):
                stop = start + math.prod(shape)
                yield name, [ShardSlice(rank, group, *within) for rank, within in _overlaps(name, start, stop, bounds)]
                start = stop + pad

    def _partitioned(self) -> Iterator[tuple[str, list[ShardSlice]]]:
        """Locate each parameter under ZeRO 3, where a rank's groups form one vector that may be split anywhere."""
        sizes = [len(group) for group in self._groups(0)]
        for rank in range(1, self.ranks):
            if [len(group) for group in self._groups(rank)] != sizes:
                raise DamagedError(f"{self._optimizer_file.format(rank)} has group sizes that differ from rank 0's")
        bounds = list(accumulate(sizes, initial=0))
        start = 0
        for name, shape in ((name, shape) for shapes in self._shapes for name, shape in shapes.items()):
            stop = start + math.ceil(math.prod(shape) / self.ranks)
            groups = list(_overlaps(name, start, stop, bounds))
            yield name, [ShardSlice(rank, group, *within) for rank in range(self.ranks) for group, within in groups]
            start = stop

    def _infos(self, model: dict[str, Any]) -> dict[str, TensorInfo]:
        """Describe buffers, frozen parameters, trained parameters, and additional names of shared parameters."""
        module = _get(model, "module")
        if not isinstance(module, dict):
            raise UserError(
                f"'{self.folder}' was written by DeepSpeed's pipeline engine; only models without pipeline stages can "
                "be merged"
            )
        trained = {name: shape for shapes in self._shapes for name, shape in shapes.items()}
        # Under ZeRO 1, frozen parameters are only in the module and are not listed elsewhere.
        others = module.keys() - trained.keys() - self._shared.keys()
        whole = _get(model, "buffer_names") if self._is_partitioned else others
        infos = {
            name: TensorInfo(tuple(tensor.shape), torch.float32 if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in module.items()
            if name in whole and isinstance(tensor, Tensor)
        }
        shapes = trained | (self._frozen if self._is_partitioned else {})
        infos |= {name: TensorInfo(shape, torch.float32) for name, shape in shapes.items()}
        return infos | {name: infos[other] for name, other in self._shared.items() if other in infos}


def _overlaps(name: str, start: int, stop: int, bounds: list[int]) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield the partitions of a vector split at ``bounds`` that overlap ``start`` to ``stop``, with the local range."""
    if stop > bounds[-1]:
        raise DamagedError(f"the shards have {bounds[-1]} elements of a group, but '{name}' would end at {stop}")
    for part, (low, high) in enumerate(pairwise(bounds)):
        if start < high and stop > low:
            yield part, (max(start, low) - low, min(stop, high) - low)


def _check_single_model_parallel_rank(folder: Path) -> None:
    names = [file.name for file in folder.glob("*.pt")]
    if len(ranks := {match[1] for name in names if (match := re.search(r"mp_rank_(\d+)", name))}) > 1:
        raise UserError(
            f"'{folder}' has {len(ranks)} model-parallel ranks, but does not record how tensors are split over them; "
            "only one rank (mp_rank_00) is supported: first merge the ranks with the program that wrote the checkpoint"
        )
    if any("expert" in name for name in names):
        raise UserError(f"'{folder}' has files of experts; only models without experts can be merged")


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise DamagedError(
            f"{pattern} is missing; the checkpoint must have been written by ZeRO 1, 2 or 3 (without ZeRO, "
            f"{_WHOLE_MODEL} contains whole weights)"
        )
    return found[0]


def _get(content: dict[str, Any], key: str) -> Any:
    try:
        return cast(Any, content[key])
    except (KeyError, TypeError):
        raise DamagedError(f"'{key}' is missing; the checkpoint must have been written by ZeRO 1, 2 or 3") from None
