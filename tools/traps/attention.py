"""Traps in statistics of attention. Every `*_script` function is wrong on purpose."""

from __future__ import annotations

import torch
from tools.traps.bench import Bench, Trap, TrapNumbers, largest, mean
from tools.traps.dense import DenseText, softmax_attention
from torch import Tensor

TAU = 0.3
#: Norms of one head's queries and keys in layer 1 of DroPE-Llama-2-7B, the model of the overflow.
QUERY_NORM, KEY_NORM = 1164.0, 975.0
#: The window in which a sink is seen by a few queries only.
WINDOW = 8
SHORT = 8


def sink_scores(pattern: Tensor) -> Tensor:
    """Return the attention on key 0, mean over the queries after it: [...] of pattern [..., query, key]."""
    return pattern[..., 1:, 0].mean(-1)


def mean_score(patterns: list[Tensor]) -> float:
    """Return the mean sink score of patterns [layer, head, query, key] over texts, layers and heads."""
    return float(torch.stack([sink_scores(pattern).mean() for pattern in patterns]).mean())


def sink_rate(scores: list[Tensor]) -> float:
    """Return the share of heads whose score [layer, head] is at least τ: thresholds first, then means."""
    return float(torch.stack([(score >= TAU).double().mean() for score in scores]).mean())


# -- pads -------------------------------------------------------------------------------------------------


def padded_score_script(padded: DenseText) -> Tensor:
    """Average over all rows of a padded batch, as if pads were queries."""
    return padded.pattern[..., 1:, 0].mean(-1)


def beside_the_score(bench: Bench, script: float) -> TrapNumbers:
    """Return the mean sink score in float64 and ours, beside a script's."""
    patterns = [text.pattern for text in bench.dense_texts]
    return TrapNumbers(mean_score(patterns), bench.mean("sinks", "texts", "score"), script)


def padded_queries(bench: Bench) -> TrapNumbers:
    """Measure the mean sink score with pads among the queries."""
    return beside_the_score(bench, mean(padded_score_script(text).mean() for text in bench.padded_texts))


# -- rotation ---------------------------------------------------------------------------------------------


def unrotated_pattern_script(text: DenseText, scale: float) -> Tensor:
    """Recompute attention from the outputs of the projections, which are not rotated yet."""
    return softmax_attention(text.q_pre, text.k_pre, scale)


def unrotated(bench: Bench) -> TrapNumbers:
    """Measure the mean sink score of queries and keys before the rotation."""
    patterns = [unrotated_pattern_script(text, bench.dense.scale) for text in bench.dense_texts]
    return beside_the_score(bench, mean_score(patterns))


# -- query 0 and short texts ------------------------------------------------------------------------------


def with_query0_script(pattern: Tensor) -> Tensor:
    """Average over all queries, query 0 included, which can attend to nothing but itself."""
    return pattern[..., 0].mean(-1)


def query0(bench: Bench) -> TrapNumbers:
    """Measure the sink rate of texts of a few tokens with query 0 counted."""
    texts = [bench.dense.forward(bench.ids(text, SHORT)) for text in bench.texts]
    run = bench.measure(["sinks"], max_tokens=SHORT)
    return TrapNumbers(
        sink_rate([sink_scores(text.pattern) for text in texts]),
        bench.mean("sinks", "summary", "sink_rate", run),
        sink_rate([with_query0_script(text.pattern) for text in texts]),
    )


# -- no BOS -----------------------------------------------------------------------------------------------


def without_bos(bench: Bench) -> TrapNumbers:
    """Measure the mean sink score of texts that were tokenized without BOS, so that position 0 is any word."""
    texts = [bench.dense.forward(text.ids[1:]) for text in bench.dense_texts]
    return beside_the_score(bench, mean_score([text.pattern for text in texts]))


# -- large scores -----------------------------------------------------------------------------------------


