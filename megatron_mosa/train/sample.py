"""A training sample as text: what a run reads."""

from __future__ import annotations

from megatron_mosa.config import Config
from megatron_mosa.data import TOKENIZER_FILE, document_starts, load_tokenizer, open_mixture
from megatron_mosa.errors import UserError
from megatron_mosa.train.start import planned_samples

BORDER = "=" * 8 + " end of document " + "=" * 8


def sample_text(config: Config, number: int) -> str:
    """Sample ``number`` of the run's data order, decoded, with a line at the end of each document.

    Where the run has checkpoints, its order is the one that they record. The sample index is built if it is missing.

    Raises:
        UserError: no such dataset, or a number that the run does not come to.
    """
    mixture = open_mixture(config.data)
    last = config.train.steps * config.train.global_batch_size - 1
    if not 0 <= number <= last:
        raise UserError(f"sample {number} does not exist: train.steps and train.global_batch_size make it 0 to {last}")
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
        texts.append(tokenizer.decode(ids.tolist(), skip_special_tokens=False) + (f"\n{BORDER}" if is_whole else ""))
    return "\n".join(texts)
