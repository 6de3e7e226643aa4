"""Loss with the MLP's output at position 0 set to zero, in the layer that writes the norm of that position.

Queipo-de-Llano et al. 2025 (arXiv:2510.06477). "The spike layer" is a different layer under different definitions, and
an MLP that writes nothing at position 0 cannot be tested by removing its output. So each definition has its own name
here, the one that an ablation needs is the default, and the tables have the norm that was removed.
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
    in_layer,
    param,
)
from phaselens_plugins._causal import REACH, Ablation, control_seeds, require_layer, zero_bos_conditions
from phaselens_plugins._common import (
    LAYER,
    TableRow,
    index_of_largest,
    layer_texts,
    mean_over_texts,
    none_if_nan,
    store_by_text,
)

if TYPE_CHECKING:
    import numpy as np

#: Names of the definitions and of the conditions.
WRITE_LAYER, WRITE_BELOW_LAST = "write layer", "write layer below the last"
LARGEST_RATIO, FIRST_RATIO, LARGEST_MLP = "largest BOS ratio", "first BOS ratio > 2", "largest MLP at BOS"
GIVEN_LAYER, EACH_LAYER, ALL_LAYERS = "given layer", "each layer", "all layers"
DEFINITIONS = {
    WRITE_LAYER: "argmax of bos_norm(l) − bos_norm(l − 1); missing where no layer adds to bos_norm",
    WRITE_BELOW_LAST: "the write layer, the last layer excluded: no layer reads what that one writes at position 0",
    LARGEST_RATIO: "argmax of the mean ratio of bos_norm to the mean norm of the other positions",
    FIRST_RATIO: "the first layer whose mean ratio exceeds 2",
    LARGEST_MLP: "argmax of the norm of the MLP's output at position 0",
    GIVEN_LAYER: "the parameter `layer`",
}
MIN_RATIO = 2.0
"""Threshold of FIRST_RATIO."""
NEGLIGIBLE_SHARE = 0.1
"""Removing an output of less than this share of the norm at position 0 is reported as nearly a no-op."""


@dataclass(frozen=True)
class BosMlpParams(Params):
    """Parameters of the metric."""

    at: str = param(
        "write",
        help="the layer that writes the norm of position 0 (write); the layer of each definition in use (definitions); "
        "every layer, one at a time (sweep); or the write layer, and all layers at once (all)",
        choices=("write", "definitions", "sweep", "all"),
    )
    layer: int | None = param(None, help="an additional layer, 0-based", unit="index", minimum=0)
    seeds: int = control_seeds()


class BosMlp(Ablation[BosMlpParams]):
    """Metric of the loss without the MLP's output at position 0; the unedited model determines the layer."""

    name = "bos-mlp"
    partial_layers = True  # norms of the residual stream are measured in layers without an MLP too
    version = "1"
    title = "MLP output at BOS removed"
    description = (
        "loss without the MLP's output at position 0, in the layer that writes the norm of that position"
    )
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
                Column(
                    "definition", str, None, "the definition of the layer; docs/metrics/bos-mlp.md lists them"
                ),
                Column("layer", int, "index", "the layer that it selects in this model, 0-based"),
                Column(
                    "condition",
                    str,
                    None,
                    "the condition that edits this layer, in `conditions`, or `not run`",
                ),
                Column("mlp_norm", float, "norm", "norm of the MLP's output at position 0, which is removed"),
                Column(
                    "bos_norm", float, "norm", "norm of the residual stream at position 0 after the layer"
                ),
                Column(
                    "removed",
                    float,
                    "ratio",
                    "mlp_norm / bos_norm; near 0, removing it tests nothing",
                ),
            ),
            "one row per definition",
        ),
        TableSpec(
            "writes",
            (
                LAYER,
                Column(
                    "bos_norm", float, "norm", "norm of the residual stream at position 0 after the layer"
                ),
                Column("bos_change", float, "norm", "change of bos_norm by the layer"),
                Column("bos_ratio", float, "ratio", "bos_norm / mean norm of the other positions"),
                Column("mlp_norm", float, "norm", "norm of the MLP's output at position 0"),
                Column("removed", float, "ratio", "mlp_norm / bos_norm"),
                Column(
                    "mlp_norm_elsewhere",
                    float,
                    "norm",
                    "mean norm of the MLP's output at the other positions",
                ),
            ),
            "one row per layer of the unedited model: means over texts",
        ),
    )

    @classmethod
    def define(cls, params: BosMlpParams) -> str:
        """State the layers and the control."""
        layers = {
            "write": "the layer that adds most to ‖x₀‖ on the unedited model",
            "definitions": "the layer of each definition in use",
            "sweep": "every layer, one at a time",
            "all": "the layer that adds most to ‖x₀‖, and all layers at once",
        }[params.at]
        given_layer = "" if params.layer is None else f", and layer {params.layer}"
        control = f"; control: one other position, {params.seeds} draws per text" if params.seeds else ""
        return (
            f"MLP output at position 0 := 0 in {layers}{given_layer}{control}; ratio: perplexity over the unedited "
            "model's"
        )

    def setup(self) -> None:
        """Refuse a layer that the model does not have, before anything runs."""
        super().setup()
        require_layer(self.params.layer, self.model)

    def hooks(self) -> Sequence[str]:
        """Return the points of the residual stream before and after each layer, and of the MLP's output."""
        return ["blocks.{layer}.hook_resid_post", "blocks.0.hook_resid_pre", "blocks.{layer}.hook_mlp_out"]

    def update(self, layer: LayerView) -> None:
        """Store the norms at position 0 of this layer for the texts of the batch."""
        from phaselens.spectrum import bos_norm, row_norms

        records = []
        for text in layer_texts(layer):
            stream = bos_norm(row_norms(text["hook_resid_post"]))
            record = {"norm": stream.norm, "ratio": stream.ratio}
            if "hook_mlp_out" in layer:
                output = bos_norm(row_norms(text["hook_mlp_out"]))
                record |= {"mlp": output.norm, "mlp_elsewhere": output.others_mean}
            if "hook_resid_pre" in layer:
                record["before"] = bos_norm(row_norms(text["hook_resid_pre"])).norm
            records.append(record)
        store_by_text(self, layer, records)

    def conditions(self) -> Sequence[Condition]:
        """Return the conditions that set position 0 of `hook_mlp_out` to 0 in each selected layer, and the controls."""
        conditions: list[Condition] = []
        for name, layer, definitions in self._selected_layers():
            points = [in_layer("{layer}" if layer is None else layer, "hook_mlp_out")]
            conditions += zero_bos_conditions(
                name, points, layer, self.params.seeds, {"definitions": definitions}
            )
        return conditions

    def _selected_layers(self) -> list[tuple[str, int | None, list[str]]]:
        """Return name, layer and definitions of each condition; definitions of a layer share the first's condition."""
        layers = self._layer_by_definition()
        if self.params.at == "sweep":
            return [
                (EACH_LAYER, layer, [name for name in layers if layers[name] == layer])
                for layer in self.per_text.layers("mlp")
            ]
        names = [*DEFINITIONS] if self.params.at == "definitions" else [WRITE_LAYER]
        if layers.get(WRITE_LAYER) == self.model.n_layers - 1:
            names.append(WRITE_BELOW_LAST)
        names.append(GIVEN_LAYER)
        by_layer: dict[int, list[str]] = {}
        for name in dict.fromkeys(names):
            layer = layers.get(name)
            if layer is not None:
                by_layer.setdefault(layer, []).append(name)
        selected: list[tuple[str, int | None, list[str]]] = [
            (definitions[0], layer, definitions) for layer, definitions in by_layer.items()
        ]
        return [*selected, (ALL_LAYERS, None, [])] if self.params.at == "all" else selected

    def _layer_by_definition(self) -> dict[str, int | None]:
        """Return the layer of each definition; None where no layer satisfies it."""
        import numpy as np

        norms, ratio, mlp = self._mean("norm"), self._mean("ratio"), self._mean("mlp")
        has_mlp = np.isin(np.arange(len(norms)), self.per_text.layers("mlp"))
        change, ratio = np.where(has_mlp, self._change(), np.nan), np.where(has_mlp, ratio, np.nan)
        layers_above = np.flatnonzero(ratio > MIN_RATIO)
        layers = {
            WRITE_LAYER: _largest_positive(change),
            WRITE_BELOW_LAST: _largest_positive(change[:-1]),
            LARGEST_RATIO: index_of_largest(ratio),
            FIRST_RATIO: int(layers_above[0]) if layers_above.size else None,
            LARGEST_MLP: _largest_positive(mlp),
        }
        if np.isnan(norms).all():
            self.warn("the layers are missing: norms at position 0 are NaN or infinite in every layer")
        return layers | ({} if self.params.layer is None else {GIVEN_LAYER: self.params.layer})

    def _change(self) -> np.ndarray:
        """Return the change of the norm at position 0 by each layer."""
        import numpy as np

        norms = self._mean("norm")
        change: np.ndarray = norms - np.concatenate([self._mean("before")[:1], norms[:-1]])
        return change

    def _mean(self, name: str) -> np.ndarray:
        """Return the mean over texts [layer]; NaN where a layer has no finite value."""
        import numpy as np

        if not self.per_text.layers(name):
            return np.full(self.model.n_layers, np.nan)
        values = self.per_text.stack(name)
        return mean_over_texts(np.where(np.isfinite(values), values, np.nan))

    def compute(self) -> Mapping[str, Table]:
        """Return the tables of every ablation, the selected layers, and the norm that the MLP writes in each layer."""
        self._warn_about_layers()
        return {
            **super().compute(),
            "layers_used": self.table("layers_used", self._layers_used_rows()),
            "writes": self.table("writes", self._writes_rows()),
        }

    def _layers_used_rows(self) -> Iterator[TableRow]:
        selected = self._selected_layers()
        norms, mlp, removed = self._mean("norm"), self._mean("mlp"), self._removed_share()
        for name, layer in self._layer_by_definition().items():
            if layer is None:
                self.warn(f"{name}: no layer satisfies it ({DEFINITIONS[name]}), so its layer is missing")
                yield name, None, "not run", None, None, None
                continue
            run = [condition for condition, condition_layer, _ in selected if condition_layer == layer]
            condition = run[0] if run else "not run"
            yield name, layer, condition, *(none_if_nan(values[layer]) for values in (mlp, norms, removed))

    def _writes_rows(self) -> Iterator[TableRow]:
        import numpy as np

        columns = [self._mean("norm"), self._change(), self._mean("ratio"), self._mean("mlp"), self._removed_share(),
                   self._mean("mlp_elsewhere")]  # fmt: skip
        if any(np.isnan(column).any() for column in columns):
            self.warn(
                "norms are missing in `writes` where no text has a finite value; those of other positions also where "
                "no text has a second token"
            )
        for layer, row in enumerate(zip(*columns, strict=True)):
            yield layer, *map(none_if_nan, row)

    def _removed_share(self) -> np.ndarray:
        """Return the norm of the MLP's output over that of the stream after the layer, at position 0 [layer]."""
        import numpy as np

        norms, mlp = self._mean("norm"), self._mean("mlp")
        removed: np.ndarray = np.divide(mlp, norms, out=np.full(norms.shape, np.nan), where=norms > 0)
        return removed

    def _warn_about_layers(self) -> None:
        """Warn of layers that several definitions share, that write little, or that no other layer reads."""
        norms, mlp, removed = self._mean("norm"), self._mean("mlp"), self._removed_share()
        write_layer = self._layer_by_definition()[WRITE_LAYER]
        writer = "" if write_layer is None else f"; most of that norm is written by layer {write_layer}"
        for name, layer, definitions in [] if self.params.at == "sweep" else self._selected_layers():
            if len(definitions) > 1:
                self.warn(
                    f"{', '.join(definitions[1:])}: layer {layer}, like {name}, so they share one condition"
                )
            if layer is not None and removed[layer] < NEGLIGIBLE_SHARE:
                self.warn(
                    f"{name}: the MLP of layer {layer} adds a vector of norm {mlp[layer]:.3g} to position 0, whose "
                    f"norm is {norms[layer]:.3g}: removing it is nearly a no-op{writer}"
                )
        if write_layer is None and norms[norms == norms].size:
            self.warn("write layer is missing: no layer adds to the norm of position 0")
        if write_layer == self.model.n_layers - 1 and self.params.at != "sweep":
            self.warn(
                f"write layer: {write_layer} is the last layer; what it writes at position 0 changes the first "
                f"predicted token only. `{WRITE_BELOW_LAST}` is run too; at=sweep runs every layer"
            )
        if write_layer is not None and self.params.at in ("write", "definitions"):
            self._warn_of_several_writers(write_layer)

    def _warn_of_several_writers(self, write_layer: int) -> None:
        """Warn if the write layer adds less than half of the rise, so that its removal leaves most of the norm."""
        change = self._change()
        rise = change[change > 0].sum()
        if change[write_layer] < rise / 2:
            self.warn(
                f"write layer: layer {write_layer} adds {change[write_layer]:.3g} of the {rise:.3g} by which layers "
                "raise the norm of position 0; several layers write it, and at=all removes them together"
            )


def _largest_positive(values: np.ndarray) -> int | None:
    """Return the layer with the largest value; None where none is above 0."""
    layer = index_of_largest(values)
    return layer if layer is not None and values[layer] > 0 else None


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [BosMlp]
