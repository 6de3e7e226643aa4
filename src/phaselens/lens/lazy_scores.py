"""Attention scores that are not computed, for attention modules that compute their softmax themselves.

In such a module, `LazyScores` stand for the matrix [batch, head, query, key]. They note what the module does to them:
factors, masks, biases, the softmax. When the module multiplies them by the values, everything that one call of an
attention function needs is known, and the matrix has never existed. An operation that such a call does not have is
refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from phaselens.errors import RefusedModel
from phaselens.lens.lazy_masks import LazyMask

#: From this number downwards, what is added to a score that was set to 0 hides its key (GPT hides by −10,000).
_HIDING = -1e3


@dataclass
class ScoreTerms:
    """What a module computed with its scores so far: scale·q·k plus `added`, where `masks` hide no key.

    query [batch, head, query, d_head], key [batch, kv_head, key, d_head]. ``added`` are tensors that broadcast to
    [batch, head, query, key]; ``masks`` are lazy, or bool tensors, True where a key is visible. ``zeroed`` is True
    where scores were multiplied by 1, and not by 0. ``is_softmax``: the softmax has been taken.
    """

    query: Tensor
    key: Tensor
    scale: float = 1.0
    added: list[Tensor] = field(default_factory=list)
    masks: list[Tensor | LazyMask] = field(default_factory=list)
    zeroed: Tensor | None = None
    is_softmax: bool = False


#: Computes attention [batch, head, query, d_value] from the terms of its scores and the values.
Attend = Callable[[ScoreTerms, Tensor], Tensor]


class LazyScores:
    """A matrix of scores, or of attention after the softmax; `shape` is [batch, head, …] or [batch · head, …]."""

    def __init__(
        self, terms: ScoreTerms, shape: Sequence[int], dtype: torch.dtype, attend: Attend, module: str
    ) -> None:
        self.terms = terms
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self._attend = attend
        self._module = module

    @property
    def device(self) -> torch.device:
        """The device of the queries."""
        return self.terms.query.device

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """Return the sizes, as `Tensor.size`."""
        return self.shape if dim is None else self.shape[dim]

    def view(self, *shape: Any) -> LazyScores:
        """Return the scores by text and head, or with both in one dimension."""
        sizes = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        if sizes.count(-1) == 1:
            sizes[sizes.index(-1)] = self.shape.numel() // -math.prod(sizes)
        batch, n_heads, n_queries, _ = self._full_shape
        n_keys = self._full_shape[3]
        if tuple(sizes) not in ((batch, n_heads, n_queries, n_keys), (batch * n_heads, n_queries, n_keys)):
            raise self._refusal(f"reshapes them to {sizes}")
        return LazyScores(self.terms, sizes, self.dtype, self._attend, self._module)

    reshape = view

    def contiguous(self) -> LazyScores:
        """Return the scores."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> LazyScores:
        """Convert the dtype, as `Tensor.to`."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype):
                return self._with_dtype(value)
            if isinstance(value, Tensor | LazyScores):
                return self._with_dtype(value.dtype)
        return self

    type_as = to

    def float(self) -> LazyScores:
        """Convert to float32."""
        return self._with_dtype(torch.float32)

    def _with_dtype(self, dtype: torch.dtype) -> LazyScores:
        return LazyScores(self.terms, self.shape, dtype, self._attend, self._module)

    def _copy(self, **changes: Any) -> LazyScores:
        terms = self.terms
        copied = replace(terms, **{"added": list(terms.added), "masks": list(terms.masks), **changes})
        return LazyScores(copied, self.shape, self.dtype, self._attend, self._module)

    # Arithmetic

    def __mul__(self, factor: Any) -> LazyScores:
        scores = self._copy()
        scores *= factor
        return scores

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> LazyScores:
        scores = self._copy()
        scores /= divisor
        return scores

    def __itruediv__(self, divisor: Any) -> LazyScores:
        self.__imul__(1.0 / float(divisor))
        return self

    def __imul__(self, factor: Any) -> LazyScores:
        self._require_scores("multiplies")
        terms = self.terms
        if isinstance(factor, Tensor) and factor.dim():
            is_mask = bool(((factor == 0) | (factor == 1)).all())
            if not is_mask or terms.added or terms.zeroed is not None:
                raise self._refusal("multiplies them by a matrix")
            terms.zeroed = self._by_head(factor) != 0
            return self
        if float(factor) <= 0:
            raise self._refusal(f"multiplies them by {float(factor):g}")
        terms.scale *= float(factor)
        terms.added = [added * factor for added in terms.added]
        return self

    def __add__(self, added: Any) -> LazyScores:
        scores = self._copy()
        scores += added
        return scores

    __radd__ = __add__

    def __iadd__(self, added: Any) -> LazyScores:
        self._require_scores("adds to")
        terms = self.terms
        if isinstance(added, LazyMask) and not added.marks_hidden:
            terms.masks.append(replace(added, bias=None))
            if added.bias is not None:
                terms.added.append(self._by_head(added.bias))
        elif isinstance(added, Tensor) and terms.zeroed is not None:
            values = self._by_head(added)
            if not bool((values.masked_fill(~terms.zeroed, 0.0) == 0).all()) or not bool(
                (values.masked_fill(terms.zeroed, _HIDING) <= _HIDING).all()
            ):
                raise self._refusal("multiplies them by a matrix")
            terms.masks.append(terms.zeroed)
            terms.zeroed = None
        elif isinstance(added, Tensor) and added.dim():
            terms.added.append(self._by_head(added))
        else:
            raise self._refusal("adds something other than a mask or a bias")
        return self

    def masked_fill(self, mask: Any, value: Any) -> LazyScores:
        """Hide the keys where `mask` is True."""
        return self._copy().masked_fill_(mask, value)

    def masked_fill_(self, mask: Any, value: Any) -> LazyScores:
        """Hide the keys where `mask` is True, in place."""
        self._require_hiding(value)
        if isinstance(mask, LazyMask) and mask.marks_hidden:
            self.terms.masks.append(mask)
        elif isinstance(mask, Tensor):
            self.terms.masks.append(~self._by_head(mask.bool()))
        else:
            raise self._refusal("fills them by something other than a mask")
        return self

    def hidden_unless(self, visible: Tensor, value: Any) -> LazyScores:
        """Hide the keys where `visible` is False."""
        self._require_hiding(value)
        scores = self._copy()
        scores.terms.masks.append(self._by_head(visible))
        return scores

    def softmax(self, dim: int, dtype: torch.dtype | None = None) -> LazyScores:
        """Take the softmax over the keys."""
        self._require_scores("takes a second softmax of")
        if dim not in (-1, self.ndim - 1):
            raise self._refusal(f"takes the softmax over dimension {dim}")
        scores = self._copy(is_softmax=True)
        return scores if dtype is None else scores._with_dtype(dtype)

    def __matmul__(self, value: Tensor) -> Tensor:
        """Return attention times the values [batch, kv_head, key, d_value] or [batch · head, key, d_value]."""
        if not self.terms.is_softmax or self.terms.zeroed is not None:
            raise self._refusal("multiplies them by values before the softmax")
        batch, n_heads, n_queries, n_keys = self._full_shape
        values = value if value.dim() == 4 else value.view(batch, n_heads, n_keys, -1)
        output = self._attend(self.terms, values.to(self.terms.query.dtype)).to(value.dtype)
        return output if self.ndim == 4 else output.reshape(batch * n_heads, n_queries, -1)

    @property
    def _full_shape(self) -> tuple[int, int, int, int]:
        batch, n_heads, n_queries, _ = self.terms.query.shape
        return batch, n_heads, n_queries, self.terms.key.shape[2]

    def _by_head(self, tensor: Tensor) -> Tensor:
        """Return a tensor that broadcasts to the scores as one that broadcasts to [batch, head, query, key]."""
        batch, n_heads, _, _ = self._full_shape
        if self.ndim == 3 and tensor.dim() == 3:
            n_rows = tensor.shape[0]
            sizes = (1, 1) if n_rows == 1 else (batch, n_heads)
            tensor = tensor.reshape(*sizes, *tensor.shape[1:])
        tensor = tensor[(None,) * (4 - tensor.dim())]
        if any(size not in (1, full) for size, full in zip(tensor.shape, self._full_shape, strict=True)):
            raise self._refusal(f"combines them with a tensor of shape {list(tensor.shape)}")
        return tensor

    def _require_scores(self, operation: str) -> None:
        if self.terms.is_softmax:
            raise self._refusal(f"{operation} attention after the softmax", "")

    def _require_hiding(self, value: Any) -> None:
        self._require_scores("fills")
        if float(value) > torch.finfo(self.dtype).min / 2:
            raise self._refusal(f"fills them with {float(value):g}")

    def _refusal(self, operation: str, of: str = "its attention scores: it ") -> RefusedModel:
        return RefusedModel(
            f"{self._module} computes something other than one softmax of {of}{operation}; PhaseLens measures "
            "attention that is one softmax of q·k with masks and biases. Use a family listed in docs/families.md"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._refusal(f"calls Tensor.{name}")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.strip("_")
        scores = next(value for value in (*args, *kwargs.values()) if isinstance(value, LazyScores))
        others = [value for value in args if value is not scores]
        operation = _OPERATIONS.get(name)
        if operation is None:
            raise scores._refusal(f"calls {func.__name__}")
        return operation(scores, others, kwargs)


def _dropout(scores: LazyScores, others: list[Any], options: dict[str, Any]) -> LazyScores:
    p = others[0] if others else options.get("p", 0.5)
    training = others[1] if len(others) > 1 else options.get("training", True)
    if training and p:
        raise scores._refusal("drops some at random; call model.eval()")
    return scores


def _where(scores: LazyScores, others: list[Any], options: dict[str, Any]) -> LazyScores:
    condition, value = others
    return scores.hidden_unless(condition, value)


def _maximum(scores: LazyScores, others: list[Any], options: dict[str, Any]) -> LazyScores:
    if float(others[0]) > torch.finfo(scores.dtype).min:
        raise scores._refusal(f"bounds them by {float(others[0]):g}")
    return scores  # every score is at least its dtype's lowest number


def _softmax(scores: LazyScores, others: list[Any], options: dict[str, Any]) -> LazyScores:
    dim = others[0] if others else options["dim"]
    return scores.softmax(dim, options.get("dtype"))


def _multiply_values(scores: LazyScores, others: list[Any], options: dict[str, Any]) -> Tensor:
    value = others[0] if others else options["mat2"] if "mat2" in options else options["other"]
    return scores @ value


_OPERATIONS: dict[str, Callable[[LazyScores, list[Any], dict[str, Any]], Any]] = {
    "add": lambda scores, others, options: scores + others[0],
    "radd": lambda scores, others, options: scores + others[0],
    "mul": lambda scores, others, options: scores * others[0],
    "rmul": lambda scores, others, options: scores * others[0],
    "div": lambda scores, others, options: scores / others[0],
    "truediv": lambda scores, others, options: scores / others[0],
    "masked_fill": lambda scores, others, options: scores.masked_fill(*others, **options),
    "expand_as": lambda scores, others, options: others[0].expand(scores.shape),
    "where": _where,
    "max": _maximum,
    "maximum": _maximum,
    "softmax": _softmax,
    "dropout": _dropout,
    "matmul": _multiply_values,
    "bmm": _multiply_values,
}
