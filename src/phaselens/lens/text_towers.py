"""The text model inside a model of several modalities, loaded without the weights of the others.

A checkpoint of a `…ForConditionalGeneration` class is loaded by that class, which knows the names of its weights, with
all modules but the text model and the unembedding removed before any weight is read. The text model then moves into
transformers' causal class of its configuration (`LlamaForCausalLM` for a Llava). Where transformers has no such class,
the whole class remains around the text model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from phaselens.errors import RefusedModel
from phaselens.lens import families
from phaselens.lens.precision import LIMITS
from phaselens.lens.pretrained import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# transformers' tables of classes by configuration, in which a model of several modalities may stand.
_TABLES = ("AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoModelForCausalLM")

# The number of tokens on which the text model and the whole one are compared.
_N_TOKENS = 8
# The attribute of a text model with the whole model around it. It is no submodule: the two share their tensors.
_WHOLE = "_phaselens_whole"


def whole_class(config: PreTrainedConfig) -> Any:
    """Return the class of the model of several modalities that `config` describes; None for a model of text alone.

    Encoder-decoders count as models of text, which are refused with a reason of their own.
    """
    import transformers

    if config.is_encoder_decoder or type(config.get_text_config(decoder=True)) is type(config):
        return None
    candidates = [getattr(transformers, name, None) for name in config.architectures or ()]
    candidates += [
        _class_in(getattr(transformers, table), config) for table in _TABLES if hasattr(transformers, table)
    ]
    classes: list[Any] = [candidate for candidate in candidates if isinstance(candidate, type)]
    for candidate in classes:
        if issubclass(candidate, transformers.PreTrainedModel):
            # A text class with the configuration of the whole: its weights are named as in a model of text.
            return candidate if candidate.config_class is type(config) else None
    return None


def _class_in(table: Any, config: PreTrainedConfig) -> Any:
    """Return the first class that a table of transformers lists for a configuration; None without any."""
    mapping = table._model_mapping
    listed = mapping.get(type(config), None)
    return listed[0] if isinstance(listed, list | tuple) else listed


def load(
    model_class: type[PreTrainedModel], location: str, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the text model of the checkpoint at `location`, and transformers' report on its loading.

    Args:
        model_class: the class of the whole model.
        location: a folder or hub id.
        options: arguments of `from_pretrained`.

    Raises:
        RefusedModel: for a model without one text decoder.
    """
    from transformers import PreTrainedModel

    with quiet_transformers():
        # A class with a `from_pretrained` of its own may read more files, such as pickles with voices.
        full_model, report = PreTrainedModel.from_pretrained.__func__(
            _text_only(model_class), location, output_loading_info=True, **options
        )
    full_model.__class__ = model_class
    report["unexpected_keys"] = {
        key for key in report["unexpected_keys"] if not _is_of_removed_module(full_model, key)
    }
    full_model = _part_with_logits(full_model)
    model = _causal_model(full_model)
    if not _agree(model, full_model):
        model = full_model
    vars(model)[_WHOLE] = full_model
    return model, report


def whole_around(model: PreTrainedModel) -> PreTrainedModel | None:
    """Return the whole model, without its other modules, from which a text model was loaded; None for any other."""
    return vars(model).get(_WHOLE)


def text_path(full_model: PreTrainedModel) -> str:
    """Return the name of the text model's module: the outermost with the text configuration."""
    from transformers import PreTrainedModel

    config_class = type(families.text_config_of(full_model))
    names = [
        name
        for name, module in full_model.named_modules()
        if name and isinstance(module, PreTrainedModel) and type(module.config) is config_class
    ]
    if not names:
        raise RefusedModel(
            f"{full_model.config.model_type} ({type(full_model).__name__}): no module has its text configuration "
            f"({config_class.__name__}); use a checkpoint of a causal language model"
        )
    return min(names, key=lambda name: name.count("."))


