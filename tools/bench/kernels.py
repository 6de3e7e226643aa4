"""Time each attention statistic on tensors of one layer, relative to one call of the fused kernel.

    python tools/bench/kernels.py [--tokens 512 2048 4096] [--heads 8] [--kv-heads 8] [--d-head 64] [--rounds 5]

CPU seconds of this process, the best of several rounds in which all variants alternate. `in float64` is a layer whose
scores are so large that every head is computed in float64. `backward` computes received mass by the fused kernel's
backward with a gradient of ones, dV = Pᵀ·1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from phaselens import attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BASELINE = "fused kernel"


def variants(
    tokens: int, heads: int, kv_heads: int, d: int, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    def draw(n: int, size: float = 1.0) -> torch.Tensor:
        """Draw a tensor in the layout of models: [batch, pos, head, d_head], transposed."""
        return (size * torch.randn(1, tokens, n, d)).to(dtype).transpose(1, 2)

    q, k, v, large = draw(heads), draw(kv_heads), draw(kv_heads), draw(heads, 1000.0)
    scale = d**-0.5
    out, lse = attention.attend(q, k, v, scale=scale)
    _, large_lse = attention.attend(large, k, v, scale=scale)
    many_k, many_v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    upstream_gradient = torch.ones_like(out)
    aten = torch.ops.aten
    return {
        BASELINE: lambda: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale),
        "attend": lambda: attention.attend(q, k, v, scale=scale),
        "sink": lambda: attention.sink_mass(q, k, lse, scale=scale),
        "entropy": lambda: attention.row_entropy(q, k, lse, scale=scale),
        "received": lambda: attention.received_mass(q, k, lse, scale=scale),
        "sink, entropy, received at once": lambda: attention.summarise(
            q, k, lse, position=0, entropy=True, received=True, scale=scale
        ),
        "distance": lambda: attention.distance_mass(q, k, lse, scale=scale),
        "window of 5": lambda: attention.window_mass(q, k, lse, 5, scale=scale),
        "attend, softcap": lambda: attention.attend(q, k, v, scale=scale, softcap=30.0),
        "attend, window 128": lambda: attention.attend(q, k, v, scale=scale, window=128),
        "sink, in float64": lambda: attention.sink_mass(large, k, large_lse, scale=scale),
        "backward": lambda: aten._scaled_dot_product_flash_attention_for_cpu_backward(
            upstream_gradient, q, many_k, many_v, out, lse, 0.0, True, scale=scale
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 4096])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--d-head", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    best_seconds: dict[int, dict[str, float]] = {}
    for tokens in options.tokens:
        table = variants(tokens, options.heads, options.kv_heads, options.d_head, DTYPES[options.dtype])
        for _ in range(options.rounds):
            for name, run in table.items():
                start = time.process_time()
                run()
                seconds = time.process_time() - start
                row = best_seconds.setdefault(tokens, {})
                row[name] = min(row.get(name, float("inf")), seconds)
    print(f"{'tokens':34}" + "".join(f"{tokens:>10}" for tokens in best_seconds))
    for name in next(iter(best_seconds.values())):
        if name == BASELINE:
            cells = [f"{row[name]:9.4f}s" for row in best_seconds.values()]
        else:
            cells = [f"{row[name] / row[BASELINE]:9.2f}×" for row in best_seconds.values()]
        print(f"{name:34}" + "".join(cells))


if __name__ == "__main__":
    main()
