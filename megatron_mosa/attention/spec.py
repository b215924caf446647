"""ModuleSpecs that put MoSA layers into Megatron-core's GPTModel."""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_mosa.attention.config import MosaTransformerConfig
from megatron_mosa.attention.layer import MosaSelfAttention
from megatron_mosa.attention.recompute import MosaTransformerLayer
from megatron_mosa.parallel import norm_class


class MosaSpecProvider(LocalSpecProvider):
    """Megatron's local modules, with norms whose gradients are correct under sequence parallelism with any engine."""

    def layer_norm(self, rms_norm: bool = False, *_: object, **__: object) -> type:
        return norm_class("RMSNorm" if rms_norm else "LayerNorm")


def get_mosa_layer_spec(config: MosaTransformerConfig, backend: BackendSpecProvider | None = None) -> ModuleSpec:
    """Return the spec of one transformer layer with MoSA attention.

    Args:
        config: the model's configuration.
        backend: provider of norms and MLP; None: ``MosaSpecProvider``. With Megatron's TESpecProvider, the gradients of
            norms under sequence parallelism must be summed by Megatron's ``finalize_model_grads``.
    """
    backend = backend or MosaSpecProvider()
    fused = backend.fuse_layernorm_and_linear()
    norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm")
    bias_dropout_add: Any = get_bias_dropout_add  # a function, although Megatron's annotation says module
    return ModuleSpec(
        module=MosaTransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(module=MosaSelfAttention),
            self_attn_bda=bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if fused else norm,
            mlp=get_mlp_module_spec_for_backend(backend),
            mlp_bda=bias_dropout_add,
        ),
    )


def get_mosa_block_spec(
    config: MosaTransformerConfig, backend: BackendSpecProvider | None = None
) -> TransformerBlockSubmodules:
    """Return the spec of all layers and the final norm, for GPTModel's ``transformer_layer_spec``."""
    backend = backend or MosaSpecProvider()
    norm: Any = backend.layer_norm(rms_norm=config.normalization == "RMSNorm")
    return TransformerBlockSubmodules(
        layer_specs=[get_mosa_layer_spec(config, backend)] * config.num_layers,
        layer_norm=norm,
    )
