"""MoSA in plain PyTorch: the reference implementation that faster kernels are tested against.

Source: arXiv 2505.00315, section 3.1. Shapes: B sequences of T tokens of width h; E heads of width h' (``d`` in
subscripts), each selecting k tokens. Scores, softmax, gate and the sum over heads are fp32 (fp64 for fp64 inputs)
whatever the type of the activations; matrix products return the type of their operands, also under autocast.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mosa.kernels.autocast import without_autocast
from megatron_mosa.kernels.documents import Documents, document_attention

NAME = "naive"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return fp64 for fp64, and fp32 for every other type."""
    return torch.promote_types(dtype, torch.float32)


@without_autocast
def router_scores(hidden_states: Tensor, router_weight: Tensor) -> Tensor:
    """Compute sigmoid(X w), the score of every token for every head.

    Args:
        hidden_states: [B, T, h].
        router_weight: [E, h].

    Returns:
        [B, E, T], fp32 (fp64 for fp64 inputs).
    """
    dtype = accumulation_dtype(hidden_states.dtype)
    # On CPUs the order of a sum depends on the place and the number of rows. Rounded from fp64 to fp32, equal tokens
    # have equal scores wherever they stand, unless a sum lies within 1e-16 or so of where rounding changes.
    exact = torch.float64 if hidden_states.device.type == "cpu" else dtype
    logits = torch.einsum("bth,eh->bet", hidden_states.to(exact), router_weight.to(exact))
    return torch.sigmoid(logits).to(dtype)


@torch.library.custom_op("megatron_mosa::select_tokens", mutates_args=())  # one op, for recompute to keep its result
def select_tokens(
    scores: Tensor,
    num_selected: int,
    include_first_token: bool = False,
    document_starts: Tensor | None = None,
    quotas: Tensor | None = None,
) -> Tensor:
    """Select the tokens with each head's largest scores (expert choice), per sequence or per document.

    Ties go to the earlier token.

    Args:
        scores: [B, E, T].
        num_selected: k, 1 to T; with ``quotas``, the largest sum of quotas over the documents of a sequence.
        include_first_token: rank token 0 of each document above all other tokens, whatever its score. If a sequence has
            more than k documents, the first k of them contribute theirs.
        document_starts: int64 [B, T], like ``Documents.starts``; None: each sequence is one document.
        quotas: int64 [B, T], number of tokens to select from each token's document; None: k from the whole sequence.

    Returns:
        int64 [B, E, k], contiguous, in position order; slots that the quotas leave empty come last and hold T.
    """
    scores = scores.contiguous()  # sort preserves strides, and the fake kernel returns contiguous tensors
    length = scores.shape[-1]
    positions = torch.arange(length, device=scores.device)
    if document_starts is None:
        document_starts = torch.zeros_like(scores[:, 0], dtype=torch.int64)
    keys = scores
    if include_first_token:
        keys = scores.masked_fill((document_starts == positions).unsqueeze(1), torch.inf)
    # A stable sort keeps equal scores in position order; topk leaves their order open.
    ranked = torch.sort(keys, dim=-1, descending=True, stable=True).indices  # [B, E, T]
    if quotas is None:
        return ranked[..., :num_selected].sort(dim=-1).values.contiguous()  # [B, E, k]
    # Sorted by document, the ranked tokens of a document occupy the same positions as the document.
    documents = document_starts.unsqueeze(1).expand_as(ranked).gather(-1, ranked)
    ranked = ranked.gather(-1, documents.sort(dim=-1, stable=True).indices)
    is_beyond_quota = positions - document_starts >= quotas  # [B, T]
    ranked = ranked.masked_fill(is_beyond_quota.unsqueeze(1), length).sort(dim=-1).values
    return ranked[..., :num_selected].contiguous()


@select_tokens.register_fake
def _(scores: Tensor, num_selected: int, *_: object) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], num_selected), dtype=torch.int64)


