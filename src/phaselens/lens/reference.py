"""A model's own forward before the lens wraps it: the baseline of the self-check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from phaselens.lens import families, frequencies
from phaselens.lens.choices import Choices, recorded_choices
from phaselens.lens.evaluation_mode import evaluate
from phaselens.lens.module_calls import first_tensor
from phaselens.lens.null_rotation import null_rotation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE = 8
"""Tokens of a check: each costs time in some thirty forwards, and as few as these tell any two positions apart."""
_PROBE_OF_CHOICES = 16
"""Tokens for a model that chooses experts: with fewer, a wrong choice may be too rare to be seen beside rounding."""


@dataclass(frozen=True)
class OwnForward:
    """One forward of a model: logits [batch, pos, d_vocab], the residual [batch, pos, d_model] entering each layer, and
    the experts that it chose."""

    logits: Tensor
    residuals: tuple[Tensor, ...]
    choices: Choices

    def with_texts_first(self) -> OwnForward:
        """Return the forward with residuals [batch, pos, stream, d_model], of one with streams first."""
        return replace(self, residuals=tuple(residual.movedim(0, 2) for residual in self.residuals))

    def beside(self, other: OwnForward) -> OwnForward:
        """Return the forward of one batch of these texts and, after them, those of `other`, of the same length."""
        logits, *residuals = (
            torch.cat(pair)
            for pair in zip((self.logits, *self.residuals), (other.logits, *other.residuals), strict=True)
        )
        return OwnForward(logits, tuple(residuals), self.choices.beside(other.choices))


@dataclass(frozen=True)
class Reference:
    """The model's own forward of the probe `tokens` [1, pos].

    `far_forward` has the same tokens at `far_positions` [1, pos], which reach beyond the trained length, as at the end
    of a long text; both are None for a model without rotation. `nulled`: every rotation was nulled.
    """

    tokens: Tensor
    forward: OwnForward
    far_positions: Tensor | None = None
    far_forward: OwnForward | None = None
    nulled: bool = False


def probe_tokens(model: PreTrainedModel, n_tokens: int = _PROBE) -> Tensor:
    """Return a few ids [1, pos], the same for every model with a vocabulary of this size."""
    length = families.probe_length(model, n_tokens)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(families.d_vocab_of(model), (1, length), generator=generator).to(model.device)


def reference_of(
    model: PreTrainedModel,
    *,
    nulled: bool = False,
    layers: Sequence[nn.Module] | None = None,
    eager: bool = False,
    streams_first: bool = False,
) -> Reference:
    """Run the unwrapped model: SDPA, or eager where SDPA would leave out a softcap or learned sink logits.

    Args:
        layers: the model's layers; by default, the model itself returns the residuals that enter them.
        eager: SDPA cannot compute the model's attention, though no attribute of its modules says so.
        streams_first: the layers receive [stream, batch, pos, d_model]; the reference then has the texts first.
    """
    tokens = probe_tokens(model)
    config = model.config
    implementation = config._attn_implementation
    evaluate(model)
    eager = eager or families.needs_eager(model) or not families.supports_sdpa(model)
    model.set_attn_implementation("eager" if eager else "sdpa")
    # The model may have run before, on longer texts.
    for module in frequencies.length_dependent(model):
        frequencies.reset(module)
    try:
        with torch.no_grad(), _identity_rotation(model, nulled):
            forward = _run(model, tokens, layers)
            if forward.choices.by_line:
                tokens = probe_tokens(model, _PROBE_OF_CHOICES)
                forward = _run(model, tokens, layers)
            far_positions = _far_positions(model, tokens)
            far_forward = (
                None if far_positions is None else _run(model, tokens, layers, position_ids=far_positions)
            )
        if streams_first:
            forward = forward.with_texts_first()
            far_forward = None if far_forward is None else far_forward.with_texts_first()
    finally:
        model.set_attn_implementation(implementation)
    return Reference(tokens, forward, far_positions, far_forward, nulled)


def _run(
    model: PreTrainedModel, tokens: Tensor, layers: Sequence[nn.Module] | None, **options: Tensor
) -> OwnForward:
    entering: list[Tensor] = []
    with recorded_choices(tokens) as choices, _collecting(entering, layers or ()):
        output = model(tokens, output_hidden_states=layers is None, use_cache=False, **options)
    residuals = tuple(entering) if layers is not None else tuple(output.hidden_states[:-1])
    return OwnForward(output.logits, residuals, choices)


@contextmanager
def _collecting(entering: list[Tensor], layers: Sequence[nn.Module]) -> Iterator[None]:
    """Append what enters each layer to `entering`, in the first forward inside the context."""

    def collect(_layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        tensor = first_tensor(args)
        tensor = first_tensor(kwargs) if tensor is None else tensor
        if tensor is not None and len(entering) < len(layers):
            entering.append(tensor.clone())

    handles = [layer.register_forward_pre_hook(collect, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _far_positions(model: PreTrainedModel, tokens: Tensor) -> Tensor | None:
    """Return positions [1, pos] at the end of a text longer than the trained length; None without a rotation."""
    far_position = frequencies.far_position(model)
    if far_position is None:
        return None
    n_tokens = tokens.shape[1]
    return torch.arange(n_tokens, device=tokens.device)[None] + max(0, far_position - n_tokens // 2)


@contextmanager
def _identity_rotation(model: PreTrainedModel, nulled: bool) -> Iterator[None]:
    """Make every rotary module of an unwrapped model return cos=1 and sin=0 if `nulled`.

    Both are multiplied by the attention factor that YaRN and longrope put into them: the length of the vector (cos,
    sin).
    """

    rotary = families.rotary_modules(model) if nulled else ()
    handles = [module.register_forward_hook(null_rotation) for module in rotary]
    tables = [
        (module, name, getattr(module, name))
        for module, name in (families.rotation_tables(model) if nulled else ())
    ]
    for module, name, table in tables:
        setattr(module, name, table[:1].expand_as(table))
    try:
        yield
    finally:
        for module, name, table in tables:
            setattr(module, name, table)
        for handle in handles:
            handle.remove()
