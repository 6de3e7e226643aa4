"""The MLP's output at position 0 set to zero, in the layer that writes the norm there, and what that does to the loss.

Queipo-de-Llano et al. 2025 (arXiv:2510.06477). "The spike layer" names different layers under different definitions,
and where the MLP writes nothing its removal is no experiment: each definition has its own name here, the one that an
ablation needs is the default, and what was removed stands beside the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.plugin import (
    CAUSAL_TABLES,
    Column,
    Condition,
    LayerView,
    Metric,
    Params,
    Table,
    TableSpec,
    hookimpl,
    param,
)
from phaselens_plugins._causal import REACH, Ablation, at_bos, control_seeds, require_layer
from phaselens_plugins._common import LAYER, best, cell, keep, real_rows

if TYPE_CHECKING:
    import numpy as np

WRITE, BELOW_LAST = "write layer", "write layer below the last"
RATIO, FIRST, LARGEST = "largest BOS ratio", "first BOS ratio > 2", "largest MLP at BOS"
GIVEN, EACH, ALL = "given layer", "each layer", "all layers"
DEFINITIONS = {
    WRITE: "argmax of bos_norm(l) − bos_norm(l − 1); null where no layer adds to bos_norm",
    BELOW_LAST: "the same, the last layer left out: nothing reads what that one writes at position 0",
    RATIO: "argmax of the mean ratio of bos_norm to the mean norm of the other positions",
    FIRST: "the first layer whose mean ratio exceeds 2",
    LARGEST: "argmax of the norm of the MLP's output at position 0",
    GIVEN: "the parameter `layer`",
}
ABOVE = 2.0
"""What the ratio exceeds in the first layer that FIRST names."""
NEARLY_NOTHING = 0.1
"""Removing an output of less than this part of the norm at position 0 is called nearly a no-op."""


@dataclass(frozen=True)
class BosMlpParams(Params):
    """What the metric can be asked for."""

    at: str = param(
        "write",
        help="the layer that writes the norm of position 0; the layer of each definition in use; every layer, one at a "
        "time; or all layers at once, beside the write layer",
        choices=("write", "definitions", "sweep", "all"),
    )
    layer: int | None = param(None, help="this layer as well, 0-based", unit="index", minimum=0)
    seeds: int = control_seeds()


class BosMlp(Ablation[BosMlpParams]):
    """Loss with the MLP's output at position 0 removed; the layer is found on the unedited model."""

    name = "bos-mlp"
    version = "1"
    title = "MLP output at BOS removed"
    description = "loss when the MLP writes nothing at position 0, in the layer that makes its norm"
    citation = (
        "Queipo-de-Llano et al. 2025, arXiv:2510.06477; github.com/DavidDemitriAfrica/drope-activations"
    )
    Params = BosMlpParams
    tables = (
        *CAUSAL_TABLES,
        REACH,
        TableSpec(
            "layers_used",
            (
                Column("definition", str, None, "which layer is meant; docs/metrics.md has them all"),
                Column("layer", int, "index", "the layer that it names in this model, 0-based"),
                Column(
                    "condition", str, None, "where that layer's result stands in `conditions`, or `not run`"
                ),
                Column("mlp_norm", float, "norm", "norm of the MLP's output at position 0: what is removed"),
                Column("bos_norm", float, "norm", "norm of the residual stream there after the layer"),
                Column(
                    "removed",
                    float,
                    "ratio",
                    "mlp_norm over bos_norm; nearly 0: removing it is no experiment",
                ),
            ),
            "a row per definition",
        ),
        TableSpec(
            "writes",
            (
                LAYER,
                Column(
                    "bos_norm", float, "norm", "norm of the residual stream at position 0 after the layer"
                ),
                Column("bos_change", float, "norm", "what the layer adds to it"),
                Column("bos_ratio", float, "ratio", "bos_norm over the mean norm of the other positions"),
                Column("mlp_norm", float, "norm", "norm of the MLP's output at position 0"),
                Column("removed", float, "ratio", "mlp_norm over bos_norm"),
                Column(
                    "mlp_norm_elsewhere",
                    float,
                    "norm",
                    "norm of the MLP's output at the other positions, their mean",
                ),
            ),
            "a row per layer of the unedited model: means over texts",
        ),
    )

    @classmethod
    def define(cls, params: BosMlpParams) -> str:
        """Which layers, and what the control is."""
        where = {
            "write": "the layer that adds most to ‖x₀‖ on the unedited model",
            "definitions": "the layer of each definition in use",
            "sweep": "every layer, one at a time",
            "all": "the layer that adds most to ‖x₀‖, and all layers at once",
        }[params.at]
        given = "" if params.layer is None else f", and layer {params.layer}"
        control = f"; control: one other position, {params.seeds} draws a text" if params.seeds else ""
        return f"MLP output at position 0 := 0 in {where}{given}{control}; ratio: perplexity over the unedited model's"

    def setup(self) -> None:
        """A layer that the model does not have is refused before anything runs."""
        super().setup()
        require_layer(self.params.layer, self.model)

    def hooks(self) -> Sequence[str]:
        """The residual stream before and after each layer, and what the MLP adds."""
        return ["blocks.{layer}.hook_resid_post", "blocks.0.hook_resid_pre", "blocks.{layer}.hook_mlp_out"]

    def update(self, layer: LayerView) -> None:
        """Norms at position 0 of this layer for the texts of the batch."""
        from phaselens.spectrum import bos_norm, row_norms

        found = []
        for x, mlp in zip(real_rows(layer, "hook_resid_post"), real_rows(layer, "hook_mlp_out"), strict=True):
            stream, added = bos_norm(row_norms(x)), bos_norm(row_norms(mlp))
            found.append(
                {"norm": stream.norm, "ratio": stream.ratio, "mlp": added.norm, "mlp_elsewhere": added.others}
            )
        if "hook_resid_pre" in layer:
            for one, x in zip(found, real_rows(layer, "hook_resid_pre"), strict=True):
                one["before"] = bos_norm(row_norms(x)).norm
        keep(self, layer, found)

    def conditions(self) -> Sequence[Condition]:
        """Position 0 of `hook_mlp_out` := 0 in each layer that is meant, and the controls."""
        found: list[Condition] = []
        for name, layer, meant in self._meant():
            points = ["blocks.{layer}.hook_mlp_out" if layer is None else f"blocks.{layer}.hook_mlp_out"]
            found += at_bos(name, points, layer, self.params.seeds, {"definitions": meant})
        return found

    def _meant(self) -> list[tuple[str, int | None, list[str]]]:
        """Name, layer and definitions of each condition; definitions that name one layer share the first one's."""
        places = self._places()
        if self.params.at == "sweep":
            return [
                (EACH, layer, [name for name, place in places.items() if place == layer])
                for layer in range(self.model.n_layers)
            ]
        wanted = [*DEFINITIONS] if self.params.at == "definitions" else [WRITE]
        if places.get(WRITE) == self.model.n_layers - 1:
            wanted.append(BELOW_LAST)
        wanted.append(GIVEN)
        by_layer: dict[int, list[str]] = {}
        for name in dict.fromkeys(wanted):
            place = places.get(name)
            if place is not None:
                by_layer.setdefault(place, []).append(name)
        meant: list[tuple[str, int | None, list[str]]] = [
            (names[0], layer, names) for layer, names in by_layer.items()
        ]
        return [*meant, (ALL, None, [])] if self.params.at == "all" else meant

    def _places(self) -> dict[str, int | None]:
        """The layer of each definition; None where no layer fits it."""
        import numpy as np

        norms, ratio, mlp = self._mean("norm"), self._mean("ratio"), self._mean("mlp")
        change = self._change()
        above = np.flatnonzero(ratio > ABOVE)
        places = {
            WRITE: _most(change),
            BELOW_LAST: _most(change[:-1]),
            RATIO: best(ratio),
            FIRST: int(above[0]) if above.size else None,
            LARGEST: _most(mlp),
        }
        if np.isnan(norms).all():
            self.warn("the layers are null: norms at position 0 are NaN or infinite in every layer")
        return places | ({} if self.params.layer is None else {GIVEN: self.params.layer})

    def _change(self) -> np.ndarray:
        """What each layer adds to the norm at position 0."""
        import numpy as np

        norms = self._mean("norm")
        change: np.ndarray = norms - np.concatenate([self._mean("before")[:1], norms[:-1]])
        return change

    def _mean(self, name: str) -> np.ndarray:
        """Mean over texts [layer]; NaN where a layer has no finite value."""
        import numpy as np

        found = self.per_text.stack(name)
        found = np.where(np.isfinite(found), found, np.nan)
        present = ~np.isnan(found)
        count = present.sum(0)
        total = np.where(present, found, 0.0).sum(0)
        means: np.ndarray = np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)
        return means

    def compute(self) -> Mapping[str, Table]:
        """Also the layers that were meant, and what the MLP writes in each."""
        self._explain()
        return {
            **super().compute(),
            "layers_used": self.table("layers_used", self._layers_used()),
            "writes": self.table("writes", self._writes()),
        }

    def _layers_used(self) -> Iterator[tuple[Any, ...]]:
        meant = self._meant()
        norms, mlp, removed = self._mean("norm"), self._mean("mlp"), self._removed()
        for name, layer in self._places().items():
            if layer is None:
                self.warn(f"{name}: no layer fits it ({DEFINITIONS[name]}), so its layer is null")
                yield name, None, "not run", None, None, None
                continue
            run = [condition for condition, place, _ in meant if place == layer]
            condition = run[0] if run else "not run"
            yield name, layer, condition, *(cell(each[layer]) for each in (mlp, norms, removed))

    def _writes(self) -> Iterator[tuple[Any, ...]]:
        import numpy as np

        columns = [self._mean("norm"), self._change(), self._mean("ratio"), self._mean("mlp"), self._removed(),
                   self._mean("mlp_elsewhere")]  # fmt: skip
        if any(np.isnan(column).any() for column in columns):
            self.warn(
                "norms are null in `writes` where no text has a finite value; those of other positions also where no "
                "text has a second token"
            )
        for layer, row in enumerate(zip(*columns, strict=True)):
            yield layer, *map(cell, row)

    def _removed(self) -> np.ndarray:
        """Norm of the MLP's output over that of the stream after the layer, at position 0 [layer]."""
        import numpy as np

        norms, mlp = self._mean("norm"), self._mean("mlp")
        removed: np.ndarray = np.divide(mlp, norms, out=np.full(norms.shape, np.nan), where=norms > 0)
        return removed

    def _explain(self) -> None:
        """What a reader of the result should know of the layers."""
        places, norms, mlp, removed = self._places(), self._mean("norm"), self._mean("mlp"), self._removed()
        write = places[WRITE]
        elsewhere = "" if write is None else f"; most of that norm is written by layer {write}"
        for name, layer, names in [] if self.params.at == "sweep" else self._meant():
            if len(names) > 1:
                self.warn(
                    f"{', '.join(names[1:])}: layer {layer}, as {name}, so one condition stands for them"
                )
            if layer is not None and removed[layer] < NEARLY_NOTHING:
                self.warn(
                    f"{name}: the MLP of layer {layer} adds a vector of norm {mlp[layer]:.3g} to position 0, whose "
                    f"norm is {norms[layer]:.3g}: removing it is nearly a no-op{elsewhere}"
                )
        if write is None and norms[norms == norms].size:
            self.warn("write layer is null: no layer adds to the norm of position 0")
        if write == self.model.n_layers - 1 and self.params.at != "sweep":
            self.warn(
                f"write layer: {write} is the last layer; what it writes at position 0 changes the first predicted "
                f"token and nothing else. `{BELOW_LAST}` is beside it; at=sweep shows every layer"
            )
        if write is not None and self.params.at in ("write", "definitions"):
            self._explain_several(write)

    def _explain_several(self, write: int) -> None:
        """Where the write layer makes less than half of the rise, removing what it writes leaves most of the norm."""
        change = self._change()
        rise = change[change > 0].sum()
        if change[write] < rise / 2:
            self.warn(
                f"write layer: layer {write} adds {change[write]:.3g} of the {rise:.3g} by which layers raise the norm "
                "of position 0; several write it, and at=all removes them together"
            )


def _most(values: np.ndarray) -> int | None:
    """The layer with the largest value; None where none is above 0."""
    place = best(values)
    return place if place is not None and values[place] > 0 else None


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """The metrics in this file."""
    return [BosMlp]
