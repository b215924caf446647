"""MoSA layers in Megatron-core's HybridModel, its successor of GPTModel; needs megatron-core 0.19 (Python 3.12)."""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_mosa.attention.config import MosaTransformerConfig
from megatron_mosa.attention.layer import MosaSelfAttention
from megatron_mosa.attention.recompute import MosaTransformerLayer
from megatron_mosa.attention.spec import MosaSpecProvider


class MosaHybridStack(HybridStack):
    """Megatron's stack with a final norm of the backend: its own is Transformer Engine's."""

    def __init__(self, config: MosaTransformerConfig, submodules: Any, norm: type, **options: Any) -> None:
        super().__init__(config, submodules, post_layer_norm=False, **options)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = norm(config, config.hidden_size, eps=config.layernorm_epsilon)


def get_mosa_hybrid_stack_spec(config: MosaTransformerConfig, backend: BackendSpecProvider | None = None) -> ModuleSpec:
    """Return what HybridModel takes as ``hybrid_stack_spec``.

    In its ``hybrid_layer_pattern`` "*" is a layer of the configured heads and "-" an MLP: ``"*-" * 12`` makes 12
    transformer layers (``config.num_layers`` counts the symbols). Other symbols have no layer here.

    Args:
        config: the model's configuration.
        backend: provides norms and MLP; None: ``MosaSpecProvider``.
    """
    backend = backend or MosaSpecProvider()
    norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm")
    bias_dropout_add: Any = get_bias_dropout_add  # a function, where Megatron's annotation says module
    attention = TransformerLayerSubmodules(
        input_layernorm=norm, self_attention=ModuleSpec(module=MosaSelfAttention), self_attn_bda=bias_dropout_add
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=norm, mlp=get_mlp_module_spec_for_backend(backend), mlp_bda=bias_dropout_add
    )
    layers = HybridStackSubmodules(
        attention_layer=ModuleSpec(module=MosaTransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
    )
    return ModuleSpec(module=MosaHybridStack, params={"norm": norm}, submodules=layers)
