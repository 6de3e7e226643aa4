"""The inputs of a measuring forward, `HookedTransformer.stream`, checked against the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from phaselens.errors import InputError, require_whole, short_form
from phaselens.lens import families

if TYPE_CHECKING:
    from phaselens.lens.bridge import HookedTransformer

#: The largest number of distances or segments: more would be a table beyond the memory of any machine.
LARGEST_SIZE = 2**24
_ID_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def model_inputs(
    lens: HookedTransformer, tokens: object, residual: object, start: object
) -> dict[str, Tensor]:
    """Return the arguments of the model's forward.

    Args:
        tokens: [batch, pos] ids; None with a residual.
        residual: [batch, pos, d_model], which enters layer `start`; None with tokens.

    Raises:
        InputError: for inputs that are missing or do not fit the model.
    """
    if start is not None:
        if lens.resume_problem is not None:
            raise InputError(f"{lens.info.label}: start_at_layer cannot be served: {lens.resume_problem}")
        if residual is None or tokens is not None:
            raise InputError(
                "start_at_layer needs `residual`, the activation entering that layer, instead of tokens"
            )
        checked = _checked_residual(lens, residual)
        # The layers' input is replaced. A model may project narrower embeddings to d_model, or write into them.
        width = families.embedding_of(lens.original_model).shape[1]
        is_wide = checked.shape[-1] == width
        embeddings = checked.clone() if is_wide else checked.new_zeros(*checked.shape[:-1], width)
        return {"inputs_embeds": embeddings}
    if tokens is None or residual is not None:
        raise InputError("stream needs `tokens`; give `residual` only with start_at_layer")
    return {"input_ids": _checked_tokens(lens, tokens).to(lens.device)}


def _checked_tokens(lens: HookedTransformer, tokens: Any) -> Tensor:
    expected = "expected tokens as a tensor [batch, pos] of ids, received"
    if not isinstance(tokens, Tensor):
        raise InputError(f"{expected} {type(tokens).__name__}")
    if tokens.dim() != 2 or tokens.dtype not in _ID_TYPES:
        raise InputError(f"{expected} {tokens.dtype} {list(tokens.shape)}")
    if tokens.numel() == 0:
        raise InputError(f"expected tokens with at least one id, received shape {list(tokens.shape)}")
    info = lens.info
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= info.d_vocab:
        raise InputError(
            f"tokens: ids from {low} to {high}, but {info.label} has 0 to {info.d_vocab - 1}; "
            "encode the text with this model's tokenizer"
        )
    if reason := info.reason_against(tokens.shape[1]):
        raise InputError(
            f"{tokens.shape[1]} tokens, but {reason.replace('the model', info.label, 1)}; shorten the texts "
            "(--max-tokens)"
        )
    return tokens if tokens.dtype in (torch.int32, torch.int64) else tokens.long()


def _checked_residual(lens: HookedTransformer, residual: Any) -> Tensor:
    expected = (
        f"expected residual as a tensor [batch, pos, {lens.info.d_model}] of {lens.info.dtype}, received"
    )
    if not isinstance(residual, Tensor):
        raise InputError(f"{expected} {short_form(residual)}")
    fits = residual.dim() == 3 and residual.shape[-1] == lens.info.d_model and residual.numel() > 0
    # Some families keep a float32 residual beside narrower weights.
    if not fits or residual.dtype not in (lens.dtype, torch.float32):
        raise InputError(f"{expected} {residual.dtype} {list(residual.shape)}")
    return residual


def require_range(lens: HookedTransformer, start: int | None, stop: int | None) -> None:
    """Raise InputError unless the layers are whole numbers of the model, and `stop` is not below `start`."""
    n_layers = lens.info.n_layers
    for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
        if layer is None:
            continue
        require_whole(name, layer)
        if not -n_layers <= layer <= n_layers:
            raise InputError(f"{name} {layer}: {lens.info.label} has {n_layers} layers")
    if start is not None and stop is not None:
        first, last = (layer + n_layers if layer < 0 else layer for layer in (start, stop))
        if last < first:
            raise InputError(
                f"stop_at_layer {stop} is below start_at_layer {start}; stop at that layer or above"
            )


def require_lengths(lengths: Tensor | None, inputs: Tensor) -> None:
    """Raise InputError unless `lengths` has, for each text of inputs [batch, pos, …], a number from 0 to pos."""
    if not isinstance(lengths, Tensor) or lengths.dim() != 1:
        return  # `streaming` says what is expected
    n_texts, n_tokens = inputs.shape[:2]
    if len(lengths) != n_texts:
        raise InputError(f"expected lengths of {n_texts} texts, received {len(lengths)}")
    if not lengths.is_floating_point() and not bool(((lengths >= 0) & (lengths <= n_tokens)).all()):
        raise InputError(
            f"expected lengths from 0 to {n_tokens}, the tokens of a row, received {lengths.tolist()}"
        )
