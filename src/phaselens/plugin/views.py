"""What a metric is handed (one layer of one batch), and a place to gather numbers text by text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from phaselens.plugin.mistakes import UnknownName, UnknownPoint, kind_of, mistake

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from phaselens.lens.projection import Projection


def lazy_copy(tensor: Tensor) -> Tensor:
    """A tensor of the same values that shares memory with `tensor` until somebody writes to one of the two.

    Writes through views, `.data`, `.numpy()`, DLPack or the storage count as well: PyTorch copies the memory when it is
    asked for a place to write. Where it cannot share the memory so (weights that a file is mapped to), this is a copy.

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
    """Texts that went through the model together, padded on the right.

    `tokens` [batch, pos] holds the token ids, `lengths` how many of a row are real, `texts` the texts'
    ids and `indices` their places in the run, which is the order that result tables come in. `spell` turns
    a token id into the tokenizer's word for it; without one, a token is its number. `hashes` are the
    sha256 of what the texts say.
    """

    texts: tuple[str, ...]
    indices: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: Tensor
    spell: Callable[[int], str] = field(default=str, repr=False)
    hashes: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        """The number of texts."""
        return len(self.texts)

    def lengths_on(self, device: torch.device) -> Tensor:
        """`lengths` as a tensor [batch]."""
        import torch

        return torch.tensor(self.lengths, device=device)

    @cached_property
    def real(self) -> Tensor:
        """[batch, pos], True where the token is the text's and not a pad."""
        import torch

        device = self.tokens.device
        return torch.arange(self.tokens.shape[1], device=device) < self.lengths_on(device)[:, None]

    def apart(self) -> Batch:
        """The same batch for another reader: what one of them writes into its tensors does not reach the other."""
        return replace(self, tokens=lazy_copy(self.tokens))


def _no_weight(name: str) -> Tensor:
    raise LookupError(f"no model stands behind this layer, so it has no weight {name!r}")


def _no_projection(name: str) -> Projection:
    raise LookupError(f"no model stands behind this layer, so it has no projection {name!r}")


