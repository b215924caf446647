"""Read models of every supported format: the configuration, and one weight at a time under our names and layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor

from megatron_mosa.checkpoint import read_metadata
from megatron_mosa.config import Config
from megatron_mosa.convert.formats.hf import HuggingFaceReader
from megatron_mosa.convert.formats.mosa import CheckpointReader
from megatron_mosa.convert.formats.torch_dist import TorchDistReader
from megatron_mosa.convert.locate import Kind, find_model
from megatron_mosa.convert.weights import Weight
from megatron_mosa.errors import UserError


class ModelReader(Protocol):
    """The interface that conversions use to read a model."""

    @property
    def path(self) -> Path:
        """The model's folder."""
        ...

    @property
    def config(self) -> Config:
        """The model's configuration, see ``model_config``; other sections have placeholder values."""
        ...

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding, padding included."""
        ...

    @property
    def weights(self) -> list[Weight]:
        """All weights, embedding first."""
        ...

    def read(self, name: str) -> Tensor:
        """Read the weight of this global name, in fp32 and in checkpoint shape."""
        ...


def open_model(path: Path) -> ModelReader:
    """Open a megatron_mosa checkpoint (the newest of a run directory), a Megatron-LM one, or a Hugging Face folder.

    Raises:
        UserError: ``path`` holds no such model, or its weights do not match its description.
        DamagedError: a file is missing or damaged.
    """
    folder, kind = find_model(path)
    if kind is Kind.MOSA:
        return CheckpointReader.open(folder, read_metadata(folder))
    if kind is Kind.HUGGING_FACE:
        return HuggingFaceReader.open(folder)
    if kind is Kind.TORCH_DIST:
        return TorchDistReader.open(folder)
    expected = f"a {Kind.MOSA.value}, a run directory, a {Kind.HUGGING_FACE.value}, or a {Kind.TORCH_DIST.value}"
    raise UserError(f"'{path}' is a {kind.value}; pass {expected}")
