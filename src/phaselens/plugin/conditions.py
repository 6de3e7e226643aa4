"""Conditions of causal metrics, and the edits that make them up. This module does not import torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from phaselens.errors import InputError, is_list_like, is_number, is_whole
from phaselens.lens.points import in_each_layer, layer_of, names_keys, read_only_reason
from phaselens.plugin.author_errors import describe_value
from phaselens.plugin.views import Batch

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

#: Name of the condition without edits, with which every other condition is compared.
BASELINE_NAME = "baseline"

#: Name, layer, head and seed of a condition.
ConditionKey: TypeAlias = tuple[str, int | None, int | None, int | None]
#: Name, layer and head: what the repeats of one condition share.
ConditionGroup: TypeAlias = tuple[str, int | None, int | None]


@dataclass(frozen=True)
class Site:
    """The site of an edit, passed to a `to` that is a function.

    `positions` [batch or 1, pos] are the absolute positions of the tensor's rows: 0 is the text's first token, even if
    a KV cache passes tokens one by one or a prompt is padded on the left (pads have −1). `batch` holds the texts of a
    run; it is None elsewhere (generation, the REPL). `weight` returns a weight of the same layer, as in `LayerView`.
    """

    point: str
    layer: int | None
    positions: Tensor
    batch: Batch | None = None
    weight: Callable[[str], Tensor] = field(default=lambda name: _no_weight(name), repr=False)

    def mask(self, positions: Iterable[int]) -> Tensor:
        """Return a boolean mask [batch or 1, pos] of the rows at these absolute positions."""
        import torch

        edited = torch.tensor(sorted(positions), device=self.positions.device)
        return torch.isin(self.positions, edited)


def _no_weight(name: str) -> Tensor:
    raise LookupError(f"this site belongs to no model, so it has no weight {name!r}")


@dataclass(frozen=True)
class Edit:
    """One change of the activations at one hook point.

    `point` is a hook name; `{layer}` in it means every layer. `to` is the number to write, or a function
    `(tensor, site)` that returns a new tensor of the same shape and does not change its argument. Only rows at
    `positions` (absolute; None: all) and `heads` (None: all; for points with heads) are changed, in every phase: with a
    KV cache, position 0 is edited once, in the prefill.

    `keys` are the absolute positions of the keys, for scores and attention: a list, or a function of the batch that
    returns one position (or None) for each of its texts. At `hook_key_scores`, which builds no matrix, they are the
    keys whose scores `to` receives, [batch, head, query, key]; by default key 0. There, only the queries after a key
    change. In a matrix (`hook_attn_scores`, `hook_pattern`) they are the columns to change; by default all.

    `entries` are those of the tensor's last dimension to change (None: all): dimensions of a residual, of a head, or
    of cos and sin.

    >>> Edit("blocks.1.hook_mlp_out", 0.0, positions=[0]).layer
    1
    >>> Edit("blocks.3.attn.hook_key_scores", float("-inf"), heads=[2], keys=[0]).keys
    [0]
    """

    point: str
    to: float | Callable[[Tensor, Site], Tensor]
    positions: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    keys: Sequence[int] | Callable[[Batch], Sequence[int | None]] | None = None
    entries: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.point, str):
            raise InputError(
                f"an edit's point is {describe_value(self.point)}; give the name of a hook point"
            )
        if reason := read_only_reason(self.point):
            raise InputError(f"edit of {self.point}: {reason}")
        if not callable(self.to) and not is_number(self.to):
            raise InputError(
                f"edit of {self.point}: `to` is {describe_value(self.to)}; give a number, or a function (tensor, site)"
            )
        for name in ("positions", "heads", "entries", *(() if callable(self.keys) else ("keys",))):
            require_whole_numbers(f"edit of {self.point}: {name}", getattr(self, name))
        if self.entries is not None and names_keys(self.point):
            raise InputError(f"edit of {self.point}: its last dimension has keys; name them by `keys`")
        if self.keys is not None and not names_keys(self.point):
            raise InputError(
                f"edit of {self.point}: this point has no keys; leave `keys` out, or edit hook_key_scores"
            )

    @property
    def layer(self) -> int | None:
        """The layer of the hook point; None for a point outside of the layers."""
        return layer_of(self.point)

    def in_layers(self, n_layers: int) -> list[Edit]:
        """Return one edit per layer if the point contains `{layer}`, else the edit itself."""
        if "{layer}" not in self.point:
            return [self]
        edits = []
        for point in in_each_layer(self.point, n_layers):
            edit = copy.copy(self)  # a copy: all but the point has been checked
            object.__setattr__(edit, "point", point)
            edits.append(edit)
        return edits


def require_whole_numbers(label: str, numbers: object) -> None:
    """Raise InputError unless `numbers` is None or a collection of whole numbers from 0."""
    if numbers is None:
        return
    if not isinstance(numbers, Collection) or not is_list_like(numbers):
        example = f"[{numbers!r}]" if is_whole(numbers) else "[0]"
        raise InputError(
            f"{label} are {describe_value(numbers)}; give a list of whole numbers from 0, such as {example}"
        )
    for number in numbers:
        if not is_whole(number) or number < 0:
            raise InputError(f"{label} contain {number!r}; give whole numbers from 0")


@dataclass(frozen=True)
class Condition:
    """A named set of edits.

    Tables show `layer` as the condition's layer, and `head` as its head, for conditions that edit one head. Conditions
    that differ only in `seed` are repeats of one control: their losses are averaged text by text before anything else
    is computed. `control_for` names the condition of the same layer and head that this one is the control for; the
    table `contrasts` then holds their difference, text by text. The metric fails if that condition does not exist.
    `params` are only recorded.
    """

    name: str
    edits: Sequence[Edit]
    layer: int | None = None
    seed: int | None = None
    control_for: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    head: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"a condition's name is {describe_value(self.name)}; give text")
        edits: object = self.edits
        if isinstance(edits, Edit):
            raise InputError(f"condition {self.name!r}: its edits are one Edit; give a list: [Edit(…)]")
        if not isinstance(edits, Collection) or not is_list_like(edits):
            raise InputError(
                f"condition {self.name!r}: its edits are {describe_value(edits)}; give a list of Edits"
            )
        for edit in edits:
            if not isinstance(edit, Edit):
                raise InputError(
                    f"condition {self.name!r}: {describe_value(edit)} among its edits; give Edits only"
                )
        for field_name, minimum in (("layer", 0), ("head", 0), ("seed", None)):
            value = getattr(self, field_name)
            if value is not None and (not is_whole(value) or (minimum is not None and value < minimum)):
                raise InputError(
                    f"condition {self.name!r}: its {field_name} is {describe_value(value)}; "
                    "give a whole number, or None"
                )
        if self.control_for is not None and not isinstance(self.control_for, str):
            raise InputError(
                f"condition {self.name!r}: control_for is {describe_value(self.control_for)}; "
                "give the name of a condition"
            )
        if not isinstance(self.params, Mapping):
            raise InputError(
                f"condition {self.name!r}: params are {describe_value(self.params)}; give a dict"
            )

    @property
    def key(self) -> ConditionKey:
        """Name, layer, head and seed, which identify the condition within its metric."""
        return self.name, self.layer, self.head, self.seed

    @property
    def group(self) -> ConditionGroup:
        """Name, layer and head, which the repeats of the condition share."""
        return self.name, self.layer, self.head

    @property
    def label(self) -> str:
        """The name with the layer and the head, for messages."""
        parts = [
            f"{noun} {getattr(self, noun)}" for noun in ("layer", "head") if getattr(self, noun) is not None
        ]
        return f"{self.name} ({', '.join(parts)})" if parts else self.name


BASELINE = Condition(BASELINE_NAME, ())


@dataclass(frozen=True)
class TaskPrompt:
    """A token sequence that a metric runs instead of the run's texts.

    Only the tokens from position `scored_from` on are predicted and scored (1: all except the first).
    """

    id: str
    ids: Sequence[int]
    scored_from: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.id, str):
            raise InputError(f"a prompt's id is {describe_value(self.id)}; give text")
        if self.ids is None:
            raise InputError(f"prompt {self.id!r}: its ids are None; give a list of token ids")
        require_whole_numbers(f"prompt {self.id!r}: its ids", self.ids)
        if not is_whole(self.scored_from):
            raise InputError(
                f"prompt {self.id!r}: scored_from is {describe_value(self.scored_from)}; give a whole number"
            )
        if not 1 <= self.scored_from < len(self.ids):
            raise InputError(
                f"prompt {self.id!r}: scored_from is {self.scored_from}; give 1 to {len(self.ids) - 1}, "
                f"so that at least one of its {len(self.ids)} tokens is predicted"
            )


@dataclass(frozen=True)
class TextOutcome:
    """The result of one text (or prompt) under one condition.

    `loss` [n_predicted] is in nats per predicted token, float32, and finite unless the model's logits are not. `top`
    [n_predicted] is the most likely token at each position (the lowest id among equals), `targets` [n_predicted] the
    actual one. `index` is the text's index in the run (or the prompt's in its list), `content` a hash of its content,
    `length` its number of tokens. `divergence` [n_predicted], float64, is the Kullback–Leibler divergence of each
    prediction from the unedited model's, KL(unedited ‖ condition) in nats; None unless the metric sets
    `needs_divergence`.
    """

    text: str
    index: int
    content: str
    length: int
    loss: np.ndarray
    top: np.ndarray
    targets: np.ndarray
    divergence: np.ndarray | None = None
