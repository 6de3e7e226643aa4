"""Loss with the value at position 0 set to zero: heads still attend to it but read nothing there.

A sink contributes a weight and a value to a head. This ablation removes the value: weights stay as they are, so the
head loses the share of attention that is on position 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phaselens.plugin import CAUSAL_TABLES, Condition, Metric, Params, hookimpl, in_layer, param
from phaselens_plugins._causal import REACH, Ablation, control_seeds, require_layer, zero_bos_conditions

ALL_LAYERS, EACH_LAYER, GIVEN_LAYER = "all layers", "each layer", "given layer"


@dataclass(frozen=True)
class BosVParams(Params):
    """Parameters of the metric."""

    at: str = param(
        "all",
        help="in all layers at once (all); or also in every layer, one at a time (sweep)",
        choices=("all", "sweep"),
    )
    layer: int | None = param(
        None, help="an additional layer to edit alone, 0-based", unit="index", minimum=0
    )
    seeds: int = control_seeds()


class BosV(Ablation[BosVParams]):
    """Metric of the loss without the value at position 0."""

    name = "bos-v"
    version = "1"
    title = "value at BOS removed"
    description = "loss when heads read nothing at position 0"
    citation = "BOS-V ablation of github.com/DavidDemitriAfrica/drope-activations"
    Params = BosVParams
    tables = (*CAUSAL_TABLES, REACH)

    @classmethod
    def define(cls, params: BosVParams) -> str:
        """State the layers and the control."""
        layers = {"all": "all layers at once", "sweep": "all layers at once and each layer alone"}[params.at]
        given_layer = "" if params.layer is None else f", and in layer {params.layer} alone"
        control = f"; control: one other position, {params.seeds} draws per text" if params.seeds else ""
        return (
            f"value of every head at position 0 := 0 in {layers}{given_layer}{control}; attention weights stay as they "
            "are"
        )

    def setup(self) -> None:
        """Refuse a layer that the model does not have, before anything runs."""
        super().setup()
        require_layer(self.params.layer, self.model)

    def conditions(self) -> Sequence[Condition]:
        """Return the conditions that set position 0 of `hook_v` to 0, and the controls."""
        if not self.model.attention_layers:
            self.warn(f"no condition is run: {self.model.absence(in_layer(0, 'attn.hook_v'))}, as all layers")
            return []
        selected: list[tuple[str, int | None]] = [(ALL_LAYERS, None)]
        if self.params.at == "sweep":
            selected += [(EACH_LAYER, layer) for layer in self.model.attention_layers]
        elif self.params.layer is not None:
            selected.append((GIVEN_LAYER, self.params.layer))
        conditions: list[Condition] = []
        for name, layer in selected:
            points = [in_layer("{layer}" if layer is None else layer, "attn.hook_v")]
            params: Mapping[str, object] = {"layers": "all" if layer is None else layer}
            conditions += zero_bos_conditions(name, points, layer, self.params.seeds, params)
        return conditions


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [BosV]
