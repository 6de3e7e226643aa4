"""One cell at a time from the clean run into the corrupt one, layer by layer upwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError, close_matches
from phaselens.patching.metrics import LogitMetric
from phaselens.patching.passes import Hook, Walk, keep
from phaselens.patching.points import brief, is_matrix, kind_point, n_heads_of
from phaselens.patching.prompts import Prompt, bos_of
from phaselens.patching.results import AXES, Sweep, empty
from phaselens.runs import Observer

if TYPE_CHECKING:
    from torch import Tensor

# A forward holds as many cells as keep its largest tensor below this many numbers: 64 MB of float32. Larger ones are no
# faster on a CPU, and one forward is also the longest that Ctrl-C waits.
_NUMBERS = 1 << 24
_MOST = 32

Cell = tuple[int | None, int | None]


def axes_of(what: str, by: str | None, lens: Any) -> str:
    """What to sweep over: `by` if it fits `what`, else the usual.

    Raises:
        InputError: for an unknown kind or `by`, or heads of what has none.
    """
    point = kind_point(what)
    has_heads = n_heads_of(lens, f"blocks.0.{point}") is not None
    if by is None:
        return "head" if has_heads else "pos"
    if not isinstance(by, str) or by not in AXES:
        raise InputError(f"by={brief(by)}; {close_matches(str(by), AXES)}")
    if "head" in by and not has_heads:
        raise InputError(f"by={by!r}: {what} has no heads; leave by= out, or sweep head, q, k, v or pattern")
    return by


def shape_of(lens: Any, what: str, by: str, n_tokens: int) -> tuple[int, ...]:
    """How many cells a layer has along each axis."""
    n_heads = n_heads_of(lens, f"blocks.0.{kind_point(what)}") or 0
    sizes = {"pos": n_tokens, "head": n_heads}
    return tuple(sizes[axis] for axis in AXES[by][1:])


def sweep(
    clean: Prompt,
    corrupt: Prompt,
    metric: LogitMetric,
    what: str,
    by: str,
    layers: Sequence[int],
    hooks: Sequence[Hook],
    base: float,
    reference: float,
    observer: Observer,
) -> Sweep:
    """Every cell of `layers`; see `Experiment.sweep`, which calls it."""
    import numpy as np

    lens = corrupt.lens
    inner = shape_of(lens, what, by, len(corrupt))
    values = empty((len(layers), *inner))
    places = list(np.ndindex(*inner))
    interrupted = False
    observer.measuring(f"{what} sweep of {lens.info.label}", len(layers) * len(places))
    try:
        donor, run = Walk(lens, clean.tokens), Walk(lens, corrupt.tokens, hooks)
        for layer in range(max(layers) + 1):
            name = f"blocks.{layer}.{kind_point(what)}"
            if layer not in layers:
                donor.advance()
            else:
                kept: dict[str, Tensor] = {}
                donor.advance([keep(kept, name)])
                if name not in kept:
                    raise InputError(f"{name} does not fire in {lens.info.label}; sweep something else")
                for some in _chunks(lens, places, len(corrupt), name):
                    found = _measure(
                        run, metric, corrupt.tokens, name, kept[name], [_cell(by, at) for at in some]
                    )
                    for at, value in zip(some, found, strict=True):
                        values[(layers.index(layer), *at)] = value
                    observer.advance(len(some))
            if layer < max(layers):
                run.advance()
    except KeyboardInterrupt:
        interrupted = True
    return Sweep(
        what, by, values, base, reference, metric.name, tuple(layers),
        tuple(clean.words), tuple(corrupt.words), lens.info.n_heads, interrupted=interrupted,
        bos=bos_of(clean, corrupt),
    )  # fmt: skip


def _chunks(
    lens: Any, places: Sequence[tuple[int, ...]], n: int, name: str
) -> Iterator[Sequence[tuple[int, ...]]]:
    """Cells that share a forward."""
    info = lens.info
    largest = n * max(info.d_vocab, 4 * info.d_model, info.n_heads * n if is_matrix(name) else 0)
    size = max(1, min(_MOST, _NUMBERS // largest))
    for start in range(0, len(places), size):
        yield places[start : start + size]


def _cell(by: str, at: tuple[int, ...]) -> Cell:
    """(position, head), None for all."""
    if by == "pos":
        return at[0], None
    return (None, at[0]) if by == "head" else (at[0], at[1])


def _measure(
    run: Walk, metric: LogitMetric, tokens: Tensor, name: str, clean: Tensor, cells: Sequence[Cell]
) -> list[float]:
    """The metric of one forward in which row i has cell i of the clean run."""
    logits = run.resume([(name, _one_each(name, clean[0], cells))], len(cells))
    return [float(value) for value in metric(logits, tokens).double()]


def _one_each(name: str, clean: Tensor, cells: Sequence[Cell]) -> Callable[..., Tensor]:
    """A hook that puts cell i of `clean` into row i."""
    import torch

    rows = torch.arange(len(cells), device=clean.device)
    positions, heads = (
        None if cells[0][axis] is None else torch.tensor([cell[axis] for cell in cells], device=clean.device)
        for axis in (0, 1)
    )

    def write(old: Tensor, hook: Any) -> Tensor:
        # A point that is the same in all rows comes as one row.
        edited = old.expand(len(cells), *old.shape[1:]).clone()
        if heads is None and is_matrix(name):
            edited[rows, :, positions] = clean[:, positions].transpose(0, 1)
        elif heads is None:
            edited[rows, positions] = clean[positions]
        elif is_matrix(name):
            if positions is None:
                edited[rows, heads] = clean[heads]
            else:
                edited[rows, heads, positions] = clean[heads, positions]
        elif positions is None:
            edited[rows, :, heads] = clean[:, heads].transpose(0, 1)
        else:
            edited[rows, positions, heads] = clean[positions, heads]
        return edited

    return write
