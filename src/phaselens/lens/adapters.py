"""TransformerLens' architecture adapters for DroPE models."""

from __future__ import annotations

from typing import Any

from transformer_lens.model_bridge.generalized_components import RMSNormalizationBridge
from transformer_lens.model_bridge.supported_architectures.llama import LlamaArchitectureAdapter
from transformer_lens.model_bridge.supported_architectures.qwen2 import Qwen2ArchitectureAdapter

from phaselens.lens.components import DroPEAttentionBridge
from phaselens.lens.interface import NAME


class _DroPE:
    """The base family's adapter, with the norms some variants have and attention that delegates."""

    _attention_bridge_cls = DroPEAttentionBridge

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)  # type: ignore[call-arg]
        # TransformerLens' loader forces eager attention unless an adapter names another.
        self.cfg.attn_implementation = NAME  # type: ignore[attr-defined]

    def _build_attention_bridge(self: Any) -> Any:
        norms = {
            name: RMSNormalizationBridge(name=name, config=self.cfg, optional=True)
            for name in ("q_norm", "k_norm")
        }
        return self._qkvo_attention_bridge(extra_submodules=norms)


class DroPELlamaArchitectureAdapter(_DroPE, LlamaArchitectureAdapter):
    """Adapter of `llama_drope`."""


class DroPEQwen2ArchitectureAdapter(_DroPE, Qwen2ArchitectureAdapter):
    """Adapter of `qwen2_drope`."""
