"""MoSA attention as one function of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_mosa.config import ModelSection, keys_of
from megatron_mosa.kernels import Documents, accumulation_dtype, autocast_operands, get_backend

_ROTARY_PERCENT = keys_of(ModelSection)["rotary_percent"]  # looked up here: torch.compile cannot


def num_selected_tokens(sequence_length: int, sparsity: float) -> int:
    """k = max(floor(T / rho), 2), never more than T (paper, section 3.1)."""
    return min(max(int(sequence_length / sparsity), 2), sequence_length)


def mosa_attention(
    hidden_states: Tensor,
    router_weight: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    *,
    num_selected: int | Callable[[int], int] | None = None,
    thresholds: Tensor | None = None,
    capacity: int | None = None,
    feedback: float = 0.0,
    share: float = 0.0,
    include_first_token: bool = False,
    rotary_percent: float = 0.5,
    rotary_base: float = 10000.0,
    documents: Documents | None = None,
    restart_rotary: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Mixture of sparse attention with expert choice (arXiv 2505.00315, section 3.1), or with thresholds.

    Each of E heads scores all T tokens, selects its own ``num_selected``, lets them attend to one another causally
    with rotary positions of the original sequence, multiplies the result by the scores, and adds its projection
    back at the selected places. Membership is NOT causal: it depends on the whole sequence.

    With ``thresholds`` (not of the paper) a head selects the first token and every token whose score is above its own
    threshold: causal, since neither depends on what comes after the token.

    With ``documents`` a selected token attends to the selected tokens of its own document only (not of the paper).

    Args:
        hidden_states: [B, T, h], any floating type.
        router_weight: [E, h].
        qkv_weight: [E, h, 3h'], columns q, k, v in that order.
        proj_weight: [E, h', h].
        num_selected: k of the sequence, 1 to T; or, with ``documents``, a rule that gives the k of each document from
            its length L, 1 to L: then a head selects the best of every document instead of the best of the sequence.
            None with ``thresholds``, and only then.
        thresholds: [E], in the type of the scores: fp32 (fp64 for fp64 states).
        capacity: with ``thresholds``: a head takes the first so many of its tokens, 1 to T; None: all, and the host
            waits to learn how many.
        feedback, share: with ``thresholds``: a head's threshold moves by ``feedback``, in logits, for every token that
            it has taken beyond ``share`` of those before; 0 or more, 0: it stays. ``share``: 0 to 1.
        include_first_token: token 0 is always among the selected, of each document where they are selected from one by
            one, else of the first k documents; with ``thresholds`` they always are.
        rotary_percent: share of the head dimension that is rotated, 0 to 1.
        rotary_base: base of the rotary frequencies.
        documents: that the sequences are packed of, from ``Documents.from_starts``; None: one a sequence.
        restart_rotary: count rotary positions from the beginning of the document instead of the sequence.
        backend: "auto", "naive" or "triton" (a GPU, or TRITON_INTERPRET=1); "auto" is what MOSA_BACKEND says in the
            environment, else Triton on GPUs of compute capability 8.0 and above, and naive elsewhere.

    Returns:
        [B, T, h], the sum over the heads, in the type of ``hidden_states``, or of torch.autocast where that is on.

    Raises:
        ValueError: an argument of the wrong rank, shape or range, or a backend that is not available.
    """
    scored_states = hidden_states
    hidden_states, qkv_weight, proj_weight = autocast_operands(hidden_states, qkv_weight, proj_weight)
    _check_tensors(hidden_states, router_weight, qkv_weight, proj_weight)
    _check_options(hidden_states, rotary_percent, documents)
    _check_selection(hidden_states, router_weight, num_selected, thresholds, capacity, documents)
    _check_feedback(thresholds, feedback, share)
    kernels = get_backend(backend, hidden_states, proj_weight.shape[1])
    starts = None if documents is None else documents.starts
    selection = documents.selection(num_selected) if documents is not None and callable(num_selected) else None
    selected = num_selected if selection is None else selection.num_slots
    scores = kernels.router_scores(scored_states, router_weight)
    if thresholds is not None:
        indices = kernels.select_above(scores, thresholds, capacity, starts, feedback, share)
    else:
        quotas = None if selection is None else selection.quotas
        indices = kernels.select_tokens(scores, selected, include_first_token, starts, quotas)
    return kernels.selected_attention(
        hidden_states,
        router_weight,
        scores,
        indices,
        qkv_weight,
        proj_weight,
        rotary_percent=rotary_percent,
        rotary_base=rotary_base,
        document_starts=starts,
        restart_rotary=restart_rotary,
        slots=None if selection is None else selection.slots,
    )


