"""Token sequences that an observing metric reads instead of the run's texts. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from phaselens.errors import InputError, is_list_like, is_whole
from phaselens.lens.info import ROTATION_MODES
from phaselens.plugin.author_errors import describe_value
from phaselens.plugin.conditions import require_whole_numbers


@dataclass(frozen=True)
class TokenSequence:
    """A token sequence that a metric reads instead of the run's texts; see `Metric.sequences`.

    `id` is the name under which `update` finds it in `layer.batch.texts`. Sequences of one `group` pass through the
    model in one batch, next to each other and in their order, so that `update` can compare them; without a group, a
    sequence is a group of its own. `rotation_mode` is `auto`, or `nope` for the model with its rotation nulled; it is
    the same in the whole group. `segments` divides the keys for `hook_segments`: the number of each token's segment,
    from 0, or −1 for a token in none; without it, all tokens are in segment 0.

    >>> TokenSequence("text 3, changed", [0, 7, 9], group="text 3").ids
    [0, 7, 9]
    """

    id: str
    ids: Sequence[int]
    group: str | None = None
    rotation_mode: str = "auto"
    segments: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str):
            raise InputError(f"a sequence's id is {describe_value(self.id)}; give text")
        if self.ids is None:
            raise InputError(f"sequence {self.id!r}: its ids are None; give a list of token ids")
        require_whole_numbers(f"sequence {self.id!r}: its ids", self.ids)
        if not len(self.ids):
            raise InputError(f"sequence {self.id!r} has no ids; give at least one")
        if self.group is not None and not isinstance(self.group, str):
            raise InputError(
                f"sequence {self.id!r}: its group is {describe_value(self.group)}; give text, or None"
            )
        if self.rotation_mode not in ROTATION_MODES:
            raise InputError(
                f"sequence {self.id!r}: its rotation_mode is {self.rotation_mode!r}; give "
                f"{' or '.join(ROTATION_MODES)}"
            )
        if self.segments is not None:
            if not is_list_like(self.segments, Collection):
                raise InputError(
                    f"sequence {self.id!r}: its segments are {describe_value(self.segments)}; give a whole number for "
                    "each token"
                )
            self._require_segments([*self.segments])

    def _require_segments(self, segments: Sequence[object]) -> None:
        if len(segments) != len(self.ids):
            raise InputError(
                f"sequence {self.id!r} has {len(segments)} segments for {len(self.ids)} tokens; give one for each"
            )
        for segment in segments:
            if not is_whole(segment) or segment < -1:
                raise InputError(
                    f"sequence {self.id!r}: its segments contain {segment!r}; give whole numbers from 0, or −1"
                )
