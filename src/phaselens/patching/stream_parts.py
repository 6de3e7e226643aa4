"""What each layer adds to the residual stream of a prompt at one position: attention, its heads, and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from phaselens.errors import InputError
from phaselens.lens.points import Hook, in_layer
from phaselens.patching.passes import capture_hook
from phaselens.patching.prompts import Prompt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from phaselens.lens import HookedTransformer


def rounding_of(dtype: torch.dtype) -> float:
    """Return the allowed relative distance of a sum of parts from the whole: a few roundings of the dtype, or many of
    float32, in which norms compute in most models."""
    import torch

    return max(4.0 * torch.finfo(dtype).eps, 256.0 * torch.finfo(torch.float32).eps)


class StreamParts:
    """The residual stream of one pass at one position, and what adds to it.

    `embed` [d_model] enters layer 0, `final` [d_model] leaves the last layer, and `logits` [d_vocab] are the model's.
    """

    def __init__(self, lens: HookedTransformer, prompt: Prompt, position: int, hooks: Sequence[Hook]) -> None:
        self.lens = lens
        n_layers = lens.info.n_layers
        boundaries = [in_layer(layer, "hook_resid_pre") for layer in range(n_layers)]
        boundaries.append(in_layer(n_layers - 1, "hook_resid_post"))
        inner = ("hook_attn_out", "hook_mixer_out", "hook_resid_mid", "attn.hook_z")
        names = [in_layer(layer, point) for layer in range(n_layers) for point in inner]
        names = [*boundaries, *(name for name in names if lens.find_hook(name) is not None)]
        activations: dict[str, Tensor] = {}
        logits = lens.stream(
            prompt.tokens, [*hooks, *(capture_hook(name, activations) for name in names)], unembed=True
        )
        self.logits = logits[0, position]
        rows = {name: activation[0, position] for name, activation in activations.items()}
        self._boundaries = [rows[name] for name in boundaries]
        self._rows = rows

    @property
    def embed(self) -> Tensor:
        """What enters layer 0, [d_model]."""
        return self._boundaries[0]

    @property
    def final(self) -> Tensor:
        """What leaves the last layer, [d_model]."""
        return self._boundaries[-1]

    def parts(self, layer: int) -> tuple[Tensor | None, Tensor]:
        """Return what attention (or what the layer has instead) adds, and the rest of what the layer adds, float64.

        Without a point between the two, attention's part is None.
        """
        entering, leaving = (self._boundaries[index].double() for index in (layer, layer + 1))
        added = leaving - entering.to(leaving.device)
        middle = self._rows.get(in_layer(layer, "hook_resid_mid"))
        outputs = [
            self._rows[name]
            for name in (in_layer(layer, "hook_attn_out"), in_layer(layer, "hook_mixer_out"))
            if name in self._rows
        ]
        if outputs:
            attention = sum((output.double() for output in outputs[1:]), outputs[0].double()).to(added.device)
        elif middle is not None:
            attention = middle.double().to(added.device) - entering.to(added.device)
        else:
            return None, added
        return attention, added - attention

    def heads(self, layer: int, attention: Tensor) -> tuple[Tensor, Tensor] | str:
        """Return what each head adds [head, d_model] and what the output projection's bias adds [d_model], float64.

        A text instead is the reason why attention's output is not the sum of its heads.
        """
        import torch

        outputs = self._rows.get(in_layer(layer, "attn.hook_z"))
        if outputs is None or in_layer(layer, "hook_mixer_out") in self._rows:
            return "the layer has something beside attention, or instead of it"
        try:
            weight = self.lens.weight_of(layer, "attn.W_O").detach().double()
        except InputError as error:
            return str(error)
        by_head = torch.einsum("hd,hdm->hm", outputs.double().to(weight.device), weight).to(attention.device)
        bias = self._bias(layer, attention)
        total = by_head.sum(0) + bias
        factor = 1.0
        limit = rounding_of(self.lens.dtype) * float(by_head.abs().sum(0).max() + bias.abs().max())
        if not float((attention - total).abs().max()) <= limit:
            square = float(total.square().sum())
            factor = float(attention @ total) / square if square > 0 else 1.0
            if not float((attention - factor * total).abs().max()) <= abs(factor) * limit:
                return "a step after the output projection, such as a norm, changes their sum"
        return factor * by_head, factor * bias

    def _bias(self, layer: int, like: Tensor) -> Tensor:
        """Return the output projection's bias [d_model], 0 where it has none."""
        import torch

        try:
            return self.lens.weight_of(layer, "attn.b_O").to(like)
        except InputError:
            return torch.zeros_like(like)
