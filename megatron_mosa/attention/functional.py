"""MoSA attention as a function of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor

from megatron_mosa.config import ModelSection, keys_of
from megatron_mosa.kernels import (
    AnyDocuments,
    Documents,
    KernelBackend,
    accumulation_dtype,
    autocast_operands,
    get_backend,
)

# Looked up here, because torch.compile cannot trace it.
_ROTARY = {name: keys_of(ModelSection)[name] for name in ("rotary_percent", "rotary_base")}


def num_selected_tokens(sequence_length: int, sparsity: float) -> int:
    """k = max(floor(T / rho), 2), but at most T (paper, section 3.1)."""
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
    """Mixture of sparse attention with expert choice (arXiv 2505.00315, section 3.1) or with thresholds.

    Each of the E heads scores all T tokens and selects ``num_selected`` of them. The selected tokens attend to one
    another causally, with rotary positions of the original sequence. The result is multiplied by the scores, projected,
    and added to the output at the positions of the selected tokens. The selection is NOT causal: whether a token is
    selected depends on the whole sequence.

    With ``thresholds`` (not in the paper), a head selects the first token and every token whose score is above the
    head's threshold. This selection is causal.

    With ``documents`` (not in the paper), a selected token attends only to selected tokens of its own document.

    torch.vmap is not supported. torch.func.grad and vjp work only with the naive backend; so do jvp and second
    derivatives, unless ``num_selected`` is a function.

    Args:
        hidden_states: [B, T, h], any floating type.
        router_weight: [E, h].
        qkv_weight: [E, h, 3h'], columns q, k, v in that order.
        proj_weight: [E, h', h].
        num_selected: k, the number of tokens to select from a sequence, 1 to T. With ``documents`` it may be a function
            from the length L of a document to a number from 1 to L; each head then selects the best tokens of every
            document. None if and only if ``thresholds`` are given.
        thresholds: [E], in the type of the scores: fp32 (fp64 for fp64 states).
        capacity: with ``thresholds``, the maximum number of tokens that a head selects, 1 to T; later ones are dropped.
            None: no limit; the host then waits for the device to learn the number of selected tokens.
        feedback: with ``thresholds``, how much a head's threshold rises, in logits, for every selected token beyond
            ``share`` of the tokens so far; at least 0. 0: thresholds are constant.
        share: with ``feedback``, the target share of selected tokens, 0 to 1.
        include_first_token: always select token 0. With ``documents``: of every document if ``num_selected`` is a
            function, else of the first k documents. With ``thresholds`` first tokens are always selected.
        rotary_percent: share of the head dimension that is rotated, 0 to 1.
        rotary_base: base of the rotary frequencies.
        documents: the documents packed into the sequences; None: each sequence is one document.
        restart_rotary: count rotary positions from the beginning of the document instead of the sequence.
        backend: "auto", "naive" or "triton" (on a GPU, or with TRITON_INTERPRET=1). "auto" is the value of the
            environment variable MOSA_BACKEND, else Triton on GPUs of compute capability 8.0 and above, and naive
            elsewhere.

    Returns:
        [B, T, h], the sum over heads, in the type of ``hidden_states``, or of torch.autocast where it is enabled.

    Raises:
        ValueError: an argument has a wrong rank, shape or value, or the backend is not available.
    """
    scored_states = hidden_states
    hidden_states, qkv_weight, proj_weight = autocast_operands(hidden_states, qkv_weight, proj_weight)
    _check_tensors(hidden_states, router_weight, qkv_weight, proj_weight)
    _check_options(hidden_states, rotary_percent, rotary_base, documents)
    _check_selection(hidden_states, router_weight, num_selected, thresholds, capacity, documents)
    _check_feedback(thresholds, feedback, share)
    kernels = get_backend(backend, hidden_states, proj_weight.shape[1])
    with _current_device_of(hidden_states):
        scores = kernels.router_scores(scored_states, router_weight)
        indices, slots = select(
            kernels,
            scores,
            num_selected,
            thresholds=thresholds,
            capacity=capacity,
            feedback=feedback,
            share=share,
            include_first_token=include_first_token,
            documents=documents,
        )
        return kernels.selected_attention(
            hidden_states,
            router_weight,
            scores,
            indices,
            qkv_weight,
            proj_weight,
            rotary_percent=rotary_percent,
            rotary_base=rotary_base,
            document_starts=None if documents is None else documents.starts,
            restart_rotary=restart_rotary,
            slots=slots,
            is_full=thresholds is None and slots is None,
        )


def _current_device_of(states: Tensor) -> AbstractContextManager[object]:
    """Return a context in which the states' device is the current one, on which Triton launches."""
    # Compiled code sets its device itself.
    return nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(states)


def select(
    kernels: KernelBackend,
    scores: Tensor,
    num_selected: int | Callable[[int], int] | None,
    *,
    thresholds: Tensor | None = None,
    capacity: int | None = None,
    feedback: float = 0.0,
    share: float = 0.0,
    include_first_token: bool = False,
    documents: AnyDocuments | None = None,
) -> tuple[Tensor, Documents | None]:
    """Select tokens for each head: those above ``thresholds`` if given, otherwise by expert choice.

    The only place that decides how tokens are selected; arguments as in ``mosa_attention``, and not checked again.

    Args:
        scores: [B, E, T].

    Returns:
        The indices, int64 [B, E, k] in position order with T in empty slots, and the k slots as packed documents if
        tokens were selected per document.
    """
    starts = None if documents is None else documents.starts
    scores = scores.detach()  # torch.func cannot differentiate a selection
    if thresholds is not None:
        if capacity is None:
            counts = kernels.count_above(scores, thresholds, starts, feedback, share)
            capacity = int(counts.max()) if counts.numel() else 1  # a batch of no sequences
        return kernels.select_above(scores, thresholds, capacity, starts, feedback, share), None
    if isinstance(documents, Documents) and callable(num_selected):
        selection = documents.selection(num_selected)
        quotas, slots, num_selected = selection.quotas, selection.slots, selection.num_slots
    else:
        quotas, slots = None, None
    return kernels.select_tokens(scores, cast(int, num_selected), include_first_token, starts, quotas), slots


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
        if not isinstance(thresholds, Tensor):
            raise ValueError(f"thresholds are a {type(thresholds).__name__}; expected a tensor of shape {(heads,)}")
        if thresholds.shape != (heads,) or thresholds.device != hidden_states.device:
            raise ValueError(
                f"thresholds have shape {tuple(thresholds.shape)} on {thresholds.device}; expected {(heads,)} on "
                f"{hidden_states.device}, one for each row of router_weight"
            )
        dtype = accumulation_dtype(hidden_states.dtype)
        if thresholds.dtype != dtype:
            raise ValueError(f"thresholds are {thresholds.dtype}; expected {dtype}, as the scores")
        if capacity is not None and (isinstance(capacity, bool | float | str) or not 1 <= capacity <= length):
            raise ValueError(f"capacity={capacity!r}; expected an integer from 1 to T={length}, or None")
    elif capacity is not None:
        raise ValueError(f"capacity={capacity} is for thresholds, but thresholds=None; expected None")
    elif callable(num_selected):
        if not isinstance(documents, Documents):
            given = "None" if documents is None else "PackedDocuments, whose lengths the host does not know"
            raise ValueError(f"num_selected is a rule for each document, but documents={given}; expected an integer")
    elif isinstance(num_selected, bool | float | str) or (num_selected is not None and not 1 <= num_selected <= length):
        raise ValueError(f"num_selected={num_selected!r}; expected an integer from 1 to T={length}")


def _check_feedback(thresholds: Tensor | None, feedback: float, share: float) -> None:
    if thresholds is None and (feedback or share):
        raise ValueError(f"feedback={feedback}, share={share} are for thresholds, but thresholds=None; expected 0")
    if not 0 <= feedback < math.inf or not 0 <= share <= 1:
        raise ValueError(f"feedback={feedback}, share={share}; expected 0 or more, and 0 to 1")


def _check_options(
    hidden_states: Tensor, rotary_percent: float, rotary_base: float, documents: Documents | None
) -> None:
    batch, length, _ = hidden_states.shape
    if documents is not None and not isinstance(documents, AnyDocuments):
        raise ValueError(
            f"documents are a {type(documents).__name__}; expected megatron_mosa.kernels.Documents, PackedDocuments or "
            "None"
        )
    if documents is not None and documents.starts.shape != (batch, length):
        raise ValueError(f"documents are of {tuple(documents.starts.shape)} tokens; expected {(batch, length)}")
    for name, value in (("rotary_percent", rotary_percent), ("rotary_base", rotary_base)):
        if not _ROTARY[name].allows(value):
            raise ValueError(_ROTARY[name].error_message(name, value))


def _check_tensors(hidden_states: Tensor, router_weight: Tensor, qkv_weight: Tensor, proj_weight: Tensor) -> None:
    if hidden_states.dim() != 3 or hidden_states.shape[1] < 1:
        raise ValueError(f"hidden_states has shape {tuple(hidden_states.shape)}; expected [B, T, h] with T >= 1")
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
