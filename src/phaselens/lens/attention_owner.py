"""The bridge component that calls a model's attention module, as the attention function sees it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from phaselens.lens.points import N_DISTANCES
from phaselens.lens.rows import Rows


@dataclass
class StreamingOptions:
    """The options of `HookedTransformer.streaming`, in one object that all layers of a lens share.

    ``sink_position`` is the absolute position of the key that `hook_sink` and `hook_key_scores` measure,
    ``n_distances`` the number of distances of `hook_distance`. ``reads_only`` promises that hooks write into no tensor
    in place: a hooked matrix that is not edited then does not change what the layer computes. ``rows`` holds the
    positions of the running forward's rows, and which of them are pads, whose queries do not count in `hook_received`
    and `hook_distance`.
    """

    sink_position: int = 0
    n_distances: int = N_DISTANCES
    reads_only: bool = False
    rows: Rows = field(default_factory=Rows)


class AttentionOwner(Protocol):
    """The bridge component that calls a model's attention module: `components.StreamingAttention`."""

    name: str
    streaming_options: StreamingOptions
    #: Results of the layer's kernels that forwards from one residual share; None outside of `KernelReplay`.
    kernels: dict[Hashable, Any] | None
    hook_key_scores: HookPoint
    hook_attn_scores: HookPoint
    hook_pattern: HookPoint
    hook_attended: HookPoint
    #: What the last forward added to the scores, [batch | 1, head | 1, 1, key]; None for nothing.
    score_bias: Tensor | None

    def hooked_statistics(self) -> list[str]: ...
    def fire_statistic(self, name: str, value: Tensor) -> None: ...
    def fire_rotated(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]: ...


def is_hooked(point: nn.Module) -> bool:
    """Return whether this hook point has hooks."""
    return bool(point._forward_hooks or point._backward_hooks)


def version_of(tensor: Tensor) -> int | None:
    """Return the number of writes into `tensor`; None under `torch.inference_mode`, which does not count them."""
    return None if tensor.is_inference() else tensor._version
