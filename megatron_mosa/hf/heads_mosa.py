"""The attention heads of a MoSA language model: dense, local and MoSA heads, with or without a cache."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from .cache_mosa import MosaCacheLayer
from .configuration_mosa import MosaConfig
from .kernels_mosa import step_in_kernels, usable
from .rows_mosa import DenseRows, SelectedRows, WindowRows
from .tokens_mosa import Tokens, rotate

PIECE = 512  # queries that attend at once where a mask is needed
FOLLOWED = 128  # tokens that are selected at once where each depends on those before
UNCALIBRATED = (
    "mosa_heads.thresholds of {} are NaN: they are not calibrated, so no head knows what to select; they must be "
    "between 0 and 1; export what mosa checkpoint causalize writes, or a checkpoint of mosa.selection=threshold"
)


class MosaCausalHeads(nn.Module):
    """Heads that see the tokens before; with a window only the last ``window``, the token itself included."""

    def __init__(self, config: MosaConfig, heads: int, groups: int, window: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.window = window
        self.q_proj = nn.Linear(config.hidden_size, heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, groups * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, groups * config.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, tokens: Tokens, rows: DenseRows | WindowRows | None) -> Tensor:
        """[B, T, h] to [B, T, h]; with ``rows``, what they hold goes before, and the new tokens are added to them."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, heads | groups, T, h']
        cos, sin = (table.unsqueeze(1) for table in tokens.rotary)  # [B, 1, T, n]
        rotated = rotate(torch.cat((query, key), dim=1), cos, sin)
        query, key = rotated.split((query.shape[1], key.shape[1]), dim=1)
        if self.window is None:
            assert rows is None or isinstance(rows, DenseRows)
            key, value = (key, value) if rows is None else of_type(query.dtype, rows.append(key, value))
            attended = causal_attention(query, key, value, tokens.valid_keys)
        else:
            assert rows is None or isinstance(rows, WindowRows)
            attended = self.attend_in_window(query, key, value, tokens, rows)
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def attend_in_window(
        self, query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, rows: WindowRows | None
    ) -> Tensor:
        """Of [B, heads, T, h'], piece after piece if the window is kept in ``rows``."""
        assert self.window is not None
        batch, length = query.shape[0], query.shape[2]
        positions = tokens.positions.expand(batch, -1)  # [B, T]
        size = length if rows is None else max(self.window, PIECE)
        outputs = []
        for start in range(0, length, size):
            piece = slice(start, start + size)
            asking = positions[:, piece]
            valid = None if tokens.valid is None else tokens.valid[:, piece]
            keys, values, places = key[:, :, piece], value[:, :, piece], asking
            seen = None if valid is None else valid
            past = None if rows is None else rows.read()
            if past is not None:
                past_keys, past_values = of_type(query.dtype, past[:2])
                keys, values = torch.cat((past_keys, keys), dim=2), torch.cat((past_values, values), dim=2)
                places = torch.cat((past[2], asking), dim=1)  # [B, window + t]
                seen = None if seen is None else torch.cat((torch.ones_like(past[2], dtype=torch.bool), seen), dim=1)
            distance = asking[:, :, None] - places[:, None]  # [B, t, n]
            visible = (distance >= 0) & (distance < self.window) & (places >= 0)[:, None]
            if valid is not None and seen is not None:
                visible = visible & seen[:, None] | ~valid[:, :, None]  # padding sees anything: no row of nothing
            outputs.append(F.scaled_dot_product_attention(query[:, :, piece], keys, values, visible[:, None]))
            if rows is not None:
                rows.write(key[:, :, piece], value[:, :, piece], asking, valid)
        return torch.cat(outputs, dim=2)


