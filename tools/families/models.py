"""Tiny random models of any model type, with attention far from uniform."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from tools.families.configs import tiny_config
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

#: Root mean square of a weight's entries, times the square root of its input width: of the weights that make the
#: scores of attention, and of all others.
_GAIN_OF_SCORES, _GAIN = 1.0, 0.6
_MAKES_SCORES = re.compile(
    r"(^|[._])(q|k|query|key|qkv|q_a|q_b|kv_a|kv_b|c_attn|query_key_value|in_proj|Wqkv)([._]|$)",
    re.IGNORECASE,
)
#: Factor of the norms of queries and keys.
_GAIN_OF_NORMS = 0.7
_NORMS_SCORES = re.compile(r"[._](q|k|query|key)_(layer)?norm[._]", re.IGNORECASE)
# Parameters of state-space layers, whose values must stay in a range; norms; and routers.
_LEFT_ALONE = re.compile(r"A_log|dt_|conv|time_|norm|ln_|_ln|lambda|router|gate\.weight", re.IGNORECASE)


def tiny_model(model_type: str, *, attention: str | None = None, seed: int = 0) -> PreTrainedModel:
    """Create a tiny random model of a model type, in float32 and eval mode.

    Args:
        attention: the name of transformers' attention implementation; None for the model's own choice.
    """
    with torch.random.fork_rng(devices=[]), _without_missing_parts():
        torch.manual_seed(seed)
        model = _random_model(tiny_config(model_type), attention)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                _spread(name, parameter)
    return model.float().eval()


def _random_model(config: PreTrainedConfig, attention: str | None) -> PreTrainedModel:
    """Create a model with transformers' own random weights."""
    # A loop over experts also runs in float64; other implementations of mixtures of experts do not.
    options = {"experts_implementation": "eager"}
    if attention is not None:
        options["attn_implementation"] = attention
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    decoder = getattr(config, "decoder", None)
    if decoder is not None and isinstance(decoder, model_class.config_class):
        return model_class._from_config(decoder, **options)
    return AutoModelForCausalLM.from_config(config, **options)


def _spread(name: str, parameter: nn.Parameter) -> None:
    """Set random entries of a size that keeps activations near 1, whatever the family's own initialisation is."""
    if parameter.dim() < 2:
        parameter.add_(0.1 * torch.randn_like(parameter))
        if _NORMS_SCORES.search(name):
            parameter.mul_(_GAIN_OF_NORMS)
    elif not _LEFT_ALONE.search(name):
        gain = _GAIN_OF_SCORES if _MAKES_SCORES.search(name) else _GAIN
        parameter.copy_(gain * parameter.shape[-1] ** -0.5 * torch.randn_like(parameter))


@contextmanager
def _without_missing_parts() -> Iterator[None]:
    """Replace parts for images and sound that need a library that isn't installed by empty ones."""
    create = AutoModel.from_config

    def create_if_possible(config: PreTrainedConfig, *args: Any, **options: Any) -> nn.Module:
        try:
            return create(config, *args, **options)
        except ImportError:
            return nn.Module()

    with mock.patch.object(AutoModel, "from_config", create_if_possible):
        yield
