"""Traps in norms and spectra of the residual stream. Every `*_script` function is wrong on purpose."""

from __future__ import annotations

import math

import numpy as np
import torch
from tools.traps.bench import Bench, Trap, TrapNumbers, largest, mean
from torch import Tensor


def matrix_entropy(x: Tensor) -> float:
    """Return −Σ p ln p of p = s² / Σ s², s the singular values of x [pos, d_model]."""
    energies = torch.linalg.svdvals(x) ** 2
    return float(torch.special.entr(energies / energies.sum()).sum())


def each_layer(bench: Bench) -> list[Tensor]:
    """Return the residual [pos, d_model] of every text after every layer."""
    return [layer for text in bench.dense_texts for layer in text.residual]


def bos_ratio(x: Tensor) -> float:
    """Return the norm of row 0 over the mean norm of the others."""
    norms = x.norm(dim=-1)
    return float(norms[0] / norms[1:].mean())


# -- pads -------------------------------------------------------------------------------------------------


def padded_ratio(bench: Bench) -> TrapNumbers:
    """Measure the BOS ratio with pads in its denominator."""
    return TrapNumbers(
        mean(map(bos_ratio, each_layer(bench))),
        bench.mean("bos-norm", "texts", "bos_ratio"),
        mean(bos_ratio(layer) for text in bench.padded_texts for layer in text.residual),
    )


def normalised_entropy(x: Tensor) -> float:
    """Return the matrix entropy over the largest possible one, ln of the smaller side."""
    return matrix_entropy(x) / math.log(min(x.shape))


def padded_entropy(bench: Bench) -> TrapNumbers:
    """Measure the normalised matrix entropy with pads among the rows."""
    return TrapNumbers(
        mean(map(normalised_entropy, each_layer(bench))),
        bench.mean("compression", "texts", "entropy_normalised"),
        mean(normalised_entropy(layer) for text in bench.padded_texts for layer in text.residual),
    )


# -- singular values --------------------------------------------------------------------------------------


def unsquared_entropy_script(x: Tensor) -> float:
    """Return the entropy of s / Σ s, without squares."""
    values = torch.linalg.svdvals(x)
    return float(torch.special.entr(values / values.sum()).sum())


def unsquared(bench: Bench) -> TrapNumbers:
    """Measure the matrix entropy of singular values that were not squared."""
    return TrapNumbers(
        mean(map(matrix_entropy, each_layer(bench))),
        bench.mean("compression", "texts", "entropy"),
        mean(map(unsquared_entropy_script, each_layer(bench))),
    )


def anisotropy_script(x: Tensor) -> float:
    """Return 1 − H / ln r under the name of anisotropy, with H of singular values that were not squared."""
    return 1 - unsquared_entropy_script(x) / math.log(min(x.shape))


def anisotropy(bench: Bench) -> TrapNumbers:
    """Measure the first direction's share of the energy."""
    energies = [torch.linalg.svdvals(layer) ** 2 for layer in each_layer(bench)]
    return TrapNumbers(
        mean(energy[0] / energy.sum() for energy in energies),
        bench.mean("compression", "texts", "anisotropy"),
        mean(map(anisotropy_script, each_layer(bench))),
    )


def clamped_entropy_script(x: Tensor) -> float:
    """Return the entropy of a float32 Gram matrix's eigenvalues over its trace, each at least 1e-10."""
    rows = x.float() if len(x) < x.shape[1] else x.float().T
    gram = rows @ rows.T
    shares = (torch.linalg.eigvalsh(gram) / gram.trace()).clamp(min=1e-10)
    return float(-(shares * shares.log()).sum())


def float32_gram(bench: Bench) -> TrapNumbers:
    """Measure the least matrix entropy of a layer from a float32 Gram matrix with clamped eigenvalues."""
    entropies = [[matrix_entropy(layer) for layer in text.residual] for text in bench.dense_texts]
    script = [[clamped_entropy_script(layer) for layer in text.residual] for text in bench.dense_texts]
    return TrapNumbers(
        float(np.mean(entropies, axis=0).min()),
        bench.mean("compression", "summary", "entropy_min"),
        float(np.mean(script, axis=0).min()),
    )


def entropy_or_zero_script(x: Tensor) -> float:
    """Return the entropy, and 0 where it cannot be computed."""
    try:
        entropy = matrix_entropy(x)
    except RuntimeError:
        return 0.0
    return entropy if math.isfinite(entropy) else 0.0


def invented(bench: Bench) -> TrapNumbers:
    """Measure the mean entropy of texts in the last layer, where one text's activations are NaN."""
    from phaselens.spectrum import spectrum

    rows = [text.residual[-1] for text in bench.dense_texts]
    damaged = [torch.full_like(rows[0], torch.nan), *rows[1:]]
    measured = [spectrum(x.float()).entropy for x in damaged]
    return TrapNumbers(
        mean(map(matrix_entropy, rows[1:])),
        mean(None if math.isnan(entropy) else entropy for entropy in measured),
        mean(map(entropy_or_zero_script, damaged)),
    )


# -- norms ------------------------------------------------------------------------------------------------


def last_state_norm_script(bench: Bench) -> float | None:
    """Return the norm of position 0 in the last of `hidden_states`, which is after the final norm."""
    return mean(text.last_state[0].norm() for text in bench.dense_texts)


