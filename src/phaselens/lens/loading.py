"""`phaselens.load`: a checked lens from a name, a folder, a hub id or a model object."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from phaselens.data.tokens import require_bos
from phaselens.errors import InputError, RefusedModel, require_unicode, short_form
from phaselens.lens import checkpoints, checks, quantised, text_towers, tokenizer_files, weight_adapters
from phaselens.lens.bridge import HookedTransformer
from phaselens.lens.description import LoadOptions, describe
from phaselens.lens.experts import use_runnable_experts
from phaselens.lens.finite_weights import require_finite
from phaselens.lens.info import ROTATION_MODES
from phaselens.lens.memory import collect_dropped, followed, garbage_kept
from phaselens.lens.model_source import ModelSource, require_adapter_scale
from phaselens.lens.overrides import override_rope_scaling, override_softmax_scale
from phaselens.lens.placement import DeviceMap
from phaselens.lens.pretrained import as_model_errors
from phaselens.lens.reference import reference_of
from phaselens.lens.refusals import refusing
from phaselens.lens.resuming import find_problem
from phaselens.lens.scaling import RopeScaling, require_softmax_scale
from phaselens.lens.unwrapping import Unwrapped
from phaselens.lens.wrapping import has_own_adapter, measure_anatomy, require_served, wrap

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load(
    source: str | os.PathLike[str] | ModelSource | PreTrainedModel,
    *,
    label: str | None = None,
    positions: str = "auto",
    bos: str = "auto",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
    adapter_scale: float | None = None,
    softmax_scale: float | None = None,
    rope_scaling: str | None = None,
    device_map: str | os.PathLike[str] | Mapping[str, str | int] | None = None,
    check: bool | Literal["report"] = True,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> HookedTransformer:
    """Load a decoder-only language model and check that the lens shows what the model computes.

    Args:
        source: ``"rope"`` or ``"drope"`` (the bundled pair); ``"smollm2"`` (from the extra ``phaselens[smollm2]``); a
            checkpoint folder; a GGUF file; a hub id (the only source that can reach the network); ``BASE+ADAPTER``, one
            of these and the folder or hub id of an adapter in peft's format; the folder of an adapter whose config
            names its base; or a Hugging Face model object, which is wrapped in place. Of a model of several modalities,
            the text model is loaded.
        label: the name used in tables; by default the last part of `source`.
        positions: ``"auto"`` keeps the checkpoint's rotation; ``"nope"`` nulls the rotation of any rotary model (cos=1,
            sin=0), without recalibration.
        bos: ``"auto"`` prepends to a text what the tokenizer prepends, ``"always"`` one BOS token, ``"never"``
            nothing; in runs, prompts, `to_tokens` and `generate` alike. See `phaselens.data.Encoder`.
        device: ``"auto"`` is the GPU if there is one; otherwise a device as torch names it.
        dtype: ``"auto"`` is the checkpoint's on a GPU and float32 on a CPU.
        revision: a commit, branch or tag of a hub id.
        tokenizer: a tokenizer, or a folder or hub id to load it from, instead of the checkpoint's own.
        adapter_scale: None merges an adapter into the weights. A number from 0 to 1 keeps it apart and multiplies it: 0
            is the base, 1 the adapted model.
        softmax_scale: the factor of q·k in every layer, in place of the model's own; None keeps that.
        rope_scaling: ``"linear:4"``, ``"dynamic:4"`` or ``"yarn:4"`` gives a model of the default rope type another
            one, with this factor, by transformers' own module; None keeps the checkpoint's.
        device_map: spreads a model that is too large for one device, instead of `device`: ``"auto"`` fills the GPUs,
            then the CPU, then the disk; a dict or a JSON file names the device of each module (a GPU's number,
            ``cpu`` or ``disk``). Weights on the CPU of a machine with GPUs, or on the disk, are loaded for each
            forward of their module.
        check: compare the hooked forward with the model's own, and refuse the model on a difference; ``"report"`` keeps
            the reference for `run_checks`, and refuses nothing.
        trust_remote_code: run code that comes with a checkpoint. No family that is served needs it.
        allow_pickle: read pickles that come with a checkpoint. No family that is served needs it.

    Returns:
        A TransformerLens bridge with `info`, `stream` and the statistics' hook points.

    Raises:
        ModelError: for a checkpoint that is missing, damaged, or too large for memory.
        RefusedModel: for a family or checkpoint that cannot be served exactly; names the layer and the difference.
        InputError: for a device, dtype, `positions` or `bos` that does not exist, and for ``bos="always"`` without a
            BOS token.

    >>> from phaselens.testing import tiny_model
    >>> lens = load(tiny_model("llama"), positions="nope")
    >>> lens.info.positions
    ('nope', 'nope')
    """
    if not isinstance(positions, str) or positions not in ROTATION_MODES:
        modes = " or ".join(f"{mode} ({effect})" for mode, effect in ROTATION_MODES.items())
        raise InputError(f"positions {short_form(positions)}: use {modes}")
    require_bos(bos)
    _require_types(label, revision, check, trust_remote_code, allow_pickle)
    tokenizer = os.fspath(tokenizer) if isinstance(tokenizer, os.PathLike) else tokenizer
    is_tokenizer = callable(tokenizer) and hasattr(tokenizer, "init_kwargs")
    if tokenizer is not None and not isinstance(tokenizer, str) and not is_tokenizer:
        raise InputError(
            "expected tokenizer as a tokenizer, or a folder or hub id to load one from, received "
            f"{short_form(tokenizer)}"
        )
    require_adapter_scale(adapter_scale)
    require_softmax_scale(softmax_scale)
    scaling = None if rope_scaling is None else RopeScaling.parse(rope_scaling)
    placement = None if device_map is None else DeviceMap.parse(device_map)
    if placement is not None and device != "auto":
        raise InputError(f"device {str(device)!r} and device_map {placement.source}: give one of them")
    options = LoadOptions(
        label,
        positions,
        bos,
        device,
        dtype,
        tokenizer,
        check,
        adapter_scale,
        softmax_scale,
        scaling,
        placement,
    )
    collect_dropped()
    if isinstance(source, ModelSource):
        _require_unused("a ModelSource, which has its own", revision=revision)
    elif isinstance(source, str | os.PathLike):
        source = ModelSource.identify(os.fspath(source), revision)
    else:
        _require_unused(
            "a model object",
            revision=revision,
            adapter_scale=adapter_scale is not None,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
        return followed(_from_object(source, options))
    return followed(_from_checkpoint(source, options, trust_remote_code, allow_pickle))


def _require_types(
    label: object, revision: object, check: object, trust_remote_code: object, allow_pickle: object
) -> None:
    for option, value in (("label", label), ("revision", revision)):
        if value is not None and (not isinstance(value, str) or not value):
            raise InputError(f"{option} is {short_form(value)}; give text, or leave it out")
        if value is not None:
            require_unicode(option, value)
    for option, value in (("trust_remote_code", trust_remote_code), ("allow_pickle", allow_pickle)):
        if not isinstance(value, bool):
            raise InputError(f"{option} is {short_form(value)}; give True or False")
    if not isinstance(check, bool) and check != "report":
        raise InputError(f"check is {short_form(check)}; give True, False or 'report'")


def _require_unused(source_kind: str, **options: object) -> None:
    """Raise InputError for an option that has no effect on this kind of source."""
    for option, value in options.items():
        if value:
            raise InputError(f"load: {option}={value!r} has no effect on {source_kind}; leave it out")


def _from_checkpoint(
    source: ModelSource, options: LoadOptions, trust_remote_code: bool, allow_pickle: bool
) -> HookedTransformer:
    if source.base.kind != "other":
        kind = "a folder" if source.folder is not None else "a file"
        _require_unused(f"{source.name!r}, {kind}", revision=source.base.revision)
    if source.named_adapter is None and options.adapter_scale is not None:
        raise InputError(
            f"adapter_scale {options.adapter_scale:g}: {source.name!r} has no adapter; write BASE+ADAPTER, or leave "
            "adapter_scale out"
        )
    device_map = options.device_map
    device = checkpoints.resolve_device(options.device) if device_map is None else device_map.device
    checkpoints.require_readable(source, allow_pickle)
    tokenizer, tokenizer_note = options.tokenizer, None
    with as_model_errors(source.name):
        config = checkpoints.read_config(source, trust_remote_code)
        dtype = checkpoints.resolve_dtype(options.dtype, device, config)
        is_merged = source.adapter is not None or source.named_adapter is not None
        is_quantised = quantised.method_of(config) is not None
        # An adapter is merged in float32, so that every dtype starts from the same weights.
        merged_in = torch.float32 if is_merged and not is_quantised else None
        load_model = functools.partial(
            checkpoints.load_pretrained,
            source,
            merged_in or dtype,
            device,
            config=config,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
        if device_map is None:
            checkpoints.require_memory(source, dtype, device, loaded_as=merged_in, as_stored=is_quantised)
            model = load_model()
        else:
            _require_placeable(source, config, is_merged=is_merged)
            model = device_map.place(lambda arguments: load_model(placement=arguments), source.name)
        if tokenizer is None:
            tokenizer, tokenizer_note = tokenizer_files.load_own_tokenizer(source)
        elif isinstance(tokenizer, str):
            tokenizer = tokenizer_files.load_tokenizer(tokenizer, source.base.revision)
    adapter = _apply_adapters(model, source, options.adapter_scale)
    if merged_in is not None:
        weight_adapters.cast_parameters(model, dtype)
    if source.package is not None and source.package.nulled:
        options = replace(options, rotation_mode="nope")
    lens = _build(model, source, replace(options, tokenizer=tokenizer), tokenizer_note)
    # transformers forgets the method where it has dequantised the weights.
    method = lens.info.quantisation or (
        f"{quantised.method_of(config)}, dequantised" if is_quantised else None
    )
    whole = text_towers.whole_class(config)
    part_of = None if whole is None else whole.__name__
    lens.info = replace(lens.info, adapter=adapter, part_of=part_of, quantisation=method)
    return lens


def _require_placeable(source: ModelSource, config: PreTrainedConfig, *, is_merged: bool) -> None:
    """Raise InputError for a source whose modules a device map cannot spread."""
    reason = ""
    if source.gguf is not None:
        reason = "a GGUF file is unpacked as a whole; convert it to safetensors"
    elif is_merged:
        reason = "an adapter is merged into weights in memory; save the merged model and load that"
    elif text_towers.whole_class(config) is not None:
        reason = (
            "its text model is taken out of a model of several modalities, whose modules have other names"
        )
    if reason:
        raise InputError(
            f"model {source.name!r}: device_map is not served: {reason}, or leave device_map out"
        )


def _apply_adapters(model: PreTrainedModel, source: ModelSource, scale: float | None) -> str | None:
    """Apply the adapter of a packaged twin, then that which the user named; return a description of the latter."""
    if source.adapter is not None:
        weight_adapters.apply_adapter(model, source.adapter, source.name)
    if source.named_adapter is None:
        return None
    return weight_adapters.apply_adapter(model, source.named_adapter, source.name, scale=scale)


def _from_object(model: PreTrainedModel, options: LoadOptions) -> HookedTransformer:
    """Wrap a model that is in memory already; it keeps its device and dtype unless `options` name others."""
    from transformers import PreTrainedModel

    if isinstance(model, HookedTransformer):
        raise InputError(f"{model.info.label} is loaded already; use it as it is")
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            "expected source as a name, a folder, a hub id, or a Hugging Face causal LM, received "
            f"{short_form(model)}"
        )
    is_quantised = quantised.method_of(model.config) is not None
    if is_quantised and not (options.device == "auto" and options.dtype == "auto"):
        raise InputError(
            f"{type(model).__name__} is quantised, so that it stays on its device and in its dtype; leave both out"
        )
    if options.device != "auto":
        model.to(checkpoints.resolve_device(options.device))
    if options.dtype != "auto":
        model.to(checkpoints.resolve_dtype(options.dtype, torch.device("cpu"), model.config))
    note = None if options.tokenizer is not None else "the model was given as an object without a tokenizer"
    if isinstance(options.tokenizer, str):
        options = replace(options, tokenizer=tokenizer_files.load_tokenizer(options.tokenizer))
    return _build(model, None, options, note)


@garbage_kept()
def _build(
    model: PreTrainedModel, source: ModelSource | None, options: LoadOptions, tokenizer_note: str | None
) -> HookedTransformer:
    require_served(model)
    if options.check:
        require_finite(model, source.name if source is not None else type(model).__name__)
    if options.softmax_scale is not None:
        override_softmax_scale(model, options.softmax_scale)
    if options.rope_scaling is not None:
        override_rope_scaling(model, options.rope_scaling)
    use_runnable_experts(model)
    with refusing(model, "measure the parts of its layers", unwrapped=True):
        is_adapted = has_own_adapter(model)
    if not is_adapted:
        return _wrapped(model, source, options, tokenizer_note, measured=True)
    unwrapped = Unwrapped.of(model)
    try:
        lens = _wrapped(model, source, options, tokenizer_note, measured=False)
        if options.check != "report" or all(result.ok for result in checks.run_checks(lens, full=False)):
            return lens
    except RefusedModel as refusal:
        # An adapter may declare something other than the model has; measuring the model's parts may still succeed.
        unwrapped.restore()
        try:
            return _wrapped(model, source, options, tokenizer_note, measured=True)
        except RefusedModel:
            raise refusal  # noqa: B904 - its cause is that of the first attempt
    unwrapped.restore()
    try:
        lens = _wrapped(model, source, options, tokenizer_note, measured=True)
        if all(result.ok for result in checks.run_checks(lens, full=False)):
            return lens
    except RefusedModel:
        pass
    unwrapped.restore()
    return _wrapped(model, source, options, tokenizer_note, measured=False)


def _wrapped(
    model: PreTrainedModel,
    source: ModelSource | None,
    options: LoadOptions,
    tokenizer_note: str | None,
    *,
    measured: bool,
) -> HookedTransformer:
    """Wrap a model by its measured anatomy or by TransformerLens' adapter, describe it, and check it if asked."""
    nulled = options.rotation_mode == "nope"
    tokenizer = options.tokenizer
    name = source.name if source is not None else model.config.name_or_path or type(model).__name__
    with refusing(model, "measure the parts of its layers", unwrapped=True):
        arithmetic = quantised.measure_arithmetic(model)
        anatomy = measure_anatomy(model) if measured else None
        layers = None if anatomy is None else anatomy.layers
        eager = anatomy is not None and anatomy.needs_eager
        streams_first = anatomy is not None and anatomy.stack.streams_first
        reference = (
            reference_of(model, nulled=nulled, layers=layers, eager=eager, streams_first=streams_first)
            if options.check
            else None
        )
    with refusing(model, "add hook points to its modules"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lens = wrap(model, _copy_for_transformer_lens(tokenizer), name, anatomy)
    lens._arithmetic = arithmetic
    lens.text_tokenizer = tokenizer
    lens.tokenizer_note = tokenizer_note
    with refusing(model, "measure its attention"):
        lens.info = describe(lens, name, source, options)
        if anatomy is not None:
            lens.resume_problem = find_problem(lens)
        if nulled:
            lens.set_rotation(nulled=True)
    if tokenizer is not None:
        lens.cfg.default_prepend_bos = lens._default_prepend_bos = lens.encoder(options.bos).puts_bos_first
    lens.reference = reference
    if options.check is True:
        checks.require(lens, checks.run_checks(lens, full=False))
    return lens


def _copy_for_transformer_lens(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    """Copy a tokenizer for TransformerLens, which adds special tokens to it; texts are tokenised with the original.

    TransformerLens would reload a tokenizer without `add_bos_token`, perhaps over the network. Whether the tokenizer
    really adds a BOS token, TransformerLens measures later.
    """
    if tokenizer is None:
        return None
    import copy

    copied = copy.deepcopy(tokenizer)
    copied.init_kwargs["add_bos_token"] = True
    copied.init_kwargs.setdefault("name_or_path", "")
    return copied
