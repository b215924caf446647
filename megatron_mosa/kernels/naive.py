"""MoSA in plain PyTorch, written to be read: the truth that faster kernels are held against.

Source: arXiv 2505.00315, section 3.1. Shapes: B sequences of T tokens of width h; E heads of width h' (``d``
in subscripts), each selecting k tokens. Scores, softmax, gate and the sum over heads are fp32 (fp64 for fp64 inputs)
whatever the type of the activations; matrix products return the type of their operands, under autocast, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mosa.kernels.autocast import without_autocast
from megatron_mosa.kernels.documents import Documents, document_attention


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 inputs, fp32 for every other type."""
    return torch.promote_types(dtype, torch.float32)


@without_autocast
def router_scores(hidden_states: Tensor, router_weight: Tensor) -> Tensor:
    """Score every token for every head: sigmoid(X w).

    Args:
        hidden_states: [B, T, h].
        router_weight: [E, h].

    Returns:
        [B, E, T], fp32 (fp64 for fp64 inputs).
    """
    dtype = accumulation_dtype(hidden_states.dtype)
    logits = torch.einsum("bth,eh->bet", hidden_states.to(dtype), router_weight.to(dtype))
    return torch.sigmoid(logits)


@torch.library.custom_op("megatron_mosa::select_tokens", mutates_args=())  # one op, so that recompute can keep it
def select_tokens(
    scores: Tensor,
    num_selected: int,
    include_first_token: bool = False,
    document_starts: Tensor | None = None,
    quotas: Tensor | None = None,
) -> Tensor:
    """Expert choice: the positions of each head's largest scores, of the sequence or of each of its documents.

    Ties go to the earlier token. With ``include_first_token``, token 0 of each document comes before all others,
    whatever its score (where the documents are more than k, those of the first k).

    Args:
        scores: [B, E, T].
        num_selected: k, 1 to T; with ``quotas``, the largest sum of quotas over the documents of a sequence.
        document_starts: int64 [B, T], as ``Documents.starts``; None: one document a sequence.
        quotas: int64 [B, T], how many tokens to select of each token's document; None: k of the whole sequence.

    Returns:
        int64 [B, E, k], contiguous, in position order; T in places that the quotas leave empty, at the end.
    """
    scores = scores.contiguous()  # a sort keeps strides, which the fake kernel must not have to guess
    length = scores.shape[-1]
    places = torch.arange(length, device=scores.device)
    if document_starts is None:
        document_starts = torch.zeros_like(scores[:, 0], dtype=torch.int64)
    keys = scores
    if include_first_token:
        keys = scores.masked_fill((document_starts == places).unsqueeze(1), torch.inf)
    # A stable sort keeps equal scores in position order; topk leaves their order open.
    ranked = torch.sort(keys, dim=-1, descending=True, stable=True).indices  # [B, E, T]
    if quotas is None:
        return ranked[..., :num_selected].sort(dim=-1).values.contiguous()  # [B, E, k]
    # Sorted by document, the ranked tokens of a document fill the very places where it lies.
    documents = document_starts.unsqueeze(1).expand_as(ranked).gather(-1, ranked)
    ranked = ranked.gather(-1, documents.sort(dim=-1, stable=True).indices)
    left_out = places - document_starts >= quotas  # [B, T]
    ranked = ranked.masked_fill(left_out.unsqueeze(1), length).sort(dim=-1).values
    return ranked[..., :num_selected].contiguous()


@select_tokens.register_fake
def _(
    scores: Tensor,
    num_selected: int,
    include_first_token: bool = False,
    document_starts: Tensor | None = None,
    quotas: Tensor | None = None,
) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], num_selected), dtype=torch.int64)