@torch.library.custom_op("megatron_mosa::select_above", mutates_args=())  # one op, for recompute to keep its result
def select_above(
    scores: Tensor,
    thresholds: Tensor,
    capacity: int,
    document_starts: Tensor | None = None,
    feedback: float = 0.0,
    share: float = 0.0,
) -> Tensor:
    """Select the tokens with scores above their head's threshold, and the first token of each document; causal.

    With ``feedback``, the threshold of a head depends on its load in the document so far: in logits, it rises by
    ``feedback`` for each selected token beyond ``share`` of the tokens so far, and falls if fewer were selected.

    Args:
        scores: [B, E, T]; NaN is above no threshold.
        thresholds: [E], in the type of the scores.
        capacity: C, 1 to T: a head selects only the first C of these tokens in a sequence.
        document_starts: int64 [B, T], like ``Documents.starts``; None: each sequence is one document.
        feedback: at least 0.
        share: 0 to 1; has no effect without ``feedback``.

    Returns:
        int64 [B, E, C], contiguous, in position order; empty slots come last and hold T.
    """
    length = scores.shape[-1]
    positions = torch.arange(length, device=scores.device)
    is_above = _is_above(scores, thresholds, document_starts, feedback, share)
    selected = torch.where(is_above, positions, length)  # [B, E, T]
    return selected.sort(dim=-1).values[..., :capacity].contiguous()


@select_above.register_fake
def _(scores: Tensor, thresholds: Tensor, capacity: int, *_: object) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], capacity), dtype=torch.int64)


def count_above(
    scores: Tensor,
    thresholds: Tensor,
    document_starts: Tensor | None = None,
    feedback: float = 0.0,
    share: float = 0.0,
) -> Tensor:
    """Return how many tokens ``select_above`` would select without a capacity: integers [B, E]."""
    return _is_above(scores, thresholds, document_starts, feedback, share).sum(dim=-1)


def _is_above(
    scores: Tensor, thresholds: Tensor, document_starts: Tensor | None, feedback: float, share: float
) -> Tensor:
    """Return which tokens ``select_above`` would select without a capacity: bool [B, E, T]."""
    positions = torch.arange(scores.shape[-1], device=scores.device)
    positions = (positions if document_starts is None else positions - document_starts).unsqueeze(-2)  # [1 or B, 1, T]
    is_first = positions == 0
    if feedback == 0:
        return (scores > thresholds[:, None]) | is_first  # [B, E, T]
    margins = torch.logit(scores) - torch.logit(thresholds)[:, None] + feedback * share * positions
    is_above = torch.zeros_like(scores, dtype=torch.bool)
    count = torch.zeros_like(scores[..., 0])  # [B, E]: selected so far in this document
    for token in range(scores.shape[-1]):
        count = count.masked_fill(is_first[..., token], 0)
        is_above[..., token] = (margins[..., token] > feedback * count) | is_first[..., token]
        count = count + is_above[..., token]
    return is_above


HISTOGRAM_BINS = 1024
HISTOGRAM_LOGITS = 16.0  # bins of equal width over -16 to 16; beyond, an fp32 score is almost exactly 0 or 1


def count_scores(scores: Tensor, histogram: Tensor) -> None:
    """Add the logits of each head's scores to a histogram; logits out of range go into the first or last bin.

    Args:
        scores: [B, E, T].
        histogram: int32 [E, HISTOGRAM_BINS], contiguous; updated in place.
    """
    heads, bins = histogram.shape
    logits = torch.logit(scores.detach())  # [B, E, T]
    index = (logits + HISTOGRAM_LOGITS) * (bins / (2 * HISTOGRAM_LOGITS))
    index = index.nan_to_num(0.0).clamp(0, bins - 1).long() + bins * torch.arange(heads, device=scores.device)[:, None]
    histogram.view(-1).scatter_add_(0, index.flatten(), histogram.new_ones(()).expand(index.numel()))


