"""Columns, statistics over texts and views of a batch's texts, shared by the built-in metrics."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsFloat, TypeAlias

from phaselens import plugin
from phaselens.plugin import CellValue, Column, FigureSet, LayerView, Metric
from phaselens.plugin import interval_columns as interval_columns

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

TableRow: TypeAlias = tuple[CellValue, ...]
Numbers: TypeAlias = "float | Sequence[Numbers]"
"""A number, or nested lists of numbers that are all of one shape."""

TEXT = Column("text", str, None, "the text's id")
LAYER = Column("layer", int, "index", "0-based")
HEAD = Column("head", int, "index", "0-based")
N_TOKENS = Column("n_tokens", int, "tokens", "tokens of the text for this model")
N_TEXTS = Column("n_texts", int, "texts", "texts with a value")

#: The figure set on sinks, BOS norm and compression, to which several metrics contribute.
STUDY = FigureSet("study", ("sink-rate", "bos-norm", "entropy", "anisotropy"))


@dataclass(frozen=True)
class LayerText:
    """One text of a batch in one layer: its activations and tokens without the pads."""

    layer: LayerView
    index: int

    @property
    def n_tokens(self) -> int:
        """The number of tokens."""
        return self.layer.batch.lengths[self.index]

    def __getitem__(self, point: str) -> Tensor:
        """Return the activations at a hook point of the layer, [pos, …]."""
        return self.layer[point][self.index, : self.n_tokens]

    def by_query(self, point: str) -> Tensor:
        """Return a statistic of the layer's attention, [head, query, …]."""
        return self.layer[point][self.index, :, : self.n_tokens]

    def token_ids(self, positions: Tensor | Sequence[int]) -> list[int]:
        """Return the token ids at `positions`."""
        token_ids: list[int] = self.layer.batch.tokens[self.index, positions].tolist()
        return token_ids


def layer_texts(layer: LayerView) -> list[LayerText]:
    """Return the texts of the layer's batch."""
    return [LayerText(layer, index) for index in range(layer.batch.n)]


def store_by_text(metric: Metric[Any], layer: LayerView, records: Sequence[Mapping[str, Numbers]]) -> None:
    """Store one record of named numbers for each text of the batch."""
    import torch

    columns = {
        name: torch.tensor([record[name] for record in records], dtype=torch.float64) for name in records[0]
    }
    metric.per_text.add(layer, **columns)


def rows_by_text(
    metric: Metric[Any], columns: Sequence[np.ndarray], *, with_lengths: bool = True
) -> Iterator[TableRow]:
    """Yield rows (text, layer[, head], *cells[, n_tokens]) of columns [text, layer] or [text, layer, head].

    A column without heads repeats its value for every head if another column has heads. Heads that a layer does not
    have get no row.
    """
    import numpy as np

    shape = max((column.shape for column in columns), key=len)
    columns = [repeated_over_heads(column, shape) for column in columns]
    texts, lengths = metric.per_text.texts, metric.per_text.lengths
    exists = head_exists(metric, shape[1:]) if len(shape) == 3 else np.ones(shape[1:], dtype=bool)
    for index in np.ndindex(shape):
        if not exists[index[1:]]:
            continue
        cells = (none_if_nan(column[index]) for column in columns)
        yield texts[index[0]], *index[1:], *cells, *([lengths[index[0]]] if with_lengths else [])


def rows_by_index(columns: Sequence[Sequence[Any] | np.ndarray]) -> Iterator[TableRow]:
    """Yield rows (*index, *cells) of columns, arrays or nested lists of one shape, such as [layer] or [layer, head]."""
    import numpy as np

    arrays: list[Any] = [np.array(column, dtype=object) for column in columns]
    for index in np.ndindex(arrays[0].shape):
        yield *index, *(array[index] for array in arrays)


