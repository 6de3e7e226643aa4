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
from phaselens.lens.pretrained import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# transformers' tables of classes by configuration, in which a model of several modalities may stand.
_TABLES = ("AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoModelForCausalLM")

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
    with quiet_transformers():
        whole, report = _text_only(model_class).from_pretrained(location, output_loading_info=True, **options)
    whole.__class__ = model_class
    model = _causal_model(whole)
    vars(model)[_WHOLE] = whole
    return model, report


def whole_around(model: PreTrainedModel) -> PreTrainedModel | None:
    """Return the whole model, without its other modules, from which a text model was loaded; None for any other."""
    return vars(model).get(_WHOLE)


def text_path(whole: PreTrainedModel) -> str:
    """Return the name of the text model's module: the outermost with the text configuration."""
    from transformers import PreTrainedModel

    config_class = type(families.text_config_of(whole))
    names = [
        name
        for name, module in whole.named_modules()
        if name and isinstance(module, PreTrainedModel) and type(module.config) is config_class
    ]
    if not names:
        raise RefusedModel(
            f"{whole.config.model_type} ({type(whole).__name__}): no module has its text configuration "
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


def _remove_other_modules(whole: PreTrainedModel) -> None:
    """Replace by None every module that is not on the way to the text model, except the unembedding."""
    path = text_path(whole).split(".")
    unembedding = whole.get_output_embeddings()
    parent: nn.Module = whole
    for name in path:
        for child_name, child in list(parent.named_children()):
            if child_name != name and child is not unembedding:
                parent._modules[child_name] = None
        parent = getattr(parent, name)


def _causal_model(whole: PreTrainedModel) -> PreTrainedModel:
    """Return a causal language model around the text model of `whole`, which shares its tensors."""
    import transformers

    text = whole.get_submodule(text_path(whole))
    if text.get_output_embeddings() is not None:
        return _with_settings(text, whole)
    config = text.config
    causal_class = _class_in(transformers.AutoModelForCausalLM, config)
    unembedding = whole.get_output_embeddings()
    if causal_class is None or causal_class.config_class is not type(config) or unembedding is None:
        return whole
    with torch.device("meta"):
        causal = causal_class(config)
    prefix = causal.base_model_prefix
    if type(getattr(causal, prefix, None)) is not type(text):
        return whole
    setattr(causal, prefix, text)
    causal.set_output_embeddings(unembedding)
    if any(tensor.is_meta for tensor in (*causal.parameters(), *causal.buffers())):
        return whole
    return _with_settings(causal, whole)


def _with_settings(text: PreTrainedModel, whole: PreTrainedModel) -> PreTrainedModel:
    """Give the text model what transformers has set on the whole one, and return it."""
    text.config.name_or_path = whole.config.name_or_path
    for name in ("generation_config", "hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(whole, name):
            setattr(text, name, getattr(whole, name))
    stored = getattr(whole.config, "quantization_config", None)
    if stored is not None:
        text.config.quantization_config = stored
    return text.eval()