def of_type(dtype: torch.dtype, keys_and_values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What a cache holds in the type of the queries, which torch.autocast may have changed since."""
    keys, values = keys_and_values
    return keys.to(dtype), values.to(dtype)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
    """Attention of the last T columns [B, heads, T, h'] to themselves and all before, [B, groups, n, h'].

    Args:
        valid: [B, n], False at padding, which nothing sees but itself; None: there is none.
    """
    length, columns, groups = query.shape[2], key.shape[2], key.shape[1]
    own = torch.arange(columns - length, columns, device=query.device)[:, None]  # [T, 1]
    column = torch.arange(columns, device=query.device)
    if length == 1:  # queries that share a key are rows of one product
        visible = None if valid is None else (valid | (column == own))[:, None, None]
        rows = query.squeeze(2).unflatten(1, (groups, -1))  # [B, groups, queries, h']
        return F.scaled_dot_product_attention(rows, key, value, visible).flatten(1, 2).unsqueeze(2)
    repeats = query.shape[1] // groups
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if valid is None and length == columns:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    outputs = []
    for start in range(0, length, PIECE):
        piece = query[:, :, start : start + PIECE]
        end = columns - length + start + piece.shape[2]
        if valid is None:
            visible: Any = causal_lower_right(piece.shape[2], end)
        else:
            at = own[start : start + PIECE]
            visible = (column[:end] <= at) & valid[:, None, None, :end] | (column[:end] == at)
        outputs.append(F.scaled_dot_product_attention(piece, key[:, :, :end], value[:, :, :end], visible))
    return torch.cat(outputs, dim=2)


def follow(margins: Tensor, before: Tensor, feedback: float, first: Tensor, valid: Tensor) -> Tensor:
    """Which tokens heads take whose threshold rises by ``feedback`` with each that they took before; [B, E, T].

    What is taken depends on what was taken before it, so the answer is guessed until it is the one that follows from
    itself. There is one such, since with each round at least one more token is right for good.

    Args:
        margins: [B, E, T], of logits above a threshold that rises with nothing.
        before: [B, E], taken before these.
        first, valid: [B or 1, 1, T], tokens that are always taken, and that may be.
    """
    chosen = ((margins > feedback * before[..., None]) | first) & valid
    while True:
        taken = before[..., None] + chosen.cumsum(-1) - chosen.long()
        follows = ((margins > feedback * taken) | first) & valid
        if torch.equal(follows, chosen):
            return chosen
        chosen = follows


class MosaHeads(nn.Module):
    """Heads that attend among the tokens that they select, gated by the router's score."""

    def __init__(self, config: MosaConfig) -> None:
        super().__init__()
        self.config = config
        heads, width, head_dim = config.num_mosa_heads, config.hidden_size, config.head_dim
        self.router_weight = nn.Parameter(torch.empty(heads, width))  # [E, h]
        self.qkv_weight = nn.Parameter(torch.empty(heads, width, 3 * head_dim))  # [E, h, 3h'], columns q, k, v
        self.proj_weight = nn.Parameter(torch.empty(heads, head_dim, width))  # [E, h', h]
        self.was_offloaded = False  # accelerate brings the weights from memory or a disk for each call
        calibrated = config.selection == "threshold"  # NaN until then
        self.register_buffer("thresholds", torch.full((heads,), torch.nan, dtype=torch.float32) if calibrated else None)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        thresholds = self.thresholds
        super()._apply(fn, recurse)
        if thresholds is not None:  # moved as bits, so that no change of the model's type rounds them
            self.thresholds = fn(thresholds.view(torch.int32)).view(torch.float32)
        return self

    def forward(self, hidden_states: Tensor, tokens: Tokens, rows: SelectedRows | None) -> Tensor:
        """[B, T, h] to [B, T, h], the sum over the heads; with ``rows``, as dense heads."""
        if self.was_offloaded and self.lacks_thresholds():  # by now the weights are here
            raise ValueError(UNCALIBRATED.format("an offloaded layer"))
        if rows is not None and hidden_states.shape[1] == 1:
            return self.step(hidden_states, tokens, rows)
        scores = self.scores(hidden_states)  # [B, E, T]
        batch, length, width = hidden_states.shape
        indices = self.select(
            scores, tokens, None if rows is None else rows.counts
        )  # [B, E, k], T in empty places, which are last
        output = torch.zeros(batch * length, width, dtype=torch.float32, device=hidden_states.device)
        if indices.shape[2] > 0:
            sequence = torch.arange(batch, device=indices.device)[:, None, None]
            columns = indices.clamp(max=length - 1)
            selected = hidden_states[sequence, columns]  # [B, E, k, h]
            states = torch.einsum("bekh,ehd->bekd", selected, self.qkv_weight).unflatten(-1, (3, -1))
            table = sequence if tokens.positions.shape[0] == batch else torch.zeros_like(sequence)
            cos, sin = (part[table, columns].unsqueeze(3) for part in tokens.rotary)  # [B, E, k, 1, n]
            query, key = rotate(states[..., :2, :], cos, sin).unbind(3)  # [B, E, k, h']
            attended = self.attend(query, key, states[..., 2, :], indices < length, rows)
            gate = scores.gather(-1, columns).masked_fill(indices == length, 0)  # [B, E, k]
            gated = (attended.float() * gate.unsqueeze(-1)).to(attended.dtype)
            projected = torch.einsum("bekd,edh->bekh", gated, self.proj_weight)  # [B, E, k, h]
            output.index_add_(0, (sequence * length + columns).flatten(), projected.float().flatten(0, 2))
        return output.view(batch, length, width).to(hidden_states.dtype)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, taken: Tensor, rows: SelectedRows | None) -> Tensor:
        """Among the selected tokens [B, E, k, h'], which are in order; places that are not ``taken`` [B, E, k] last."""
        first = rows is None or rows.keys is None
        if rows is not None:
            own = rows.add_packed(key, value, taken)  # [B, E, k]
            if not first:
                keys, values = of_type(query.dtype, rows.read())  # [B, E, rows, h']
                visible = torch.arange(keys.shape[2], device=key.device) <= own.unsqueeze(-1)  # [B, E, k, rows]
                return F.scaled_dot_product_attention(query, keys, values, visible)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)  # places are in order of positions

    def step(self, hidden_states: Tensor, tokens: Tokens, rows: SelectedRows) -> Tensor:
        """One token of each sequence, [B, 1, h] to [B, 1, h]: only heads that select it compute anything."""
        rows.begin(hidden_states, len(self.router_weight))
        assert self.thresholds is not None
        if usable(hidden_states):
            weights, config = (self.router_weight, self.qkv_weight, self.proj_weight), self.config
            states, share = hidden_states[:, 0], 1 / config.sparsity
            output = step_in_kernels(states, weights, self.thresholds, tokens, rows, config.load_feedback, share)
            return output[:, None]
        batch, _, width = hidden_states.shape
        scores = self.scores(hidden_states)
        chosen = self.above_threshold(scores, tokens, rows.counts)[..., 0]  # [B, E]
        sequence, head = chosen.nonzero(as_tuple=True)  # [n] each
        states = self.project_in(hidden_states[:, 0], sequence, head).unflatten(-1, (3, -1))  # [n, 3, h']
        table = sequence if tokens.positions.shape[0] == batch else torch.zeros_like(sequence)
        cos, sin = (part[table] for part in tokens.rotary)  # [n, 1, pairs]
        query, key = rotate(states[:, :2], cos, sin).unbind(1)  # [n, h']
        own = rows.add_pairs(chosen, (sequence, head), key, states[:, 2])  # [n]
        keys, values = of_type(query.dtype, rows.read((sequence, head)))  # [n, rows, h']
        visible = torch.arange(keys.shape[1], device=keys.device) <= own[:, None]  # [n, rows]
        attended = F.scaled_dot_product_attention(query[:, None], keys, values, visible[:, None])[:, 0]  # [n, h']
        gated = (attended.float() * scores[sequence, head]).to(attended.dtype)
        return self.project_out(gated, sequence, head, batch).view(batch, 1, width).to(hidden_states.dtype)

    def lacks_thresholds(self) -> bool:
        """Whether a threshold was never set, as far as they can be seen now. It waits for the device."""
        if self.thresholds is None:
            return False
        self.was_offloaded = self.thresholds.is_meta
        return not self.was_offloaded and bool(self.thresholds.isnan().any())

    def scores(self, hidden_states: Tensor) -> Tensor:
        """Of the router, [B, E, T], in fp32 whatever the type of the model, and under autocast."""
        kind = hidden_states.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            return torch.sigmoid(torch.einsum("bth,eh->bet", hidden_states.float(), self.router_weight.float()))

    def reads_all(self, pairs: int) -> bool:
        """Whether the weights of all heads are read: copying those of every pair costs three times their bytes."""
        return 3 * pairs >= len(self.router_weight)

    def project_in(self, hidden_states: Tensor, sequence: Tensor, head: Tensor) -> Tensor:
        """Queries, keys and values [n, 3h'] of pairs, of states [B, h]."""
        if self.reads_all(len(head)):
            return torch.einsum("bh,ehd->ebd", hidden_states, self.qkv_weight)[head, sequence]
        return torch.einsum("nh,nhd->nd", hidden_states[sequence], self.qkv_weight[head])

    def project_out(self, gated: Tensor, sequence: Tensor, head: Tensor, batch: int) -> Tensor:
        """The sum over the heads, [B, h], of what pairs have attended to, [n, h']."""
        heads, head_dim, width = self.proj_weight.shape
        if self.reads_all(len(head)):
            spread = gated.new_zeros(batch, heads, head_dim)
            spread[sequence, head] = gated
            return spread.flatten(1) @ self.proj_weight.flatten(0, 1)
        projected = torch.einsum("nd,ndh->nh", gated, self.proj_weight[head])
        output = torch.zeros(batch, width, dtype=torch.float32, device=gated.device)
        return output.index_add_(0, sequence, projected.float())

    def above_threshold(self, scores: Tensor, tokens: Tokens, taken: Tensor | None) -> Tensor:
        """Which of the tokens [B, E, T] have a score above their head's threshold, or are the first of a sequence.

        Args:
            taken: [B, E], how many tokens each head took before these; None: none.
        """
        assert self.thresholds is not None
        first = (tokens.positions == 0)[:, None]  # [B or 1, 1, T]
        valid = torch.ones_like(first) if tokens.valid is None else tokens.valid[:, None]
        feedback = self.config.load_feedback
        if feedback == 0:
            return ((scores > self.thresholds[:, None]) | first) & valid
        share = tokens.positions[:, None] / self.config.sparsity
        margins = torch.logit(scores) - torch.logit(self.thresholds)[:, None] + feedback * share  # [B, E, T]
        before = scores.new_zeros(scores.shape[:2]) if taken is None else taken.to(scores.dtype)
        pieces = []
        for piece in margins.split(FOLLOWED, dim=-1):
            columns = slice(len(pieces) * FOLLOWED, len(pieces) * FOLLOWED + piece.shape[-1])
            pieces.append(follow(piece, before, feedback, first[..., columns], valid[..., columns]))
            before = before + pieces[-1].sum(-1)
        return torch.cat(pieces, dim=-1)

    def select(self, scores: Tensor, tokens: Tokens, taken: Tensor | None) -> Tensor:
        """The columns of each head's tokens [B, E, k], in order, of scores [B, E, T]; places left over hold T."""
        if self.config.selection == "expert_choice":
            return self.largest(scores, tokens)
        length = scores.shape[-1]
        chosen = self.above_threshold(scores, tokens, taken)
        places = chosen.cumsum(-1)  # from 1
        count = int(places[..., -1].max())
        indices = places.new_full((*places.shape[:2], count + 1), length)  # [B, E, 1 + k]; place 0 takes the others
        columns = torch.arange(length, device=scores.device).expand_as(places)
        return indices.scatter_(-1, places.masked_fill(~chosen, 0), columns)[..., 1:]

    def largest(self, scores: Tensor, tokens: Tokens) -> Tensor:
        """The columns of each head's largest scores, ties to the earlier token.

        A sequence with padding selects as many tokens as it would alone, and none of the padding.
        """
        length = scores.shape[-1]
        keys = scores.clone()
        if self.config.include_first_token:
            keys = keys.masked_fill((tokens.positions == 0)[:, None], torch.inf)
        if tokens.valid is None or tokens.lengths is None:
            ranked = torch.sort(keys, dim=-1, descending=True, stable=True).indices
            return ranked[..., : self.config.num_selected(length)].sort(dim=-1).values
        keys = keys.masked_fill(~tokens.valid[:, None], -torch.inf)
        quotas = [self.config.num_selected(count) for count in tokens.lengths]
        ranked = torch.sort(keys, dim=-1, descending=True, stable=True).indices[..., : max(quotas)]
        place = torch.arange(max(quotas), device=scores.device)
        left_out = place >= torch.tensor(quotas, device=scores.device)[:, None]  # [B, k]
        return ranked.masked_fill(left_out[:, None], length).sort(dim=-1).values


class MosaAttention(nn.Module):
    """The sum of a layer's dense, local and MoSA heads."""

    def __init__(self, config: MosaConfig) -> None:
        super().__init__()
        dense, local = config.num_dense_heads, config.num_local_heads
        self.dense_heads = MosaCausalHeads(config, dense, config.num_key_value_heads) if dense else None
        self.local_heads = MosaCausalHeads(config, local, local, config.local_window) if local else None
        self.mosa_heads = MosaHeads(config) if config.num_mosa_heads else None

    def forward(self, hidden_states: Tensor, tokens: Tokens, cache: MosaCacheLayer | None) -> Tensor:
        """[B, T, h] to [B, T, h]."""
        parts = []
        for heads, kind in ((self.dense_heads, "dense"), (self.local_heads, "local"), (self.mosa_heads, "mosa")):
            if heads is not None:
                parts.append(heads(hidden_states, tokens, None if cache is None else getattr(cache, kind)))
        if cache is not None:
            cache.length += hidden_states.shape[1]
        output = parts[0]
        for part in parts[1:]:
            output = output + part
        return output
