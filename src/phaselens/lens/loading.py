"""`phaselens.load`: from a name, a folder, a hub id or a model object to a checked lens."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from phaselens.data import Encoder
from phaselens.data.tokens import require_bos
from phaselens.errors import InputError, RefusedModel
from phaselens.lens import checks, families, packaged, sources
from phaselens.lens import positions as layers
from phaselens.lens.bridge import HookedTransformer
from phaselens.lens.components import each_attention
from phaselens.lens.info import ModelInfo
from phaselens.lens.lora import cast_parameters, merge_adapter
from phaselens.lens.packaged import PackagedModel
from phaselens.lens.rotation import read_rotations
from phaselens.lens.visibility import measure_windows
from phaselens.lens.weights import read_head_outputs
from phaselens.lens.wrapping import require_served, wrap

POSITIONS = ("auto", "nope")


def load(
    source: Any,
    *,
    label: str | None = None,
    positions: str = "auto",
    bos: str = "auto",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    tokenizer: Any = None,
    check: bool | Literal["report"] = True,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> HookedTransformer:
    """Load a decoder-only language model and check that what the lens sees is what the model does.

    Args:
        source: ``"rope"`` or ``"drope"`` (the bundled pair); ``"smollm2"`` (from the extra ``phaselens[smollm2]``); a
            checkpoint folder; a hub id (the only thing here that can reach the network); or a Hugging Face model
            object, which is wrapped in place.
        label: the name used in tables; by default the last part of `source`.
        positions: ``"auto"`` as the checkpoint is; ``"nope"`` nulls the rotation of any rotary model (cos=1, sin=0),
            without recalibration.
        bos: ``"auto"`` puts before a text what the tokenizer does, ``"always"`` one BOS token, ``"never"`` nothing; on
            every route (runs, prompts, `to_tokens`, `generate`). See `phaselens.data.Encoder`.
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
        InputError: a device, dtype, `positions` or `bos` that does not exist; ``bos="always"`` without a BOS token.

    >>> from phaselens.testing import tiny_model
    >>> lens = load(tiny_model("llama"), positions="nope")
    >>> lens.info.positions
    ('nope', 'nope')
    """
    if positions not in POSITIONS:
        raise InputError(
            f"positions {positions!r}: use auto (as the checkpoint is) or nope (rotation nulled)"
        )
    require_bos(bos)
    _require_types(label, revision, check, trust_remote_code, allow_pickle)
    tokenizer = os.fspath(tokenizer) if isinstance(tokenizer, os.PathLike) else tokenizer
    if tokenizer is not None and not isinstance(tokenizer, str) and not callable(tokenizer):
        raise InputError(
            f"tokenizer is a {type(tokenizer).__name__}; give a tokenizer, or where to load one from"
        )
    if not isinstance(source, str | os.PathLike):
        _require_unused(
            "a model object",
            revision=revision,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
        return _from_object(source, label, positions, bos, device, dtype, tokenizer, check)
    name = os.fspath(source)
    folder = sources.resolve(name)
    if os.path.isdir(folder):
        _require_unused(f"{name!r}, a folder", revision=revision)
    package = packaged.MODELS.get(name)
    adapter = packaged.adapter_folder(name) if package is not None and package.adapter is not None else None
    place = sources.resolve_device(device)
    sources.require_readable(folder, name, revision, allow_pickle)
    with sources.explained(name):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code)
        kind = sources.resolve_dtype(dtype, place, config)
        # An adapter is merged in float32, so that every dtype starts from the same weights.
        merged_in = torch.float32 if adapter is not None else None
        sources.require_memory(folder, name, kind, place, loaded_as=merged_in)
        model = sources.load_pretrained(
            folder, name, merged_in or kind, place, revision, trust_remote_code, allow_pickle
        )
        text_tokenizer, note = sources.load_tokenizer(folder, tokenizer, revision)
    if adapter is not None:
        merge_adapter(model, adapter, name)
        cast_parameters(model, kind)
    how = "nope" if package is not None and package.nulled else positions
    lens = _build(model, name, label, how, bos, text_tokenizer, note, check, folder, revision)
    if package is not None:
        lens.info = _describe_packaged(lens.info, package, adapter)
    return lens


def _require_types(label: Any, revision: Any, check: Any, trust_remote_code: Any, allow_pickle: Any) -> None:
    for option, value in (("label", label), ("revision", revision)):
        if value is not None and (not isinstance(value, str) or not value):
            raise InputError(f"{option} is {value!r}; give text, or leave it out")
    for option, value in (("trust_remote_code", trust_remote_code), ("allow_pickle", allow_pickle)):
        if not isinstance(value, bool):
            raise InputError(f"{option} is {value!r}; give True or False")
    if not isinstance(check, bool) and check != "report":
        raise InputError(f"check is {check!r}; give True, False or 'report'")


def _require_unused(what: str, **options: Any) -> None:
    """InputError for an option that says nothing of `what`, and would be ignored."""
    for option, value in options.items():
        if value:
            raise InputError(f"load: {option}={value!r} says nothing of {what}; leave it out")


def _from_object(
    model: Any,
    label: str | None,
    positions: str,
    bos: str,
    device: str | torch.device,
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
    return _build(model, name, label, positions, bos, tokenizer, note, check, "", None)


def _build(
    model: Any,
    source: str,
    label: str | None,
    how: str,
    bos: str,
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
    nulled = layers.null_rotation(lens) if how == "nope" else None
    lens.info = _describe(lens, source, label, bos, tokenizer, folder, revision, nulled)
    if tokenizer is not None:
        lens.cfg.default_prepend_bos = lens._default_prepend_bos = lens.encoder(bos).puts_bos_first
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
    lens: HookedTransformer,
    source: str,
    label: str | None,
    bos: str,
    tokenizer: Any,
    folder: str,
    revision: str | None,
    positions: tuple[str, ...] | None,
) -> ModelInfo:
    """All of it measured, but for what the caller knows; `positions` None: measured too."""
    from importlib.metadata import version

    config = lens.original_model.config
    n_heads = int(config.num_attention_heads)
    modules = [attention.original_component for attention in each_attention(lens)]
    d_heads = {families.d_head_of(module, config) for module in modules}
    if len(d_heads) > 1:
        raise RefusedModel(
            f"{config.model_type}: layers differ in d_head ({sorted(d_heads)}), which tables cannot say"
        )
    if positions is None:
        positions = layers.detect(lens)
    bos_token_id = getattr(tokenizer, "bos_token_id", None) if tokenizer is not None else config.bos_token_id
    return ModelInfo(
        label=label or source.rstrip("/").rsplit("/", 1)[-1],
        source=source,
        family=config.model_type,
        architecture=type(lens.original_model).__name__,
        n_layers=len(modules),
        n_heads=n_heads,
        n_kv_heads=families.n_kv_heads_of(modules[0], config),
        d_head=d_heads.pop(),
        d_model=int(config.hidden_size),
        d_vocab=int(lens.original_model.get_input_embeddings().weight.shape[0]),
        n_ctx=getattr(config, "max_position_embeddings", None),
        positions=positions,
        windows=measure_windows(lens),
        scales=tuple(layers.scale_of(module, config) for module in modules),
        softcap=layers.softcap_of(modules[0]),
        dtype=str(lens.dtype).removeprefix("torch."),
        device=str(lens.device),
        attention_path="sdpa; statistics from the fused kernel's log-sum-exp",
        bos_token_id=bos_token_id,
        bos_policy=_bos_policy(tokenizer),
        bos=bos,
        revision=revision,
        attention_type=getattr(config, "attention_type", None),
        softmax_scale=getattr(config, "softmax_scale", None),
        quantisation=_quantisation(config),
        rotations=read_rotations(lens, positions),
        head_outputs=read_head_outputs(lens),
        files=sources.hash_files(folder) if folder else {},
        versions={name: version(name) for name in ("torch", "transformers", "transformer-lens")},
    )


def _describe_packaged(info: ModelInfo, package: PackagedModel, adapter: Path | None) -> ModelInfo:
    """`info` with what the checkpoint folder cannot say: the stored format, the note for readers, the adapter."""
    hashes = sources.hash_files(str(adapter)) if adapter is not None else {}
    files = {**info.files, **{f"adapter/{file}": digest for file, digest in hashes.items()}}
    return replace(info, quantisation=package.quantisation, note=package.note, files=files)


def _bos_policy(tokenizer: Any) -> str:
    """Whether the tokenizer itself puts a BOS token at position 0, and what it appends."""
    if tokenizer is None:
        return "no tokenizer"
    encoder = Encoder(tokenizer)
    if encoder.bos_token_id is None:
        policy = "tokenizer has no BOS"
    else:
        policy = "tokenizer adds BOS" if encoder.puts_bos_first else "tokenizer adds no BOS"
    if encoder.left_out:
        appended = " ".join(map(str, tokenizer.convert_ids_to_tokens(encoder.left_out)))
        policy += f", and appends {appended}, which is left out"
    return policy


def _quantisation(config: Any) -> str | None:
    said = getattr(config, "quantization_config", None)
    if said is None:
        return None
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    return str(method or "unknown")
