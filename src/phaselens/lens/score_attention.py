"""Attention modules that compute their softmax themselves, made to call transformers' attention interface instead.

Such a module (GPT-J, Bloom, Falcon, …) is found by one tiny forward: a softmax over the keys runs in it, outside of the
interface. Its forward then runs with lazy scores and lazy masks, which note what it does to them, and the interface
gets the queries, keys, values, mask and bias. Everything else in the module runs as it is. No family is named here.
"""

from __future__ import annotations

import copy
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from phaselens.errors import RefusedModel
from phaselens.lens.attention_dispatch import IMPLEMENTATION, attend_hooked
from phaselens.lens.lazy_masks import LazyMask, build_lazy_mask
from phaselens.lens.lazy_scores import LazyScores, ScoreTerms
from phaselens.lens.score_masks import MaskReader

SCORES_IMPLEMENTATION = "phaselens_scores"
"""The name under which transformers knows the lens' attention in models with modules that compute their own softmax."""
_PROBE_IMPLEMENTATION = "phaselens_probe"
# A number of tokens that is no usual number of heads or experts.
_N_PROBE_TOKENS = 11
_FUSED = torch.nn.functional.scaled_dot_product_attention
_ROUTED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def use_lens_attention(model: PreTrainedModel) -> None:
    """Make a model attend by the lens, also in modules that compute their own softmax."""
    if not any(module in _ROUTED for module in model.modules()):
        for module in find_score_modules(model):
            module.forward = ScoreRoute(module, model)
            _ROUTED.add(module)
    if any(module in _ROUTED for module in model.modules()):
        set_implementations(model, dict.fromkeys(_configs(model), SCORES_IMPLEMENTATION))
    else:
        model.set_attn_implementation(IMPLEMENTATION)


@contextmanager
def attending_by_lens(model: PreTrainedModel) -> Iterator[None]:
    """Make a model attend by the lens inside the context, as `use_lens_attention` does."""
    implementations = implementations_of(model)
    try:
        use_lens_attention(model)
        yield
    finally:
        set_implementations(model, implementations)


def _configs(model: PreTrainedModel) -> dict[int, Any]:
    """Return the configurations of a model and of the models inside it, by their identity."""
    return {
        id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)
    }


def implementations_of(model: PreTrainedModel) -> dict[int, str | None]:
    """Return the attention implementation of each configuration, by its identity."""
    return {key: config._attn_implementation for key, config in _configs(model).items()}


def set_implementations(model: PreTrainedModel, implementations: Mapping[int, str | None]) -> None:
    """Set the attention implementation of each configuration.

    transformers' own method changes none in a model whose source does not call the interface.
    """
    for key, config in _configs(model).items():
        config._attn_implementation_internal = implementations[key]


def find_score_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules in which a softmax over the keys runs that is not one of the attention interface."""
    implementations = implementations_of(model)
    finder = _SoftmaxFinder()
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(finder.enter))
        handles.append(module.register_forward_hook(finder.leave))
    ids = torch.arange(_N_PROBE_TOKENS, device=model.get_input_embeddings().weight.device)[None]
    set_implementations(model, dict.fromkeys(implementations, _PROBE_IMPLEMENTATION))
    try:
        with torch.no_grad(), finder:
            model(input_ids=ids % len(model.get_input_embeddings().weight), use_cache=False)
    finally:
        set_implementations(model, implementations)
        for handle in handles:
            handle.remove()
    return finder.modules


class _SoftmaxFinder(TorchFunctionMode):
    """Collects the modules in which a softmax of a matrix [..., query, key] is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.modules: list[nn.Module] = []
        self._running: list[nn.Module] = []

    def enter(self, module: nn.Module, _args: object) -> None:
        """Note that a module runs; a forward pre-hook."""
        self._running.append(module)

    def leave(self, _module: nn.Module, _args: object, _output: object) -> None:
        """Note that the innermost module has run; a forward hook."""
        self._running.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ == "softmax":
            attends = _is_matrix((args[0] if args else kwargs["input"]).shape)
        else:
            attends = func is _FUSED and _is_matrix((*args[0].shape[:-1], args[1].shape[-2]))
        if attends and self._running and self._running[-1] not in self.modules:
            self.modules.append(self._running[-1])
        return func(*args, **kwargs)


def _is_matrix(shape: Sequence[int]) -> bool:
    """Return whether a tensor has a row for each query and a column for each key of the probe."""
    return len(shape) in (3, 4) and tuple(shape[-2:]) == (_N_PROBE_TOKENS, _N_PROBE_TOKENS)


