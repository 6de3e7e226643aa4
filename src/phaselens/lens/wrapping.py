"""Build the lens around a loaded model, in place: TransformerLens' bridge with the components of `phaselens.lens`."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformer_lens.factories import architecture_adapter_factory
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    JointGateUpMLPBridge,
    NormalizationBridge,
    RMSNormalizationBridge,
)
from transformer_lens.model_bridge.generalized_components.block import (
    VARIANT_SUBMODULE_NAMES,
    BlockBridge,
)
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
from phaselens.lens import attention_dispatch, families, quantised
from phaselens.lens.anatomy import Anatomy, dissect
from phaselens.lens.attention_owner import StreamingOptions
from phaselens.lens.blocks import SkippingBlock
from phaselens.lens.bridge import HookedTransformer
from phaselens.lens.components import StreamingAttention, attention_layers, mix_in
from phaselens.lens.evaluation_mode import evaluate, evaluate_parts
from phaselens.lens.frequencies import make_independent
from phaselens.lens.loss_point import fire_losses
from phaselens.lens.masks import state_causality
from phaselens.lens.memory import keep_freed_memory
from phaselens.lens.original_components import NativeGateUp, NativeNorm
from phaselens.lens.ownership import Ownership
from phaselens.lens.score_attention import attending_by_lens, use_lens_attention
from phaselens.lens.structural_adapter import build_from_anatomy

# Attention that is one softmax over causal q·k, computed by the function that transformers is told to use.
_SERVED_ATTENTION = (PositionEmbeddingsAttentionBridge, JointQKVAttentionBridge)

# What TransformerLens' adapters raise for a configuration that they do not support, or a library that they need.
_UNUSABLE = (
    ImportError,
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    NotImplementedError,
    AssertionError,
)


def wrap(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str | None = None,
    anatomy: Anatomy | None = None,
) -> HookedTransformer:
    """Build the bridge around a loaded Hugging Face model, in place; `phaselens.load` does the rest.

    Args:
        anatomy: the result of `measure_anatomy`, for a model without an adapter of its own in TransformerLens.

    Raises:
        RefusedModel: for a checkpoint that TransformerLens' adapter of the family refuses, or whose unembedding has no
            plain weight; and for a model without such an adapter that has no one residual stream.
    """
    keep_freed_memory()
    evaluate(model)
    name = name or model.config.name_or_path or model.config.model_type
    with _scanning_without_cycles():
        if anatomy is None:
            bridge = _build_from_adapter(model, tokenizer, name)
        else:
            bridge = build_from_anatomy(model, anatomy, tokenizer, name)
    if anatomy is None:
        model.set_attn_implementation(attention_dispatch.IMPLEMENTATION)
    else:
        use_lens_attention(model)
    # The builder makes plain bridges. This class adds methods, and only the state that is set here.
    bridge.__class__ = HookedTransformer
    bridge.ownership = Ownership()
    options = bridge._streaming_options = StreamingOptions()
    bridge.hook_loss = HookPoint()
    fire_losses(bridge)  # before the rows forget the tokens of the call
    options.rows.follow(families.body_of(model))
    make_independent(model, options.rows)
    bridge._points = {}
    bridge.position_axes = {}
    bridge._unembedding = None
    bridge.resume_problem = None
    bridge.head_paths = () if anatomy is None else anatomy.stack.heads
    bridge._arithmetic = None
    bridge.text_tokenizer = None
    bridge._default_prepend_bos = bool(bridge.cfg.default_prepend_bos)
    for attention in attention_layers(bridge).values():
        attention.connect(options)
    evaluate_parts(bridge)
    lens: HookedTransformer = bridge
    return lens


@contextmanager
def _scanning_without_cycles() -> Iterator[None]:
    """Let TransformerLens look for hooks without a strong reference to the bridge.

    It does so by a function that refers to itself and to the bridge, whose weights would stay in memory until Python
    collects cycles, long after the last reference to the lens is gone.
    """
    scan = TransformerBridge._scan_existing_hooks

    def scan_weakly(bridge: TransformerBridge, module: nn.Module, prefix: str = "") -> None:
        scan(weakref.proxy(bridge), module, prefix)

    TransformerBridge._scan_existing_hooks = scan_weakly
    try:
        yield
    finally:
        TransformerBridge._scan_existing_hooks = scan


def _build_from_adapter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str
) -> TransformerBridge:
    """Build the bridge by TransformerLens' adapter of the architecture."""
    try:
        return build_bridge_from_module(
            model,
            type(model).__name__,
            hf_config=model.config,
            tokenizer=tokenizer,
            model_name=name,
            post_adapter_hook=_install_mixins,
        )
    except (NotImplementedError, AssertionError) as error:
        raise RefusedModel(f"{model.config.model_type}: {error}") from error


def measure_anatomy(model: PreTrainedModel) -> Anatomy:
    """Return the anatomy of an unwrapped model, which is left as it was.

    Raises:
        RefusedModel: for a model without one residual stream that its layers add to.
    """
    evaluate(model)
    state_causality(model)
    with attending_by_lens(model):
        return dissect(model, f"{model.config.model_type} ({type(model).__name__})")


def has_own_adapter(model: PreTrainedModel) -> bool:
    """Return whether TransformerLens has an adapter for this architecture that the lens can use."""
    architecture = type(model).__name__
    if architecture not in architecture_adapter_factory.SUPPORTED_ARCHITECTURES:
        return False
    factory = architecture_adapter_factory.ArchitectureAdapterFactory
    try:
        bridge_config = build_bridge_config_from_hf(model.config, architecture, architecture, torch.float32)
        blocks = factory.select_architecture_adapter(bridge_config).component_mapping.get("blocks")
    except _UNUSABLE:
        return False
    if not isinstance(blocks, BlockBridge):
        return False
    attention = blocks.submodules.get("attn")
    # An adapter for layers of several kinds declares parts that a layer may lack.
    is_mixed = any(name in blocks.submodules for name in VARIANT_SUBMODULE_NAMES if name != "attn")
    if not isinstance(attention, _SERVED_ATTENTION) or attention.optional or is_mixed:
        return False
    is_fused = "qkv" in attention.submodules
    splits_weights = is_fused or any(
        type(part) is JointGateUpMLPBridge for part in blocks.submodules.values()
    )
    if splits_weights and quantised.has_packed_weights(model):
        return False
    return not is_fused or families.has_fused_layout(model)


def require_served(model: PreTrainedModel) -> None:
    """Check, before anything is run or changed, that the model is a causal, decoder-only one that reads tokens.

    Raises:
        RefusedModel: for an encoder-decoder, and for a model without one embedding of tokens.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise RefusedModel(
            f"{config.model_type} ({type(model).__name__}): an encoder-decoder; PhaseLens serves decoder-only, causal "
            "models; use a family listed in docs/families.md"
        )
    if not isinstance(getattr(model.get_input_embeddings(), "weight", None), torch.Tensor):
        raise RefusedModel(
            f"{config.model_type} ({type(model).__name__}): it has no single table of token embeddings, so it does not "
            "read one text token by token; use a family listed in docs/families.md"
        )
    if families.has_sparse_blocks(model):
        raise RefusedModel(
            f"{config.model_type} ({type(model).__name__}): in a text longer than a few blocks, its queries see random "
            "blocks of keys, also later ones; PhaseLens serves causal attention only. With "
            '"attention_type": "original_full" in its config.json, the model attends causally to all keys'
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
