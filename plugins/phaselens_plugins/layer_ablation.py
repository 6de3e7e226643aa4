"""What attention, the MLP, or both add to the residual stream set to zero, in any layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phaselens.plugin import CAUSAL_TABLES, Condition, Edit, Metric, Params, hookimpl, param
from phaselens_plugins._causal import REACH, Ablation, at_bos, control_seeds, layer_ranges, layers_in

ATTN, MLP = "blocks.{layer}.hook_attn_out", "blocks.{layer}.hook_mlp_out"
PARTS = {
    "attn": ("attention off", (ATTN,)),
    "mlp": ("MLP off", (MLP,)),
    "both": ("attention and MLP off", (ATTN, MLP)),
    "bos_only": ("attention and MLP off at BOS", (ATTN, MLP)),
}


@dataclass(frozen=True)
class LayerAblationParams(Params):
    """What the metric can be asked for."""

    part: str = param(
        "both",
        help="what adds nothing any more: attention (after its output projection), the MLP, both, both at position 0 "
        "only, or each of the four in turn",
        choices=(*PARTS, "each"),
    )
    layers: str = param("all", help="which layers: all, or numbers and ranges, as 0,2-4")
    together: bool = param(False, help="these layers at once, in place of one at a time")
    seeds: int = control_seeds("the control of bos_only")

    def __post_init__(self) -> None:
        super().__post_init__()
        layer_ranges(self.layers)


class LayerAblation(Ablation[LayerAblationParams]):
    """Loss without what a part of a layer adds to the residual stream."""

    name = "layer-ablation"
    version = "1"
    title = "parts of layers removed"
    description = "loss when attention, the MLP or both of a layer add nothing"
    citation = "component ablation of github.com/DavidDemitriAfrica/drope-activations"
    Params = LayerAblationParams
    tables = (*CAUSAL_TABLES, REACH)

    @classmethod
    def define(cls, params: LayerAblationParams) -> str:
        """What is removed, and where."""
        part = {
            "attn": "what attention adds := 0",
            "mlp": "what the MLP adds := 0",
            "both": "what attention and MLP add := 0",
            "bos_only": "what attention and MLP add at position 0 := 0",
            "each": "attention, MLP, both, and both at position 0 only := 0, in turn",
        }[params.part]
        layers = "all layers" if params.layers.strip() == "all" else f"layers {params.layers}"
        how = "at once" if params.together else "one at a time"
        return f"{part}, in {layers}, {how}; ratio: perplexity over the unedited model's"

    def setup(self) -> None:
        """Layers that the model does not have are refused before anything runs."""
        super().setup()
        self.layers = layers_in(self.params.layers, self.model)

    def conditions(self) -> Sequence[Condition]:
        """A condition a part and layer, or a part and all the layers."""
        parts = PARTS if self.params.part == "each" else [self.params.part]
        groups = [self.layers] if self.params.together else [[layer] for layer in self.layers]
        return [one for part in parts for layers in groups for one in self._of(part, layers)]

    def _of(self, part: str, layers: Sequence[int]) -> list[Condition]:
        name, patterns = PARTS[part]
        points = [pattern.replace("{layer}", str(layer)) for layer in layers for pattern in patterns]
        params = {"part": part, "layers": list(layers)}
        if self.params.together:
            where = "all layers" if len(layers) == self.model.n_layers else f"layers {self.params.layers}"
            name = f"{name}, {where}"
        layer = None if self.params.together else layers[0]
        if part == "bos_only":
            return list(at_bos(name, points, layer, self.params.seeds, params))
        return [Condition(name, [Edit(point, 0.0) for point in points], layer, params=params)]


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """The metrics in this file."""
    return [LayerAblation]