def _attend_in_probe(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend in a model whose modules are being searched, unseen by the search; transformers calls this."""
    with torch._C.DisableTorchFunction():
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=options.get("scaling")
        )
    return output, None


class ScoreRoute:
    """The forward of an attention module that computes its own softmax, with lazy scores if the lens attends."""

    def __init__(self, module: nn.Module, model: PreTrainedModel) -> None:
        self._forward = module.forward
        self._module = weakref.ref(module)
        self._config = model.config
        self._file = inspect.getfile(type(module))
        self._masks = MaskReader(type(module).__name__)
        if getattr(model, "_supports_sdpa", False) and hasattr(module, "config"):
            # Modules that distinguish SDPA (Falcon) then compute what they do by default.
            config: Any = copy.copy(module.config)
            config._attn_implementation_internal = "sdpa"
            module.config = config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._config._attn_implementation != SCORES_IMPLEMENTATION:
            return self._forward(*args, **kwargs)
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with _ScoreCapture(self._file, next(tensors).shape[0], self.attend, self._masks.label):
            result = self._forward(*args, **kwargs)
        if isinstance(result, tuple | list):
            # The matrix, which the module returns beside its output, does not exist.
            return type(result)(None if isinstance(value, LazyScores) else value for value in result)
        return result

    def attend(self, terms: ScoreTerms, value: Tensor) -> Tensor:
        """Call the attention function with what the module did to its scores; return [batch, head, query, d_value]."""
        module = self._module()
        assert module is not None
        mask, bias = self._masks.read(module, terms)
        output, _ = attend_hooked(module, terms.query, terms.key, value, mask, scaling=terms.scale, bias=bias)
        return output.transpose(1, 2)


class _ScoreCapture(TorchFunctionMode):
    """Makes the product of queries and keys lazy where the module's own code computes it."""

    def __init__(
        self, file: str, n_texts: int, attend: Callable[[ScoreTerms, Tensor], Tensor], label: str
    ) -> None:
        super().__init__()
        self._file, self._n_texts, self._attend, self._label = file, n_texts, attend, label

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # Not in modules inside, nor in hooks: only calls from the module's own source file.
        if sys._getframe(1).f_code.co_filename == self._file:
            name = func.__name__.strip("_")
            if name in ("matmul", "bmm") and self._are_activations(args):
                return self._scores(*args)
            if name == "baddbmm":
                return self._biased_scores(*args, **kwargs)
            if func is _FUSED:
                return self._attend_fused(*args, **kwargs)
            if func is torch.zeros and len(args) == 3 and self._n_texts:
                # A matrix of zeros to which the product is added.
                return torch.zeros((), **kwargs).expand(args)
        return func(*args, **kwargs)

    def _are_activations(self, args: tuple[Any, ...]) -> bool:
        return len(args) == 2 and all(
            isinstance(operand, Tensor) and not isinstance(operand, nn.Parameter) and operand.dim() in (3, 4)
            for operand in args
        )

    def _scores(self, query: Tensor, transposed_key: Tensor) -> LazyScores:
        key = transposed_key.transpose(-1, -2)
        shape = (*query.shape[:-1], key.shape[-2])
        if query.dim() == 3:
            query, key = (
                states.reshape(self._n_texts, states.shape[0] // self._n_texts, *states.shape[1:])
                for states in (query, key)
            )
        return LazyScores(ScoreTerms(query, key), shape, query.dtype, self._attend, self._label)

    def _biased_scores(
        self, added: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
    ) -> LazyScores:
        scores = self._scores(batch1, batch2) * alpha
        is_zero = not any(added.stride()) and not bool(added.flatten()[0])
        return scores if is_zero else scores + added * beta

    def _attend_fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | LazyMask | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p:
            raise RefusedModel(f"{self._label} drops attention at random; call model.eval()")
        shape = (*query.shape[:-1], key.shape[-2])
        terms = ScoreTerms(query, key)
        scores = LazyScores(terms, shape, query.dtype, self._attend, self._label)
        scores *= query.shape[-1] ** -0.5 if scale is None else scale
        if is_causal:
            terms.masks.append(LazyMask(torch.Size(shape), query.dtype, query.device, None))
        if isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool:
            scores = scores.hidden_unless(attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return scores.softmax(-1) @ value


AttentionInterface.register(SCORES_IMPLEMENTATION, attend_hooked)
AttentionMaskInterface.register(SCORES_IMPLEMENTATION, build_lazy_mask)
AttentionInterface.register(_PROBE_IMPLEMENTATION, _attend_in_probe)
AttentionMaskInterface.register(_PROBE_IMPLEMENTATION, eager_mask)