def scaled_states(bench: Bench) -> tuple[Tensor, Tensor, float]:
    """Return the first text's queries and keys [layer, head, pos, d_head] with the norms of the study, in float16."""
    text = bench.dense_texts[-1]
    q, k = (
        (states / states.norm(dim=-1).mean() * norm).half()
        for states, norm in ((text.q, QUERY_NORM), (text.k, KEY_NORM))
    )
    return q, k, bench.dense.scale


def half_precision_script(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Multiply queries and keys in their own precision, then scale."""
    return softmax_attention(q, k, scale).float()


def rate_of_nan_script(scores: Tensor) -> float:
    """Count the scores that reach τ; NaN reaches nothing."""
    return float((scores >= TAU).double().mean())


def clamped_script(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Clamp the scores to [−100, 100], so that they are finite."""
    scores = (q.float() @ k.float().transpose(-1, -2) * scale).clamp(-100, 100)
    return scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


def streamed_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return our sink scores [layer, head] of float16 queries and keys."""
    from phaselens.attention import attend, sink_mass, sink_score

    _, lse = attend(q, k, k, scale=scale)
    lengths = torch.full((len(q),), q.shape[2])
    return sink_score(sink_mass(q, k, lse, scale=scale), lengths)


def overflow(bench: Bench) -> TrapNumbers:
    """Measure the sink rate of scores beyond the largest float16 number."""
    q, k, scale = scaled_states(bench)
    exact = sink_scores(softmax_attention(q.double(), k.double(), scale))
    return TrapNumbers(
        sink_rate([exact]),
        sink_rate([streamed_scores(q, k, scale)]),
        rate_of_nan_script(sink_scores(half_precision_script(q, k, scale))),
    )


def nan_rows(bench: Bench) -> TrapNumbers:
    """Measure the share of attention rows that are NaN in float16."""
    q, k, scale = scaled_states(bench)
    pattern = half_precision_script(q, k, scale)
    measured = streamed_scores(q, k, scale)
    return TrapNumbers(
        0.0, float(measured.isnan().double().mean()), float(pattern.isnan().any(-1).double().mean())
    )


def clamped(bench: Bench) -> TrapNumbers:
    """Measure the mean sink score of scores that were clamped."""
    q, k, scale = scaled_states(bench)
    exact = softmax_attention(q.double(), k.double(), scale)
    return TrapNumbers(
        float(sink_scores(exact).mean()),
        float(streamed_scores(q, k, scale).mean()),
        float(sink_scores(clamped_script(q, k, scale)).mean()),
    )


# -- entropy ----------------------------------------------------------------------------------------------


def last_row_entropy_script(pattern: Tensor) -> Tensor:
    """Return the entropy [...] of pattern [..., query, key] in float16, where 1e-10 is 0 and NaN becomes 0."""
    weights = pattern.half()
    rows = -(weights * weights.clamp(min=1e-10).log()).sum(-1)
    rows = torch.where(rows.isnan(), torch.zeros_like(rows), rows)
    return rows.float().mean(-1)


def row_entropies(pattern: Tensor) -> Tensor:
    """Return the entropy of each row, in nats."""
    return torch.special.entr(pattern).sum(-1)


def last_row(bench: Bench) -> TrapNumbers:
    """Measure the mean entropy of attention in half precision."""
    return TrapNumbers(
        mean(row_entropies(text.pattern).mean() for text in bench.dense_texts),
        bench.mean("attention-patterns", "texts", "entropy"),
        mean(last_row_entropy_script(text.pattern).mean() for text in bench.dense_texts),
    )


# -- local attention, distances ---------------------------------------------------------------------------


def local_bos(bench: Bench) -> TrapNumbers:
    """Measure local attention with position 0 among the local keys."""
    return TrapNumbers(
        mean(local_shares(text.pattern, with_bos=False).mean() for text in bench.dense_texts),
        bench.mean("attention-patterns", "texts", "local"),
        mean(local_shares(text.pattern, with_bos=True).mean() for text in bench.dense_texts),
    )


def distance_profile_script(patterns: list[Tensor], n_distances: int, memory: Tensor) -> Tensor:
    """Return attention by distance over the pairs that all texts have, written over `memory` [distance].

    `np.divide(sums, counts, where=counts > 0)` without `out=` returns whatever its new array held before where no
    pair exists. `memory` is that content.
    """
    shortest = min(pattern.shape[-1] for pattern in patterns)
    profile = memory.clone()
    for distance in range(min(shortest, n_distances)):
        profile[distance] = mean(pattern.diagonal(-distance, -2, -1).mean() for pattern in patterns) or 0.0
    return profile


def distances(bench: Bench) -> TrapNumbers:
    """Count the distances up to the longest text whose value in the profile is not a mean of attention."""
    lengths = [text.n_tokens for text in bench.dense_texts]
    run = bench.measure([("attention-patterns", {"distances": max(lengths)})])
    rows = bench.rows("attention-patterns", "profile", run)
    n_without = sum(row["attention"] is None for row in rows if row["layer"] == 0)
    memory = torch.full((max(lengths),), 1e305, dtype=torch.float64)
    profile = distance_profile_script([text.pattern for text in bench.dense_texts], max(lengths), memory)
    return TrapNumbers(0.0, float(n_without), float((profile == 1e305).sum()))


# -- classes of heads -------------------------------------------------------------------------------------


def is_distributed(sink: Tensor, local: Tensor, is_spread: Tensor) -> Tensor:
    """Return whether a head is neither a sink head nor a local one, and is spread: bool [layer, head]."""
    return (sink < TAU) & (local < TAU) & is_spread


def local_shares(pattern: Tensor, *, with_bos: bool) -> Tensor:
    """Return the attention [...] on the 5 keys before a query, mean over the queries after the first."""
    n = pattern.shape[-1]
    query, key = torch.arange(n)[:, None], torch.arange(n)[None]
    is_local = (key < query) & (key >= query - 5)
    if not with_bos:
        is_local &= key > 0
    return (pattern * is_local).sum(-1)[..., 1:].mean(-1)


def median_classes_script(patterns: list[Tensor]) -> float:
    """Return the share of heads that are "distributed": more entropy, in float16, than the layer's median head."""
    entropy = torch.stack([last_row_entropy_script(pattern) for pattern in patterns]).mean(0)
    sink = torch.stack([sink_scores(pattern) for pattern in patterns]).mean(0)
    local = torch.stack([local_shares(pattern, with_bos=True) for pattern in patterns]).mean(0)
    is_spread = entropy > entropy.quantile(0.5, dim=-1, keepdim=True)
    return float(is_distributed(sink, local, is_spread).double().mean())


def head_classes(bench: Bench) -> TrapNumbers:
    """Measure the share of heads that attend to many keys."""
    patterns = [text.pattern for text in bench.dense_texts]
    normalised = [
        (row_entropies(pattern)[..., 1:] / torch.arange(2, pattern.shape[-1] + 1).log()).mean(-1)
        for pattern in patterns
    ]
    sink = torch.stack([sink_scores(pattern) for pattern in patterns]).mean(0)
    local = torch.stack([local_shares(pattern, with_bos=False) for pattern in patterns]).mean(0)
    exact = is_distributed(sink, local, torch.stack(normalised).mean(0) >= 0.7)
    return TrapNumbers(
        float(exact.double().mean()),
        bench.mean("attention-patterns", "summary", "distributed_heads"),
        median_classes_script(patterns),
    )


# -- the matrix -------------------------------------------------------------------------------------------


def no_mask_script(text: DenseText, scale: float) -> Tensor:
    """Apply the softmax to all scores, those of later keys included."""
    return softmax_attention(text.q, text.k, scale, is_causal=False)


def no_mask(bench: Bench) -> TrapNumbers:
    """Measure the mean sink score without a causal mask."""
    patterns = [no_mask_script(text, bench.dense.scale) for text in bench.dense_texts]
    return beside_the_score(bench, mean_score(patterns))


def tiled_keys_script(text: DenseText, n_key_heads: int, scale: float) -> Tensor:
    """Share key heads among query heads in turn, where the model shares them among neighbours."""
    n_heads = text.k.shape[1]
    key_heads = text.k[:, :: n_heads // n_key_heads]
    return softmax_attention(text.q, key_heads.repeat(1, n_heads // n_key_heads, 1, 1), scale)


def tiled_keys(bench: Bench) -> TrapNumbers:
    """Measure the largest error of a head's sink score with key heads in the wrong order."""
    config = bench.dense.model.config
    errors = [
        (
            sink_scores(tiled_keys_script(text, config.num_key_value_heads, bench.dense.scale))
            - sink_scores(text.pattern)
        )
        for text in bench.dense_texts
    ]
    return TrapNumbers(0.0, largest_head_error(bench), largest(error.abs().max() for error in errors))


def largest_head_error(bench: Bench) -> float:
    """Return the largest difference of our sink scores from the dense ones, over texts, layers and heads."""
    rows = bench.rows("sinks", "texts")
    scores = torch.stack([sink_scores(text.pattern) for text in bench.dense_texts]).flatten()
    return largest((torch.tensor([row["score"] for row in rows], dtype=torch.float64) - scores).abs())


def hidden_sink_script(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Return exp(s₀ − lse) for every query, whether it sees key 0 or not."""
    return ((q * k[..., :1, :]).sum(-1) * scale - lse).exp()[..., 1:].mean(-1)


def hidden_sink(bench: Bench) -> TrapNumbers:
    """Measure the mean sink score in a sliding window."""
    from phaselens.attention import attend, sink_mass, sink_score

    exact, measured, script = [], [], []
    for text in bench.dense_texts:
        q, k, scale = text.q.float(), text.k.float(), bench.dense.scale
        _out, lse = attend(q, k, k, scale=scale, window=WINDOW)
        lengths = torch.full((len(q),), text.n_tokens)
        sink = sink_mass(q, k, lse, scale=scale, window=WINDOW)
        measured.append(sink_score(sink, lengths, window=WINDOW).mean())
        script.append(hidden_sink_script(q, k, lse, scale).mean())
        n = text.n_tokens
        seen = torch.ones(n, n, dtype=torch.bool).tril().triu(1 - WINDOW)
        scores = (text.q @ text.k.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
        exact.append(scores.softmax(-1)[..., 1:WINDOW, 0].mean())
    return TrapNumbers(mean(exact), mean(measured), mean(script))


TRAPS = (
    Trap("Pads as queries", "mean sink score", 0.01, padded_queries),
    Trap("Queries and keys before the rotation", "mean sink score", 0.01, unrotated),
    Trap("Query 0 and short texts", "sink rate, texts of 8 tokens", 0.05, query0),
    Trap("Position 0 without BOS", "mean sink score", 0.01, without_bos),
    Trap("Overflow in float16", "share of rows that are NaN", 0.5, nan_rows),
    Trap("NaN ≥ τ", "sink rate", 0.1, overflow),
    Trap("Clamped scores", "mean sink score", 0.01, clamped),
    Trap("The entropy of the last row", "mean entropy, nats", 0.5, last_row),
    Trap("The sink counted as local", "mean local attention", 0.01, local_bos),
    Trap("Uninitialised distances", "distances that are not a mean of attention", 1, distances),
    Trap("Heads above the median", "share of heads that are distributed", 0.04, head_classes),
    Trap("No causal mask", "mean sink score", 0.01, no_mask),
    Trap("Key heads in the wrong order", "largest error of a head's sink score", 0.0, tiled_keys),
    Trap("A sink that the query cannot see", "mean sink score, window of 8", 0.1, hidden_sink),
)
