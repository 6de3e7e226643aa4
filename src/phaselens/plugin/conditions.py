"""What a causal metric declares: conditions, and the edits that make them. Imports no torch."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError, is_list_like, is_number, is_whole
from phaselens.plugin.mistakes import kind_of
from phaselens.plugin.views import Batch

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_IN_LAYER = re.compile(r"blocks\.(\d+)\.(.+)")
_STATISTICS = ("hook_lse", "hook_sink", "hook_entropy", "hook_received", "hook_distance")

#: The condition without an edit has this name; every other one is compared with it.
BASELINE_NAME = "baseline"


@dataclass(frozen=True)
class Site:
    """Where an edit is applied, for a `to` that is a function.

    `positions` [batch or 1, pos] are the absolute positions of the rows of the tensor: 0 is the text's first token,
    also when a KV cache hands tokens over one by one or a prompt is padded on the left (pads stand at −1). `batch`
    holds the texts of a run; it is None elsewhere (generation, the REPL). `weight` finds a weight of the same layer,
    as in `LayerView`.
    """

    point: str
    layer: int | None
    positions: Tensor
    batch: Batch | None = None
    weight: Callable[[str], Tensor] = field(default=lambda name: _no_weight(name), repr=False)

    def mask(self, positions: Iterable[int]) -> Tensor:
        """[batch or 1, pos], True in rows that stand at one of these absolute positions."""
        import torch

        wanted = torch.tensor(sorted(positions), device=self.positions.device)
        return torch.isin(self.positions, wanted)


def _no_weight(name: str) -> Tensor:
    raise LookupError(f"no model stands behind this site, so it has no weight {name!r}")


@dataclass(frozen=True)
class Edit:
    """One change of the activations at one hook point.

    `point` is a hook name; `{layer}` in it stands for every layer. `to` is the number that is written, or a function
    `(tensor, site)` that returns the new tensor, of the same shape, and leaves the one it was given as it is. Only rows
    at `positions` (absolute; None: all) and `heads` (None: all; for points with heads) are changed, in every phase:
    with a KV cache, an edit of position 0 happens in the prefill and never again.

    >>> Edit("blocks.1.hook_mlp_out", 0.0, positions=[0]).layer
    1
    """

    point: str
    to: float | Callable[[Tensor, Site], Tensor]
    positions: Sequence[int] | None = None
    heads: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.point, str):
            raise InputError(f"an edit's point is {kind_of(self.point)}; give the name of a hook point")
        if self.point.rsplit(".", 1)[-1] in _STATISTICS:
            raise InputError(
                f"edit of {self.point}: it is a measurement, and nothing in the model follows from it"
            )
        if not callable(self.to) and not is_number(self.to):
            raise InputError(
                f"edit of {self.point}: `to` is {kind_of(self.to)}; give a number, or a function (tensor, site)"
            )
        for name in ("positions", "heads"):
            _require_places(f"edit of {self.point}: {name}", getattr(self, name))

    @property
    def layer(self) -> int | None:
        """The layer of its point; None outside of the layers."""
        inside = _IN_LAYER.fullmatch(self.point)
        return int(inside[1]) if inside else None

    def in_layers(self, n_layers: int) -> list[Edit]:
        """Itself, or one edit for every layer where the point says `{layer}`."""
        if "{layer}" not in self.point:
            return [self]
        edits = [copy.copy(self) for _ in range(n_layers)]  # copies: all but the point has been checked
        for layer, edit in enumerate(edits):
            object.__setattr__(edit, "point", self.point.replace("{layer}", str(layer)))
        return edits


def _require_places(what: str, places: Any) -> None:
    """InputError unless it is None or a collection of whole numbers from 0."""
    if places is None:
        return
    if not is_list_like(places, Collection):
        example = f"[{places!r}]" if is_whole(places) else "[0]"
        raise InputError(
            f"{what} are a list of whole numbers from 0, such as {example}; found {kind_of(places)}"
        )
    for value in places:
        if not is_whole(value) or value < 0:
            raise InputError(f"{what} are whole numbers from 0, found {value!r}")


@dataclass(frozen=True)
class Condition:
    """A name and the edits that make it.

    `layer` is what tables show as its layer. Conditions that differ in nothing but `seed` are repeats of one control:
    their losses are averaged text by text before anything else is computed. `control_for` names the condition, of the
    same layer, that this one is the control of; their difference, text by text, then stands in the table `contrasts`.
    A control of a condition that does not exist fails the metric. `params` are for the record.
    """

    name: str
    edits: Sequence[Edit]
    layer: int | None = None
    seed: int | None = None
    control_for: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"a condition's name is {kind_of(self.name)}; give text")
        edits: Any = self.edits
        if isinstance(edits, Edit):
            raise InputError(f"condition {self.name!r}: its edits are one Edit; give a list: [Edit(…)]")
        if not is_list_like(edits, Collection):
            raise InputError(f"condition {self.name!r}: its edits are {kind_of(edits)}; give a list of Edits")
        for edit in edits:
            if not isinstance(edit, Edit):
                raise InputError(f"condition {self.name!r}: {kind_of(edit)} among its edits; give Edits only")
        for field_name, least in (("layer", 0), ("seed", None)):
            value = getattr(self, field_name)
            if value is not None and (not is_whole(value) or (least is not None and value < least)):
                raise InputError(
                    f"condition {self.name!r}: its {field_name} is {kind_of(value)}; give a whole number, or None"
                )
        if self.control_for is not None and not isinstance(self.control_for, str):
            raise InputError(
                f"condition {self.name!r}: control_for is {kind_of(self.control_for)}; give the name of a condition"
            )
        if not isinstance(self.params, Mapping):
            raise InputError(f"condition {self.name!r}: params are {kind_of(self.params)}; give a dict")

    @property
    def key(self) -> tuple[str, int | None, int | None]:
        """What tells it from the other conditions of its metric."""
        return self.name, self.layer, self.seed


BASELINE = Condition(BASELINE_NAME, ())


@dataclass(frozen=True)
class Prompt:
    """A token sequence of a metric's own, to be run instead of the run's texts.

    Only the tokens from position `scored_from` on are predicted and scored (1: all but the first).
    """

    id: str
    ids: Sequence[int]
    scored_from: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.id, str):
            raise InputError(f"a prompt's id is {kind_of(self.id)}; give text")
        if self.ids is None:
            raise InputError(f"prompt {self.id!r}: its ids are None; give a list of token ids")
        _require_places(f"prompt {self.id!r}: its ids", self.ids)
        if not is_whole(self.scored_from):
            raise InputError(
                f"prompt {self.id!r}: scored_from is {kind_of(self.scored_from)}; give a whole number"
            )
        if not 1 <= self.scored_from < len(self.ids):
            raise InputError(
                f"prompt {self.id!r}: scored_from is {self.scored_from}; give 1 to {len(self.ids) - 1}, "
                f"so that at least one of its {len(self.ids)} tokens is predicted"
            )


@dataclass(frozen=True)
class Outcome:
    """One text (or prompt) under one condition.

    `loss` [n_predicted] is in nats per predicted token, float32, and finite unless the model's logits are not; `top`
    [n_predicted] is the token that the model holds most likely in each place (the lowest id among equals); `targets`
    [n_predicted] are the tokens that stand there. `index` is the text's place in the run (or the prompt's in its
    list), `content` a hash of what it says, `length` its tokens.
    """

    text: str
    index: int
    content: str
    length: int
    loss: np.ndarray
    top: np.ndarray
    targets: np.ndarray
