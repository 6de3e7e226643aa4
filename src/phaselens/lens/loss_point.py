"""`hook_loss`: the loss of each token, computed from the final norm's output in any forward in which it is hooked."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from phaselens.errors import InputError
from phaselens.lens import families
from phaselens.lens.attention_owner import is_hooked
from phaselens.lens.points import read_only_reason
from phaselens.lens.token_losses import unembedding_of

if TYPE_CHECKING:
    from phaselens.lens.bridge import HookedTransformer

NAME = "hook_loss"


def fire_losses(lens: HookedTransformer) -> None:
    """Make every forward of the model's body fire `hook_loss`, if it is hooked and the forward was given tokens."""
    # A strong reference from a hook of the model to its lens would keep both alive.
    reference = weakref.ref(lens)

    def fire(_body: object, _args: object, output: Any) -> None:
        owner = reference()
        if owner is not None and is_hooked(owner.hook_loss):
            _fire(owner, output.last_hidden_state)

    families.body_of(lens.original_model).register_forward_hook(fire)


def _fire(lens: HookedTransformer, final: Tensor) -> None:
    tokens = lens.rows.tokens
    if tokens is None:
        raise InputError(
            f"{NAME} needs the tokens of the text; run the forward from tokens, not from a residual"
        )
    loss = _losses(lens, tokens, final.detach())
    if lens.hook_loss(loss) is not loss:
        raise InputError(f"{NAME}: a hook returned a new value; return None: {read_only_reason(NAME)}")


def _losses(lens: HookedTransformer, tokens: Tensor, final: Tensor) -> Tensor:
    """Return the losses [batch, pos] of tokens [batch, pos] from final [batch, pos, d_model]; NaN where unknown.

    That is the case for a text's first token, for pads, and for the first token after a KV cache, whose prediction
    belongs to the call before.
    """
    if lens._unembedding is None:
        with _without_hooks(lens):
            unembedding_of(lens)
    is_predicted = lens.rows.positions().expand_as(tokens) > 0
    real = lens.rows.real()
    if real is not None:
        is_predicted = is_predicted & real
    is_predicted = is_predicted[:, 1:]
    with torch.no_grad():
        losses = unembedding_of(lens).losses(final[:, :-1][is_predicted], tokens[:, 1:][is_predicted]).loss
    loss = losses.new_full(tokens.shape, torch.nan)
    loss[:, 1:][is_predicted] = losses
    return loss


@contextmanager
def _without_hooks(lens: HookedTransformer) -> Iterator[None]:
    """Take the hooks off every point inside the context, so that a forward there fires none of them."""
    hooks = {point: point._forward_hooks for point in dict.fromkeys(lens.hook_points())}
    try:
        for point in hooks:
            point._forward_hooks = type(hooks[point])()
        yield
    finally:
        for point, forward_hooks in hooks.items():
            point._forward_hooks = forward_hooks
