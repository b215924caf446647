"""Training samples as text, as a run reads them."""

from __future__ import annotations

from megatron_mosa.config import Config
from megatron_mosa.data import TOKENIZER_FILE, document_starts, load_tokenizer, open_mixture
from megatron_mosa.errors import UserError
from megatron_mosa.train.start import planned_end, planned_samples

DOCUMENT_END = "=" * 8 + " end of document " + "=" * 8


def sample_text(config: Config, number: int) -> str:
    """Return sample ``number`` in the run's data order, decoded, with a line at the end of each document.

    If the run has checkpoints, the order is the one they record. The sample index is built if it is missing.

    Raises:
        UserError: there is no such dataset, or the run never reaches this sample.
    """
    mixture = open_mixture(config.data)
    last = planned_end(config) - 1
    if not 0 <= number <= last:
        raise UserError(f"sample must be 0 to {last} (by train.steps and train.global_batch_size), got {number}")
    samples = planned_samples(config, mixture)
    samples.prepare(number, number)
    tokens = samples[number]["tokens"]
    end = mixture.manifest.end_of_document_id
    tokenizer = load_tokenizer(str(mixture.paths[0] / TOKENIZER_FILE))
    pieces = tokens.tensor_split((document_starts(tokens, end).diff() > 0).nonzero().flatten() + 1)
    texts = []
    for piece in pieces:
        is_whole = int(piece[-1]) == end
        ids = piece[:-1] if is_whole else piece
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        texts.append(f"{text}\n{DOCUMENT_END}" if is_whole else text)
    return "\n".join(texts)
