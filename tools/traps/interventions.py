"""Traps in interventions and their statistics. Every `*_script` function is wrong on purpose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from tools.traps.bench import Bench, Trap, TrapNumbers
from tools.traps.dense import DenseModel, DenseText, token_losses
from tools.traps.spectrum import bos_ratio
from torch import Tensor, nn

#: Tokens that are decoded.
N_DECODED = 16
N_SEEDS = 10


def weighted_loss(losses: Sequence[Tensor]) -> float:
    """Return the mean over all predicted tokens, of losses [pos − 1] by text."""
    return float(torch.cat(list(losses)).mean())


def loss_without_bos_mlp(bench: Bench, layer: int) -> float:
    """Return the loss in nats with the MLP's output at position 0 of a layer set to zero."""
    return weighted_loss([bench.dense.losses_without_bos_mlp(text.ids, layer) for text in bench.dense_texts])


def baseline_loss(bench: Bench) -> float:
    """Return the loss of the unedited model in nats."""
    return weighted_loss([text.losses for text in bench.dense_texts])


@lru_cache(maxsize=8)
def causal_run(bench: Bench) -> Any:
    """Run the interventions on a model, once."""
    return bench.measure(
        [
            ("bos-mlp", {"at": "write", "seeds": 0}),
            ("qk-disruption", {"conditions": "massive,random-count", "seeds": N_SEEDS}),
        ]
    )


def condition(bench: Bench, metric: str, name: str) -> dict[str, Any]:
    """Return the row of one condition."""
    (row,) = [row for row in bench.rows(metric, "conditions", causal_run(bench)) if row["condition"] == name]
    return row


def our_loss(bench: Bench) -> float:
    """Return the loss of the unedited model in our tables."""
    return math.log(condition(bench, "bos-mlp", "baseline")["ppl"])


# -- the layer, and edits that change nothing -------------------------------------------------------------


def write_layer(bench: Bench) -> int:
    """Return the layer after which the norm of position 0 has grown most."""
    norms = torch.stack([text.residual[:, 0].norm(dim=-1) for text in bench.dense_texts]).mean(0)
    return int(norms.diff(prepend=torch.zeros(1)).argmax())


def largest_ratio_layer_script(bench: Bench) -> int:
    """Return the layer with the largest BOS ratio under the name of the spike layer."""
    ratios = [[bos_ratio(layer) for layer in text.residual] for text in bench.dense_texts]
    return int(np.mean(ratios, axis=0).argmax())


def idle_layer(bench: Bench) -> TrapNumbers:
    """Measure what the MLP's output at position 0 is worth."""
    unedited = baseline_loss(bench)
    return TrapNumbers(
        loss_without_bos_mlp(bench, write_layer(bench)) - unedited,
        condition(bench, "bos-mlp", "write layer")["delta_nats"],
        loss_without_bos_mlp(bench, largest_ratio_layer_script(bench)) - unedited,
    )


def forgotten_return_script(_module: nn.Module, _args: object, output: Tensor) -> None:
    """Build the edited output, and forget to return it."""
    edited = output.clone()
    edited[:, 0] = 0


def forgotten_return(bench: Bench) -> TrapNumbers:
    """Measure the same edit by a hook that returns nothing."""
    handle = bench.dense.layers[write_layer(bench)].mlp.register_forward_hook(forgotten_return_script)
    edited = [bench.dense.forward(text.ids).losses for text in bench.dense_texts]
    handle.remove()
    right = idle_layer(bench)
    return TrapNumbers(right.reference, right.measured, weighted_loss(edited) - baseline_loss(bench))


# -- decoding ---------------------------------------------------------------------------------------------


def greedy(dense: DenseModel, ids: Sequence[int], *, cached: bool) -> list[int]:
    """Decode `N_DECODED` tokens with or without a KV cache."""
    from transformers import DynamicCache

    tokens, cache = list(ids), DynamicCache(config=dense.model.config) if cached else None
    start = 0
    with torch.no_grad():
        for _ in range(N_DECODED):
            chunk = torch.tensor([tokens[start:]])
            logits = dense.model(chunk, past_key_values=cache, use_cache=cached).logits
            start = len(tokens) if cached else 0
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(ids) :]


