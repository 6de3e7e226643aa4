"""The value at position 0 set to zero: attention still goes there, and brings nothing back.

Of the two things that a head reads at a sink, weight and content, this removes the content: weights stay as they
are, so the share of attention that sits on position 0 is lost to the head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phaselens.plugin import CAUSAL_TABLES, Condition, Metric, Params, hookimpl, param
from phaselens_plugins._causal import REACH, Ablation, at_bos, control_seeds, require_layer

ALL, EACH, GIVEN = "all layers", "each layer", "given layer"


@dataclass(frozen=True)
class BosVParams(Params):
    """What the metric can be asked for."""

    at: str = param(
        "all", help="in all layers at once; or also in every layer, one at a time", choices=("all", "sweep")
    )
    layer: int | None = param(None, help="this layer alone as well, 0-based", unit="index", minimum=0)
    seeds: int = control_seeds()


class BosV(Ablation[BosVParams]):
    """Loss with the value at position 0 removed from attention."""

    name = "bos-v"
    version = "1"
    title = "value at BOS removed"
    description = "loss when attention to position 0 brings nothing back"
    citation = "BOS-V ablation of github.com/DavidDemitriAfrica/drope-activations"
    Params = BosVParams
    tables = (*CAUSAL_TABLES, REACH)

    @classmethod
    def define(cls, params: BosVParams) -> str:
        """Which layers, and what the control is."""
        where = {"all": "all layers at once", "sweep": "all layers at once and every layer by itself"}[
            params.at
        ]
        given = "" if params.layer is None else f", and in layer {params.layer} alone"
        control = f"; control: one other position, {params.seeds} draws a text" if params.seeds else ""
        return f"value of every head at position 0 := 0 in {where}{given}{control}; attention weights stay as they are"

    def setup(self) -> None:
        """A layer that the model does not have is refused before anything runs."""
        super().setup()
        require_layer(self.params.layer, self.model)

    def conditions(self) -> Sequence[Condition]:
        """Position 0 of `hook_v` := 0, and the controls."""
        n_layers, given = self.model.n_layers, self.params.layer
        wanted: list[tuple[str, int | None]] = [(ALL, None)]
        if self.params.at == "sweep":
            wanted += [(EACH, layer) for layer in range(n_layers)]
        elif given is not None:
            wanted.append((GIVEN, given))
        found: list[Condition] = []
        for name, layer in wanted:
            points = [f"blocks.{'{layer}' if layer is None else layer}.attn.hook_v"]
            found += at_bos(name, points, layer, self.params.seeds, _params(layer))
        return found


def _params(layer: int | None) -> Mapping[str, Any]:
    return {"layers": "all" if layer is None else layer}


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """The metrics in this file."""
    return [BosV]
