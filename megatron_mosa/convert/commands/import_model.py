"""Import the weights of another program's model as a megatron_mosa checkpoint, without optimizer state."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_mosa.checkpoint import (
    METADATA,
    FileRecord,
    Metadata,
    TensorInfo,
    damage_as_run_error,
    hash_files,
    write_manifest,
    write_metadata,
    write_state_offline,
)
from megatron_mosa.config import Config, config_to_dict
from megatron_mosa.convert.added_heads import ModelWithAddedHeads
from megatron_mosa.convert.locate import Kind, find_model_of
from megatron_mosa.convert.model_config import check_vocabulary
from megatron_mosa.convert.model_reader import ModelReader, open_model
from megatron_mosa.convert.target import atomic_folder, check_target
from megatron_mosa.convert.weights import num_parameters
from megatron_mosa.utils import versions


def import_hf(
    path: Path, target: Path, *, add_mosa_heads: int = 0, sparsity: float = 16.0, force: bool = False
) -> None:
    """Import an exported model or a Llama from a folder with config.json and safetensors; see ``import_model``."""
    import_model(Kind.HUGGING_FACE, path, target, add_mosa_heads=add_mosa_heads, sparsity=sparsity, force=force)


def import_model(
    kind: Kind, path: Path, target: Path, *, add_mosa_heads: int = 0, sparsity: float = 16.0, force: bool = False
) -> None:
    """Write the weights of a model as a checkpoint to start a run from, one tensor at a time.

    Args:
        kind: the format at ``path``: a Hugging Face folder or a Megatron-LM checkpoint.
        path: the model's folder.
        target: the folder to create.
        add_mosa_heads: number of fresh MoSA heads to add to each layer of a model without any; 0: none.
        sparsity: sparsity rho of the added heads.
        force: replace an existing model at ``target``.

    Raises:
        UserError: the folder does not exist, the model is not supported, tensors are missing, unexpected or of another
            shape, or the target exists.
        RunError: a file is damaged, or writing failed.
    """
    folder = find_model_of(kind, path)
    check_target(target, folder, force=force)
    with damage_as_run_error(folder):
        model = open_model(folder)
        if add_mosa_heads:
            model = ModelWithAddedHeads.of(model, add_mosa_heads, sparsity)
        _import(model, target, force)


def _import(model: ModelReader, target: Path, force: bool) -> None:
    metadata = _metadata(model.config, model.vocab_rows, model.path)
    with atomic_folder(target, force=force) as writing:
        records = _write(model, writing)
        write_metadata(metadata, writing)
        write_manifest(writing, records | hash_files(writing, [METADATA]))
    print(
        f"{target}: imported {num_parameters(model.weights):,} parameters without optimizer state; start a run from it "
        f"with checkpoint.initialize_from={target}"
    )


def _write(model: ModelReader, writing: Path) -> dict[str, FileRecord]:
    from megatron_mosa.utils import progress

    infos = {f"model.{weight.name}": TensorInfo(weight.shape, torch.float32) for weight in model.weights}
    with progress(sum(4 * info.elements for info in infos.values()), "importing") as bar:

        def read(key: str) -> Tensor:
            tensor = model.read(key.removeprefix("model."))
            bar.update(tensor.nbytes)
            return tensor

        return write_state_offline(infos, read, writing)


def _metadata(config: Config, vocab_rows: int, folder: Path) -> Metadata:
    from megatron_mosa.data import (
        TOKENIZER_FILE,
        TokenizerIdentity,
        load_tokenizer,
        tokenizer_identity,
        vocabulary_size,
    )

    file = folder / TOKENIZER_FILE
    identity, size = TokenizerIdentity(None, None), vocab_rows
    if file.is_file():
        tokenizer = load_tokenizer(str(file))
        identity, size = tokenizer_identity(file, tokenizer), vocabulary_size(tokenizer)
    fix = f"resize the embedding to at least {size:,} rows, or remove {TOKENIZER_FILE} if it is not the model's"
    check_vocabulary(f"'{folder}': {TOKENIZER_FILE}", size, vocab_rows, fix)
    return Metadata(
        step=0,
        consumed_samples=0,
        optimizer_step=0,
        config=config_to_dict(config),
        data={
            "index_samples": None,
            "tokenizer_hash": identity.file_hash,
            "encoding_hash": identity.encoding_hash,
            "vocab_size": size,
            "fingerprint": None,
        },
        versions=versions("torch", "transformers"),
        layout={},
    )
