"""Rules of what MoSA heads select."""

from __future__ import annotations

from megatron_mosa.config.schema import Config
from megatron_mosa.errors import UserError


def documents(config: Config) -> None:
    """Options that need documents, and heads to honour them."""
    asked = {
        "mosa.selection_scope=document": config.mosa.selection_scope == "document",
        "model.restart_rotary=true": config.model.restart_rotary,
    }
    for setting, is_asked in asked.items():
        if is_asked and not config.model.attend_within_documents:
            raise UserError(
                f"{setting} knows no documents: attention goes over the whole packed sequence; set "
                "model.attend_within_documents=true, or leave it out"
            )
    if config.mosa.selection_scope == "document" and not config.mosa.num_heads:
        raise UserError(
            "mosa.selection_scope=document has no MoSA heads: mosa.num_heads=0, and dense and local heads select "
            "nothing; set mosa.selection_scope=sequence"
        )


def threshold(config: Config) -> None:
    """Options of selection by a threshold, and those that it does not go with."""
    mosa = config.mosa
    if mosa.load_feedback and mosa.selection != "threshold":
        raise UserError(
            f"mosa.load_feedback={mosa.load_feedback} moves thresholds, and mosa.selection={mosa.selection} has none; "
            "set mosa.selection=threshold, or mosa.load_feedback=0"
        )
    if mosa.selection != "threshold":
        return
    if mosa.selection_scope == "document":
        raise UserError(
            "mosa.selection_scope=document does not go with mosa.selection=threshold: a threshold takes tokens one by "
            "one, whatever document they are of; set mosa.selection_scope=sequence (attention stays inside documents)"
        )
    if not mosa.include_first_token:
        raise UserError(
            "mosa.include_first_token=false does not go with mosa.selection=threshold, which always takes the first "
            "token; set mosa.include_first_token=true"
        )