class _Own(Mapping[str, "Tensor"]):
    """Tensors by name, each as a lazy copy that is made when it is first asked for."""

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

    `index` is the 0-based layer, or None for a point outside of the layers, which arrives alone under its
    whole name (`hook_embed`). Pads are still in the tensors: drop what `batch.real` does not mark before
    you sum anything. Tensors are this view's own: what is written into one changes neither the forward nor what
    another metric reads, and costs a copy of it. Keep none: each holds the memory of an activation.

    `weight` finds a weight of the same layer by TransformerLens' name: `layer.weight("attn.W_O")` is
    [head, d_head, d_model]. What is derived from it may be kept; writing into it does not change the model. A
    projection's weight reproduces what its module computes, whatever that stores (packed, adapted); where no weight
    does, `weight` raises InputError and says why. `projection` also serves modules that norm or round their input
    before they multiply.
    """

    index: int | None
    batch: Batch
    activations: Mapping[str, Tensor] = field(repr=False)
    weight: Callable[[str], Tensor] = field(default=_no_weight, repr=False)
    projection: Callable[[str], Projection] = field(default=_no_projection, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "activations", _Own(self.activations))

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

    def apart(self, names: Collection[str]) -> LayerView:
        """The same layer with the points in `names` only, for a metric inside this one: what it writes into its tensors
        does not reach this view."""
        kept = {name: self[name] for name in self if name in names}
        return replace(self, activations=kept, batch=self.batch.apart())

    def float64(self, name: str) -> Tensor:
        """`self[name]` in float64 (on the CPU where the device has no float64), so that sums do not
        depend on padding."""
        tensor = self[name]
        return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


class PerText:
    """Numbers gathered a layer of a batch at a time and read back as [text, layer, …] in the order of the
    texts.

    It can be pickled, and two of them that saw different texts can be merged in any order.
    """

    def __init__(self) -> None:
        self._ids: dict[int, str] = {}
        self._hashes: dict[int, str] = {}
        self._lengths: dict[int, int] = {}
        self._values: dict[str, dict[tuple[int, int], np.ndarray]] = {}

    def add(self, layer: LayerView, **values: Tensor) -> None:
        """Keep `values`, each [batch, …] and finished for these texts and this layer.

        Raises:
            TypeError: for a value that is no such tensor, or has another shape in another layer or batch.
        """
        if not isinstance(layer, LayerView):
            raise mistake(f"per_text.add takes the layer that update was handed, and got {kind_of(layer)}")
        batch = layer.batch
        for index, text, length in zip(batch.indices, batch.texts, batch.lengths, strict=True):
            self._ids[index], self._lengths[index] = text, length
        self._hashes.update(zip(batch.indices, batch.hashes or batch.texts, strict=True))
        for name, tensor in values.items():
            rows = _rows(name, tensor, batch.n)
            kept = self._values.setdefault(name, {})
            shape = next(iter(kept.values())).shape if kept else rows.shape[1:]
            if rows.shape[1:] != shape:
                raise mistake(
                    f"per_text.add: {name} is {list(rows.shape[1:])} a text here and was {list(shape)} in another "
                    "layer or batch; give one shape always (reduce over positions, whose number differs by batch)"
                )
            for index, row in zip(batch.indices, rows, strict=True):
                kept[index, layer.index or 0] = row.copy()

    def merge(self, other: PerText) -> None:
        """Take over all that `other` gathered."""
        self._ids.update(other._ids)
        self._hashes.update(other._hashes)
        self._lengths.update(other._lengths)
        for name, kept in other._values.items():
            self._values.setdefault(name, {}).update(kept)

    @property
    def texts(self) -> list[str]:
        """The ids of the texts, in their order."""
        return [self._ids[index] for index in sorted(self._ids)]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text, in the same order."""
        return [self._lengths[index] for index in sorted(self._ids)]

    @property
    def by_content(self) -> list[int]:
        """Places of the texts in an order that depends on what they say, not on the order they came in.

        Statistics that draw texts by chance draw from this order; the same texts then give the same answer.
        """
        hashes = [self._hashes[index] for index in sorted(self._ids)]
        return sorted(range(len(hashes)), key=hashes.__getitem__)

    def stack(self, name: str) -> np.ndarray:
        """All values under `name`: float64 [text, layer, …]; NaN where a text has none for a layer.

        Raises:
            KeyError: for a name under which nothing was added.
        """
        import numpy as np

        if name not in self._values:
            held = ", ".join(self._values) or "nothing yet"
            raise UnknownName(
                f"per_text.stack({name!r}): it holds {held}; add values by per_text.add(layer, {name}=tensor)"
            )
        kept = self._values[name]
        layers = 1 + max(layer for _, layer in kept)
        missing = np.full_like(next(iter(kept.values())), np.nan)
        return np.stack(
            [
                np.stack([kept.get((index, layer), missing) for layer in range(layers)])
                for index in sorted(self._ids)
            ]
        )


def _rows(name: str, tensor: Tensor, n_texts: int) -> np.ndarray:
    """A value as float64 [batch, …] on the CPU; TypeError for what is no tensor with a row a text."""
    import torch

    expected = f"give a torch tensor [batch, …] with a row for each of the batch's {n_texts} texts"
    if not isinstance(tensor, torch.Tensor):
        raise mistake(f"per_text.add: {name} is {kind_of(tensor)}; {expected}")
    if not tensor.dim() or len(tensor) != n_texts:
        found = f"{len(tensor)} rows" if tensor.dim() else "one number"
        raise mistake(
            f"per_text.add: {name} has {found} for a batch of {n_texts} texts; {expected}", kind=ValueError
        )
    rows: np.ndarray = tensor.detach().cpu().double().numpy()
    return rows
