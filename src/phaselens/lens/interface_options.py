"""Options of a call of transformers' attention interface that change which attention it is, and are not served."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from phaselens.errors import RefusedModel

_UNSERVED = {
    "block_indices": "attends only to the blocks of keys that an indexer selects for each query",
    "sinks": "adds sink logits that depend on the text to each row",
}
"""What attention does, by the option that tells the interface so."""


def require_served(module: nn.Module, options: Mapping[str, object]) -> None:
    """Check the options of a call that the lens does not read.

    Raises:
        RefusedModel: for attention that is not one softmax of scaled products over all visible keys.
    """
    for name, effect in _UNSERVED.items():
        if options.get(name) is not None:
            raise RefusedModel(
                f"{type(module).__name__} {effect}; PhaseLens measures one softmax of scaled q·k over all keys before "
                "a query, or over a window of them"
            )
