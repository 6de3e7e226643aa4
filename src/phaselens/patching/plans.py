"""`SweepPlan`: the inputs that a sweep and an attribution share, and the result that both return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError, close_matches, short_form
from phaselens.lens.points import Hook, in_layer
from phaselens.patching.metrics import LogitMetric
from phaselens.patching.prompts import Prompt, bos_of
from phaselens.patching.results import AXES, Sweep
from phaselens.patching.targets import n_heads_at, point_of_kind

if TYPE_CHECKING:
    import numpy as np

    from phaselens.lens import HookedTransformer


def axes_of(lens: HookedTransformer, what: str, by: str | None) -> str:
    """Return the axes to sweep `what` over: `by`, or by default heads if there are any, else positions.

    Raises:
        InputError: for an unknown kind or `by`, or for heads of a kind that has none.
    """
    has_heads = n_heads_at(lens, in_layer(0, point_of_kind(what))) is not None
    if by is None:
        return "head" if has_heads else "pos"
    if not isinstance(by, str) or by not in AXES:
        raise InputError(f"by={short_form(by)}; {close_matches(str(by), AXES)}")
    if "head" in by and not has_heads:
        raise InputError(f"by={by!r}: {what} has no heads; leave by= out, or sweep head, q, k, v or pattern")
    return by


@dataclass(frozen=True)
class SweepPlan:
    """Cells of the clean run to put into the corrupt run, one at a time.

    `what`, `by` and `layers` select the cells. `hooks` edit the corrupt run; `set_aside` are the edits that do not fit
    the prompts. `base` is the metric of the edited corrupt run, `clean_value` that of the clean run.
    """

    clean: Prompt
    corrupt: Prompt
    metric: LogitMetric
    what: str
    by: str
    layers: tuple[int, ...]
    hooks: Sequence[Hook]
    set_aside: tuple[str, ...]
    base: float
    clean_value: float

    @property
    def lens(self) -> HookedTransformer:
        """The model of both prompts."""
        return self.corrupt.lens

    def hook_name(self, layer: int) -> str:
        """Return the hook point that is swept in a layer."""
        return in_layer(layer, point_of_kind(self.what))

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """The number of cells of a layer along each axis."""
        sizes = {"pos": len(self.corrupt), "head": n_heads_at(self.lens, self.hook_name(0)) or 0}
        return tuple(sizes[axis] for axis in AXES[self.by][1:])

    def result(
        self, values: np.ma.MaskedArray[Any, Any], *, kind: str = "patching", interrupted: bool = False
    ) -> Sweep:
        """Return the sweep whose cells have these values of the metric, [layer, …]."""
        return Sweep(
            self.what,
            self.by,
            values,
            self.base,
            self.clean_value,
            self.metric.name,
            self.layers,
            tuple(self.clean.words),
            tuple(self.corrupt.words),
            self.lens.info.n_heads,
            kind,
            interrupted,
            self.set_aside,
            bos=bos_of(self.clean, self.corrupt),
            model=self.lens.info.label,
        )