def select_above(
    scores: Tensor,
    thresholds: Tensor,
    capacity: int | None,
    document_starts: Tensor | None = None,
    feedback: float = 0.0,
    share: float = 0.0,
) -> Tensor:
    """Every token whose score is above its head's threshold, and the first of each document; causal.

    With ``feedback`` a head's threshold moves, in logits, by that much for every token that it has taken before, in the
    document, beyond ``share`` of the tokens there: down where it took fewer. So each sequence gets about its share.

    Args:
        scores: [B, E, T]; one that is not a number is above nothing.
        thresholds: [E], in the type of the scores.
        capacity: C, 1 to T: a head takes the first C such tokens of a sequence; None: all of them, C being the largest
            number that a head takes, which the host waits for.
        document_starts: int64 [B, T], as ``Documents.starts``; None: one document a sequence.
        feedback: 0 or more.
        share: 0 to 1; of no meaning without ``feedback``.

    Returns:
        int64 [B, E, C], contiguous, in position order; T in empty places, at the end.
    """
    if capacity is None:
        capacity = int(count_above(scores, thresholds, document_starts, feedback, share).max())
    return _select_above(scores, thresholds, capacity, document_starts, feedback, share)


def count_above(
    scores: Tensor,
    thresholds: Tensor,
    document_starts: Tensor | None = None,
    feedback: float = 0.0,
    share: float = 0.0,
) -> Tensor:
    """How many tokens ``select_above`` takes without a capacity: integers [B, E]."""
    return _is_above(scores, thresholds, document_starts, feedback, share).sum(dim=-1)


def _is_above(
    scores: Tensor, thresholds: Tensor, document_starts: Tensor | None, feedback: float, share: float
) -> Tensor:
    """bool [B, E, T]."""
    places = torch.arange(scores.shape[-1], device=scores.device)
    inside = (places if document_starts is None else places - document_starts).unsqueeze(-2)  # [1 or B, 1, T]
    is_first = inside == 0
    if feedback == 0:
        return (scores > thresholds[:, None]) | is_first  # [B, E, T]
    margins = torch.logit(scores) - torch.logit(thresholds)[:, None] + feedback * share * inside
    taken = torch.zeros_like(scores, dtype=torch.bool)
    before = torch.zeros_like(scores[..., 0])  # [B, E]: taken of this document
    for token in range(scores.shape[-1]):
        before = before.masked_fill(is_first[..., token], 0)
        taken[..., token] = (margins[..., token] > feedback * before) | is_first[..., token]
        before = before + taken[..., token]
    return taken


@torch.library.custom_op("megatron_mosa::select_above", mutates_args=())  # one op, so that recompute can keep it
def _select_above(
    scores: Tensor,
    thresholds: Tensor,
    capacity: int,
    document_starts: Tensor | None = None,
    feedback: float = 0.0,
    share: float = 0.0,
) -> Tensor:
    length = scores.shape[-1]
    places = torch.arange(length, device=scores.device)
    is_above = _is_above(scores, thresholds, document_starts, feedback, share)
    taken = torch.where(is_above, places, length)  # [B, E, T]
    return taken.sort(dim=-1).values[..., :capacity].contiguous()


@_select_above.register_fake
def _(
    scores: Tensor,
    thresholds: Tensor,
    capacity: int,
    document_starts: Tensor | None = None,
    feedback: float = 0.0,
    share: float = 0.0,
) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], capacity), dtype=torch.int64)


HISTOGRAM_BINS = 1024
HISTOGRAM_LOGITS = 16.0  # bins of equal width over -16 to 16: in fp32 a score beyond is 0 or 1, nearly


def count_scores(scores: Tensor, histogram: Tensor) -> None:
    """Count the scores of each head, by their logits; those beyond the ends go into the last bins.

    Args:
        scores: [B, E, T].
        histogram: int32 [E, HISTOGRAM_BINS], contiguous; the counts are added to it.
    """
    heads, bins = histogram.shape
    logits = torch.logit(scores.detach())  # [B, E, T]
    place = (logits + HISTOGRAM_LOGITS) * (bins / (2 * HISTOGRAM_LOGITS))
    place = place.nan_to_num(0.0).clamp(0, bins - 1).long() + bins * torch.arange(heads, device=scores.device)[:, None]
    histogram.view(-1).scatter_add_(0, place.flatten(), histogram.new_ones(()).expand(place.numel()))


