"""Loss with the outputs of attention, of the MLP, or of both set to zero, in any layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phaselens.plugin import CAUSAL_TABLES, Condition, Edit, Metric, Params, hookimpl, param
from phaselens_plugins._causal import (
    REACH,
    Ablation,
    control_seeds,
    layer_ranges,
    parse_layers,
    zero_bos_conditions,
)

ATTN, MLP = "blocks.{layer}.hook_attn_out", "blocks.{layer}.hook_mlp_out"
#: What a layer has instead of attention, or beside it: state space, linear attention, a convolution.
MIXER = "blocks.{layer}.hook_mixer_out"
#: Name of the condition and its hook points, by the parameter `part`.
PARTS = {
    "attn": ("attention off", (ATTN,)),
    "mlp": ("MLP off", (MLP,)),
    "both": ("attention and MLP off", (ATTN, MIXER, MLP)),
    "bos_only": ("attention and MLP off at BOS", (ATTN, MIXER, MLP)),
}


@dataclass(frozen=True)
class LayerAblationParams(Params):
    """Parameters of the metric."""

    part: str = param(
        "both",
        help="the output set to zero: that of attention (after its output projection), of the MLP, of both, of both "
        "at position 0 only, or each of the four in turn",
        choices=(*PARTS, "each"),
    )
    layers: str = param("all", help="the layers: all, or numbers and ranges, such as 0,2-4")
    together: bool = param(False, help="edit all of these layers at once instead of one at a time")
    seeds: int = control_seeds("the control of bos_only")

    def __post_init__(self) -> None:
        super().__post_init__()
        layer_ranges(self.layers)


class LayerAblation(Ablation[LayerAblationParams]):
    """Metric of the loss without the output that a part of a layer adds to the residual stream."""

    name = "layer-ablation"
    version = "1"
    title = "parts of layers removed"
    description = "loss when attention, the MLP or both of a layer add nothing"
    citation = "component ablation of github.com/DavidDemitriAfrica/drope-activations"
    Params = LayerAblationParams
    tables = (*CAUSAL_TABLES, REACH)

    @classmethod
    def define(cls, params: LayerAblationParams) -> str:
        """State the outputs that are removed and the layers."""
        part = {
            "attn": "attention output := 0",
            "mlp": "MLP output := 0",
            "both": "attention and MLP outputs := 0",
            "bos_only": "attention and MLP outputs at position 0 := 0",
            "each": "outputs of attention, MLP, both, and both at position 0 only := 0, in turn",
        }[params.part]
        layers = "all layers" if params.layers.strip() == "all" else f"layers {params.layers}"
        grouping = "at once" if params.together else "one at a time"
        return f"{part}, in {layers}, {grouping}; ratio: perplexity over the unedited model's"

    def setup(self) -> None:
        """Refuse layers that the model does not have, before anything runs."""
        super().setup()
        self.layers = parse_layers(self.params.layers, self.model)

    def conditions(self) -> Sequence[Condition]:
        """Return one condition per part and layer, or per part for all layers together."""
        parts = PARTS if self.params.part == "each" else [self.params.part]
        groups = [self.layers] if self.params.together else [[layer] for layer in self.layers]
        return [
            condition
            for part in parts
            for layers in groups
            for condition in self._conditions_of(part, layers)
            if condition.edits
        ]

    def _conditions_of(self, part: str, layers: Sequence[int]) -> list[Condition]:
        name, patterns = PARTS[part]
        points = [point for layer in layers for point in self._points(patterns, layer)]
        params = {"part": part, "layers": list(layers)}
        if self.params.together:
            is_all = len(layers) == self.model.n_layers
            name = f"{name}, {'all layers' if is_all else f'layers {self.params.layers}'}"
        layer = None if self.params.together else layers[0]
        if part == "bos_only":
            return list(zero_bos_conditions(name, points, layer, self.params.seeds, params))
        return [Condition(name, [Edit(point, 0.0) for point in points], layer, params=params)]

    def _points(self, patterns: Sequence[str], layer: int) -> list[str]:
        """Return the points that the layer has; what it has instead of attention replaces attention."""
        points = [pattern.replace("{layer}", str(layer)) for pattern in patterns]
        attention, mixer = (pattern.replace("{layer}", str(layer)) for pattern in (ATTN, MIXER))
        if attention in points and self.model.absence(attention) is not None:
            points = [mixer, *(point for point in points if point not in (attention, mixer))]
            self.warn(
                f"layer {layer} is {self.model.kind_of(layer)}: its output is removed in attention's place"
            )
        return [point for point in points if self._exists(point, is_mixer=point == mixer)]

    def _exists(self, point: str, *, is_mixer: bool) -> bool:
        # Models whose kinds are not stated have attention alone in all layers.
        return self.model.absence(point) is None and (bool(self.model.kinds) or not is_mixer)


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [LayerAblation]
