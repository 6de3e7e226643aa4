"""Read predictions out of the residual stream: the logit lens, and direct logit attribution.

The **logit lens** applies the model's own final norm and unembedding to the residual that enters each layer
(nostalgebraist 2020): what the model would predict if the layers above did nothing. **Direct logit attribution** splits
a logit, or the difference of two, into what the embedding, each head and each MLP wrote into the residual stream, with
the final norm's divisor held fixed (Elhage et al. 2021): what reaches the logits directly, without later layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from phaselens.errors import InputError, RefusedModel, is_whole, require_whole, short_form
from phaselens.lens.final_norm import frozen_final_norm
from phaselens.lens.points import Hook, in_layer
from phaselens.lens.token_losses import Unembedding, unembedding_of
from phaselens.patching.experiment import Experiment
from phaselens.patching.metrics import token_id
from phaselens.patching.passes import capture_hook, hooks_from_layer
from phaselens.patching.prompts import Prompt, token_text
from phaselens.patching.results import TextResult, unmeasured
from phaselens.patching.stream_parts import StreamParts, rounding_of
from phaselens.patching.targets import resolve_position
from phaselens.patching.wording import number_phrase, number_text
from phaselens.plugin import Column, Table, TableSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, repr=False)
class LogitLens(TextResult):
    """The next tokens that the residual stream predicts at each depth; row i is the residual entering layer i.

    `depths` are 0 … n_layers; the last is the residual after all layers, whose predictions are the model's own. `top`
    are the most probable tokens of each depth with their probabilities, `values` the metric at each depth (None without
    one).
    """

    label: str
    pos: int
    word: str
    depths: tuple[int, ...]
    top: tuple[tuple[tuple[str, float], ...], ...]
    metric: str | None
    values: tuple[float, ...] | None
    bos: str = field(kw_only=True)

    def to_table(self) -> Table:
        """Return one row per depth: the most probable tokens with their probabilities, and the metric."""
        columns = [Column("depth", int, "layers", "layers that have been run")]
        for rank in range(1, 1 + len(self.top[0])):
            columns.append(Column(f"token_{rank}", str, None, f"token of rank {rank}"))
            columns.append(Column(f"p_{rank}", float, "probability", "its probability"))
        if self.values is not None:
            columns.append(Column("value", float, f"of {self.metric}", "the metric of these logits"))
        values = [()] * len(self.depths) if self.values is None else [(value,) for value in self.values]
        return TableSpec("logit lens", tuple(columns)).build(
            (depth, *(cell for pair in tokens for cell in pair), *value)
            for depth, tokens, value in zip(self.depths, self.top, values, strict=True)
        )

    def __str__(self) -> str:
        lines = [f"logit lens of {self.label!r}, next token after position {self.pos} {self.word}"]
        width = max(len(text) for tokens in self.top for text, _ in tokens)
        for row, (depth, tokens) in enumerate(zip(self.depths, self.top, strict=True)):
            cells = "  ".join(f"{text:>{width}} {number_text(p, digits=3)}" for text, p in tokens)
            value = "" if self.values is None else f"  {number_text(self.values[row], signed=True):>9}"
            lines.append(f"{depth:3}  {cells}{value}")
        if self.metric is not None:
            lines.append(f"note: the last column is {self.metric}")
        lines.append(
            "note: row i is the residual entering layer i; the last row is the model's own prediction"
        )
        return "\n".join([*lines, f"bos: {self.bos}"])


@dataclass(frozen=True, repr=False)
class LogitAttribution(TextResult):
    """What each part of the model writes directly into a logit, or into the difference of two.

    `embed` is what enters layer 0; `attn` and `mlp` are [layer], masked where a layer has no such part: then the whole
    layer is in `mlp`. `heads` [layer, head] and `attn_bias` [layer] split `attn`, and are masked where they do not
    (`notes` says why). `constant` is the part of the biases of final norm and unembedding. The sum of `embed`, `attn`,
    `mlp` and `constant` is `total`, the model's own logit (before a soft cap, if it has one). All are float64, in the
    unit of logits.
    """

    quantity: str
    pos: int
    word: str
    total: float
    constant: float
    embed: float
    attn: np.ma.MaskedArray[Any, Any]
    mlp: np.ma.MaskedArray[Any, Any]
    heads: np.ma.MaskedArray[Any, Any]
    attn_bias: np.ma.MaskedArray[Any, Any]
    notes: tuple[str, ...] = ()
    bos: str = field(kw_only=True)

    def to_table(self) -> Table:
        """Return one row per part; rows `attn` are the sums of rows `head` and `attn bias` of their layer."""
        rows: list[tuple[Any, ...]] = [("embed", None, None, self.embed)]
        for layer in range(len(self.attn)):
            for name, values in (("attn", self.attn), ("mlp", self.mlp), ("attn bias", self.attn_bias)):
                if values[layer] is not np.ma.masked:
                    rows.append((name, layer, None, float(values[layer])))
            heads = [
                (head, value) for head, value in enumerate(self.heads[layer]) if value is not np.ma.masked
            ]
            rows += [("head", layer, head, float(value)) for head, value in heads]
        return _ATTRIBUTION_TABLE.build([*rows, ("constant", None, None, self.constant)])

    def strongest(self, n: int = 10) -> list[tuple[str, float]]:
        """Return the `n` parts with the largest contribution by absolute value: heads where they are known."""
        require_whole("n", n, 1)
        parts: list[tuple[str, float]] = [("embed", self.embed), ("constant", self.constant)]
        for layer in range(len(self.attn)):
            heads = [
                (f"head {layer}.{head}", float(value))
                for head, value in enumerate(self.heads[layer])
                if value is not np.ma.masked
            ]
            if heads:
                parts += [*heads, (f"attn bias {layer}", float(self.attn_bias[layer]))]
            elif self.attn[layer] is not np.ma.masked:
                parts.append((f"attn {layer}", float(self.attn[layer])))
            parts.append((f"mlp {layer}", float(self.mlp[layer])))
        return sorted(parts, key=lambda part: -abs(part[1]))[:n]

    def __str__(self) -> str:
        lines = [
            f"direct attribution of {self.quantity} at position {self.pos} {self.word}",
            f"total {number_text(self.total, signed=True)}; largest parts:",
        ]
        lines += [f"  {name:12} {number_text(value, signed=True):>9}" for name, value in self.strongest()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes), f"bos: {self.bos}"])


_ATTRIBUTION_TABLE = TableSpec(
    "attribution",
    (
        Column("part", str, None, "embed, attn, mlp, head, attn bias or constant"),
        Column("layer", int, "index", "0-based"),
        Column("head", int, "index", "0-based"),
        Column(
            "contribution", float, "logits", "what the part adds to the logit, the final norm's divisor fixed"
        ),
    ),
    "One row per part; attn is the sum of its heads and its bias.",
)


def logit_lens(source: Prompt | Experiment, *, pos: int = -1, top: int = 3) -> LogitLens:
    """Apply the model's final norm and unembedding to the residual that enters each layer.

    Args:
        source: a prompt, or an experiment, whose edited run is read and whose metric is measured at each depth.
        pos: the position whose next token is predicted; negative from the end.
        top: the number of tokens to list.

    Raises:
        InputError: for a position or number out of range, or a model whose layers read more than the residual.

    >>> from phaselens.testing import tiny_lens
    >>> from phaselens.patching import prompt
    >>> result = logit_lens(prompt(tiny_lens(), "to be"))
    >>> result.depths, len(result.top[0])
    ((0, 1, 2), 3)
    """
    prompt, hooks = _run_of(source, "logit_lens")
    lens = prompt.lens
    if not is_whole(top) or not 1 <= top <= lens.info.d_vocab:
        raise InputError(f"top={short_form(top)}: give a number, 1 to {lens.info.d_vocab}")
    position = resolve_position(pos, len(prompt))
    if lens.resume_problem is not None:
        raise InputError(
            f"logit_lens: {lens.info.label} does not predict from one residual stream: {lens.resume_problem}"
        )
    metric = source.metric if isinstance(source, Experiment) else None
    if metric is not None and metric.misfit(len(prompt)):
        metric = None
    n_layers = lens.info.n_layers
    points = [
        *(in_layer(layer, "hook_resid_pre") for layer in range(n_layers)),
        in_layer(n_layers - 1, "hook_resid_post"),
    ]
    residuals: dict[str, Tensor] = {}
    lens.stream(prompt.tokens, [*hooks, *(capture_hook(point, residuals) for point in points)])
    top_tokens, values = [], []
    for point in points:
        logits = lens.stream(
            residual=residuals[point],
            start_at_layer=n_layers,
            hooks=hooks_from_layer(hooks, n_layers),
            unembed=True,
        )
        probabilities = logits[0, position].double().softmax(-1)
        ranking = probabilities.topk(top).indices.tolist()
        top_tokens.append(tuple((token_text(lens, token), float(probabilities[token])) for token in ranking))
        if metric is not None:
            values.append(float(metric(logits, prompt.tokens)[0]))
    return LogitLens(
        lens.info.label,
        position,
        prompt.words[position],
        tuple(range(n_layers + 1)),
        tuple(top_tokens),
        metric.name if metric is not None else None,
        tuple(values) if metric is not None else None,
        bos=prompt.bos,
    )


def direct_logit_attribution(
    source: Prompt | Experiment, a: str | int, b: str | int | None = None, *, pos: int = -1
) -> LogitAttribution:
    """Split the logit of token `a`, or of `a` minus that of `b`, into what each part of the model writes into it.

    Args:
        source: a prompt, or an experiment, whose edited run is split.
        a: a text of one token (mind the leading space), or a token id.
        b: the token whose logit is subtracted; None for the logit of `a` alone.
        pos: the position whose next token is predicted; negative from the end.

    Raises:
        InputError: for a token or position that does not exist.
        RefusedModel: for a model whose logits are not a linear map of its final norm's output, or whose parts do not
            add up to them.

    >>> from phaselens.testing import tiny_lens
    >>> from phaselens.patching import prompt
    >>> result = direct_logit_attribution(prompt(tiny_lens(), "to be"), "a", "b")
    >>> parts = result.embed + result.constant + result.attn.sum() + result.mlp.sum()
    >>> bool(abs(parts - result.total) < 1e-5), result.heads.shape
    (True, (2, 4))
    """
    import torch

    prompt, hooks = _run_of(source, "direct_logit_attribution")
    lens = prompt.lens
    position = resolve_position(pos, len(prompt))
    ids = [token_id(lens, token) for token in ((a,) if b is None else (a, b))]
    if b is not None and ids[0] == ids[1]:
        raise InputError(
            f"direct_logit_attribution: {a!r} and {b!r} are the same token; give two different tokens"
        )
    unembedding = unembedding_of(lens)
    if not isinstance(unembedding, Unembedding):
        raise RefusedModel(
            f"{lens.info.label}: its unembedding is not one matrix, so a logit is not split into parts"
        )
    stream = StreamParts(lens, prompt, position, hooks)
    signs = (1.0, -1.0)[: len(ids)]
    output = sum(
        (sign * unembedding.weight[index].detach().double() for sign, index in zip(signs, ids, strict=True)),
        torch.zeros((), dtype=torch.float64, device=unembedding.weight.device),
    )
    offset = 0.0
    if unembedding.bias is not None:
        offset = sum(
            sign * float(unembedding.bias[index].detach()) for sign, index in zip(signs, ids, strict=True)
        )
    direction, constant = frozen_final_norm(lens, stream.final, output * unembedding.factor)
    constant += offset * unembedding.factor

    def contribution(part: Tensor) -> float:
        return float(direction @ part.detach().double().to(direction.device))

    n_layers, n_heads = lens.info.n_layers, lens.info.n_heads
    attn, mlp, attn_bias = (unmeasured((n_layers,)) for _ in range(3))
    heads = unmeasured((n_layers, n_heads))
    reasons: dict[str, list[int]] = {}
    for layer in range(n_layers):
        attention, remainder = stream.parts(layer)
        mlp[layer] = contribution(remainder)
        if attention is None:
            reasons.setdefault("attention and MLP are not told apart; both are in mlp", []).append(layer)
            continue
        attn[layer] = contribution(attention)
        split = stream.heads(layer, attention)
        if isinstance(split, str):
            reasons.setdefault(f"heads are not split: {split}", []).append(layer)
            continue
        by_head, bias = split
        heads[layer, : len(by_head)] = [contribution(head) for head in by_head]
        attn_bias[layer] = contribution(bias)
    embed = contribution(stream.embed)
    total = embed + constant + float(attn.sum() if attn.count() else 0.0) + float(mlp.sum())
    own = _logit_before_softcap(stream.logits, ids, unembedding.softcap)
    sizes = sum(abs(float(value)) for value in (embed, constant, *attn.compressed(), *mlp))
    if not abs(total - own) <= rounding_of(lens.dtype) * max(sizes, 1.0):
        raise RefusedModel(
            f"{lens.info.label}: the parts of the residual add up to {total:.6g}, its logit is {own:.6g}; an edit "
            "after the layers, or a step that is not linear, lies between"
        )
    notes = [f"{number_phrase('layer', layers)}: {reason}" for reason, layers in reasons.items()]
    if unembedding.softcap is not None:
        notes.append(f"the logits are before their soft cap of {unembedding.softcap:g}")
    names = [token_text(lens, index) for index in ids]
    quantity = f"logit of {names[0]}" if b is None else f"logit of {names[0]} − {names[1]}"
    return LogitAttribution(
        quantity, position, prompt.words[position], own, constant, embed, attn, mlp, heads, attn_bias,
        tuple(notes), bos=prompt.bos,
    )  # fmt: skip


def _run_of(source: Prompt | Experiment, name: str) -> tuple[Prompt, list[Hook]]:
    """Return the prompt to read, and the edits of its run."""
    if isinstance(source, Experiment):
        return source.edited, source.hooks()
    if isinstance(source, Prompt):
        return source, []
    raise InputError(f"{name}: expected source as a prompt or an Experiment, received {short_form(source)}")


def _logit_before_softcap(logits: Tensor, ids: Sequence[int], softcap: float | None) -> float:
    """Return the logit of the first token, minus that of the second if there are two, before the model's soft cap."""
    values = [float(logits[index].double()) for index in ids]
    if softcap is not None:
        values = [softcap * math.atanh(value / softcap) for value in values]
    return values[0] - sum(values[1:])