def _text_only(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return a subclass of the same name, whose instances have no module but the text model and the unembedding."""

    def initialise(self: PreTrainedModel, config: PreTrainedConfig, *args: object, **kwargs: object) -> None:
        initialise_whole = super(text_only, self).__init__
        try:
            initialise_whole(config, *args, **kwargs)
        except ImportError:
            # A vision tower may need a package (timm) that the text model does not.
            with _placeholders_for_others(type(config.get_text_config(decoder=True))):
                initialise_whole(config, *args, **kwargs)
        _remove_other_modules(self)

    namespace = {"__init__": initialise, "__module__": model_class.__module__}
    text_only: type[PreTrainedModel] = type(model_class.__name__, (model_class,), namespace)
    return text_only


@contextmanager
def _placeholders_for_others(text_config_class: type) -> Iterator[None]:
    """Let `AutoModel.from_config` return an empty module for every configuration but the text model's."""
    from transformers import AutoModel

    original = AutoModel.from_config

    def from_config(config: PreTrainedConfig, **kwargs: object) -> nn.Module:
        return original(config, **kwargs) if type(config) is text_config_class else nn.Module()

    AutoModel.from_config = from_config
    try:
        yield
    finally:
        # The original is inherited.
        del AutoModel.from_config


def _part_with_logits(full_model: PreTrainedModel) -> PreTrainedModel:
    """Return the innermost model around the text model that has an unembedding: the full one, or Omni's thinker."""
    from transformers import PreTrainedModel

    names = text_path(full_model).split(".")
    for depth in range(len(names) - 1, 0, -1):
        part = full_model.get_submodule(".".join(names[:depth]))
        if isinstance(part, PreTrainedModel) and part.get_output_embeddings() is not None:
            return part
    return full_model


def _remove_other_modules(full_model: PreTrainedModel) -> None:
    """Replace by None every module that is not on the way to the text model, except the unembedding."""
    path = text_path(full_model).split(".")
    unembedding = _part_with_logits(full_model).get_output_embeddings()
    parent: nn.Module = full_model
    for name in path:
        for child_name, child in list(parent.named_children()):
            if child_name != name and child is not unembedding:
                parent._modules[child_name] = None
        parent = getattr(parent, name)


def _is_of_removed_module(full_model: nn.Module, key: str) -> bool:
    """Return whether a tensor belongs to a module that `_remove_other_modules` has replaced by None."""
    module: nn.Module | None = full_model
    for name in key.split("."):
        if module is None:
            return True
        if name not in module._modules:
            return False
        module = module._modules[name]
    return module is None


def _causal_model(full_model: PreTrainedModel) -> PreTrainedModel:
    """Return a causal language model around the text model of `full_model`, which shares its tensors."""
    import transformers

    text = full_model.get_submodule(text_path(full_model))
    if text.get_output_embeddings() is not None:
        return _with_settings(text, full_model)
    config = text.config
    causal_class = _class_in(transformers.AutoModelForCausalLM, config)
    unembedding = full_model.get_output_embeddings()
    if causal_class is None or causal_class.config_class is not type(config) or unembedding is None:
        return full_model
    with torch.device("meta"):
        causal = causal_class(config)
    prefix = causal.base_model_prefix
    if type(getattr(causal, prefix, None)) is not type(text):
        return full_model
    setattr(causal, prefix, text)
    causal.set_output_embeddings(unembedding)
    if any(tensor.is_meta for tensor in (*causal.parameters(), *causal.buffers())):
        return full_model
    return _with_settings(causal, full_model)


def _agree(causal: PreTrainedModel, full_model: PreTrainedModel) -> bool:
    """Return whether the two have equal logits on text. A whole that cannot run on text alone has none to compare.

    The text class may scale logits that the whole one does not (Cohere 2 in Aya Vision).
    """
    if causal is full_model:
        return True
    fields = full_model.config.to_dict()
    special = {value for key, value in fields.items() if "token" in key and isinstance(value, int)}
    d_vocab = families.d_vocab_of(causal)
    ids = [token for token in range(d_vocab) if token not in special][:_N_TOKENS]
    tokens = torch.tensor([ids], device=causal.device)
    with torch.no_grad():
        text_logits = causal(tokens, use_cache=False).logits
        try:
            expected = full_model(tokens, use_cache=False).logits
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError):
            return True
    gap = float((text_logits.double() - expected.double()).abs().max())
    return not gap > LIMITS[text_logits.dtype] * float(expected.abs().max())


def _with_settings(text: PreTrainedModel, full_model: PreTrainedModel) -> PreTrainedModel:
    """Give the text model what transformers has set on the whole one, and return it."""
    text.config.name_or_path = full_model.config.name_or_path
    for name in ("generation_config", "hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(full_model, name):
            setattr(text, name, getattr(full_model, name))
    stored = getattr(full_model.config, "quantization_config", None)
    if stored is not None:
        text.config.quantization_config = stored
    return text.eval()
