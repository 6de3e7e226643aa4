"""The input of a metric (one layer of one batch), and storage for one value per text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from phaselens.errors import require_kind
from phaselens.lens.points import points_in_layer
from phaselens.plugin.author_errors import UnknownName, UnknownPoint, author_error, describe_value

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from phaselens.lens.projection import Projection


def lazy_copy(tensor: Tensor) -> Tensor:
    """Return a copy of `tensor` that shares its memory until one of the two is written to.

    Writes through views, `.data`, `.numpy()`, DLPack or the storage also count: PyTorch copies the memory when writable
    memory is requested. Memory that cannot be shared in this way (weights mapped to a file) is copied at once.

    >>> import torch
    >>> original = torch.ones(3)
    >>> lazy_copy(original).numpy()[0] = 5.0
    >>> original
    tensor([1., 1., 1.])
    """
    try:
        return tensor._lazy_clone()
    except RuntimeError:
        return tensor.clone()


@dataclass(frozen=True)
class Batch:
    """Texts that pass through the model together, padded on the right.

    `tokens` [batch, pos] holds the token ids, `lengths` the number of real tokens in each row, `texts` the texts' ids,
    and `indices` their positions in the run, which give the order of result tables. `token_name` converts a token id to
    the tokenizer's name for it; the default returns the number as text. `hashes` are the sha256 of the texts.
    """

    texts: tuple[str, ...]
    indices: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: Tensor
    token_name: Callable[[int], str] = field(default=str, repr=False)
    hashes: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        """The number of texts."""
        return len(self.texts)

    def lengths_on(self, device: torch.device) -> Tensor:
        """Return `lengths` as a tensor [batch]."""
        import torch

        return torch.tensor(self.lengths, device=device)

    @cached_property
    def real(self) -> Tensor:
        """Boolean mask [batch, pos], True for tokens of the text and False for pads."""
        import torch

        device = self.tokens.device
        return torch.arange(self.tokens.shape[1], device=device) < self.lengths_on(device)[:, None]

    def private_copy(self) -> Batch:
        """Return a copy of the batch for another reader. Writing to the tensors of one does not change the other."""
        return replace(self, tokens=lazy_copy(self.tokens))


def _no_weight(name: str) -> Tensor:
    raise LookupError(f"this layer belongs to no model, so it has no weight {name!r}")


def _no_projection(name: str) -> Projection:
    raise LookupError(f"this layer belongs to no model, so it has no projection {name!r}")


class _LazyCopies(Mapping[str, "Tensor"]):
    """Tensors by name, each as a lazy copy made on first access."""

    def __init__(self, shared: Mapping[str, Tensor]) -> None:
        self._shared = shared
        self._copies: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._copies:
            self._copies[name] = lazy_copy(self._shared[name])
        return self._copies[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shared)

    def __contains__(self, name: object) -> bool:
        return name in self._shared

    def __len__(self) -> int:
        return len(self._shared)


@dataclass(frozen=True)
class LayerView(Mapping[str, "Tensor"]):
    """The hooked activations of one layer for one batch, by name without `blocks.{layer}.`.

    `index` is the 0-based layer, or None for a point outside of the layers, which has its full name (`hook_embed`).
    The tensors include pads: drop the rows that `batch.real` does not mark before you sum anything. Writing to a tensor
    changes neither the forward nor what another metric reads, and costs a copy of it. Do not keep tensors: each holds
    the memory of an activation.

    `weight` returns a weight of the same layer by its TransformerLens name: `layer.weight("attn.W_O")` is
    [head, d_head, d_model]. Values derived from it may be kept; writing to it does not change the model. A projection's
    weight reproduces what its module computes, however it is stored (packed, adapted); if no weight does, `weight`
    raises InputError with the reason. `projection` also supports modules that normalise or round their input before
    they multiply.
    """

    index: int | None
    batch: Batch
    activations: Mapping[str, Tensor] = field(repr=False)
    weight: Callable[[str], Tensor] = field(default=_no_weight, repr=False)
    projection: Callable[[str], Projection] = field(default=_no_projection, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "activations", _LazyCopies(self.activations))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.activations:
            raise UnknownPoint(name, self.index, list(self.activations))
        return self.activations[name]

    def __contains__(self, name: object) -> bool:
        return name in self.activations

    def __iter__(self) -> Iterator[str]:
        return iter(self.activations)

    def __len__(self) -> int:
        return len(self.activations)

    def has_all(self, names: Collection[str]) -> bool:
        """Return whether the view has every point of its layer in `names`, as the metric's `hooks()` returns them."""
        return all(point in self for point in points_in_layer(names, self.index))

    def private_copy(self, names: Collection[str]) -> LayerView:
        """Return a copy of the layer with only the points in `names`, for a metric inside this one. Writing to its
        tensors does not change this view. Names are those of this view, or those that the metric's `hooks()` returns.
        """
        chosen = {*names, *points_in_layer(names, self.index)}
        activations = {name: self[name] for name in self if name in chosen}
        return replace(self, activations=activations, batch=self.batch.private_copy())

    def float64(self, name: str) -> Tensor:
        """Return `self[name]` in float64 (on the CPU if the device lacks it), so that sums do not depend on padding."""
        tensor = self[name]
        return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


