"""The facts of a loaded model, measured on it where they can be, and the options that it was loaded with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

import torch

from phaselens.data import Encoder
from phaselens.lens import families, gguf_files, placement, quantised
from phaselens.lens.anatomy import absent_points
from phaselens.lens.attention_facts import AttentionFacts
from phaselens.lens.components import attention_layers
from phaselens.lens.digests import hash_source
from phaselens.lens.head_outputs import read_gates, read_head_outputs
from phaselens.lens.info import ModelInfo
from phaselens.lens.rotation import detect_rotation
from phaselens.lens.rotation_pairs import read_rotated_pairs
from phaselens.lens.visibility import measure_windows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from phaselens.lens.bridge import HookedTransformer
    from phaselens.lens.model_source import ModelSource
    from phaselens.lens.placement import DeviceMap
    from phaselens.lens.scaling import RopeScaling


@dataclass(frozen=True)
class LoadOptions:
    """The checked arguments of `load` that apply to every kind of source."""

    label: str | None
    rotation_mode: str
    bos: str
    device: str | torch.device
    dtype: str | torch.dtype
    tokenizer: PreTrainedTokenizerBase | str | None
    check: bool | Literal["report"]
    adapter_scale: float | None = None
    softmax_scale: float | None = None
    rope_scaling: RopeScaling | None = None
    device_map: DeviceMap | None = None


def describe(
    lens: HookedTransformer, name: str, source: ModelSource | None, options: LoadOptions
) -> ModelInfo:
    """Return the facts of a wrapped model, measured on it where they can be."""
    model: PreTrainedModel = lens.original_model
    config = model.config
    encodings = detect_rotation(lens)
    windows, longest = measure_windows(lens)
    facts = {layer: attention.facts for layer, attention in attention_layers(lens).items()}
    first = next(iter(facts.values()), None)
    package = source.package if source is not None else None
    head_outputs = read_head_outputs(lens)
    plans = [getattr(block, "plan", None) for block in lens.blocks]
    tokenizer = options.tokenizer
    bos_token_id = (
        getattr(tokenizer, "bos_token_id", None) if tokenizer is not None else families.bos_token_id_of(model)
    )
    return ModelInfo(
        label=options.label or (source.short if source is not None else name.rstrip("/").rsplit("/", 1)[-1]),
        source=name,
        family=config.model_type,
        architecture=type(model).__name__,
        n_layers=len(lens.blocks),
        n_heads=max((layer_facts.n_heads for layer_facts in facts.values()), default=0),
        n_kv_heads=max((layer_facts.n_kv_heads for layer_facts in facts.values()), default=0),
        d_head=max((layer_facts.d_head for layer_facts in facts.values()), default=0),
        d_model=families.d_model_of(model),
        d_vocab=families.d_vocab_of(model),
        n_ctx=families.n_ctx_of(model),
        positions=encodings,
        windows=windows,
        longest=longest,
        scales=tuple(facts[layer].scale if layer in facts else None for layer in range(len(lens.blocks))),
        softcap=None if first is None else first.softcap,
        dtype=str(lens.dtype).removeprefix("torch."),
        device=str(lens.device),
        device_map=placement.description_of(model),
        attention_path="sdpa; statistics from the fused kernel's log-sum-exp",
        bos_token_id=bos_token_id,
        bos_policy=_bos_policy(tokenizer),
        bos=options.bos,
        n_ctx_trained=families.n_ctx_trained_of(model),
        revision=source.base.revision if source is not None else None,
        attention_type=getattr(config, "attention_type", None),
        has_position_table=families.has_position_table(
            model, [attention.original_component for attention in attention_layers(lens).values()]
        ),
        softmax_scale=_softmax_scale_of(config, options),
        rope_scaling=None if options.rope_scaling is None else str(options.rope_scaling),
        quantisation=_quantisation_of(model, source),
        rotations=read_rotated_pairs(lens, encodings),
        head_outputs=head_outputs,
        heads=_heads_by_layer(facts, len(lens.blocks)),
        learned_sinks=tuple(layer for layer in facts if facts[layer].sink_logits is not None),
        gates=read_gates(lens, head_outputs),
        kinds=tuple(plan.kind for plan in plans if plan is not None),
        absent=absent_points(plans),
        protocol=package.protocol if package is not None else None,
        note=package.note if package is not None else None,
        files=hash_source(source) if source is not None else {},
        versions={name: version(name) for name in ("torch", "transformers", "transformer-lens")},
    )


def _heads_by_layer(facts: Mapping[int, AttentionFacts], n_layers: int) -> tuple[int, ...]:
    """Return the number of heads of each layer; empty where all layers with attention have the same."""
    if len({layer_facts.n_heads for layer_facts in facts.values()}) < 2:
        return ()
    return tuple(facts[layer].n_heads if layer in facts else 0 for layer in range(n_layers))


def _quantisation_of(model: PreTrainedModel, source: ModelSource | None) -> str | None:
    """Return how the weights were stored, which a packaged model and a GGUF file know best; None without rounding."""
    if source is not None and source.package is not None:
        return source.package.quantisation
    if source is not None and source.gguf is not None:
        return gguf_files.read_header(source.gguf, source.name).quantisation
    return quantised.description_of(model)


def _bos_policy(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Describe the tokenizer's own policy: a BOS token at position 0 or none, and tokens that it appends."""
    if tokenizer is None:
        return "no tokenizer"
    encoder = Encoder(tokenizer)
    if encoder.bos_token_id is None:
        policy = "tokenizer has no BOS"
    else:
        policy = "tokenizer adds BOS" if encoder.puts_bos_first else "tokenizer adds no BOS"
    if encoder.dropped_ids:
        appended = " ".join(map(str, tokenizer.convert_ids_to_tokens(encoder.dropped_ids)))
        policy += f", and appends {appended}, which is left out"
    return policy


def _softmax_scale_of(config: PreTrainedConfig, options: LoadOptions) -> float | None:
    """Return the scale that the user or the checkpoint set in place of the model's own."""
    if options.softmax_scale is not None:
        return float(options.softmax_scale)
    scale: float | None = getattr(config, "softmax_scale", None)
    return scale
