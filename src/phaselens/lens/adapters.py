"""TransformerLens' architecture adapters for DroPE models."""

from __future__ import annotations

from collections.abc import Callable

from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.generalized_components import RMSNormalizationBridge
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
from transformer_lens.model_bridge.supported_architectures.llama import LlamaArchitectureAdapter
from transformer_lens.model_bridge.supported_architectures.qwen2 import Qwen2ArchitectureAdapter

from phaselens.lens.attention_dispatch import IMPLEMENTATION
from phaselens.lens.components import DroPEAttentionBridge


class _DroPEAdapter:
    """Mixin for the base family's adapter that adds the variants' norms, and attention that delegates."""

    _attention_bridge_cls = DroPEAttentionBridge
    # From the base family's adapter.
    cfg: TransformerBridgeConfig
    _qkvo_attention_bridge: Callable[..., AttentionBridge]

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)  # type: ignore[call-arg]
        # TransformerLens' loader forces eager attention unless the adapter names another implementation.
        self.cfg.attn_implementation = IMPLEMENTATION

    def _build_attention_bridge(self) -> AttentionBridge:
        norms = {
            name: RMSNormalizationBridge(name=name, config=self.cfg, optional=True)
            for name in ("q_norm", "k_norm")
        }
        return self._qkvo_attention_bridge(extra_submodules=norms)


class DroPELlamaArchitectureAdapter(_DroPEAdapter, LlamaArchitectureAdapter):
    """Adapter of `llama_drope`."""


class DroPEQwen2ArchitectureAdapter(_DroPEAdapter, Qwen2ArchitectureAdapter):
    """Adapter of `qwen2_drope`."""
