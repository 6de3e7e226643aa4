"""The anatomy of a model of any architecture: its stack of layers, and the plan of each, measured by tiny forwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from phaselens.errors import RefusedModel
from phaselens.lens.layer_plans import LayerPlan, LayerPlanner, LayerPlans
from phaselens.lens.layer_stack import LayerStack, find_stack, same
from phaselens.lens.points import in_layer
from phaselens.lens.projection_maps import measure_projections
from phaselens.lens.residual_parts import LayerSums, measure_sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A model's stack of layers and the plan of each."""

    stack: LayerStack
    plans: LayerPlans

    @property
    def layers(self) -> list[nn.Module]:
        """The model's layers."""
        return [call.module for call in self.stack.layers]

    @property
    def needs_eager(self) -> bool:
        """Whether SDPA cannot compute the model's attention: it has neither a softcap nor learned sink logits."""
        all_facts = [plan.facts for plan in self.plans if plan.facts is not None]
        return any(facts.softcap is not None or facts.sink_logits is not None for facts in all_facts)


def absent_points(plans: Sequence[LayerPlan | None]) -> dict[str, str]:
    """Return the reason for each hook point that a layer does not have."""
    return {
        in_layer(layer, point): reason
        for layer, plan in enumerate(plans)
        if plan is not None
        for point, reason in plan.absent.items()
    }


def dissect(model: PreTrainedModel, family: str) -> Anatomy:
    """Return the anatomy of an unwrapped model whose attention implementation is the lens' own, by a few tiny forwards.

    Raises:
        RefusedModel: for a model without one residual stream that its layers add to.
    """
    stack = find_stack(model, family)
    sums = measure_sums(model, stack)
    attention_names = {
        layer: name
        for layer, layer_sums in enumerate(sums)
        if (name := _attention_name(stack, layer, layer_sums, family)) is not None
    }
    projections = measure_projections(model, stack, attention_names)
    plans = [
        LayerPlanner(
            layer_sums, stack.layers[layer].module, attention_names.get(layer), projections.get(layer)
        ).plan(stack.layers[layer].attention)
        for layer, layer_sums in enumerate(sums)
    ]
    return Anatomy(stack, LayerPlans(replace(plan, streams_first=stack.streams_first) for plan in plans))


def _attention_name(stack: LayerStack, layer: int, sums: LayerSums, family: str) -> str | None:
    """Return the name in its layer of the module that calls the attention interface; None where there is none."""
    calls = stack.layers[layer].attention
    if not calls:
        if stack.layers[layer].attends:
            raise RefusedModel(
                f"{family}: attention of layer {layer} does not go through transformers' attention interface, so its "
                "rows cannot be measured; use a family listed in docs/families.md"
            )
        return None
    if len(calls) > 1:
        if all(same(call.query, calls[0].query) and same(call.key, calls[0].key) for call in calls):
            raise RefusedModel(
                f"{family}: layer {layer} multiplies one attention pattern by its values in {len(calls)} parts, and "
                "subtracts what pairs of heads read (differential attention), so that no head writes what its own "
                "softmax reads; PhaseLens measures models whose heads do"
            )
        raise RefusedModel(
            f"{family}: layer {layer} calls the attention interface {len(calls)} times, so it has several patterns; "
            "PhaseLens measures models with one attention per layer"
        )
    n_keys, n_queries = calls[0].key.shape[2], calls[0].query.shape[2]
    if n_keys != n_queries:
        raise RefusedModel(
            f"{family}: attention of layer {layer} has {n_keys} keys in a text of {n_queries} tokens, so that some "
            "stand for several tokens (compressed keys) or for none; PhaseLens measures attention from tokens to tokens"
        )
    owner = next(
        other
        for other in range(stack.n_layers)
        if any(module is calls[0].module for module in stack.layers[other].module.modules())
    )
    if (
        owner != layer
        or sum(call.attention[0].module is calls[0].module for call in stack.layers if call.attention) > 1
    ):
        raise RefusedModel(
            f"{family}: layers share one attention module, so its weights and hook points belong to several layers; "
            "PhaseLens measures models whose layers have their own"
        )
    names = {id(module): name for name, module in stack.layers[layer].module.named_modules()}
    name = names[id(calls[0].module)]
    if not name:
        raise RefusedModel(
            f"{family}: its attention modules are in a list of their own, and no module is a layer with attention "
            "and MLP, whose residual stream could be hooked; use a family listed in docs/families.md"
        )
    return name
