"""`phaselens.load`: from a name, a folder, a hub id or a model object to a checked lens."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from phaselens.errors import InputError, RefusedModel
from phaselens.lens import checks, packaged, sources
from phaselens.lens import positions as layers
from phaselens.lens.bridge import HookedTransformer, require_served, wrap
from phaselens.lens.components import each_attention
from phaselens.lens.info import ModelInfo
from phaselens.lens.lora import cast_parameters, merge_adapter
from phaselens.lens.packaged import PackagedModel

POSITIONS = ("auto", "nope")


def load(
    source: Any,
    *,
    label: str | None = None,
    positions: str = "auto",
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    tokenizer: Any = None,
    check: bool | Literal["report"] = True,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> HookedTransformer:
    """Load a decoder-only language model and check that what the lens sees is what the model does.

    Args:
        source: ``"rope"`` or ``"drope"`` (the bundled pair); ``"smollm2"``, ``"smollm2-drope"`` or ``"smollm2-rope"``
            (from the extra ``phaselens[smollm2]``); a checkpoint folder; a hub id (the only thing here that can reach
            the network); or a Hugging Face model object, which is wrapped in place.
        label: the name used in tables; by default the last part of `source`.
        positions: ``"auto"`` as the checkpoint is; ``"nope"`` nulls the rotation of any rotary model (cos=1, sin=0),
            without recalibration.
        device: ``"auto"`` is the GPU where there is one; else as torch names it.
        dtype: ``"auto"`` is the checkpoint's on a GPU and float32 on a CPU.
        tokenizer: a tokenizer, or where to load one from, instead of the checkpoint's own.
        check: compare the hooked forward with the model's own, and refuse on a difference; ``"report"`` keeps what
            `run_checks` needs to compare, and refuses nothing.
        trust_remote_code, allow_pickle: both off: neither is needed for a family that is served, and both run code
            that comes with a checkpoint.

    Returns:
        A TransformerLens bridge with `info`, `stream` and the statistics' hook points.

    Raises:
        ModelError: nothing there, damaged, too large for memory.
        RefusedModel: a family or a checkpoint that cannot be served exactly; says which layer, and by how much.
        InputError: a device, dtype or `positions` that does not exist.

    >>> from phaselens.testing import tiny_model
    >>> lens = load(tiny_model("llama"), positions="nope")
    >>> lens.info.positions
    ('nope', 'nope')
    """
    if positions not in POSITIONS:
        raise InputError(
            f"positions {positions!r}: use auto (as the checkpoint is) or nope (rotation nulled)"
        )
    if not isinstance(source, str | os.PathLike):
        return _from_object(source, label, positions, device, dtype, tokenizer, check)
    name = os.fspath(source)
    folder = sources.resolve(name)
    package = packaged.MODELS.get(name)
    adapter = packaged.adapter_folder(name) if package is not None and package.adapter is not None else None
    place = sources.resolve_device(device)
    sources.require_weights(folder, name, allow_pickle)
    sources.require_reachable(folder, revision)
    with sources.explained(name):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code)
        kind = sources.resolve_dtype(dtype, place, config)
        sources.require_memory(folder, name, kind, place)
        # An adapter is merged in float32, so that every dtype starts from the same weights.
        stored = torch.float32 if adapter is not None else kind
        model = sources.load_pretrained(
            folder, name, stored, place, revision, trust_remote_code, allow_pickle
        )
        text_tokenizer, note = sources.load_tokenizer(folder, tokenizer, revision)
    if adapter is not None:
        merge_adapter(model, adapter, name)
        cast_parameters(model, kind)
    how = "nope" if package is not None and package.nulled else positions
    lens = _build(model, name, label, how, text_tokenizer, note, check, folder, revision)
    if package is not None:
        lens.info = _describe_packaged(lens.info, package, adapter)
    return lens


def _from_object(
    model: Any,
    label: str | None,
    positions: str,
    device: str,
    dtype: str | torch.dtype,
    tokenizer: Any,
    check: bool | Literal["report"],
) -> HookedTransformer:
    """Wrap a model that is in memory already; it stays where it is and as it is, unless told otherwise."""
    from transformers import PreTrainedModel

    if isinstance(model, HookedTransformer):
        raise InputError(f"{model.info.label} is loaded already; use it as it is")
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"load: got a {type(model).__name__}; give a name, a folder, a hub id, or a Hugging Face causal LM"
        )
    if device != "auto":
        model.to(sources.resolve_device(device))
    if dtype != "auto":
        model.to(sources.resolve_dtype(dtype, torch.device("cpu"), model.config))
    name = model.config.name_or_path or type(model).__name__
    if isinstance(tokenizer, str):
        tokenizer, _ = sources.load_tokenizer(tokenizer, tokenizer, None)
    note = None if tokenizer is not None else "the model was given as an object without a tokenizer"
    return _build(model, name, label, positions, tokenizer, note, check, "", None)


def _build(
    model: Any,
    source: str,
    label: str | None,
    how: str,
    tokenizer: Any,
    note: str | None,
    check: bool | Literal["report"],
    folder: str,
    revision: str | None,
) -> HookedTransformer:
    require_served(model)
    reference = checks.reference_of(model, nulled=how == "nope") if check else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lens = wrap(model, _own_copy(tokenizer), source)
    lens.text_tokenizer = tokenizer
    lens.tokenizer_note = note
    if how == "nope":
        layers.null_rotation(lens)
    lens.info = _describe(lens, source, label, tokenizer, folder, revision)
    lens.reference = reference
    if check is True:
        checks.require(lens, checks.run_checks(lens, full=False))
    return lens


def _own_copy(tokenizer: Any) -> Any:
    """A tokenizer for TransformerLens, which adds special tokens to its own; texts are tokenised with the original.

    TransformerLens would load it anew with `add_bos_token`, perhaps over the network, unless told that it has it;
    whether it does add one, TransformerLens then finds out by trying.
    """
    if tokenizer is None:
        return None
    import copy

    own = copy.deepcopy(tokenizer)
    own.init_kwargs["add_bos_token"] = True
    own.init_kwargs.setdefault("name_or_path", "")
    return own


def _describe(
    lens: HookedTransformer, source: str, label: str | None, tokenizer: Any, folder: str, revision: str | None
) -> ModelInfo:
    from importlib.metadata import version

    config = lens.original_model.config
    n_heads = int(config.num_attention_heads)
    modules = [attention.original_component for attention in each_attention(lens)]
    d_heads = {layers.d_head_of(module, config) for module in modules}
    if len(d_heads) > 1:
        raise RefusedModel(
            f"{config.model_type}: layers differ in d_head ({sorted(d_heads)}), which tables cannot say"
        )
    bos = getattr(tokenizer, "bos_token_id", None) if tokenizer is not None else config.bos_token_id
    return ModelInfo(
        label=label or source.rstrip("/").rsplit("/", 1)[-1],
        source=source,
        family=config.model_type,
        architecture=type(lens.original_model).__name__,
        n_layers=len(modules),
        n_heads=n_heads,
        n_kv_heads=int(getattr(config, "num_key_value_heads", None) or n_heads),
        d_head=d_heads.pop(),
        d_model=int(config.hidden_size),
        d_vocab=int(lens.original_model.get_input_embeddings().weight.shape[0]),
        n_ctx=getattr(config, "max_position_embeddings", None),
        positions=layers.detect(lens),
        windows=tuple(layers.window_of(module, config) for module in modules),
        scales=tuple(layers.scale_of(module, config) for module in modules),
        softcap=getattr(config, "attn_logit_softcapping", None),
        dtype=str(lens.dtype).removeprefix("torch."),
        device=str(lens.device),
        attention_path="sdpa; statistics from the fused kernel's log-sum-exp",
        bos_token_id=bos,
        bos_policy=_bos_policy(tokenizer),
        revision=revision,
        attention_type=getattr(config, "attention_type", None),
        softmax_scale=getattr(config, "softmax_scale", None),
        quantisation=_quantisation(config),
        files=sources.hash_files(folder) if folder else {},
        versions={name: version(name) for name in ("torch", "transformers", "transformer-lens")},
    )


def _describe_packaged(info: ModelInfo, package: PackagedModel, adapter: Path | None) -> ModelInfo:
    """`info` with what the checkpoint folder cannot say: the stored format, the note for readers, the adapter."""
    hashes = sources.hash_files(str(adapter)) if adapter is not None else {}
    files = {**info.files, **{f"adapter/{file}": digest for file, digest in hashes.items()}}
    return replace(info, quantisation=package.quantisation, note=package.note, files=files)


def _bos_policy(tokenizer: Any) -> str:
    """Whether the tokenizer itself puts a BOS token at position 0."""
    if tokenizer is None:
        return "no tokenizer"
    ids = tokenizer("a")["input_ids"]
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return "tokenizer has no BOS"
    return "tokenizer adds BOS" if ids and ids[0] == bos else "tokenizer adds no BOS"


def _quantisation(config: Any) -> str | None:
    said = getattr(config, "quantization_config", None)
    if said is None:
        return None
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    return str(method or "unknown")
