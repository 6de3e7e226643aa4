"""Compare the speed and the values of sweeps with TransformerLens' own functions, on the same model and prompts.

    python tools/bench/patching.py [--tokens 32] [--rounds 3] [--dtype float32]

Both are timed alternately in one process; the fastest round counts. --layers uses a random model instead.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

#: what, by, and the name of TransformerLens' function; its axes are those of our sweep.
SWEEPS = (
    ("resid", "pos", "resid_pre"),
    ("attn", "pos", "attn_out"),
    ("mlp", "pos", "mlp_out"),
    ("head", "head", "attn_head_out_all_pos"),
    ("head", "pos-head", "attn_head_out_by_pos"),
    ("q", "pos-head", "attn_head_q_by_pos"),
    ("k", "pos-head", "attn_head_k_by_pos"),
    ("v", "pos-head", "attn_head_v_by_pos"),
    ("pattern", "head", "attn_head_pattern_all_pos"),
)


def experiment_of(lens: Any, n_tokens: int) -> Any:
    """Make an experiment on two prompts that differ in the middle token, with a difference of two logits."""
    from phaselens.patching import Experiment, LogitMetric, Prompt

    clean_ids = [0, *(2 + (37 * position) % (lens.info.d_vocab - 3) for position in range(1, n_tokens))]
    corrupt_ids = list(clean_ids)
    corrupt_ids[n_tokens // 2] = 2 + (clean_ids[n_tokens // 2] + 11) % (lens.info.d_vocab - 3)
    metric = LogitMetric("logit difference", lambda logits, _tokens: logits[:, -1, 5] - logits[:, -1, 9])
    return Experiment(
        Prompt(lens, "clean", tuple(clean_ids)), Prompt(lens, "corrupt", tuple(corrupt_ids)), metric
    )


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the wall time of `work` and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> None:
    """Print one line per sweep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument(
        "--layers", type=int, help="a random Llama with this many layers, d_model 256, instead of `rope`"
    )
    parser.add_argument("--sweeps", nargs="+", choices=sorted({what for what, _, _ in SWEEPS}))
    options = parser.parse_args()

    import torch
    from transformer_lens import patching

    from phaselens.patching import KINDS

    torch.set_num_threads(options.threads)
    # TransformerLens keeps its results in torch's default dtype; this keeps its rounding out of the difference.
    torch.set_default_dtype(getattr(torch, options.dtype))
    lens = _lens(options.layers, getattr(torch, options.dtype))
    experiment = experiment_of(lens, options.tokens)
    print(
        f"{lens.info.label}: {lens.info.n_layers} layers, {lens.info.n_heads} heads; {options.tokens} tokens, "
        f"{options.threads} thread(s), {options.dtype}, best of {options.rounds}"
    )
    print(f"{'sweep':16}{'cells':>7}{'theirs s':>10}{'ours s':>9}{'ratio':>8}{'largest difference':>21}")
    corrupt = experiment.corrupt.tokens

    def metric(logits: Any) -> Any:
        return experiment.metric(logits, corrupt)[0]

    for what, by, name in SWEEPS:
        if options.sweeps and what not in options.sweeps:
            continue
        tl_patch: Callable[..., Any] = getattr(patching, f"get_act_patch_{name}")
        # Cache only the patched points: a cache of everything builds each attention matrix and rounds differently.
        _, cache = lens.run_with_cache(
            experiment.clean.tokens, names_filter=lambda hook, what=what: hook.endswith(KINDS[what])
        )
        timings: list[tuple[float, float]] = []
        for _ in range(options.rounds):
            with torch.no_grad():
                slow, expected = seconds(
                    lambda sweep=tl_patch, cache=cache: sweep(lens, corrupt, cache, metric)
                )
            fast, sweep = seconds(lambda what=what, by=by: experiment.sweep(what, by=by))
            timings.append((slow, fast))
        slow, fast = (min(times) for times in zip(*timings, strict=True))
        difference = float(abs(sweep.values - expected.double().numpy()).max())
        print(
            f"{what + ' ' + by:16}{sweep.values.size:7}{slow:10.3f}{fast:9.3f}{slow / fast:8.1f}{difference:21.1e}",
            flush=True,
        )


def _lens(layers: int | None, dtype: Any) -> Any:
    import phaselens
    from phaselens.testing import tiny_model

    if layers is None:
        return phaselens.load("rope", dtype=dtype, device="cpu", check=False)
    model = tiny_model(
        "llama", dtype=dtype, num_hidden_layers=layers, hidden_size=256, intermediate_size=704,
        num_attention_heads=8, num_key_value_heads=8, vocab_size=2048, max_position_embeddings=512,
    )  # fmt: skip
    return phaselens.load(model, label="random", check=False)


if __name__ == "__main__":
    main()
