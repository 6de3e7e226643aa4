"""Small metrics that record the calls of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from phaselens.plugin import Column, LayerView, Metric, Params, Table, TableSpec


class Probe(Metric[Params]):
    """Records each layer that it receives, and computes a table of means by text and layer."""

    name = "probe"
    version = "1"
    tables = (
        TableSpec("texts", (Column("text", str), Column("layer", int, "index"), Column("mean"))),
        TableSpec("summary", (Column("value"),)),
    )
    points: ClassVar[tuple[str, ...]] = ("blocks.{layer}.hook_resid_post",)
    #: (layer, names, texts) of every update of any instance, in order.
    calls: ClassVar[list[tuple[int | None, tuple[str, ...], tuple[str, ...]]]] = []

    def hooks(self) -> Sequence[str]:
        return self.points

    def update(self, layer: LayerView) -> None:
        type(self).calls.append((layer.index, tuple(layer), layer.batch.texts))
        for name in layer:
            values = layer.float64(name)
            if values.dim() == 3 and values.shape[:2] == layer.batch.real.shape:
                real = layer.batch.real[..., None]
                mean = (values * real).sum((1, 2)) / (real.sum(1)[:, 0] * values.shape[2])
                self.per_text.add(layer, mean=mean)

    def compute(self) -> Mapping[str, Table]:
        mean = self.per_text.stack("mean")
        rows = [
            (text, layer, mean[row, layer])
            for layer in range(mean.shape[1])  # by layer first: the run puts the texts in order
            for row, text in enumerate(self.per_text.texts)
        ]
        return {"texts": self.table("texts", rows[::-1])}


def probe(**changes: Any) -> type[Probe]:
    """A fresh subclass of `Probe` with some attributes changed."""
    return type("Probe", (Probe,), {"calls": [], "__module__": __name__, **changes})
