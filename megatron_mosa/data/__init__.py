"""Turn text into batches: sources, tokenizers, datasets, samples and loaders."""

from typing import TYPE_CHECKING

from megatron_mosa.utils import lazy_face

if TYPE_CHECKING:
    from megatron_mosa.data.build import build_dataset
    from megatron_mosa.data.integrity import FileHash, HashingProcess, is_large
    from megatron_mosa.data.loader import training_batches, validation_batches
    from megatron_mosa.data.manifest import MANIFEST_FILE, Manifest, end_of_document_id, load_manifest, read_manifest
    from megatron_mosa.data.mixture import Mixture, check_tokenizer, open_mixture
    from megatron_mosa.data.samples import (
        TrainingSamples,
        ValidationSamples,
        check_lengths,
        document_starts,
        lengths_of_documents,
    )
    from megatron_mosa.data.sources import iter_documents
    from megatron_mosa.data.tokenizer import (
        PROBE,
        TOKENIZER_FILE,
        TokenizerIdentity,
        adds_special_tokens,
        load_tokenizer,
        tokenizer_hash,
        tokenizer_identity,
        train_tokenizer,
        vocabulary_size,
    )

__all__ = [
    "MANIFEST_FILE",
    "PROBE",
    "TOKENIZER_FILE",
    "FileHash",
    "HashingProcess",
    "Manifest",
    "Mixture",
    "TokenizerIdentity",
    "TrainingSamples",
    "ValidationSamples",
    "adds_special_tokens",
    "build_dataset",
    "check_lengths",
    "check_tokenizer",
    "document_starts",
    "end_of_document_id",
    "is_large",
    "iter_documents",
    "lengths_of_documents",
    "load_manifest",
    "load_tokenizer",
    "open_mixture",
    "read_manifest",
    "tokenizer_hash",
    "tokenizer_identity",
    "train_tokenizer",
    "training_batches",
    "validation_batches",
    "vocabulary_size",
]

__getattr__, __dir__ = lazy_face(__name__, __file__)
