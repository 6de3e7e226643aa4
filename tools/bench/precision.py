"""Measure the distance of attention statistics from float64, by dtype, shape of the scores and their size.

    python tools/bench/precision.py [--tokens 512] [--d-head 64 128] [--heads 8]

Each row is the worst value over all heads and queries of one problem. `bound` is scale·max‖q‖·max‖k‖, which no score
exceeds; `redone` is the number of heads computed in float64 because float32 is not precise enough. The first errors
are against float64 on the same q and k; `rounding` is, for comparison, the change of the sink mass by storing q and k
in that dtype.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from phaselens import attention
from phaselens.attention._precision import needs_float64
from phaselens.attention._problem import Problem

SHAPES = ("any", "shifted", "aligned", "rivals", "sink", "weak sink")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOUNDS = (16.0, 48.0, 64.0, 96.0, 128.0, 1e3, 1e5)


def draw_problem(
    shape: str, bound: float, *, n: int, heads: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw q and k [1, head, n, d] whose scores stay within ±`bound`, in one of the shapes that trained heads have."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, heads, n, d, generator=generator) for _ in range(2))
    c = torch.randn(1, heads, 1, d, generator=generator)
    if shape == "shifted":  # keys share a large part, as with a bias
        k = c + 0.3 * k
    elif shape == "aligned":  # all scores are large, and nearly equal
        q, k = c + 0.05 * q, c + 0.05 * k
    elif shape == "rivals":  # many keys compete at a large score
        q, k = c + 0.05 * q, 0.3 * k
        k[:, :, ::7] = c + 0.02 / 0.3 * k[:, :, ::7]
    elif shape == "sink":  # the first key wins by far
        q = 0.9 * c + 0.4 * q
        k[:, :, :1] = c
    elif shape == "weak sink":
        q = 0.6 * c + 0.8 * q
        k[:, :, :1] = 0.4 * c
    largest = q.norm(dim=-1).amax(-1) * k.norm(dim=-1).amax(-1)
    return (q * (bound / largest)[..., None, None]).to(dtype), k.to(dtype)


def dense_attention(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return (lse, pattern) of causal attention with scale 1, in float64."""
    scores = q.double() @ k.double().transpose(-1, -2)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(future, -torch.inf)
    lse = scores.logsumexp(-1)
    return lse, (scores - lse[..., None]).exp()


def errors(q: Tensor, k: Tensor) -> dict[str, float]:
    """Return the largest differences from float64; received mass and lse relative to values above 1."""
    exact_lse, pattern = dense_attention(q, k)
    _, lse = attention.attend(q, k, k, scale=1.0)
    summary = attention.summarise(q, k, lse, position=0, entropy=True, received=True, scale=1.0)
    received = pattern.sum(-2)
    pairs = {
        "lse": (attention.refine_lse(q, k, lse, scale=1.0), exact_lse, exact_lse.abs().clamp(min=1.0)),
        "sink": (summary.sink, pattern[..., 0], 1.0),
        "entropy": (summary.entropy, torch.special.entr(pattern).sum(-1), 1.0),
        "received": (summary.received, received, received.clamp(min=1.0)),
    }
    return {
        name: float(((computed - exact) / size).abs().amax())
        for name, (computed, exact, size) in pairs.items()
    }


def rows(tokens: int, d: int, heads: int) -> Iterator[tuple[str, str, float, int, dict[str, float], float]]:
    for dtype in DTYPES:
        for shape in SHAPES:
            for bound in BOUNDS:
                exact_qk = draw_problem(shape, bound, n=tokens, heads=heads, d=d, dtype=torch.float64)
                q, k = (x.to(dtype) for x in exact_qk)
                _, lse = attention.attend(q, k, k, scale=1.0)
                redone = int(needs_float64(Problem(q, k, 1.0), lse).sum())
                rounding = float(
                    (dense_attention(q, k)[1][..., 0] - dense_attention(*exact_qk)[1][..., 0]).abs().amax()
                )
                yield str(dtype).removeprefix("torch."), shape, bound, redone, errors(q, k), rounding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--d-head", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = ("lse", "sink", "entropy", "received")
    worst: dict[tuple[str, int], dict[str, float]] = {}
    for d in options.d_head:
        print(f"d_head {d}, {options.tokens} tokens, {options.heads} heads")
        print(
            f"{'dtype':9} {'shape':10} {'bound':>7} {'redone':>6}  "
            + " ".join(f"{n:>10}" for n in names)
            + "   rounding"
        )
        for dtype, shape, bound, redone, differences, rounding in rows(options.tokens, d, options.heads):
            cells = " ".join(f"{differences[name]:10.1e}" for name in names)
            print(f"{dtype:9} {shape:10} {bound:7g} {redone:6d}  {cells} {rounding:10.1e}")
            worst_so_far = worst.setdefault((dtype, d), dict.fromkeys(names, 0.0))
            worst[dtype, d] = {name: max(worst_so_far[name], differences[name]) for name in names}
        print()
    print("worst of all")
    for (dtype, d), differences in worst.items():
        print(f"{dtype:9} d_head {d:<18} " + " ".join(f"{differences[name]:10.1e}" for name in names))


if __name__ == "__main__":
    main()
