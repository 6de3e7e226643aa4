"""How the parts of a layer feed the residual stream, measured with random numbers.

One forward replaces the residual that enters each layer, and everything of its shape that a module inside computes, by
independent random numbers. Whatever adds up to the input of a module, or to the layer's output, is then a linear
combination of these numbers, whose coefficients are solved for: ``resid_pre + 0.22 · self_attn`` enters `ln2`, say. A
second forward, with other numbers at one position, tells the modules that mix positions from those that do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from phaselens.lens.layer_stack import N_PROBE_TOKENS, LayerStack, layer_modules, probe_ids, same
from phaselens.lens.module_calls import ModuleCall, recording_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLES = 512
"""Number of entries of a tensor from which coefficients are solved; they are then checked on all."""
_SOLVER_PRECISION = 1e-12
RESIDUAL = ""
"""The name of the residual that enters the layer, among the terms of a sum."""


@dataclass(frozen=True)
class Term:
    """One term of a sum: the name of the module whose output it is (or `RESIDUAL`), and its factor."""

    name: str
    factor: float


@dataclass(frozen=True)
class Sum:
    """A sum of outputs, and the module that it enters; None where it leaves the layer."""

    enters: str | None
    terms: tuple[Term, ...]

    @property
    def names(self) -> frozenset[str]:
        """The names of the terms."""
        return frozenset(term.name for term in self.terms)

    def factor_of(self, name: str) -> float:
        """Return the factor of a term."""
        return next(term.factor for term in self.terms if term.name == name)


@dataclass(eq=False)
class LayerSums:
    """The sums inside a layer, in order, and facts about its modules by name.

    ``sums`` enter modules and have several terms, or one with a factor; ``inputs`` maps a module whose input is another
    module's output, or the residual, to that one's name. ``outputs`` are the sums that modules return. ``output`` is
    the sum that leaves the layer; None if it is not one. ``mixed_inputs`` and ``mixed_outputs`` are the modules whose
    input or output at one position depends on the residual at another. ``problem`` is the
    reason why the layer has no one residual stream; ``result`` is what it returns.
    """

    sums: list[Sum] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, Sum] = field(default_factory=dict)
    output: Sum | None = None
    mixed_inputs: set[str] = field(default_factory=set)
    mixed_outputs: set[str] = field(default_factory=set)
    calls: list[ModuleCall] = field(default_factory=list)
    problem: str | None = None
    result: object = None

    def call_of(self, name: str) -> ModuleCall:
        """Return the first call of a module."""
        return next(call for call in self.calls if call.path == name)

    def mixes_positions(self, name: str) -> bool:
        """Return whether a module, or one inside it, mixes positions."""
        return any(mixed == name or mixed.startswith(f"{name}.") for mixed in self.mixed_outputs)


def measure_sums(model: PreTrainedModel, stack: LayerStack) -> list[LayerSums]:
    """Return the sums of each layer of an unwrapped model."""
    first, noise = _noisy_forward(model, stack, 0)
    second, _ = _noisy_forward(model, stack, 1)
    layers = []
    for index, (calls, calls_after) in enumerate(zip(first, second, strict=True)):
        layers.append(_sums_of(calls, noise[index]))
        _note_mixing(layers[-1], calls, calls_after)
    return layers


def residual_shape(stack: LayerStack) -> torch.Size:
    """Return the shape of what enters the first layer."""
    residual = stack.layers[0].input
    assert residual is not None
    return residual.shape


def _noisy_forward(
    model: PreTrainedModel, stack: LayerStack, variant: int
) -> tuple[list[list[ModuleCall]], list[dict[int, Tensor]]]:
    """Run one forward with random numbers in place of all residuals; return each layer's calls and the numbers.

    The numbers that follow a call are stored under the number of its last boundary; those that enter the layer under
    −1. Two variants have different numbers at the last position but one, and the same ones at all others.
    """
    modules: dict[str, nn.Module] = {}
    for index, layer in enumerate(stack.layers):
        modules[f"{index}:"] = layer.module
        modules.update({f"{index}:{name}": module for name, module in layer_modules(layer.module).items()})
    running = {"layer": -1, "count": 0}
    noise: list[dict[int, Tensor]] = [{} for _ in stack.layers]
    produced: list[list[Tensor | None]] = [[] for _ in stack.layers]

    def random(like: Tensor) -> Tensor:
        running["count"] += 1
        generator = torch.Generator().manual_seed(1009 * running["layer"] + running["count"])
        numbers = torch.randn(like.shape, generator=generator)
        by_text = numbers.view(shape)
        if stack.streams_first:
            by_text = by_text.movedim(0, 2)
        if variant:
            by_text[:, -2] = torch.randn(by_text[:, -2].shape, generator=generator)
        return numbers.to(like.device, like.dtype)

    shape = residual_shape(stack)

    def on_input(name: str, tensor: Tensor) -> Tensor | None:
        if not name.endswith(":"):
            return None
        running["layer"], running["count"] = int(name[:-1]), 0
        numbers = random(tensor)
        noise[running["layer"]][-1] = numbers
        return numbers

    def on_output(name: str, tensor: Tensor) -> Tensor | None:
        layer = running["layer"]
        if name.endswith(":") or layer < 0:
            return None
        is_like = tensor.numel() == shape.numel() and tensor.shape[-1] == shape[-1]
        numbers = random(tensor) if is_like else None
        produced[layer].append(numbers)
        # A model may add to what a module returned, in place (Falcon).
        return None if numbers is None else numbers.clone()

    with recording_modules(modules, on_input=on_input, on_output=on_output) as calls:
        model(input_ids=probe_ids(model), use_cache=False)
    by_layer: list[list[ModuleCall]] = [[] for _ in stack.layers]
    current = -1
    for call in calls:
        number, name = call.path.split(":", 1)
        current = current if name else int(number)
        call.path = name
        by_layer[current].append(call)
    for layer_calls, layer_noise, numbers_of_layer in zip(by_layer, noise, produced, strict=True):
        with_output = sorted(
            (call for call in layer_calls if call.path and call.output is not None),
            key=lambda call: call.ended,
        )
        for call, numbers in zip(with_output, numbers_of_layer, strict=True):
            if numbers is not None:
                layer_noise[call.ended] = numbers
    return by_layer, noise


def _sums_of(calls: Sequence[ModuleCall], noise: dict[int, Tensor]) -> LayerSums:
    layer_call, inner = calls[0], [call for call in calls if call.path]
    layer = LayerSums(calls=list(inner), result=layer_call.result)
    entering = layer_call.input
    if entering is None or layer_call.output is None or entering.shape != layer_call.output.shape:
        layer.problem = "the layer does not return a tensor of the shape that it receives"
        return layer
    if entering.dim() > 3:
        n_streams = entering.numel() // (N_PROBE_TOKENS * entering.shape[-1])
        layer.problem = f"the layer keeps several residual streams, {n_streams} for each token"
        return layer
    names = {-1: RESIDUAL} | {call.ended: call.path for call in inner if call.ended in noise}
    basis = {boundary: numbers.double().reshape(-1) for boundary, numbers in noise.items()}
    entries = [(call.began, call.path, call.input) for call in inner]
    exits = [(call.ended, call.path, call.output) for call in (*inner, layer_call)]
    for boundary, name, tensor in sorted((*entries, *exits), key=lambda item: item[0]):
        if tensor is None or tensor.numel() != entering.numel() or tensor.shape[-1] != entering.shape[-1]:
            continue
        earlier = {number: values for number, values in basis.items() if number < boundary}
        terms = _solve(tensor.double().reshape(-1), earlier, names, tensor.dtype)
        if terms is None:
            continue
        if boundary == layer_call.ended:
            layer.output = Sum(None, terms)
        elif any(boundary == call.ended for call in inner):
            layer.outputs.setdefault(name, Sum(None, terms))
        elif len(terms) == 1 and terms[0].factor == 1.0:
            layer.inputs.setdefault(name, terms[0].name)
        else:
            layer.sums.append(Sum(name, terms))
    return layer


def _note_mixing(layer: LayerSums, calls: Sequence[ModuleCall], calls_after: Sequence[ModuleCall]) -> None:
    """Note the modules whose input or output at the last position differs between two variants of the numbers."""
    if calls[0].input is None:
        return
    n_positions = N_PROBE_TOKENS
    for call, other in zip(calls, calls_after, strict=False):
        for names, tensor, variant in (
            (layer.mixed_inputs, call.input, other.input),
            (layer.mixed_outputs, call.output, other.output),
        ):
            if tensor is None or variant is None or tensor.shape != variant.shape:
                continue
            if not tensor.numel() or tensor.numel() % (n_positions * tensor.shape[-1]):
                continue
            last, other_last = (
                values.double().reshape(-1, n_positions, tensor.shape[-1])[:, -1]
                for values in (tensor, variant)
            )
            if float((last - other_last).abs().max()) > 1e-3 * float(last.abs().max()):
                names.add(call.path)


def _solve(
    target: Tensor, basis: dict[int, Tensor], names: dict[int, str], dtype: torch.dtype
) -> tuple[Term, ...] | None:
    """Return the terms that add up to `target`, or None if no linear combination of the basis does."""
    for boundary, values in basis.items():
        if same(values, target):
            return (Term(names[boundary], 1.0),)
    if not basis:
        return None
    index = torch.linspace(0, target.numel() - 1, min(_SAMPLES, target.numel()), device=target.device).long()
    if len(basis) >= len(index):
        return None
    # The solution itself is no more precise than this, whatever the dtype.
    precision = max(8 * float(torch.finfo(dtype).eps) / len(index) ** 0.5, _SOLVER_PRECISION)
    factors = dict(zip(basis, _least_squares(target, list(basis.values()), index), strict=True))
    kept = [boundary for boundary, factor in factors.items() if abs(factor) > 4 * precision]
    if not kept:
        return None
    factors = dict(
        zip(kept, _least_squares(target, [basis[boundary] for boundary in kept], index), strict=True)
    )
    for boundary, factor in factors.items():
        if abs(factor - 1.0) < precision:
            factors[boundary] = 1.0
    total = torch.stack([factor * basis[boundary] for boundary, factor in factors.items()]).sum(0)
    limit = 8 * torch.finfo(dtype).eps * float(target.abs().max())
    if not float((target - total).abs().max()) <= limit:
        return None
    return tuple(Term(names[boundary], factor) for boundary, factor in factors.items())


def _least_squares(target: Tensor, columns: Sequence[Tensor], index: Tensor) -> list[float]:
    matrix = torch.stack([column[index] for column in columns], 1).cpu()
    solution: list[float] = torch.linalg.lstsq(matrix, target[index].cpu()[:, None]).solution[:, 0].tolist()
    return solution