class PerText:
    """Values collected one layer of one batch at a time, and read back as [text, layer, …] in the order of the texts.

    Two that saw different texts can be merged in any order.
    """

    def __init__(self) -> None:
        self._ids: dict[int, str] = {}
        self._hashes: dict[int, str] = {}
        self._lengths: dict[int, int] = {}
        self._values: dict[str, dict[tuple[int, int], np.ndarray]] = {}
        #: The shape of a text's value by name and layer.
        self._shapes: dict[str, dict[int, tuple[int, ...]]] = {}
        #: The number of layers of the model, where some of them have no values; 0 where all layers have.
        self.n_layers = 0
        #: What `texts`, `lengths` and `by_content` return, until a text is added: metrics read them in loops.
        self._ordered: tuple[list[str], list[int], list[int]] | None = None

    def add(self, layer: LayerView, **values: Tensor) -> None:
        """Keep `values`, each [batch, …] and complete for these texts and this layer.

        Layers may have values of different sizes, since their numbers of heads may differ.

        Raises:
            TypeError: for a value that is not a tensor, whose shape differs from another batch's of the layer, or whose
                number of dimensions differs from another layer's.
            ValueError: for a tensor without one row per text.
        """
        if not isinstance(layer, LayerView):
            raise author_error(
                f"per_text.add: layer is {describe_value(layer)}; give the layer that update receives"
            )
        batch = layer.batch
        self._ordered = None
        for index, text, length in zip(batch.indices, batch.texts, batch.lengths, strict=True):
            self._ids[index], self._lengths[index] = text, length
        self._hashes.update(zip(batch.indices, batch.hashes or batch.texts, strict=True))
        for name, tensor in values.items():
            rows = _rows(name, tensor, batch.n)
            layer_index = layer.index or 0
            self._require_shape(name, layer_index, rows.shape[1:])
            by_text_and_layer = self._values.setdefault(name, {})
            for index, row in zip(batch.indices, rows, strict=True):
                by_text_and_layer[index, layer_index] = row.copy()

    def _require_shape(self, name: str, layer_index: int, shape: tuple[int, ...]) -> None:
        """Raise TypeError for a shape that does not fit those of the layer's other batches, or of other layers."""
        shapes = self._shapes.setdefault(name, {})
        other_layer, other = next(iter(shapes.items()), (layer_index, shape))
        if layer_index in shapes:
            other_layer, other = layer_index, shapes[layer_index]
        if other != shape and (other_layer == layer_index or len(other) != len(shape)):
            where = "batch" if other_layer == layer_index else "layer"
            raise author_error(
                f"per_text.add: {name} has shape {list(shape)} per text, but {list(other)} in another {where}; give "
                "one shape in all batches, and one number of dimensions in all layers (reduce over positions, whose "
                "number differs by batch)"
            )
        shapes[layer_index] = shape

    def merge(self, other: PerText) -> None:
        """Add everything that `other` collected."""
        self._ordered = None
        self._ids.update(other._ids)
        self._hashes.update(other._hashes)
        self._lengths.update(other._lengths)
        self.n_layers = max(self.n_layers, other.n_layers)
        for name, values in other._values.items():
            self._values.setdefault(name, {}).update(values)
            self._shapes.setdefault(name, {}).update(other._shapes.get(name, {}))

    def state(self) -> dict[str, Any]:
        """Return everything that was collected, as a few arrays."""
        import numpy as np

        indices = list(self._ids)
        values: dict[str, dict[str, np.ndarray]] = {}
        for name, rows in self._values.items():
            largest = self._largest_shape(name)
            padded = [_padded(row, largest) for row in rows.values()]
            values[name] = {"keys": np.array(list(rows), dtype=np.int64), "rows": np.stack(padded)}
            if any(row.shape != largest for row in rows.values()):
                shapes = [row.shape for row in rows.values()]
                values[name]["shapes"] = np.array(shapes, dtype=np.int64)
        return {
            "n_layers": self.n_layers,
            "indices": np.array(indices, dtype=np.int64),
            "ids": list(self._ids.values()),
            "hashes": [self._hashes[index] for index in indices],
            "lengths": np.array([self._lengths[index] for index in indices], dtype=np.int64),
            "values": values,
        }

    def load_state(self, tree: Mapping[str, Any]) -> None:
        """Restore what `state` returned, in place of everything collected so far."""
        require_kind("tree", tree, Mapping, "as PerText.state returns it")
        self._ordered = None
        self.n_layers = int(tree["n_layers"])
        indices = tree["indices"].tolist()
        self._ids = dict(zip(indices, tree["ids"], strict=True))
        self._hashes = dict(zip(indices, tree["hashes"], strict=True))
        self._lengths = dict(zip(indices, tree["lengths"].tolist(), strict=True))
        self._values, self._shapes = {}, {}
        for name, stored in tree["values"].items():
            rows = list(stored["rows"].copy())
            if "shapes" in stored:
                sizes = [tuple(map(slice, shape)) for shape in stored["shapes"].tolist()]
                rows = [row[size] for row, size in zip(rows, sizes, strict=True)]
            keys = list(map(tuple, stored["keys"].tolist()))
            self._values[name] = dict(zip(keys, rows, strict=True))
            self._shapes[name] = {layer: row.shape for (_, layer), row in self._values[name].items()}

    @property
    def texts(self) -> list[str]:
        """The ids of the texts, in order."""
        return self._in_order()[0]

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each text, in the same order."""
        return self._in_order()[1]

    @property
    def by_content(self) -> list[int]:
        """Indices of the texts in an order that depends only on their content.

        Statistics that draw texts at random draw from this order, so that the same texts give the same result.
        """
        return self._in_order()[2]

    def _in_order(self) -> tuple[list[str], list[int], list[int]]:
        """Return the ids and lengths of the texts in order, and their indices in the order of their hashes."""
        if self._ordered is None:
            indices = sorted(self._ids)
            hashes = [self._hashes[index] for index in indices]
            self._ordered = (
                [self._ids[index] for index in indices],
                [self._lengths[index] for index in indices],
                sorted(range(len(hashes)), key=hashes.__getitem__),
            )
        return self._ordered

    def layers(self, name: str) -> list[int]:
        """Return the layers that have values under `name`."""
        return sorted({layer for _, layer in self._values.get(name, {})})

    def _largest_shape(self, name: str) -> tuple[int, ...]:
        """Return the smallest shape that holds the values of every layer."""
        return tuple(map(max, zip(*self._shapes[name].values(), strict=True)))

    def stack(self, name: str) -> np.ndarray:
        """Return all values under `name`: float64 [text, layer, …], with NaN for a layer without a value.

        Values of a layer with fewer heads than another are followed by NaN; `ModelInfo.n_heads_in` tells their number.

        Raises:
            KeyError: for a name without values.
        """
        import numpy as np

        if name not in self._values:
            names = ", ".join(self._values) or "nothing yet"
            raise UnknownName(
                f"per_text.stack({name!r}): it holds {names}; add values by per_text.add(layer, {name}=tensor)"
            )
        values = self._values[name]
        layers = max(self.n_layers, 1 + max(layer for _, layer in values))
        shape = self._largest_shape(name)
        missing = np.full(shape, np.nan)
        return np.stack(
            [
                np.stack([_padded(values.get((index, layer), missing), shape) for layer in range(layers)])
                for index in sorted(self._ids)
            ]
        )


def _padded(row: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a text's value with NaN behind its entries, in a shape of the same number of dimensions."""
    import numpy as np

    if row.shape == shape:
        return row
    padded = np.full(shape, np.nan)
    padded[tuple(map(slice, row.shape))] = row
    return padded


def _rows(name: str, tensor: Tensor, n_texts: int) -> np.ndarray:
    """Return a value as float64 [batch, …] on the CPU; raise an error unless it is a tensor with one row per text."""
    import torch

    expected = f"give a torch tensor [batch, …] with one row for each of the batch's {n_texts} texts"
    if not isinstance(tensor, torch.Tensor):
        raise author_error(f"per_text.add: {name} is {describe_value(tensor)}; {expected}")
    if not tensor.dim() or len(tensor) != n_texts:
        received = f"{len(tensor)} rows" if tensor.dim() else "one number"
        raise author_error(
            f"per_text.add: {name} has {received} for a batch of {n_texts} texts; {expected}",
            error_class=ValueError,
        )
    rows: np.ndarray = tensor.detach().cpu().double().numpy()
    return rows
