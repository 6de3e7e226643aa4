"""Another attention scale, or another rope type, for a model that was just loaded, by transformers' own modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from phaselens.errors import RefusedModel
from phaselens.lens import families
from phaselens.lens.scaling import RopeScaling

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def override_softmax_scale(model: PreTrainedModel, scale: float) -> None:
    """Set the factor of q·k in every attention module, in place.

    Raises:
        RefusedModel: if no attention module has an attribute for it.
    """
    if not families.set_scales(model, scale):
        raise RefusedModel(
            f"{model.config.model_type}: softmax_scale cannot be set, since no attention module has an attribute for "
            "its scale; leave it out"
        )


def override_rope_scaling(model: PreTrainedModel, scaling: RopeScaling) -> None:
    """Give the model the rope type, in its configuration and by new rotary modules of the same classes, in place.

    Raises:
        RefusedModel: for a model without rotation, one with a rope type or with layers of several ones already, and one
            whose rotary module cannot be made from its configuration.
    """
    family = f"{model.config.model_type}: rope_scaling={scaling} cannot be served"
    modules = [(name, module) for name, module in model.named_modules() if families.rope_types_of(module)]
    if not modules:
        raise RefusedModel(f"{family}: the model has no rotary module of transformers")
    parameters = families.rope_parameters_of(model)
    if parameters is None or any(isinstance(value, dict) for value in parameters.values()):
        raise RefusedModel(f"{family}: its layers do not share one set of rope parameters")
    current = parameters.get("rope_type", "default")
    if current != "default":
        raise RefusedModel(
            f"{family}: its rope type is {current!r} already; it can be set for a default one only"
        )
    n_ctx = families.n_ctx_of(model)
    if n_ctx is None:
        raise RefusedModel(f"{family}: the model does not state the length that it was trained for")
    families.set_rope_parameters(model, {**parameters, **_parameters_of(scaling, n_ctx)})
    try:
        for name, module in modules:
            _replace(model, name, type(module)(families.text_config_of(model)))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        families.set_rope_parameters(model, parameters)
        raise RefusedModel(f"{family}: {type(error).__name__}: {error}") from error


def _parameters_of(scaling: RopeScaling, n_ctx: int) -> dict[str, object]:
    """Return transformers' rope parameters of a scaling; n_ctx is the trained length."""
    parameters: dict[str, object] = {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling.rope_type == "yarn":
        parameters["original_max_position_embeddings"] = n_ctx
    return parameters


def _replace(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule `name`, on the model's device."""
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, attribute, module.to(model.device))
