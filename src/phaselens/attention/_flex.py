"""FlexAttention, for windows and softcaps on a GPU: kernels that torch compiles for the card when first needed.

A kernel is compiled for each class of problems: dtype, head sizes, heads per key head, window or not, softcap or not.
Lengths, windows and softcaps are arguments. No kernel is believed unchecked: the first result of each is compared with
that of the key blocks in its last rows, and a kernel that cannot be compiled, or disagrees, is not used again.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from phaselens.attention import _key_blocks
from phaselens.attention._problem import Problem

BLOCK = 128
"""Queries, and keys, in one block of a FlexAttention mask."""
_N_CHECKED = 64
"""Last queries of a problem that the first result of a kernel is compared in."""
_LSE_LIMIT = 1e-3
"""Largest difference of a log-sum-exp that rounding explains, in nats."""

KernelClass = tuple[torch.device, torch.dtype, int, int, int, bool, bool]
_is_right: dict[KernelClass, bool] = {}
"""Whether the kernel of a class was compiled, and agreed with the key blocks."""


def serves(problem: Problem, v: Tensor) -> bool:
    """Return whether a kernel exists for this problem, and has not failed before."""
    has_only_band = problem.mask is None and problem.bias is None and problem.hidden_keys is None
    is_square = BLOCK <= problem.n_queries == problem.n_keys
    has_sizes = all(16 <= size <= 256 for size in (problem.q.shape[-1], v.shape[-1]))
    return (
        has_only_band
        and (problem.window is not None or problem.softcap is not None)
        and is_square
        and has_sizes
        and v.dtype == problem.q.dtype
        and problem.scale > 0
        and problem.compute_dtype == torch.float32
        and is_available(problem.q.device)
        and _is_right.get(_class_of(problem, v), True)
    )


def is_available(device: torch.device) -> bool:
    """Return whether torch can compile kernels for this device."""
    return device.type == "cuda" and _has_triton() and is_ampere(device)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def is_ampere(device: torch.device) -> bool:
    """Return whether the GPU is new enough for fused and compiled kernels in bfloat16."""
    return torch.cuda.get_device_capability(device)[0] >= 8


def attend(problem: Problem, v: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return (out, lse) as `_kernels.attend`; None where the kernel fails, which a warning says once."""
    kernel_class = _class_of(problem, v)
    wrong = None
    try:
        out, lse = _run(problem, v)
        if kernel_class not in _is_right:
            expected = _last_rows(problem, v)
            if all(bool(states.isfinite().all()) for states in expected):  # else there is nothing to compare
                wrong = _disagreement(out, lse, *expected, float(v.abs().amax()))
                _is_right[kernel_class] = wrong is None
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        wrong = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        _is_right[kernel_class] = False
    if wrong is None:
        return out, lse
    warnings.warn(
        f"FlexAttention is not used for {_named(problem)}: {wrong}. Results are exact; they take longer",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def _run(problem: Problem, v: Tensor) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import AuxRequest

    out, aux = _compiled()(
        problem.q,
        problem.k,
        v,
        score_mod=_capped(problem.softcap, problem.q.device),
        block_mask=band_mask(problem.n_keys, problem.window, problem.q.device),
        scale=problem.scale,
        enable_gqa=problem.group > 1,
        return_aux=AuxRequest(lse=True),
    )
    return out, aux.lse


@functools.cache
def _compiled() -> Callable[..., Any]:
    """Return FlexAttention, compiled; without a whole graph it would store all scores, so that is an error."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


@functools.lru_cache(maxsize=16)
def _capped(softcap: float | None, device: torch.device) -> Callable[..., Tensor] | None:
    """Return the function that caps a score; its cap is a tensor, so that another one needs no other kernel."""
    if softcap is None:
        return None
    cap = torch.tensor(softcap, dtype=torch.float32, device=device)

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.tanh(score / cap) * cap

    return capped


@functools.lru_cache(maxsize=16)
def band_mask(n: int, window: int | None, device: torch.device) -> Any:
    """Return the block mask of `n` queries that see themselves and the keys before them, within the window if any.

    From the blocks' corners: torch's own function looks at every query and key.
    """
    from torch.nn.attention.flex_attention import BlockMask

    reach = torch.tensor(n if window is None else window, device=device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query - key
        return (distance >= 0) & (distance < reach)

    first = torch.arange(0, n, BLOCK, device=device)
    # Of each pair of blocks: the distances from the last key to the first query, and from the first to the last.
    nearest = first[:, None] - first - (BLOCK - 1)
    farthest = first[:, None] - first + (BLOCK - 1)
    has_visible = (farthest >= 0) & (nearest < reach)
    is_whole = first + BLOCK <= n
    is_full = (nearest >= 0) & (farthest < reach) & is_whole[:, None]
    partial, full = (_listed(blocks) for blocks in (has_visible & ~is_full, is_full))
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(n, n))


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many key blocks of each query block are marked [1, 1, query], and these first [1, 1, query, key]."""
    indices = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], indices.int()[None, None]


def _last_rows(problem: Problem, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of the last queries, by key blocks."""
    first = max(0, problem.n_queries - _N_CHECKED)
    return _key_blocks.attend(replace(problem, q=problem.q[:, :, first:]), v)


def _disagreement(
    out: Tensor, lse: Tensor, expected_out: Tensor, expected_lse: Tensor, largest_value: float
) -> str | None:
    """Return how a result differs from that expected in its last rows; None within rounding."""
    n_rows = expected_lse.shape[-1]
    lse_gap = float((lse[:, :, -n_rows:] - expected_lse).abs().amax())
    out_gap = float((out[:, :, -n_rows:].to(expected_out.dtype) - expected_out).abs().amax())
    # Not `>`, which is false for NaN.
    if not lse_gap <= _LSE_LIMIT * max(1.0, float(expected_lse.abs().amax())):
        return f"its log-sum-exp differs from that of the scores by {lse_gap:.2g}"
    if not out_gap <= 8 * torch.finfo(out.dtype).eps * largest_value:
        return f"its output differs from that of the weights by {out_gap:.2g}"
    return None


def _class_of(problem: Problem, v: Tensor) -> KernelClass:
    q = problem.q
    has_window, has_softcap = problem.window is not None, problem.softcap is not None
    return q.device, q.dtype, q.shape[-1], v.shape[-1], problem.group, has_window, has_softcap


def _named(problem: Problem) -> str:
    parts = [name for name in ("window", "softcap") if getattr(problem, name) is not None]
    dtype = str(problem.q.dtype).removeprefix("torch.")
    return f"heads of {problem.q.shape[-1]} in {dtype} with a {' and a '.join(parts)}"
