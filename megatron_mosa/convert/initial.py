"""Find the weights that a new run is initialized from: an existing or imported checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mosa.checkpoint import StateReader, find_damage, read_metadata
from megatron_mosa.config import Config, padded_vocab_size
from megatron_mosa.convert.locate import Kind, find_model
from megatron_mosa.convert.model_config import model_config
from megatron_mosa.convert.weights import model_weights
from megatron_mosa.data import TokenizerIdentity
from megatron_mosa.errors import UserError

_KEY = "checkpoint.initialize_from"
_EMBEDDINGS = "embedding.word_embeddings.weight", "output_layer.weight"
_IMPORTS = {Kind.HUGGING_FACE: "hf", Kind.TORCH_DIST: "torch-dist"}


def find_initial_weights(path: Path, config: Config, data: dict[str, Any], *, reads_all: bool) -> Path:
    """Return the checkpoint at ``path`` (the newest of a run directory) if its weights fit the model of ``config``.

    Settings without weights, such as sparsity, window, rotary base or sequence length, may differ. So may the
    selection: a threshold run starts with its warm-up if the checkpoint has no thresholds, and expert choice needs
    none. The number of clusters of Routing heads may not: their centroids are loaded.

    Args:
        data: the run's ``vocab_size``, ``tokenizer_hash`` and ``encoding_hash``.
        reads_all: verify the hashes of all files, not just their sizes.

    Raises:
        UserError: the checkpoint does not exist, is damaged, has another tokenizer, or has weights of other names or
            shapes, or heads of another width.
    """
    try:
        folder, kind = find_model(path)
    except UserError as error:
        raise UserError(f"{_KEY}: {error}") from None
    if kind is not Kind.MOSA:
        fix = "give a run or an imported model"
        if kind in _IMPORTS:
            fix = f"import it first: mosa checkpoint import {path} OUT --from {_IMPORTS[kind]}"
        raise UserError(f"{_KEY}={path} is a {kind.value}; {fix}")
    metadata = read_metadata(folder)
    if metadata.has_manifest and (damage := find_damage(folder, reads_all=reads_all)):
        raise UserError(f"{_KEY}: checkpoint '{folder}' is damaged: {damage}; restore it, or choose another one")
    checkpoint_hash = metadata.tokenizer.file_hash
    if checkpoint_hash is not None and not metadata.tokenizer.is_same(TokenizerIdentity.recorded(data)):
        raise UserError(
            f"{_KEY}: '{folder}' was trained with another tokenizer ({checkpoint_hash}) than the dataset was built "
            f"with ({data['tokenizer_hash']}); rebuild the dataset with that tokenizer (data.tokenizer=PATH)"
        )
    rows = padded_vocab_size(data["vocab_size"], config.model.vocab_size_multiple)
    original = model_config(metadata.config)
    weights, recorded = model_weights(config, rows), model_weights(original, rows)
    untrained = {weight.name for weight in recorded if not weight.is_trained}
    stored = {name: info.shape for name, info in StateReader(folder).weights.items()}
    # Of what is not trained, the run takes what it finds.
    expected = {weight.name: weight.shape for weight in weights if weight.is_trained or weight.name in stored}
    found = {name: shape for name, shape in stored.items() if name not in untrained or name in expected}
    for name in sorted(expected.keys() | found.keys()):
        ours, theirs = expected.get(name, ()), found.get(name, ())
        if ours != theirs:
            raise UserError(
                f"{_KEY}: '{folder}' holds another model: {name} is {theirs or 'missing'}, but the run expects "
                f"{ours or 'none'}; set {_fix(name, ours, theirs, data['vocab_size'])}"
            )
    # With it the shapes determine the numbers of heads and of groups; 2 heads of 16 have the shapes of 4 of 8.
    ours, theirs = config.model.head_dim, original.model.head_dim
    if ours != theirs:
        raise UserError(
            f"{_KEY}: '{folder}' holds another model: model.head_dim is {theirs}, but the run asks for {ours}; set "
            f"model.head_dim={theirs}, and the numbers of heads as in that checkpoint"
        )
    return folder


def _fix(name: str, ours: tuple[int, ...], theirs: tuple[int, ...], vocab_size: int) -> str:
    """Return what to set, where the weight ``name`` is the first whose shape differs."""
    if name in _EMBEDDINGS and ours[1:] == theirs[1:] and vocab_size <= theirs[0]:
        return f"model.vocab_size_multiple={theirs[0]}"  # whatever the multiple was, the rows are one of themselves
    return "sections model and mosa as in that checkpoint"
