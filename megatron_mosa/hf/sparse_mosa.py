"""MoSA heads: attention among the tokens that each head selects, with or without a cache."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_mosa import MosaConfig
from .kernels_mosa import can_run_kernels, step_in_kernels, training_kernels
from .room_mosa import Prompts, Room
from .rows_mosa import BLOCK, SelectedRows, to_dtype
from .tokens_mosa import Tokens, largest, rotate

SELECTION_CHUNK = 128  # tokens selected at once if each selection depends on the earlier ones
UNCALIBRATED = (
    "mosa_heads.thresholds of {} are NaN: they are not calibrated, so the heads cannot select tokens; they must be "
    "between 0 and 1; export the output of mosa checkpoint causalize, or a checkpoint of mosa.selection=threshold "
    "after its first optimizer step"
)


def select_with_feedback(margins: Tensor, before: Tensor, feedback: float, first: Tensor, valid: Tensor) -> Tensor:
    """Select tokens [B, E, T] where the threshold rises by ``feedback`` with each token selected before.

    Each selection depends on the earlier ones, so the result is found as the fixed point of an iteration. It is unique
    and reached after at most T rounds, since each round makes at least one more token final.

    Args:
        margins: [B, E, T], logits minus the threshold before any feedback.
        before: [B, E], number of tokens selected before these.
        feedback: rise of the threshold, in logits.
        first: [B or 1, 1, T], tokens that are always selected.
        valid: [B or 1, 1, T], tokens that may be selected.
    """
    chosen = ((margins > feedback * before[..., None]) | first) & valid
    while True:
        count = before[..., None] + chosen.cumsum(-1) - chosen.long()
        update = ((margins > feedback * count) | first) & valid
        if torch.equal(update, chosen):
            return chosen
        chosen = update


def choose_heads(scores: Tensor, bias: Tensor, number: int) -> Tensor:
    """Return which ``number`` of the E heads each token takes, bool [B, E, T], by the sums of scores and biases [E].

    Ties go to the earlier head.
    """
    keys = scores + bias[:, None]
    least = keys.topk(number, dim=1).values[:, -1:]  # [B, 1, T]
    is_above, is_tied = keys > least, keys == least
    room = number - is_above.sum(dim=1, keepdim=True)
    return is_above | (is_tied & (is_tied.cumsum(dim=1, dtype=torch.int32) <= room))


class Prompt(NamedTuple):
    """The first tokens of sequences in MoSA heads, once the heads have counted those that they select."""

    module: Any
    """``megatron_mosa.kernels.prompt``."""

    scores: Tensor
    """fp32 [B, E, T]."""

    indices: Tensor | None
    """[B, E, k], padded with T; None: still to be selected, by thresholds."""

    first: Tensor
    """long [B, E], the first of consecutive blocks in ``rows`` for each sequence and head."""

    rows: SelectedRows
    """Knows counts and totals; has no room yet."""

    room: Room | None
    """Guessed; None: the totals say how much is needed."""


class MosaHeads(nn.Module):
    """Heads that attend among the tokens that they select, gated by the router's score."""

    thresholds: Tensor | None
    head_bias: Tensor | None

    def __init__(self, config: MosaConfig) -> None:
        super().__init__()
        self.config = config
        heads, width, head_dim = config.num_mosa_heads, config.hidden_size, config.head_dim
        self.router_weight = nn.Parameter(torch.empty(heads, width))  # [E, h]
        self.qkv_weight = nn.Parameter(torch.empty(heads, width, 3 * head_dim))  # [E, h, 3h'], columns q, k, v
        self.proj_weight = nn.Parameter(torch.empty(heads, head_dim, width))  # [E, h', h]
        self.prompts = Prompts(heads)
        self.was_offloaded = False  # accelerate loads the weights from memory or disk for each call
        is_causal = config.selection == "threshold"  # thresholds are NaN until calibrated
        self.register_buffer("thresholds", torch.full((heads,), torch.nan, dtype=torch.float32) if is_causal else None)
        is_balanced = config.selection == "token_choice"
        self.register_buffer("head_bias", torch.zeros(heads, dtype=torch.float32) if is_balanced else None)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = {name: buffer for name in ("thresholds", "head_bias") if (buffer := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            # Moved as integers, so that a change of the model's dtype does not round them.
            setattr(self, name, fn(buffer.view(torch.int32)).view(torch.float32))
        return self

    def forward(
        self, hidden_states: Tensor, tokens: Tokens, rows: SelectedRows | None, prompt: Prompt | None = None
    ) -> Tensor:
        """Map [B, T, h] to [B, T, h], summed over heads. Selected tokens attend to those in ``rows``, and are added."""
        if self.was_offloaded and self.lacks_thresholds():  # the weights are loaded by now
            raise ValueError(UNCALIBRATED.format("an offloaded layer"))
        if rows is not None and hidden_states.shape[1] == 1:
            return self.step(hidden_states, tokens, rows)
        prompt = self.start_prompt(hidden_states, tokens, rows) if prompt is None else prompt
        if prompt is not None:
            return self.read_prompt(hidden_states, prompt, rows is not None)
        scores = self.scores(hidden_states)  # [B, E, T]
        batch, length, width = hidden_states.shape
        indices = self.select(scores, tokens, None if rows is None else rows.counts)  # [B, E, k], padded with T
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

    def start_prompt(self, hidden_states: Tensor, tokens: Tokens, rows: SelectedRows | None) -> Prompt | None:
        """Start what ``forward`` then does with the first tokens of sequences, if the kernels of training can.

        In a trial the host guesses how many tokens the heads select, if an earlier prompt was similar. Otherwise their
        number is copied to the host while the device runs what is launched in between.
        """
        is_first = tokens.valid is None and (rows is None or rows.keys is None)
        if not is_first or self.router_weight.device != hidden_states.device:
            return None
        module, config = training_kernels(hidden_states, self.config.head_dim), self.config
        if module is None or (rows is not None and hidden_states.shape[1] == 1):
            return None
        scores = module.router_scores(hidden_states, self.router_weight)
        indices, trial = None, None if self.thresholds is None else tokens.trial
        room = None if trial is None else self.prompts.guess(*hidden_states.shape[:2])
        following = config.load_feedback, 1 / config.sparsity
        if self.thresholds is None:
            indices = self.select(scores, tokens, None)
            counts = (indices < scores.shape[2]).sum(dim=2)
        elif room is not None:
            room = room._replace(rows=module.capacity_for(room.rows))
            indices, counts = module.select_and_count(scores, self.thresholds, room.rows, *following)
        else:
            counts = module.count_above(scores, self.thresholds, *following)
        rows = SelectedRows() if rows is None else rows
        counts, first, totals = module.lay_out(counts, BLOCK)
        rows.begin(counts, totals)
        if trial is not None and room is not None:
            trial.layers.append((self.prompts, rows, room))
        return Prompt(module, scores, indices, first, rows, room)

    def read_prompt(self, hidden_states: Tensor, prompt: Prompt, is_stored: bool) -> Tensor:
        """Compute the same as ``forward`` for a prompt that has been started, and store keys and values."""
        module, scores, indices, first, rows, room = prompt
        config = self.config
        if indices is None:
            assert self.thresholds is not None
            totals = rows.host_totals()
            batch, length, _ = hidden_states.shape
            self.prompts.learn(batch, length, totals)
            capacity = module.capacity_for(totals[1])
            following = config.load_feedback, 1 / config.sparsity
            indices = module.select_above(scores, self.thresholds, capacity, *following)
        weights = self.qkv_weight, self.proj_weight
        rotation = config.rotary_percent, config.rotary_base
        read = module.read_prompt(hidden_states, self.router_weight, scores, indices, *weights, *rotation)
        if is_stored:
            if room is None:
                blocks, most, _ = rows.host_totals()
                room = Room(most, blocks)
            rows.reserve(hidden_states.new_empty(0, config.head_dim), room.rows, room.blocks)
            read.store(first, rows.table, rows.keys, rows.values)
        return read.output

    def attend(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor, rows: SelectedRows | None) -> Tensor:
        """Attend among selected tokens [B, E, k, h'] in order of position, of which the ``valid`` ones come first."""
        is_empty = rows is None or rows.keys is None
        if rows is not None:
            own = rows.add_packed(key, value, valid)  # [B, E, k]
            if not is_empty:
                keys, values = to_dtype(query.dtype, rows.read())  # [B, E, rows, h']
                visible = torch.arange(keys.shape[2], device=key.device) <= own.unsqueeze(-1)  # [B, E, k, rows]
                return F.scaled_dot_product_attention(query, keys, values, visible)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def step_in_kernels(
        self, hidden_states: Tensor, tokens: Tokens, rows: SelectedRows, residual: Tensor | None = None
    ) -> Tensor:
        """Do the same as ``step`` where the kernels run; the residual, [B, 1, h], is that of a captured step."""
        weights, config = (self.router_weight, self.qkv_weight, self.proj_weight), self.config
        assert self.thresholds is not None
        settings = config.load_feedback, 1 / config.sparsity, None if residual is None else residual[:, 0]
        return step_in_kernels(hidden_states[:, 0], weights, self.thresholds, tokens, rows, *settings)[:, None]

    def step(self, hidden_states: Tensor, tokens: Tokens, rows: SelectedRows) -> Tensor:
        """Map one token of each sequence, [B, 1, h] to [B, 1, h]. Only heads that select it compute anything."""
        rows.initialize(hidden_states, len(self.router_weight))
        if self.thresholds is not None and can_run_kernels(hidden_states):
            return self.step_in_kernels(hidden_states, tokens, rows)
        batch, _, width = hidden_states.shape
        scores = self.scores(hidden_states)
        chosen = self.chosen(scores, tokens, rows.counts)[..., 0]  # [B, E]
        sequence, head = chosen.nonzero(as_tuple=True)  # [n] each
        states = self.project_in(hidden_states[:, 0], sequence, head).unflatten(-1, (3, -1))  # [n, 3, h']
        table = sequence if tokens.positions.shape[0] == batch else torch.zeros_like(sequence)
        cos, sin = (part[table] for part in tokens.rotary)  # [n, 1, pairs]
        query, key = rotate(states[:, :2], cos, sin).unbind(1)  # [n, h']
        own = rows.add_pairs(chosen, (sequence, head), key, states[:, 2])  # [n]
        keys, values = to_dtype(query.dtype, rows.read((sequence, head)))  # [n, rows, h']
        visible = torch.arange(keys.shape[1], device=keys.device) <= own[:, None]  # [n, rows]
        attended = F.scaled_dot_product_attention(query[:, None], keys, values, visible[:, None])[:, 0]  # [n, h']
        gated = (attended.float() * scores[sequence, head]).to(attended.dtype)
        return self.project_out(gated, sequence, head, batch).view(batch, 1, width).to(hidden_states.dtype)

    def loaded_thresholds(self) -> Tensor | None:
        """Return the thresholds, or None if there are none, or if they are not loaded, which is remembered."""
        self.was_offloaded = self.thresholds is not None and self.thresholds.is_meta
        return None if self.was_offloaded else self.thresholds

    def lacks_thresholds(self) -> bool:
        """Return whether a threshold is NaN, as far as they are loaded. Waits for the device."""
        thresholds = self.loaded_thresholds()
        return thresholds is not None and bool(thresholds.isnan().any())

    def scores(self, hidden_states: Tensor) -> Tensor:
        """Return the router's scores [B, E, T] in fp32, whatever the model's dtype, also under autocast."""
        device = hidden_states.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            # On CPUs fp64, so that after rounding equal tokens have equal scores wherever they stand.
            dtype = torch.float64 if device == "cpu" else torch.float32
            logits = torch.einsum("bth,eh->bet", hidden_states.to(dtype), self.router_weight.to(dtype))
            return torch.sigmoid(logits).float()

    def reads_all_weights(self, pairs: int) -> bool:
        """Return whether to use the weights of all heads: copying those of each pair costs three times their bytes."""
        return 3 * pairs >= len(self.router_weight)

    def project_in(self, hidden_states: Tensor, sequence: Tensor, head: Tensor) -> Tensor:
        """Project states [B, h] to queries, keys and values [n, 3h'] of n pairs of sequence and head."""
        if self.reads_all_weights(len(head)):
            return torch.einsum("bh,ehd->ebd", hidden_states, self.qkv_weight)[head, sequence]
        return torch.einsum("nh,nhd->nd", hidden_states[sequence], self.qkv_weight[head])

    def project_out(self, gated: Tensor, sequence: Tensor, head: Tensor, batch: int) -> Tensor:
        """Project the outputs [n, h'] of n pairs, and sum over heads: [B, h]."""
        heads, head_dim, width = self.proj_weight.shape
        if self.reads_all_weights(len(head)):
            spread = gated.new_zeros(batch, heads, head_dim)
            spread[sequence, head] = gated
            return spread.flatten(1) @ self.proj_weight.flatten(0, 1)
        projected = torch.einsum("nd,ndh->nh", gated, self.proj_weight[head])
        output = torch.zeros(batch, width, dtype=torch.float32, device=gated.device)
        return output.index_add_(0, sequence, projected.float())

    def chosen(self, scores: Tensor, tokens: Tokens, before: Tensor | None) -> Tensor:
        """Return which tokens [B, E, T] each head selects, by its threshold or by their choice, with the first ones.

        Args:
            scores: [B, E, T].
            tokens: positions and padding.
            before: [B, E], number of tokens that each head selected before these; None: none.
        """
        first = (tokens.positions == 0)[:, None]  # [B or 1, 1, T]
        valid = torch.ones_like(first) if tokens.valid is None else tokens.valid[:, None]
        if self.head_bias is not None:
            return (choose_heads(scores, self.head_bias, self.config.heads_per_token) | first) & valid
        assert self.thresholds is not None
        feedback = self.config.load_feedback
        if feedback == 0:
            return ((scores > self.thresholds[:, None]) | first) & valid
        share = tokens.positions[:, None] / self.config.sparsity
        margins = torch.logit(scores) - torch.logit(self.thresholds)[:, None] + feedback * share  # [B, E, T]
        count = scores.new_zeros(scores.shape[:2]) if before is None else before.to(scores.dtype)
        chunks = []
        for chunk in margins.split(SELECTION_CHUNK, dim=-1):
            columns = slice(len(chunks) * SELECTION_CHUNK, len(chunks) * SELECTION_CHUNK + chunk.shape[-1])
            chunks.append(select_with_feedback(chunk, count, feedback, first[..., columns], valid[..., columns]))
            count = count + chunks[-1].sum(-1)
        return torch.cat(chunks, dim=-1)

    def select(self, scores: Tensor, tokens: Tokens, before: Tensor | None) -> Tensor:
        """Return the columns of each head's tokens [B, E, k] in order, padded with T, from scores [B, E, T]."""
        if self.config.selection == "expert_choice":
            return self.top_k(scores, tokens)
        length = scores.shape[-1]
        chosen = self.chosen(scores, tokens, before)
        slots = chosen.cumsum(-1)  # from 1; slot 0 is for tokens that are not selected
        count = int(slots[..., -1].max())
        indices = slots.new_full((*slots.shape[:2], count + 1), length)  # [B, E, 1 + k]
        columns = torch.arange(length, device=scores.device).expand_as(slots)
        return indices.scatter_(-1, slots.masked_fill(~chosen, 0), columns)[..., 1:]

    def top_k(self, scores: Tensor, tokens: Tokens) -> Tensor:
        """Return the columns of each head's largest scores, where ties go to the earlier token.

        A sequence with padding selects as many tokens as it would alone, and no padding.
        """
        if self.config.include_first_token:
            scores = scores.masked_fill((tokens.positions == 0)[:, None], torch.inf)
        return largest(scores, tokens, self.config.num_selected)
