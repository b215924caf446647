"""Turn text into batches: sources, tokenizers, datasets, samples and loaders."""

from megatron_mosa.data.build import build_dataset
from megatron_mosa.data.loader import training_batches, validation_batches
from megatron_mosa.data.manifest import Manifest, load_manifest, read_manifest
from megatron_mosa.data.mixture import Mixture, open_mixture
from megatron_mosa.data.samples import TrainingSamples, ValidationSamples
from megatron_mosa.data.tokenizer import end_of_document_id, load_tokenizer, tokenizer_hash, train_tokenizer

__all__ = [
    "Manifest",
    "Mixture",
    "TrainingSamples",
    "ValidationSamples",
    "build_dataset",
    "end_of_document_id",
    "load_manifest",
    "load_tokenizer",
    "open_mixture",
    "read_manifest",
    "tokenizer_hash",
    "train_tokenizer",
    "training_batches",
    "validation_batches",
]