def rotary_frequencies(rotary_dim: int, base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Angles per position of the rotated pairs: base^(-2i / rotary_dim), [rotary_dim / 2]."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=dtype, device=device) / rotary_dim
    return base**-exponents


def rotary_dim(head_dim: int, rotary_percent: float) -> int:
    """How many leading channels of a head are rotated: an even number."""
    return 2 * int(head_dim * rotary_percent / 2)


def apply_rotary(states: Tensor, positions: Tensor, rotary_percent: float, rotary_base: float) -> Tensor:
    """Rotate the leading ``rotary_percent`` of the channels by their token's position; leave the rest alone.

    Channel i is paired with channel i + rotary_dim / 2 (half-split rotation).

    Args:
        states: [..., n, h'], queries or keys.
        positions: [..., n], positions in the original sequence; broadcasts against ``states``.

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
    """[..., 2F], the gate and then what it gates, to [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def split_heads(
    qkv: Tensor, rotary_percent: float, rotary_base: float, document_starts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The packed projection of dense heads, taken apart, queries and keys rotated.

    Args:
        qkv: [T, B, G, H / G + 2, h']: of each group its queries, its key and its value.
        rotary_percent, rotary_base: as ``apply_rotary``.
        document_starts: int64 [B, T]: positions are counted from there; None: from the beginning of the sequence.

    Returns:
        Queries [B, H, T, h'], keys and values [B, G, T, h'], of any strides.
    """
    query, key, value = (
        part.flatten(2, 3).permute(1, 2, 0, 3) for part in qkv.split((qkv.shape[3] - 2, 1, 1), dim=3)
    )  # [B, H | G, T, h']
    positions = torch.arange(qkv.shape[0], device=qkv.device)
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
) -> Tensor:
    """Attention of each head among its selected tokens, gated by their scores and added back at their places.

    Args:
        hidden_states: [B, T, h].
        router_weight: [E, h]; not used here, where its gradient goes through ``scores``.
        scores: [B, E, T], as ``router_scores`` returns them: the gate, and the router's only gradient.
        indices: int64 [B, E, k] in position order; T for an empty place.
        qkv_weight: [E, h, 3h'], the columns being q, k, v in that order.
        proj_weight: [E, h', h].
        document_starts: int64 [B, T], as ``Documents.starts``: a token attends inside its document only.
        restart_rotary: count rotary positions from the beginning of the document.
        slots: the k slots as packed documents, where a number of each document was selected: k x k is not made then,
            which many short documents would make as large as T x T.

    Returns:
        [B, T, h], the sum over heads.
    """
    batch, length, width = hidden_states.shape
    dtype = accumulation_dtype(hidden_states.dtype)
    sequence = torch.arange(batch, device=hidden_states.device)[:, None, None]
    tokens = indices.clamp(max=length - 1)  # where an empty place reads and, gated by 0, adds
    empty = indices == length  # [B, E, k]
    positions, starts = indices, torch.zeros_like(indices)
    if document_starts is not None:
        starts = document_starts[sequence, tokens].masked_fill(empty, length)  # [B, E, k]
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

    gate = scores.gather(-1, tokens).masked_fill(empty, 0)  # [B, E, k]
    gated = (attended.to(dtype) * gate.unsqueeze(-1)).to(attended.dtype)
    projected = torch.einsum("bekd,edh->bekh", gated, proj_weight)  # [B, E, k, h]

    output = torch.zeros(batch, length, width, dtype=dtype, device=hidden_states.device)
    places = (sequence * length + tokens).flatten()  # row of the token in [B * T, h]
    output.view(-1, width).index_add_(0, places, projected.to(dtype).flatten(0, 2))
    return output.to(hidden_states.dtype)


def accumulate(total: Tensor, gradient: Tensor, replaces: bool) -> None:
    """``total += gradient``, or ``total.copy_(gradient)``.

    Args:
        total: fp32, contiguous.
        gradient: of any floating-point type, in the same shape.
        replaces: whether ``total`` is replaced.
    """
    if replaces:
        total.copy_(gradient)
    else:
        total.add_(gradient)
