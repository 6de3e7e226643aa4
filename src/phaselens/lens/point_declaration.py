"""An entry of the registry of hook points in `points`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PointDeclaration:
    """A hook point's entry in the registry.

    ``name`` is the name within a layer (or within a norm); outside of the layers it is the whole name. ``dimensions``
    are those of the tensor that a hook function receives. ``quantity`` says what its values are: activations of the
    model, scores before the softmax (or a function of them alone), attention after it, or losses. ``is_of_sink`` marks
    points whose values depend on the sink position. ``needs_own_attention`` marks points that fire only where the
    model's own attention runs, and not TransformerLens'. ``computed_after`` names the part of the layer that is
    computed before the point, so that an edit here leaves it unchanged (``rotation``: queries, keys and values).
    ``exists_in`` says which models have the point, where not all do. The dtype is the model's; that of statistics,
    scores and matrices is float32 or wider.
    """

    name: str
    dimensions: tuple[str, ...]
    meaning: str
    quantity: Literal["activation", "scores", "attention", "loss"] = "activation"
    is_statistic: bool = False
    is_of_sink: bool = False
    needs_own_attention: bool = False
    computed_after: Literal["nothing", "rotation", "attention", "mlp"] = "nothing"
    exists_in: str = ""

    @property
    def shape(self) -> str:
        """The dimensions as text: `[batch, head, query]`."""
        return f"[{', '.join(self.dimensions)}]"

    @property
    def is_editable(self) -> bool:
        """Whether the model depends on the tensor. It does not depend on a statistic, which is measured beside it."""
        return not self.is_statistic

    @property
    def is_matrix(self) -> bool:
        """Whether the tensor is an attention matrix [batch, head, query, key]."""
        return self.dimensions[-2:] == ("query", "key")