def final_norm(bench: Bench) -> TrapNumbers:
    """Measure the norm of position 0 after the last layer."""
    last = bench.lens.info.n_layers - 1
    return TrapNumbers(
        mean(text.residual[-1, 0].norm() for text in bench.dense_texts),
        bench.mean("bos-norm", "texts", "bos_norm", layer=last),
        last_state_norm_script(bench),
    )


def half_precision_norm_script(x: np.ndarray) -> float:
    """Return the norm of a float16 vector, whose squares are summed in float16."""
    with np.errstate(over="ignore"):
        return float(np.sqrt((x.astype(np.float16) ** 2).sum(dtype=np.float16)))


def half_norm(bench: Bench) -> TrapNumbers:
    """Measure the largest norm of position 0."""
    rows = [layer[0] for layer in each_layer(bench)]
    return TrapNumbers(
        largest(row.norm() for row in rows),
        largest(row["bos_norm"] for row in bench.rows("bos-norm", "texts")),
        largest(half_precision_norm_script(row.numpy()) for row in rows),
    )


def ratio_or_one_script(x: Tensor) -> float:
    """Return the BOS ratio, and 1 for a text of one token."""
    return bos_ratio(x) if len(x) > 1 else 1.0


def one_token(bench: Bench) -> TrapNumbers:
    """Measure the mean BOS ratio of all texts and of one more that has a single token."""
    import phaselens

    texts = [*bench.texts, ""]
    dense = [*bench.dense_texts, bench.dense.forward(bench.ids(""))]
    run = phaselens.run(bench.lens, metrics=["bos-norm"], texts=texts, max_tokens=96)
    return TrapNumbers(
        mean(bos_ratio(layer) for text in dense for layer in text.residual if len(layer) > 1),
        bench.mean("bos-norm", "texts", "bos_ratio", run),
        mean(ratio_or_one_script(layer) for text in dense for layer in text.residual),
    )


def share_of_means_script(attention: Tensor, mlp: Tensor) -> float:
    """Return the attention's share from the mean norms over all tokens, which the massive ones decide."""
    a, m = attention.norm(dim=-1).mean(), mlp.norm(dim=-1).mean()
    return float(a / (a + m))


def massive_rows(x: Tensor) -> Tensor:
    """Return whether a row's norm is at least 10 times the median, bool [pos]."""
    norms = x.norm(dim=-1)
    return norms >= 10 * np.median(norms)


def content_share(attention: Tensor, mlp: Tensor, x: Tensor) -> float:
    """Return the attention's share by token, mean over tokens that are neither BOS nor massive."""
    a, m = attention.norm(dim=-1), mlp.norm(dim=-1)
    is_content = ~massive_rows(x)
    is_content[0] = False
    return float((a / (a + m))[is_content].mean())


def token_means(bench: Bench) -> TrapNumbers:
    """Measure attention's share of what the layer that writes the norm of position 0 adds to ordinary tokens."""
    write_layer = bench.rows("bos-norm", "summary")[0]["write_layer"]
    outputs = [
        (text.attention[write_layer], text.mlp[write_layer], text.residual[write_layer])
        for text in bench.dense_texts
    ]
    return TrapNumbers(
        mean(content_share(*parts) for parts in outputs),
        bench.mean("layer-balance", "texts", "share_rest", layer=write_layer),
        mean(share_of_means_script(attention, mlp) for attention, mlp, _ in outputs),
    )


# -- massive values ---------------------------------------------------------------------------------------


def massive_cells(states: Tensor) -> float:
    """Return how many cells of [layer, head, pos, d_head] exceed 5 times the mean cell of their layer."""
    cells = states.norm(dim=-2)
    return float((cells > 5 * cells.mean((-1, -2), keepdim=True)).sum())


def unrotated_cells(bench: Bench) -> TrapNumbers:
    """Count the massive cells of queries before the rotation, where a pair's norm is spread differently."""
    return TrapNumbers(
        mean(massive_cells(text.q) for text in bench.dense_texts),
        bench.mean("massive-values", "summary", "q_total"),
        mean(massive_cells(text.q_pre) for text in bench.dense_texts),
    )


TRAPS = (
    Trap("Pads in a ratio", "mean BOS ratio", 0.05, padded_ratio),
    Trap("Pads in a spectrum", "mean normalised matrix entropy", 0.05, padded_entropy),
    Trap("Singular values that are not squared", "mean matrix entropy, nats", 0.1, unsquared),
    Trap("Another anisotropy", "mean anisotropy", 0.05, anisotropy),
    Trap("A float32 Gram matrix", "least matrix entropy of a layer, nats", 0.0, float32_gram),
    Trap("0 for what cannot be computed", "mean matrix entropy of the last layer, nats", 0.1, invented),
    Trap("The final norm's output as a residual", "norm of position 0 after the last layer", 1, final_norm),
    Trap("Norms in float16", "largest norm of position 0", 0.001, half_norm),
    Trap("1 for a text of one token", "mean BOS ratio", 0.05, one_token),
    Trap("Means that massive tokens decide", "attention's share in the write layer", 0.01, token_means),
    Trap("Massive values before the rotation", "massive cells of queries", 0.1, unrotated_cells),
)
