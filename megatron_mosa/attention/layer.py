"""The hybrid attention layer: heads of all kinds between one gather and one reduction."""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_mosa.attention.config import HEAD_FIELDS, MosaTransformerConfig
from megatron_mosa.attention.heads import PartitionedHeads
from megatron_mosa.attention.kinds import KINDS
from megatron_mosa.attention.recompute import recomputed
from megatron_mosa.kernels import AnyDocuments
from megatron_mosa.parallel import sum_gradients


class MosaSelfAttention(MegatronModule):
    """Self-attention of a Megatron-core TransformerLayer whose output is the sum of its heads of all ``KINDS``.

    The heads of a kind are the submodule ``dense_heads``, ``local_heads``, ...; None if there are none.

    Heads are partitioned over the tensor-parallel group. With sequence parallelism the input is gathered once and the
    output reduce-scattered once for all heads together; without it, there is one all-reduce each in forward and
    backward. Attention is always causal. ``attention_mask`` passes the ``Documents`` of the batch if attention stays
    within documents; any other mask is ignored, as by Megatron's causal layers.
    """

    config: MosaTransformerConfig

    def __init__(
        self,
        config: MosaTransformerConfig,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        if not isinstance(config, MosaTransformerConfig):
            raise ValueError(f"config is a {type(config).__name__}; expected MosaTransformerConfig")
        config.check_initialization()
        self.layer_number = layer_number
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
        self.tp_group = groups.tp
        self.present: list[str] = []  # names of the submodules of ``heads``
        for kind in KINDS:
            name, count = f"{kind.name}_heads", getattr(config, HEAD_FIELDS[kind.name])
            setattr(self, name, kind.module()(config, self.tp_group) if count else None)
            if count:
                self.present.append(name)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | AnyDocuments | None = None,
        **options: object,
    ) -> tuple[Tensor, None]:
        """Compute the layer.

        Args:
            hidden_states: [T, B, h], or [T / tensor-parallel size, B, h] under sequence parallelism.
            attention_mask: the ``Documents`` of the batch if ``mosa_attend_within_documents`` is set; otherwise
                ignored, but not ``Documents``.
            options: further arguments of TransformerLayer; all must be None.

        Returns:
            The output in the shape of the input, and None for the bias.

        Raises:
            ValueError: rotary embeddings, packed sequences or an inference context are given; documents are missing,
                unexpected, or do not fit the shape or device of the states.
        """
        for name, value in options.items():
            if value is not None:
                raise ValueError(f"{name} is not supported by MosaSelfAttention; expected None{_HINTS.get(name, '')}")
        documents = self._documents(hidden_states, attention_mask)
        if self.config.mosa_recompute == "attention" and self.training:
            output = recomputed(self._heads, hidden_states, documents)
        else:
            output = self._heads(hidden_states, documents)
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group), None
        return reduce_from_tensor_model_parallel_region(output, group=self.tp_group), None

    def _documents(self, hidden_states: Tensor, attention_mask: object) -> AnyDocuments | None:
        """Check and return the documents passed as the attention mask, or None if the layer has no documents."""
        documents = attention_mask if isinstance(attention_mask, AnyDocuments) else None
        if (documents is not None) != self.config.mosa_attend_within_documents:
            allowed = "megatron_mosa.kernels.Documents" if documents is None else "None"
            raise ValueError(
                f"attention_mask is a {type(attention_mask).__name__}; expected with mosa_attend_within_documents="
                f"{self.config.mosa_attend_within_documents}: {allowed}"
            )
        if documents is not None:
            length, batch, _ = hidden_states.shape
            length *= self.tp_group.size() if self.config.sequence_parallel else 1
            if documents.starts.shape != (batch, length) or documents.starts.device != hidden_states.device:
                raise ValueError(
                    f"attention_mask has documents of {tuple(documents.starts.shape)} tokens on "
                    f"{documents.starts.device}; expected {(batch, length)} on {hidden_states.device}"
                )
        return documents

    @property
    def heads(self) -> list[PartitionedHeads]:
        """The layer's heads, of each kind that it has."""
        return [getattr(self, name) for name in self.present]

    def _heads(self, hidden_states: Tensor, documents: AnyDocuments | None) -> Tensor:
        """Gather the input and compute this rank's part of the sum over heads: [T, B, h]."""
        if self.config.sequence_parallel:
            states = gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
        else:
            states = sum_gradients(hidden_states, self.tp_group)
        # whole sequences, [T, B, h]
        output = None
        for heads in self.heads:  # Dynamo cannot go on in a comprehension after a break of its graph
            part = heads(states, documents)
            output = part if output is None else output + part
        assert output is not None
        return output.contiguous()  # Megatron-core 0.16 silently does not reduce other tensors


_HINTS = {"rotary_pos_emb": " (build GPTModel with position_embedding_type='none': the layer rotates by itself)"}