def rotary_frequencies(rotary_dim: int, base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the angle per position of each rotated pair, base^(-2i / rotary_dim): [rotary_dim / 2]."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=dtype, device=device) / rotary_dim
    return base**-exponents


def rotary_dim(head_dim: int, rotary_percent: float) -> int:
    """Return the number of leading channels of a head that are rotated, which is even."""
    return 2 * int(head_dim * rotary_percent / 2)


def apply_rotary(states: Tensor, positions: Tensor, rotary_percent: float, rotary_base: float) -> Tensor:
    """Rotate the leading ``rotary_percent`` of the channels by the position of their token; keep the rest.

    Channel i is paired with channel i + rotary_dim / 2 (half-split rotation).

    Args:
        states: [..., n, h'], queries or keys.
        positions: [..., n], positions in the original sequence; broadcast against ``states``.

    Returns:
        [..., n, h'] in the type of ``states``.
    """
    size = rotary_dim(states.shape[-1], rotary_percent)
    if size == 0:
        return states
    dtype = accumulation_dtype(states.dtype)
    frequencies = rotary_frequencies(size, rotary_base, dtype, states.device)
    angles = positions.to(dtype).unsqueeze(-1) * frequencies  # [..., n, size / 2]
    cos, sin = angles.cos(), angles.sin()
    first, second = states[..., :size].to(dtype).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((rotated.to(states.dtype), states[..., size:]), dim=-1)


def swiglu(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) * up, [..., F], from the gate and the values it gates, [..., 2F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def split_heads(
    qkv: Tensor, rotary_percent: float, rotary_base: float, document_starts: Tensor | None = None, stride: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the packed projection of dense heads, and rotate queries and keys.

    Args:
        qkv: [T, B, G, H / G + 2, h']: the queries, the key and the value of each group.
        rotary_percent: share of the head dimension that is rotated, 0 to 1.
        rotary_base: base of the rotary frequencies.
        document_starts: int64 [B, T], where positions are counted from; None: from the beginning of the sequence.
        stride: distance of the T tokens from each other: token t is at position t * stride.

    Returns:
        Queries [B, H, T, h'], keys and values [B, G, T, h'], with any strides.
    """
    query, key, value = (
        part.flatten(2, 3).permute(1, 2, 0, 3) for part in qkv.split((qkv.shape[3] - 2, 1, 1), dim=3)
    )  # [B, H | G, T, h']
    positions = stride * torch.arange(qkv.shape[0], device=qkv.device)
    if document_starts is not None:
        positions = (positions - document_starts).unsqueeze(1)  # [B, 1, T]
    query = apply_rotary(query, positions, rotary_percent, rotary_base)
    return query, apply_rotary(key, positions, rotary_percent, rotary_base), value


@without_autocast
def selected_attention(
    hidden_states: Tensor,
    router_weight: Tensor,
    scores: Tensor,
    indices: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    *,
    rotary_percent: float,
    rotary_base: float,
    document_starts: Tensor | None = None,
    restart_rotary: bool = False,
    slots: Documents | None = None,
    is_full: bool = False,
    addend: Tensor | None = None,
) -> Tensor:
    """Causal attention of each head among its selected tokens, gated by their scores, summed over heads per token.

    Args:
        hidden_states: [B, T, h].
        router_weight: [E, h]; unused here, because its gradient flows through ``scores``.
        scores: [B, E, T], from ``router_scores``: the gate, and the only path of the router's gradient.
        indices: int64 [B, E, k] in position order; T in empty slots.
        qkv_weight: [E, h, 3h'], columns q, k, v in that order.
        proj_weight: [E, h', h].
        rotary_percent: share of the head dimension that is rotated, 0 to 1.
        rotary_base: base of the rotary frequencies.
        document_starts: int64 [B, T], like ``Documents.starts``: tokens attend within their document; None: each
            sequence is one document.
        restart_rotary: count rotary positions from the beginning of the document.
        slots: the k slots as packed documents, if tokens were selected per document. Avoids the k x k matrix of logits,
            which with many short documents would be as large as T x T.
        is_full: every slot is filled, which lets other backends be faster; unused here.
        addend: [B, T, h], what heads of other kinds contribute; None: nothing.

    Returns:
        [B, T, h], the addend plus the sum over heads.
    """
    batch, length, width = hidden_states.shape
    dtype = accumulation_dtype(hidden_states.dtype)
    sequence = torch.arange(batch, device=hidden_states.device)[:, None, None]
    tokens = indices.clamp(max=length - 1)  # an empty slot reads the last token; its gate is 0
    is_empty = indices == length  # [B, E, k]
    positions, starts = indices, torch.zeros_like(indices)
    if document_starts is not None:
        starts = document_starts[sequence, tokens].masked_fill(is_empty, length)  # [B, E, k]
        positions = indices - starts if restart_rotary else indices

    selected = hidden_states[sequence, tokens]  # [B, E, k, h]
    query, key, value = torch.einsum("bekh,ehd->bekd", selected, qkv_weight).chunk(3, dim=-1)  # [B, E, k, h']
    query = apply_rotary(query, positions, rotary_percent, rotary_base)
    key = apply_rotary(key, positions, rotary_percent, rotary_base)

    if slots is not None:
        attended = document_attention(query, key, value, slots)  # [B, E, k, h']
    else:
        logits = torch.einsum("bend,bemd->benm", query, key).to(dtype) * query.shape[-1] ** -0.5  # [B, E, k, k]
        visible = indices.unsqueeze(-1) >= indices.unsqueeze(-2)  # query position >= key position
        if document_starts is not None:
            visible &= indices.unsqueeze(-2) >= starts.unsqueeze(-1)  # key position >= start of the query's document
        weights = logits.masked_fill(~visible, -torch.inf).softmax(dim=-1).to(value.dtype)
        attended = torch.einsum("benm,bemd->bend", weights, value)  # [B, E, k, h']

    gate = scores.gather(-1, tokens).masked_fill(is_empty, 0)  # [B, E, k]
    gated = (attended.to(dtype) * gate.unsqueeze(-1)).to(attended.dtype)
    projected = torch.einsum("bekd,edh->bekh", gated, proj_weight)  # [B, E, k, h]

    output = torch.zeros(batch, length, width, dtype=dtype, device=hidden_states.device)
    rows = (sequence * length + tokens).flatten()  # in [B * T, h]
    output.view(-1, width).index_add_(0, rows, projected.to(dtype).flatten(0, 2))
    return (output if addend is None else output + addend).to(hidden_states.dtype)


def accumulate(total: Tensor, gradient: Tensor, replaces: Tensor) -> None:
    """Add a gradient to an fp32 total in place, or replace the total by it.

    Args:
        total: fp32, contiguous.
        gradient: any floating type, in the same shape.
        replaces: a bool scalar on their device: whether the total is replaced, whatever it holds.
    """
    total.masked_fill_(replaces, 0.0).add_(gradient)


@without_autocast
def linear_cross_entropy(hidden_states: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
    """Compute the weighted sum of the cross entropies of an output layer.

    Args:
        hidden_states: [N, h], the input of the output layer.
        weight: [V, h], the weight of the output layer for the whole vocabulary.
        targets: int64 [N]; may be out of range where the token weight is 0.
        token_weights: [N], the weight of each token's loss; no gradient flows to it.

    Returns:
        A scalar, fp32 (fp64 for fp64 inputs).
    """
    logits = (hidden_states @ weight.t()).to(accumulation_dtype(hidden_states.dtype))  # [N, V]
    losses = F.cross_entropy(logits, targets.masked_fill(token_weights == 0, 0), reduction="none")
    return (losses * token_weights.detach()).sum()
