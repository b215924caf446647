"""Configuration rules for the selection of MoSA heads."""

from __future__ import annotations

from megatron_mosa.config.schema import Config
from megatron_mosa.errors import UserError


def documents(config: Config) -> None:
    """Check options that need document boundaries, or heads that use them."""
    settings = {
        "mosa.selection_scope=document": config.mosa.selection_scope == "document",
        "model.restart_rotary=true": config.model.restart_rotary,
    }
    for setting, is_set in settings.items():
        if is_set and not config.model.attend_within_documents:
            raise UserError(
                f"{setting} needs document boundaries, but attention spans the whole packed sequence; set "
                "model.attend_within_documents=true, or omit it"
            )
    if config.mosa.selection_scope == "document" and not config.mosa.num_heads:
        raise UserError(
            "mosa.selection_scope=document needs MoSA heads, but mosa.num_heads=0: dense and local heads do not select "
            "tokens; set mosa.selection_scope=sequence"
        )


def threshold(config: Config) -> None:
    """Check options of selection by thresholds or token choice, and options that these do not support."""
    mosa = config.mosa
    if mosa.load_feedback and mosa.selection != "threshold":
        raise UserError(
            f"mosa.load_feedback={mosa.load_feedback} moves thresholds, but mosa.selection={mosa.selection} has none; "
            "set mosa.selection=threshold, or mosa.load_feedback=0"
        )
    if mosa.selection == "expert_choice":
        return
    if mosa.selection_scope == "document":
        why = "a threshold selects each token" if mosa.selection == "threshold" else "each token chooses"
        raise UserError(
            f"mosa.selection_scope=document is not supported with mosa.selection={mosa.selection}: {why} "
            "regardless of its document; set mosa.selection_scope=sequence (attention stays within documents)"
        )
    if not mosa.include_first_token:
        raise UserError(
            f"mosa.include_first_token=false is not supported with mosa.selection={mosa.selection}, which always "
            "selects the first token; set mosa.include_first_token=true"
        )
    if mosa.selection == "token_choice" and mosa.num_heads and not config.heads_per_token:
        raise UserError(
            f"mosa.sparsity={mosa.sparsity:g} leaves each token round(mosa.num_heads / mosa.sparsity) = 0 of "
            f"mosa.num_heads={mosa.num_heads} heads to choose; set mosa.sparsity below {2 * mosa.num_heads}"
        )
