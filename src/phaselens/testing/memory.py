"""Measure the memory that a metric's `update` takes: tensors by torch's dispatcher, arrays by tracemalloc."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from phaselens.data import texts_from
from phaselens.plugin import LayerView, Metric, Params
from phaselens.runs import feed_metric
from phaselens.testing.models import tiny_lens

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer

#: Text lengths in tokens: long enough for work in blocks to show, short enough for one second on one core.
LENGTHS = (1024, 2048)


def with_update(
    metric: type[Metric[Any]], update: Callable[[Metric[Any], LayerView], None]
) -> type[Metric[Any]]:
    """Return a subclass of `metric`, of the same name and module, with another `update`."""
    return type(metric.__name__, (metric,), {"update": update, "__module__": metric.__module__})


def peaks_by_length(metric: type[Metric[Any]], params: Params, family: str) -> list[tuple[int, int]]:
    """Return (tokens, bytes) for each of `LENGTHS`, where bytes is the larger of the largest tensor and the peak of all
    arrays that an update of one layer allocates for one text."""
    lens = _lens(family)
    return [(length, _peak(metric, params, lens, length)) for length in LENGTHS]


@lru_cache
def _lens(family: str) -> HookedTransformer:
    return tiny_lens(family, max_position_embeddings=2 * max(LENGTHS))


def _peak(metric: type[Metric[Any]], params: Params, lens: HookedTransformer, length: int) -> int:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class LargestStorage(TorchDispatchMode):
        """Records the largest storage that any operation returns."""

        n_bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if hasattr(leaf, "untyped_storage"):
                    self.n_bytes = max(self.n_bytes, leaf.untyped_storage().nbytes())
            return result

    update, peak = metric.update, 0

    def measured_update(self: Metric[Any], layer: LayerView) -> None:
        nonlocal peak
        tracemalloc.start()
        try:
            with LargestStorage() as largest:
                update(self, layer)
            array_peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        peak = max(peak, array_peak, largest.n_bytes)

    measured_metric = with_update(metric, measured_update)
    repeated = "to be or not to be that is the question " * (length // 40 + 1)
    (text,) = texts_from([repeated[: length - 1]])
    tokens = lens.encoder().tokenize(text, length)
    feed_metric(lens, [tokens], measured_metric(lens.info, params), [[0]])
    return peak
