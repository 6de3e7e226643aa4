"""The interface through which the results of shards are kept; this one keeps nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from phaselens.runs.shard_parts import ShardPart
from phaselens.runs.shards import Shard

OBSERVATIONS, CONDITIONS = "observations", "conditions"


@dataclass(frozen=True)
class WorkUnit:
    """A piece of work whose result is one file: one phase of one shard.

    `phase` is `OBSERVATIONS` or `CONDITIONS`. `prompts_of` names the metric whose prompts the shard holds; it is empty
    for the run's texts.
    """

    phase: str
    shard: Shard
    prompts_of: str = ""


class ShardStore:
    """Base class of stores. The results of a run without one are only in memory."""

    #: Whether results are kept, so that every part must be storable.
    keeps = False

    def load(self, unit: WorkUnit) -> dict[str, ShardPart] | None:
        """Return the kept parts of a unit by metric; None without them."""
        return None

    def save(self, unit: WorkUnit, parts: Mapping[str, ShardPart]) -> None:
        """Keep the parts of a unit; they hold changes of states, not instances."""
