"""Whether a forward can start from the residual that enters a layer, measured.

It cannot where later layers receive more than that residual: the token embeddings (Zamba), an embedding for each layer
(Gemma 3n and 4), or several residual streams that the model makes from the embeddings itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from phaselens.errors import InputError
from phaselens.lens.captures import capture
from phaselens.lens.points import in_layer

if TYPE_CHECKING:
    from phaselens.lens.bridge import HookedTransformer

# What a model's forward raises when it gets residuals in place of embeddings.
_UNSERVED = (InputError, RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError)


def find_problem(lens: HookedTransformer) -> str | None:
    """Return the reason why forwards of the model cannot start at a layer; None if they can."""
    layer = lens.info.n_layers - 1
    tokens = torch.arange(6)[None] % lens.info.d_vocab
    final, residuals = capture(lens, tokens, {"last": in_layer(layer, "hook_in")})
    try:
        resumed = lens.stream(residual=residuals["last"], start_at_layer=layer)
    except _UNSERVED:
        return "the model does not run from a residual alone"
    # NaN weights give NaN both ways.
    if torch.allclose(resumed, final, rtol=0.0, atol=0.0, equal_nan=True):
        return None
    return "its layers read more than the residual that enters them, such as the token embeddings"
