"""Traps of the libraries that scripts are built on. Every `*_script` function is wrong on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from tools.traps.bench import Bench, Trap, TrapNumbers
from tools.traps.dense import DenseModel, token_losses
from tools.traps.interventions import decoding_losses, write_layer
from torch import Tensor, nn

#: Pads before a text.
N_PADS = 8
#: Tokens of the text that is decoded or padded.
N_TOKENS = 32


def last_ids(bench: Bench) -> list[int]:
    """Return the beginning of the last text."""
    return bench.dense_texts[-1].ids[:N_TOKENS]


@torch.no_grad()
def losses_of(dense: DenseModel, ids: Sequence[int]) -> Tensor:
    """Return the losses [pos − 1] of a text."""
    return token_losses(dense.model(torch.tensor([list(ids)]), use_cache=False).logits[0], ids)


# -- a point that is only one branch ----------------------------------------------------------------------


def without_row_0(x: Tensor) -> Tensor:
    """Return x [batch, pos, d_model] with zeros in row 0."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], 1)


def middle_removed(dense: DenseModel, layer: int, ids: Sequence[int]) -> Tensor:
    """Return the losses with the residual between attention and MLP set to zero at position 0."""
    block, entering = dense.layers[layer], []

    def note(_module: nn.Module, args: tuple[Any, ...]) -> None:
        entering.append(args[0])

    def cancel(_module: nn.Module, _args: object, output: tuple[Any, ...]) -> tuple[Any, ...]:
        attention = torch.cat([-entering[-1][:, :1], output[0][:, 1:]], 1)
        return (attention, *output[1:])

    with ExitStack() as stack:
        stack.callback(block.register_forward_pre_hook(note).remove)
        stack.callback(block.self_attn.register_forward_hook(cancel).remove)
        return losses_of(dense, ids)


def one_branch_script(dense: DenseModel, layer: int, ids: Sequence[int]) -> Tensor:
    """Edit the input of the second norm, which is the MLP's branch alone: the skip path keeps the old residual."""
    handle = dense.layers[layer].post_attention_layernorm.register_forward_pre_hook(
        lambda _module, args: (without_row_0(args[0]),)
    )
    try:
        return losses_of(dense, ids)
    finally:
        handle.remove()


def one_branch(bench: Bench) -> TrapNumbers:
    """Measure the loss without the residual at BOS between attention and MLP of the write layer."""
    from phaselens.plugin import Edit
    from phaselens.runs import applied

    layer, ids = write_layer(bench), last_ids(bench)
    with applied(bench.lens, [Edit(f"blocks.{layer}.hook_resid_mid", 0.0, positions=[0])]):
        logits = bench.lens.stream(torch.tensor([ids]), unembed=True)[0].double()
    return TrapNumbers(
        float(middle_removed(bench.dense, layer, ids).mean()),
        float(token_losses(logits, ids).mean()),
        float(one_branch_script(bench.dense, layer, ids).mean()),
    )


# -- caches and masks -------------------------------------------------------------------------------------


@torch.no_grad()
def ignored_cache_script(dense: DenseModel, ids: Sequence[int]) -> Tensor:
    """Decode the second half of a text with a model that ignores the cache that it is given."""
    n_prompt = len(ids) // 2
    chunks = [ids[:n_prompt], *([token] for token in ids[n_prompt:])]
    logits = [dense.model(torch.tensor([list(chunk)]), use_cache=False).logits[0] for chunk in chunks]
    return token_losses(torch.cat(logits), ids)[n_prompt:]


def ignored_cache(bench: Bench) -> TrapNumbers:
    """Measure the loss of decoded tokens."""
    ids = last_ids(bench)
    n_prompt = len(ids) // 2
    return TrapNumbers(
        float(losses_of(bench.dense, ids)[n_prompt:].mean()),
        float(decoding_losses(bench.lens.original_model, ids).mean()),
        float(ignored_cache_script(bench.dense, ids).mean()),
    )


def padded_on_the_left(bench: Bench) -> list[int]:
    """Return the text with pads before it."""
    return [bench.lens.tokenizer.eos_token_id] * N_PADS + last_ids(bench)


def dropped_mask_script(bench: Bench) -> Tensor:
    """Run a batch that is padded on the left through an attention function without a registered mask."""
    return losses_of(bench.dense, padded_on_the_left(bench))[N_PADS:]


def masked_losses(bench: Bench) -> Tensor:
    """Return our losses of the same padded text, with its mask."""
    tokens = torch.tensor([padded_on_the_left(bench)])
    mask = torch.ones_like(tokens)
    mask[:, :N_PADS] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = bench.lens.original_model(
            tokens, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
    return token_losses(logits[0, N_PADS:].double(), last_ids(bench))


def dropped_mask(bench: Bench) -> TrapNumbers:
    """Measure the loss of a text with pads before it."""
    return TrapNumbers(
        float(losses_of(bench.dense, last_ids(bench)).mean()),
        float(masked_losses(bench).mean()),
        float(dropped_mask_script(bench).mean()),
    )


TRAPS = (
    Trap("A point that is one branch", "loss without the residual at BOS, nats", 0.01, one_branch),
    Trap("A cache that is ignored", "loss of the decoded tokens, nats", 0.1, ignored_cache),
    Trap("A padding mask that is dropped", "loss, 8 pads on the left, nats", 0.01, dropped_mask),
)
