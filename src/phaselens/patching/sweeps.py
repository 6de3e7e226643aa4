"""Sweeps: put one cell of the clean run at a time into the corrupt run, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from phaselens.errors import InputError
from phaselens.lens.points import HookFunction, is_matrix
from phaselens.patching.passes import LayerwiseRun, capture_hook
from phaselens.patching.plans import SweepPlan
from phaselens.patching.results import Sweep, unmeasured
from phaselens.patching.targets import naming_keys, positions_first
from phaselens.runs import Observer

if TYPE_CHECKING:
    from torch import Tensor

# Cells share a forward as long as its largest tensor stays below this many numbers, 64 MB of float32. Larger batches
# are not faster on a CPU, and Ctrl-C waits for the end of a forward.
_MAX_NUMBERS = 1 << 24
_MAX_BATCH = 32

#: Index of a cell within a layer: [pos], [head] or [pos, head].
CellIndex = tuple[int, ...]
#: Position and head of a cell; None for all.
SweepCell = tuple[int | None, int | None]


def sweep(plan: SweepPlan, observer: Observer) -> Sweep:
    """Measure every cell of the plan; see `Experiment.sweep`, which calls this."""
    import numpy as np

    values = unmeasured((len(plan.layers), *plan.layer_shape))
    indices = list(np.ndindex(*plan.layer_shape))
    interrupted = False
    observer.measuring(f"{plan.what} sweep of {plan.lens.info.label}", values.size)
    try:
        clean_run = LayerwiseRun(plan.lens, plan.clean.tokens)
        corrupt_run = LayerwiseRun(plan.lens, plan.corrupt.tokens, plan.hooks)
        last_layer = max(plan.layers)
        for layer in range(last_layer + 1):
            if layer not in plan.layers:
                clean_run.advance()
            else:
                name = plan.hook_name(layer)
                activation = _advance_and_capture(clean_run, name)
                for batch in _batches(plan, indices, name):
                    cells = [_sweep_cell(plan.by, index) for index in batch]
                    results = _measure(plan, corrupt_run, name, activation, cells)
                    for index, value in zip(batch, results, strict=True):
                        values[(plan.layers.index(layer), *index)] = value
                    observer.advance(len(batch))
            if layer < last_layer:
                corrupt_run.advance()
    except KeyboardInterrupt:
        interrupted = True
    return plan.result(values, interrupted=interrupted)


def _advance_and_capture(run: LayerwiseRun, name: str) -> Tensor:
    """Advance the run by one layer, and return the activation at a point of that layer."""
    activations: dict[str, Tensor] = {}
    run.advance([capture_hook(name, activations)])
    if name not in activations:
        raise InputError(
            f"{name} does not fire in a run of {run.lens.info.label}; choose another kind of activation"
        )
    return activations[name]


def _batches(plan: SweepPlan, indices: Sequence[CellIndex], name: str) -> Iterator[Sequence[CellIndex]]:
    """Yield groups of cells that share a forward."""
    info, n_tokens = plan.lens.info, len(plan.corrupt)
    row_size = max(info.d_vocab, 4 * info.d_model, info.n_heads * n_tokens if is_matrix(name) else 0)
    batch_size = max(1, min(_MAX_BATCH, _MAX_NUMBERS // (n_tokens * row_size)))
    for start in range(0, len(indices), batch_size):
        yield indices[start : start + batch_size]


def _sweep_cell(by: str, index: CellIndex) -> SweepCell:
    if by == "pos":
        return index[0], None
    return (None, index[0]) if by == "head" else (index[0], index[1])


def _measure(
    plan: SweepPlan, run: LayerwiseRun, name: str, clean: Tensor, cells: Sequence[SweepCell]
) -> list[float]:
    """Return the metric of each row of one forward, where row i has cell i of the clean activation."""
    hook = naming_keys(name, _cell_hook(name, clean, cells))
    logits = run.resume([(name, hook)], len(cells))
    return [float(value) for value in plan.metric(logits, plan.corrupt.tokens).double()]


def _cell_hook(name: str, clean: Tensor, cells: Sequence[SweepCell]) -> HookFunction:
    """Return a hook that writes cell i of `clean` [1, …] into row i."""
    import torch

    rows = torch.arange(len(cells), device=clean.device)
    positions, heads = (
        None if cells[0][axis] is None else torch.tensor([cell[axis] for cell in cells], device=clean.device)
        for axis in (0, 1)
    )
    source = positions_first(name, clean)[0]

    def write(activation: Tensor, hook: object) -> Tensor:
        # An activation that is the same in all rows has only one row.
        edited = activation.expand(len(cells), *activation.shape[1:]).clone()
        view = positions_first(name, edited)
        if heads is None:
            view[rows, positions] = source[positions]
        elif positions is None:
            view[rows, :, heads] = source[:, heads].transpose(0, 1)
        else:
            view[rows, positions, heads] = source[positions, heads]
        return edited

    return write
