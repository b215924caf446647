"""Fixtures: checkpoints of small models, written once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mosa.data import train_tokenizer
from megatron_mosa.parallel import destroy_parallel, initialize_parallel
from tests.conversion.models import CAUSAL, KINDS, Trained, train


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """One model of each kind, with random weights, including norms."""
    return make(tmp_path_factory.mktemp("conversion"), KINDS)


@pytest.fixture(scope="session")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model whose MoSA heads select by thresholds."""
    return make(tmp_path_factory.mktemp("causal"), {"causal": CAUSAL})["causal"]


@pytest.fixture(scope="session")
def unset(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model like ``causal`` before the first update of its thresholds."""
    return make(tmp_path_factory.mktemp("unset"), {"unset": CAUSAL}, updates=0)["unset"]


def make(folder: Path, kinds: dict[str, list[str]], updates: int = 7) -> dict[str, Trained]:
    """Write a checkpoint for each kind below ``folder``, all with the same tokenizer."""
    data = folder / "data"
    data.mkdir()
    texts = [f"to export {number} and import {number * number} and back" for number in range(200)]
    train_tokenizer(texts, 300).save(str(data / "tokenizer.json"))
    initialize_parallel(1, seed=1)
    try:
        return {kind: train(folder / f"{kind}-run", data, options, updates) for kind, options in kinds.items()}
    finally:
        destroy_parallel()
