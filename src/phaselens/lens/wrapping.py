"""Build the lens around a loaded model, in place: TransformerLens' bridge with the components of `phaselens.lens`."""

from __future__ import annotations

import torch
from transformer_lens.factories import architecture_adapter_factory
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    JointGateUpMLPBridge,
    NormalizationBridge,
    RMSNormalizationBridge,
)
from transformer_lens.model_bridge.generalized_components.block import BlockBridge
from transformer_lens.model_bridge.generalized_components.joint_qkv_attention import JointQKVAttentionBridge
from transformer_lens.model_bridge.generalized_components.position_embeddings_attention import (
    PositionEmbeddingsAttentionBridge,
)
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_config_from_hf,
    build_bridge_from_module,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phaselens.errors import RefusedModel
from phaselens.lens import attention_dispatch
from phaselens.lens.blocks import SkippingBlock
from phaselens.lens.bridge import HookedTransformer
from phaselens.lens.components import StreamingAttention, attention_layers, mix_in
from phaselens.lens.frequencies import make_independent
from phaselens.lens.memory import keep_freed_memory
from phaselens.lens.original_components import NativeGateUp, NativeNorm

# Attention that is one softmax over causal q·k, computed by the function that transformers is told to use.
_SERVED_ATTENTION = (PositionEmbeddingsAttentionBridge, JointQKVAttentionBridge)


def wrap(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, name: str | None = None
) -> HookedTransformer:
    """Build the bridge around a loaded Hugging Face model, in place; `phaselens.load` does the rest.

    Raises:
        RefusedModel: for a checkpoint that TransformerLens' adapter of the family refuses, or whose unembedding has no
            plain weight.
    """
    keep_freed_memory()
    model.eval()
    try:
        bridge = build_bridge_from_module(
            model,
            type(model).__name__,
            hf_config=model.config,
            tokenizer=tokenizer,
            model_name=name or model.config.name_or_path or model.config.model_type,
            post_adapter_hook=_install_mixins,
        )
    except (NotImplementedError, AssertionError) as error:
        raise RefusedModel(f"{model.config.model_type}: {error}") from error
    model.set_attn_implementation(attention_dispatch.IMPLEMENTATION)
    # The builder makes plain bridges. This class adds methods, and only the state that is set here.
    bridge.__class__ = HookedTransformer
    options = bridge._streaming_options = attention_dispatch.StreamingOptions()
    options.rows.follow(model.base_model)
    make_independent(model, options.rows)
    bridge._points = {}
    bridge.position_axes = {}
    bridge._unembedding = None
    bridge._arithmetic = None
    bridge.text_tokenizer = None
    bridge._default_prepend_bos = bool(bridge.cfg.default_prepend_bos)
    for attention in attention_layers(bridge):
        attention.connect(options)
    bridge.eval()
    lens: HookedTransformer = bridge
    return lens


def require_served(model: PreTrainedModel) -> None:
    """Check, before anything is run or changed, that this model's attention can be measured exactly.

    Raises:
        RefusedModel: for an architecture that TransformerLens does not know, or whose attention is not one softmax
            over causal scores.
    """
    config = model.config
    architecture = type(model).__name__
    family = f"{config.model_type} ({architecture})"
    advice = "use a family listed in docs/families.md"
    if getattr(config, "is_encoder_decoder", False):
        raise RefusedModel(
            f"{family}: an encoder-decoder; PhaseLens serves decoder-only, causal models; {advice}"
        )
    if architecture not in architecture_adapter_factory.SUPPORTED_ARCHITECTURES:
        raise RefusedModel(f"{family}: TransformerLens has no adapter for this architecture; {advice}")
    bridge_config = build_bridge_config_from_hf(config, architecture, architecture, torch.float32)
    factory = architecture_adapter_factory.ArchitectureAdapterFactory
    blocks = factory.select_architecture_adapter(bridge_config).component_mapping.get("blocks")
    attention = blocks.submodules.get("attn") if isinstance(blocks, BlockBridge) else None
    if attention is None:
        raise RefusedModel(
            f"{family}: it has no stack of attention blocks, so nothing here can be measured; {advice}"
        )
    if not isinstance(attention, _SERVED_ATTENTION):
        attention_class = type(attention).__name__.removesuffix("Bridge")
        raise RefusedModel(
            f"{family}: its attention ({attention_class}) is not one softmax over causal q·k; {advice}"
        )


def _install_mixins(adapter: ArchitectureAdapter) -> None:
    """Add the mixins to the adapter's templates, before they are cloned for each layer."""
    mapping = adapter.component_mapping
    blocks = mapping["blocks"]
    attention = blocks.submodules["attn"]
    mix_in(attention, StreamingAttention)
    mix_in(blocks, SkippingBlock)
    for component in (*mapping.values(), *blocks.submodules.values(), *attention.submodules.values()):
        if type(component) in (NormalizationBridge, RMSNormalizationBridge):
            mix_in(component, NativeNorm)
        elif type(component) is JointGateUpMLPBridge:
            mix_in(component, NativeGateUp)