def rows_by_head(metric: Metric[Any], columns: Sequence[Sequence[Any] | np.ndarray]) -> Iterator[TableRow]:
    """Yield rows (layer, head, *cells) of columns [layer, head], without the heads that a layer does not have."""
    rows = list(rows_by_index(columns))
    exists = head_exists(metric, (metric.model.n_layers, len(rows) // (metric.model.n_layers or 1)))
    return (row for row, is_head in zip(rows, exists.flatten(), strict=True) if is_head)


def head_exists(metric: Metric[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Return bool [layer, head], whether the layer has a head with this number; `shape` is that of the result."""
    import numpy as np

    n_heads = np.array([metric.model.n_heads_in(layer) for layer in range(shape[0])])
    exists: np.ndarray = np.arange(shape[1]) < n_heads[:, None]
    return exists


def mean_over_heads(metric: Metric[Any], values: np.ndarray) -> np.ndarray:
    """Return the mean over the heads that a layer has of values [..., layer, head]; NaN where one of them is NaN."""
    import numpy as np

    exists = head_exists(metric, values.shape[-2:])
    means: np.ndarray = np.where(exists, values, 0.0).sum(-1) / exists.sum(-1)
    return means


def repeated_over_heads(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return values [text, layer], repeated for every head if `shape` is [text, layer, head]."""
    import numpy as np

    return values if values.ndim == len(shape) else np.broadcast_to(values[..., None], shape)


def mean_intervals(
    metric: Metric[Any],
    values: np.ndarray,
    *,
    where: np.ndarray | None = None,
    n_resamples: int | None = None,
) -> list[Any]:
    """Return what `phaselens.plugin.mean_intervals` does; the metric itself says why ends are missing."""
    return plugin.mean_intervals(metric, values, where=where, n_resamples=n_resamples, explain=False)


def null_means(metric: Metric[Any], nulls: np.ndarray, where: np.ndarray | None = None) -> list[Any]:
    """Return the mean over texts of null values, as `mean_intervals` does, without an interval."""
    means: list[Any] = mean_intervals(metric, nulls, where=where, n_resamples=1)[0]
    return means


def mean_over_texts(values: np.ndarray) -> np.ndarray:
    """Return the mean [...] of values [text, …] over the texts that have one; NaN where no text has."""
    import numpy as np

    present = ~np.isnan(values)
    total, count = np.where(present, values, 0.0).sum(0), present.sum(0)
    means: np.ndarray = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return means


def mean_or_none(values: np.ndarray) -> float | None:
    """Return the mean of the values that are not NaN; None if there are none."""
    import numpy as np

    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else None


def index_of_largest(values: np.ndarray) -> int | None:
    """Return the index of the largest value that is not NaN; None if all are NaN."""
    import numpy as np

    return None if np.isnan(values).all() else int(np.nanargmax(values))


def most_frequent(numbers: np.ndarray) -> tuple[int, float]:
    """Return the number that occurs most often, and its share."""
    import numpy as np

    distinct, counts = np.unique(numbers, return_counts=True)
    return int(distinct[counts.argmax()]), float(counts.max() / counts.sum())


def none_if_nan(value: SupportsFloat) -> float | None:
    """Return the value as a float, or None (missing, in a table) if it is NaN (missing, in an array)."""
    number = float(value)
    return None if math.isnan(number) else number


def quoted_ids(text_ids: Sequence[str], is_chosen: np.ndarray) -> str:
    """Return the ids of up to three of the chosen texts, and the number of further ones."""
    quoted = [repr(text) for text, chosen in zip(text_ids, is_chosen, strict=True) if chosen]
    return ", ".join(quoted[:3]) + (f" and {len(quoted) - 3} more" if len(quoted) > 3 else "")


def generator_for(content: str, seed: int, purpose: str) -> np.random.Generator:
    """Return a generator of random numbers that depends on the text's content, the seed and the purpose alone."""
    import numpy as np

    digest = hashlib.sha256(f"{seed} {purpose} {content}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16]))
