"""What memory a metric's `update` takes, measured: tensors by torch's dispatcher, arrays by tracemalloc."""

from __future__ import annotations

import tracemalloc
from functools import lru_cache
from typing import Any

from phaselens.plugin import LayerView, Metric, Params
from phaselens.testing.models import tiny_lens

#: Long enough that work done in blocks shows as such, short enough for a second on one core.
LENGTHS = (1024, 2048)


def peaks_by_length(metric: type[Metric[Any]], params: Params, family: str) -> list[tuple[int, int]]:
    """(tokens, bytes) for each of `LENGTHS`: the larger of the largest tensor and the peak of all arrays that an
    update of one layer makes for one text."""
    lens = _lens(family)
    return [(length, _peak(metric, params, lens, length)) for length in LENGTHS]


@lru_cache
def _lens(family: str) -> Any:
    return tiny_lens(family, max_position_embeddings=2 * max(LENGTHS))


def _peak(metric: type[Metric[Any]], params: Params, lens: Any, length: int) -> int:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from phaselens.data import texts_from
    from phaselens.runs import gather

    class Largest(TorchDispatchMode):
        """Notes the largest storage that any operation returns."""

        n_bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if hasattr(leaf, "untyped_storage"):
                    self.n_bytes = max(self.n_bytes, leaf.untyped_storage().nbytes())
            return out

    update, peak = metric.update, 0

    def measured(self: Metric[Any], layer: LayerView) -> None:
        nonlocal peak
        tracemalloc.start()
        try:
            with Largest() as largest:
                update(self, layer)
            arrays = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        peak = max(peak, arrays, largest.n_bytes)

    watched = type(metric.__name__, (metric,), {"update": measured, "__module__": metric.__module__})
    text = ("to be or not to be that is the question " * (length // 40 + 1))[: length - 1]
    (given,) = texts_from([text])
    tokens = lens.encoder().tokens(given, length)
    gather(lens, [tokens], watched(lens.info, params), [[0]])
    return peak
