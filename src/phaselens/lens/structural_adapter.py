"""TransformerLens' bridge for a model of any architecture, from its measured anatomy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import EmbeddingBridge, UnembeddingBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources._bridge_builder import configure_tokenizer
from transformer_lens.model_bridge.sources.transformers_driver import TransformersDriver

from phaselens.lens import families
from phaselens.lens.anatomy import Anatomy
from phaselens.lens.measured_parts import MeasuredBlock, MeasuredPart, norm_component

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class StructuralAdapter(ArchitectureAdapter):
    """The adapter of a model whose parts were measured."""

    def __init__(self, config: TransformerBridgeConfig, model: PreTrainedModel, anatomy: Anatomy) -> None:
        super().__init__(config)
        stack = anatomy.stack
        self.weight_processing_conversions: dict[str, Any] = {}
        self.supports_compatibility_mode = False
        mapping: dict[str, GeneralizedComponent] = {}
        if stack.embedding is not None:
            mapping["embed"] = EmbeddingBridge(name=stack.embedding)
        if stack.positions is not None:
            mapping["pos_embed"] = MeasuredPart(stack.positions, config)
        mapping["blocks"] = MeasuredBlock(stack.path, config, anatomy.plans)
        if stack.final_norm is not None:
            norm = norm_component(stack.final_norm, config, model.get_submodule(stack.final_norm))
            mapping["ln_final"] = norm or MeasuredPart(stack.final_norm, config)
        if stack.unembedding is not None:
            mapping["unembed"] = UnembeddingBridge(name=stack.unembedding)
        self.component_mapping = mapping


def build_from_anatomy(
    model: PreTrainedModel, anatomy: Anatomy, tokenizer: PreTrainedTokenizerBase | None, name: str
) -> Any:
    """Build TransformerLens' bridge around a model, in place."""
    facts = next((plan.facts for plan in anatomy.plans if plan.facts is not None), None)
    width = families.d_model_of(model)
    config = TransformerBridgeConfig(
        d_model=width,
        d_head=facts.d_head if facts is not None else width,
        n_heads=facts.n_heads if facts is not None else 1,
        n_key_value_heads=facts.n_kv_heads if facts is not None else None,
        n_layers=anatomy.stack.n_layers,
        n_ctx=families.n_ctx_of(model) or 2048,
        d_vocab=families.d_vocab_of(model),
        architecture=type(model).__name__,
        model_name=name,
        dtype=next(model.parameters()).dtype,
    )
    config.device = str(families.embedding_of(model).device)
    adapter = StructuralAdapter(config, model, anatomy)
    if tokenizer is not None:
        tokenizer = configure_tokenizer(tokenizer, config)
    driver = TransformersDriver(model, adapter, tokenizer)
    return TransformerBridge(model, adapter, tokenizer, driver=driver)