def _check_selection(
    hidden_states: Tensor,
    router_weight: Tensor,
    num_selected: int | Callable[[int], int] | None,
    thresholds: Tensor | None,
    capacity: int | None,
    documents: Documents | None,
) -> None:
    length, heads = hidden_states.shape[1], router_weight.shape[0]
    if (num_selected is None) == (thresholds is None):
        both = "are both given" if thresholds is not None else "are both None"
        raise ValueError(f"num_selected and thresholds {both}; expected one of them (expert choice, or thresholds)")
    if thresholds is not None:
        if thresholds.shape != (heads,) or thresholds.device != hidden_states.device:
            raise ValueError(
                f"thresholds have shape {tuple(thresholds.shape)} on {thresholds.device}; expected {(heads,)} on "
                f"{hidden_states.device}, one for each row of router_weight"
            )
        dtype = accumulation_dtype(hidden_states.dtype)
        if thresholds.dtype != dtype:
            raise ValueError(f"thresholds are {thresholds.dtype}; expected {dtype}, as the scores")
        if capacity is not None and not 1 <= capacity <= length:
            raise ValueError(f"capacity={capacity} is out of range; expected 1 to T={length}, or None")
    elif capacity is not None:
        raise ValueError(f"capacity={capacity} is for thresholds, but thresholds=None; expected None")
    elif callable(num_selected):
        if documents is None:
            raise ValueError("num_selected is a rule for each document, but documents=None; expected an integer")
    elif num_selected is not None and not 1 <= num_selected <= length:
        raise ValueError(f"num_selected={num_selected} is out of range; expected 1 to T={length}")


def _check_feedback(thresholds: Tensor | None, feedback: float, share: float) -> None:
    if thresholds is None and (feedback or share):
        raise ValueError(f"feedback={feedback}, share={share} are for thresholds, but thresholds=None; expected 0")
    if not 0 <= feedback < math.inf or not 0 <= share <= 1:
        raise ValueError(f"feedback={feedback}, share={share}; expected 0 or more, and 0 to 1")


def _check_options(hidden_states: Tensor, rotary_percent: float, documents: Documents | None) -> None:
    batch, length, _ = hidden_states.shape
    if documents is not None and documents.starts.shape != (batch, length):
        raise ValueError(f"documents are of {tuple(documents.starts.shape)} tokens; expected {(batch, length)}")
    if not _ROTARY_PERCENT.allows(rotary_percent):
        raise ValueError(_ROTARY_PERCENT.error_message("rotary_percent", rotary_percent))


def _check_tensors(hidden_states: Tensor, router_weight: Tensor, qkv_weight: Tensor, proj_weight: Tensor) -> None:
    if hidden_states.dim() != 3:
        raise ValueError(f"hidden_states has shape {tuple(hidden_states.shape)}; expected [B, T, h]")
    width = hidden_states.shape[2]
    if router_weight.dim() != 2 or router_weight.shape[0] < 1 or router_weight.shape[1] != width:
        raise ValueError(f"router_weight has shape {tuple(router_weight.shape)}; expected [E, {width}] with E >= 1")
    heads = router_weight.shape[0]
    if proj_weight.dim() != 3 or proj_weight.shape[0] != heads or proj_weight.shape[2] != width:
        raise ValueError(f"proj_weight has shape {tuple(proj_weight.shape)}; expected [{heads}, h', {width}]")
    head_dim = proj_weight.shape[1]
    if qkv_weight.shape != (heads, width, 3 * head_dim):
        raise ValueError(
            f"qkv_weight has shape {tuple(qkv_weight.shape)}; expected for this proj_weight: "
            f"{(heads, width, 3 * head_dim)}"
        )
    for name, tensor in (("router_weight", router_weight), ("qkv_weight", qkv_weight), ("proj_weight", proj_weight)):
        if tensor.device != hidden_states.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {hidden_states.device}, as hidden_states")
    for name, tensor in (("qkv_weight", qkv_weight), ("proj_weight", proj_weight)):
        if tensor.dtype != hidden_states.dtype:
            raise ValueError(f"{name} is {tensor.dtype}; expected {hidden_states.dtype}, as hidden_states")
    if not torch.is_floating_point(hidden_states):
        raise ValueError(f"hidden_states is {hidden_states.dtype}; expected a floating type")