class ChunkHookScript:
    """Zeroes row 0 of every chunk that a module sees, and counts them."""

    def __init__(self) -> None:
        self.n_rows = 0

    def __call__(self, _module: nn.Module, _args: object, output: Tensor) -> Tensor:
        self.n_rows += 1
        return torch.cat([torch.zeros_like(output[:, :1]), output[:, 1:]], 1)


def decoding_losses(model: Any, ids: Sequence[int]) -> Tensor:
    """Return the losses of tokens that are passed one by one, with a KV cache, after a prompt of half the text."""
    from transformers import DynamicCache

    cache, tokens = DynamicCache(config=model.config), torch.tensor([list(ids)])
    n_prompt = len(ids) // 2
    chunks = [tokens[:, :n_prompt], *tokens[:, n_prompt:].split(1, 1)]
    with torch.no_grad():
        logits = [model(chunk, past_key_values=cache, use_cache=True).logits[0] for chunk in chunks]
    return token_losses(torch.cat(logits).double(), ids)[n_prompt:]


def decoded_by_script(bench: Bench, ids: Sequence[int]) -> tuple[Tensor, int]:
    """Decode with the script's hook at the write layer's MLP; return the losses and the number of edited rows."""
    hook = ChunkHookScript()
    handle = bench.dense.layers[write_layer(bench)].mlp.register_forward_hook(hook)
    losses = decoding_losses(bench.dense.model, ids)
    handle.remove()
    return losses, hook.n_rows


def decoded_by_us(bench: Bench, ids: Sequence[int]) -> tuple[Tensor, int]:
    """Decode under our edit of position 0; return the losses and the number of edited rows."""
    from phaselens.plugin import Edit
    from phaselens.runs import applied

    edited_rows: list[int] = []

    def silence(tensor: Tensor, site: Any) -> Tensor:
        edited_rows.append(int(site.mask([0]).sum()))
        return torch.zeros_like(tensor)

    edit = Edit(f"blocks.{write_layer(bench)}.hook_mlp_out", silence, positions=[0])
    with applied(bench.lens, [edit]):
        losses = decoding_losses(bench.lens.original_model, ids)
    return losses, sum(edited_rows)


def edited_rows(bench: Bench) -> TrapNumbers:
    """Count the rows that an edit of position 0 changes while tokens are decoded."""
    ids = bench.dense_texts[-1].ids[: 2 * N_DECODED]
    return TrapNumbers(1.0, float(decoded_by_us(bench, ids)[1]), float(decoded_by_script(bench, ids)[1]))


def decoded_losses(bench: Bench) -> TrapNumbers:
    """Measure the loss of decoded tokens under an edit of position 0."""
    ids = bench.dense_texts[-1].ids[: 2 * N_DECODED]
    expected = bench.dense.losses_without_bos_mlp(ids, write_layer(bench))[N_DECODED:]
    return TrapNumbers(
        float(expected.mean()),
        float(decoded_by_us(bench, ids)[0].mean()),
        float(decoded_by_script(bench, ids)[0].mean()),
    )


# -- cells that are selected on the texts they are judged on ----------------------------------------------


def is_massive(squares: Tensor) -> Tensor:
    """Return the cells [head, d_head] whose norm exceeds 5 times the mean, from Σ x²."""
    cells = squares.sqrt()
    return cells > 5 * cells.mean()


