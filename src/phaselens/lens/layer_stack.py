"""The parts of a model outside of its layers, found in one recorded forward: the stack of layers and what surrounds it.

The stack is the list of modules that pass one tensor, the residual stream, from each to the next. No name is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from phaselens.errors import RefusedModel
from phaselens.lens.module_calls import ModuleCall, noting_attention, recording_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

N_PROBE_TOKENS = 11
"""A number of tokens that is no usual number of heads or experts."""


@dataclass(frozen=True, eq=False)
class LayerStack:
    """The paths of a model's parts, within the model: the list of layers, and the modules around it.

    ``layers`` are the calls of the layers, in order. ``heads`` are the modules that compute logits from
    what the model's body returns, one after the other. A part that the model does not have is None.
    """

    path: str
    layers: tuple[ModuleCall, ...]
    calls: tuple[ModuleCall, ...]
    embedding: str | None
    positions: str | None
    final_norm: str | None
    unembedding: str | None
    heads: tuple[str, ...]

    @property
    def streams_first(self) -> bool:
        """Whether the layers pass several residual streams, [stream, batch, pos, d_model] (Gemma 3n)."""
        entering = self.layers[0].input
        return entering is not None and _has_streams_first(entering)

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return len(self.layers)


def probe_ids(model: PreTrainedModel, n_tokens: int = N_PROBE_TOKENS) -> Tensor:
    """Return a few token ids [1, pos], the same for every model with a vocabulary of this size."""
    embedding = model.get_input_embeddings()
    n_ids = int(embedding.weight.shape[0])
    ids = torch.randint(n_ids, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    return ids.to(embedding.weight.device)


def find_stack(model: PreTrainedModel, family: str) -> LayerStack:
    """Return the stack of layers of an unwrapped model, by one forward of a few tokens.

    Raises:
        RefusedModel: for a model without one stack of layers that each run once.
    """
    modules = dict(model.named_modules())
    modules.pop("", None)
    # One token throughout, so that what differs between positions is an encoding of positions.
    ids = torch.full_like(probe_ids(model), int(model.get_input_embeddings().weight.shape[0]) // 2)
    with recording_modules(modules) as calls, noting_attention(calls, N_PROBE_TOKENS):
        model(input_ids=ids, use_cache=False)
    path, layers = _stack_of(model, calls, family)
    last = layers[-1]
    names = {id(module): name for name, module in modules.items()}

    def name_of(module: nn.Module | None) -> str | None:
        return None if module is None else names.get(id(module))

    unembedding = name_of(model.get_output_embeddings())
    after = [call for call in calls if call.began > last.ended and call.input is not None]
    body = next(call for call in calls if call.began <= last.began and call.ended >= last.ended)
    if unembedding is None:
        d_vocab = model.get_input_embeddings().weight.shape[0]
        heads = [call for call in after if call.output is not None and call.output.shape[-1] == d_vocab]
        unembedding = heads[-1].path if heads and not list(heads[-1].module.children()) else None
    norms = [
        call.path
        for call in after
        if call.ended < body.ended and not list(call.module.children()) and same(call.input, last.output)
    ]
    return LayerStack(
        path,
        tuple(layers),
        tuple(calls),
        name_of(model.get_input_embeddings()),
        _positions(calls, layers[0]),
        norms[0] if norms else None,
        unembedding,
        _heads(model, calls, body),
    )


def _heads(model: PreTrainedModel, calls: Sequence[ModuleCall], body: ModuleCall) -> tuple[str, ...]:
    """Return the outermost modules that the model calls after its body, up to the one that computes logits."""
    n_ids = model.get_input_embeddings().weight.shape[0]
    end, names = body.ended, []
    for call in calls:
        if call.began > end and call.output is not None:
            names.append(call.path)
            if call.output.shape[-1] == n_ids:
                return tuple(names)
            end = call.ended
    return ()


def _positions(calls: Sequence[ModuleCall], first_layer: ModuleCall) -> str | None:
    """Return the embedding of positions: a table looked up before the first layer whose rows differ by position.

    All tokens are the same.
    """
    width = None if first_layer.input is None else first_layer.input.shape[-1]
    for call in calls:
        rows = call.output
        if call.ended > first_layer.began or rows is None or not isinstance(call.module, nn.Embedding):
            continue
        is_table = rows.dim() in (2, 3) and rows.shape[-2:] == (N_PROBE_TOKENS, width)
        if is_table and not same(rows[..., :1, :].expand_as(rows), rows):
            return call.path
    return None


def _stack_of(
    model: PreTrainedModel, calls: Sequence[ModuleCall], family: str
) -> tuple[str, list[ModuleCall]]:
    calls_by_module: dict[int, list[ModuleCall]] = {}
    for call in calls:
        calls_by_module.setdefault(id(call.module), []).append(call)
    has_attention = any(call.attention for call in calls)
    stacks: list[tuple[str, list[ModuleCall]]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        layer_calls = [call for layer in module for call in calls_by_module.get(id(layer), [])]
        if not layer_calls or (has_attention and not any(call.attention for call in layer_calls)):
            continue
        if any(name.startswith(f"{outer}.") for outer, _ in stacks):
            continue
        if any(_passes_on(call) for call in layer_calls):
            stacks.append((name, layer_calls))
    if not has_attention:
        stacks = sorted(stacks, key=lambda stack: -len(stack[1]))[:1]
    if not stacks:
        raise RefusedModel(
            f"{family}: it has no list of layers that pass a residual stream from each to the next, so nothing here "
            "can be measured; use a family listed in docs/families.md"
        )
    if len(stacks) > 1:
        names = ", ".join(name for name, _ in stacks)
        raise RefusedModel(
            f"{family}: it has several stacks of layers ({names}), and PhaseLens measures one residual stream; "
            "use a family listed in docs/families.md"
        )
    path, layers = stacks[0]
    entering = layers[0].input
    assert entering is not None
    is_by_text = entering.dim() >= 3 and entering.shape[:2] == (1, N_PROBE_TOKENS)
    if not is_by_text and not _has_streams_first(entering):
        raise RefusedModel(
            f"{family}: its layers receive a residual of shape {list(entering.shape)} for one text of "
            f"{N_PROBE_TOKENS} tokens, where PhaseLens needs [batch, pos, d_model]"
        )
    n_layers = len(dict(model.named_modules())[path])
    if len({id(call.module) for call in layers}) < len(layers):
        counts = max(sum(call.module is other.module for other in layers) for call in layers)
        raise RefusedModel(
            f"{family}: its layers run {counts} times in one forward, so that a layer has several residual streams, "
            "patterns and outputs; PhaseLens measures models whose layers run once"
        )
    if len(layers) < n_layers:
        raise RefusedModel(
            f"{family}: only {len(layers)} of its {n_layers} layers run on text alone; the others need other inputs, "
            "such as images"
        )
    order = sorted(layers, key=lambda call: call.began)
    if [id(call) for call in order] != [id(call) for call in layers]:
        raise RefusedModel(f"{family}: its layers do not run in the order of their list, {path}")
    return path, layers


def _has_streams_first(residual: Tensor) -> bool:
    return residual.dim() == 4 and residual.shape[1:3] == (1, N_PROBE_TOKENS)


def _passes_on(call: ModuleCall) -> bool:
    """Return whether a layer returns a tensor of the shape that it received."""
    return call.input is not None and call.output is not None and call.input.shape == call.output.shape


def same(first: Tensor | None, second: Tensor | None) -> bool:
    """Return whether two tensors are equal, whatever their shapes, and whether both exist."""
    if first is None or second is None or first.numel() != second.numel():
        return False
    return bool(torch.equal(first.reshape(-1), second.reshape(-1).to(first)))


def layer_modules(layer: nn.Module) -> dict[str, nn.Module]:
    """Return the modules inside a layer by their names in it, without the layer, and without those that only pass their
    input on."""
    return {
        name: module
        for name, module in layer.named_modules()
        if name and not isinstance(module, nn.Dropout | nn.Identity)
    }