def same_text_script(_layer: int, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Zero the massive cells of the very states that are edited, in a pass that earlier layers have changed."""
    edited = [
        states.masked_fill(is_massive(states[0].square().sum(-2))[None, :, None], 0) for states in (q, k)
    ]
    return edited[0], edited[1]


def other_texts_edit(
    bench: Bench, text_number: int
) -> Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the edit of one text by cells that are massive in the clean passes of the other fold's texts."""
    hashes = [text.sha256 for text in bench.run.texts]
    ranks = [sorted(hashes).index(text_hash) for text_hash in hashes]
    others = [
        text
        for rank, text in zip(ranks, bench.dense_texts, strict=True)
        if rank % 2 != ranks[text_number] % 2
    ]
    group = bench.dense.model.config.num_attention_heads // bench.dense.model.config.num_key_value_heads

    def cells(layer: int, states: Callable[[DenseText], Tensor], step: int) -> Tensor:
        squares = torch.stack([states(text)[layer, ::step].square().sum(-2) for text in others]).sum(0)
        return is_massive(squares)[None, :, None]

    def edit(layer: int, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return (
            q.masked_fill(cells(layer, lambda text: text.q, 1), 0),
            k.masked_fill(cells(layer, lambda text: text.k, group), 0),
        )

    return edit


def loss_with_edit(bench: Bench, edits: Sequence[Any]) -> float:
    """Return the loss with queries and keys edited, one edit per text."""
    losses = []
    for text, edit in zip(bench.dense_texts, edits, strict=True):
        with bench.dense.changed(edit=edit):
            losses.append(bench.dense.forward(text.ids).losses)
    return weighted_loss(losses)


def same_texts(bench: Bench) -> TrapNumbers:
    """Measure the loss without massive cells of queries and keys."""
    unedited, n_texts = baseline_loss(bench), len(bench.texts)
    return TrapNumbers(
        loss_with_edit(bench, [other_texts_edit(bench, number) for number in range(n_texts)]) - unedited,
        condition(bench, "qk-disruption", "massive")["delta_nats"],
        loss_with_edit(bench, [same_text_script] * n_texts) - unedited,
    )


# -- statistics -------------------------------------------------------------------------------------------


def losses_by_seed(bench: Bench) -> tuple[np.ndarray, np.ndarray]:
    """Return the losses [text] without massive cells, and [text, seed] without as many random ones."""
    rows = bench.rows("qk-disruption", "texts", causal_run(bench))
    texts = list(dict.fromkeys(row["text"] for row in rows))
    losses = {(row["text"], row["condition"], row["seed"]): row["loss"] for row in rows}
    treated = [losses[text, "massive", None] for text in texts]
    control = [[losses[text, "random-count", seed] for seed in range(N_SEEDS)] for text in texts]
    return np.array(treated), np.array(control)


def seeds_as_n_script(treated: np.ndarray, control: np.ndarray) -> float:
    """Return Cohen's d of treated − control with seeds as the sample: the treated arm is a constant."""
    differences = treated.mean() - control.mean(0)
    return float(differences.mean() / differences.std())


def d_over_texts(treated: np.ndarray, control: np.ndarray) -> float:
    """Return Cohen's d of treated − control with texts as the sample, the control's seeds averaged first."""
    differences = treated - control.mean(1)
    return float(differences.mean() / differences.std(ddof=1))


def seeds_as_n(bench: Bench) -> TrapNumbers:
    """Measure the effect size of massive against random cells."""
    from phaselens.uncertainty import compare_arms

    treated, control = losses_by_seed(bench)
    return TrapNumbers(
        d_over_texts(treated, control),
        compare_arms(treated, control).d_z,
        seeds_as_n_script(treated, control),
    )


def length_weighted_script(losses: Sequence[Tensor]) -> float:
    """Weigh each text's mean loss by its tokens, though one less is predicted."""
    weights = torch.tensor([len(text_losses) + 1 for text_losses in losses], dtype=torch.float64)
    means = torch.stack([text_losses.mean() for text_losses in losses])
    return float((means * weights).sum() / weights.sum())


def length_weighted(bench: Bench) -> TrapNumbers:
    """Measure the loss of the unedited model."""
    losses = [text.losses for text in bench.dense_texts]
    return TrapNumbers(weighted_loss(losses), our_loss(bench), length_weighted_script(losses))


def leaking_conversion(bench: Bench) -> TrapNumbers:
    """Measure the loss of a model whose attention was rewritten without a causal mask."""
    with bench.dense.changed(is_causal=False):
        leaking = [bench.dense.forward(text.ids).losses for text in bench.dense_texts]
    return TrapNumbers(baseline_loss(bench), our_loss(bench), weighted_loss(leaking))


TRAPS = (
    Trap("A layer that writes nothing", "Δ nats without the MLP at BOS", 0.0, idle_layer),
    Trap("An edit that changes nothing", "Δ nats without the MLP at BOS", 0.01, forgotten_return),
    Trap("Position 0 of the current chunk", "rows edited while 16 tokens are decoded", 10, edited_rows),
    Trap("Position 0 of the current chunk", "loss of the decoded tokens, nats", 0.01, decoded_losses),
    Trap("Cells selected on the texts they are judged on", "Δ nats without massive cells", 1e-3, same_texts),
    Trap("Seeds as n", "d of massive against random cells", 1, seeds_as_n),
    Trap("Weights of T tokens", "loss, nats", 0.0, length_weighted),
    Trap("A conversion without a causal mask", "loss, nats", 0.1, leaking_conversion),
)
