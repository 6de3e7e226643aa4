"""One part of a run, as a task of a job array computes it: some of the shards, chosen by their numbers."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from phaselens.errors import InputError, PhaseLensError, short_form
from phaselens.plugin.author_errors import describe_error
from phaselens.runs.batches import BatchTooLarge
from phaselens.runs.crew import N_TRIES, Crew, UnitJob, failed_twice
from phaselens.runs.result import FailedShard
from phaselens.runs.shard_store import CONDITIONS, OBSERVATIONS, WorkUnit

PHASES = (OBSERVATIONS, CONDITIONS)


@dataclass(frozen=True)
class Part:
    """Part `number` of `n_parts`, counted from 1, as in `--shards 3/8`."""

    number: int
    n_parts: int

    @classmethod
    def parse(cls, text: object) -> Self:
        """Parse `3/8`.

        >>> Part.parse("3/8")
        Part(number=3, n_parts=8)
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII) if isinstance(text, str) else None
        number, n_parts = map(int, match.groups()) if match else (0, 0)
        if not 1 <= number <= n_parts:
            raise InputError(
                f"--shards {short_form(text)}: write PART/PARTS, such as 3/8; parts count from 1"
            )
        return cls(number, n_parts)

    def __str__(self) -> str:
        return f"{self.number}/{self.n_parts}"

    def owns(self, unit: WorkUnit, model_number: int) -> bool:
        """Return whether a unit belongs to this part: every n-th shard, so that long texts are spread over all."""
        start = model_number + zlib.crc32(unit.texts_of.encode())
        return (unit.shard.index + start) % self.n_parts == self.number - 1


class PartCrew(Crew):
    """Computes the units of one part, and leaves those of other parts out.

    If conditions follow from the observations, those of all parts are needed before them. Then the part observes its
    own shards first, and after that whatever other parts have not observed by then, the last ones first, since their
    owners take the first ones. So no part ever waits for another one, and the parts can run in any order.

    Args:
        part: the part.
        inner: computes the units; a plain `Crew` leaves them to this process.
        has_conditions: whether a metric of the run has conditions.
        only_phase: compute the units of this phase only.
    """

    makes_tables = False

    def __init__(
        self, part: Part, inner: Crew, *, has_conditions: bool, only_phase: str | None = None
    ) -> None:
        super().__init__()
        self._part = part
        self._inner = inner
        self._only_phase = only_phase
        self._helps_to_observe = has_conditions and only_phase != OBSERVATIONS
        self.makes_plans = inner.makes_plans
        self.failed_shards = inner.failed_shards
        self.lost = inner.lost

    def begin_model(self, number: int, label: str, text_ids: Sequence[str]) -> None:
        super().begin_model(number, label, text_ids)
        self._inner.begin_model(number, label, text_ids)

    def goes_on_to_conditions(self) -> bool:
        return self._only_phase != OBSERVATIONS

    def make_plan(self, phase: str, names: Sequence[str]) -> None:
        self._inner.make_plan(phase, names)

    def select(self, units: Sequence[WorkUnit]) -> Sequence[WorkUnit]:
        own = [unit for unit in units if self._part.owns(unit, self.number)]
        if units and units[0].phase == OBSERVATIONS and self._helps_to_observe:
            own += [unit for unit in reversed(units) if not self._part.owns(unit, self.number)]
        return own

    def compute(self, job: UnitJob) -> None:
        chosen = self.select(job.units)
        self.leave_out(unit for unit in job.units if unit not in chosen)
        if self._inner.makes_plans:
            if chosen:
                self._inner.compute(replace(job, units=chosen))
            self.n_computed = self._inner.n_computed
            return
        for unit in chosen:
            if not job.exists(unit):
                self._try(job, unit)

    def _try(self, job: UnitJob, unit: WorkUnit) -> None:
        reasons = []
        for _ in range(N_TRIES):
            try:
                job.compute(unit)
            except BatchTooLarge as error:
                reasons.append(str(error))
            except PhaseLensError:  # it would end the next shard too
                raise
            except Exception as error:  # noqa: BLE001 - reported with the shard; the others go on
                reasons.append(describe_error(error))
            else:
                return
        self.give_up([unit], failed_twice(reasons))


class MergingCrew(Crew):
    """Computes nothing. Units that are missing are an error, or are left out and reported.

    Args:
        path: the run's directory, for messages.
        failures: shards that parts have tried in vain, as they were recorded; these are left out and reported.
        allow_missing: report missing units instead of raising.
    """

    makes_plans = True

    def __init__(self, path: str, failures: Sequence[FailedShard], *, allow_missing: bool) -> None:
        super().__init__()
        self._path = path
        self._reasons = {(shard.model, shard.name): shard.reason for shard in failures}
        self._allow_missing = allow_missing

    def make_plan(self, phase: str, names: Sequence[str]) -> None:
        raise InputError(
            f"the run in {self._path!r}: {self.label}: no part has begun the {phase} of {', '.join(names)}; run the "
            "parts (phaselens run … --shards 1/N, …) again: each computes what is missing"
        )

    def compute(self, job: UnitJob) -> None:
        missing = []
        for unit in job.units:
            reason = self._reasons.get((self.label, unit.name))
            if reason is not None:
                self.give_up([unit], reason)
            elif self._allow_missing:
                self.give_up([unit], "no part has computed it")
            else:
                missing.append(unit)
        if not missing:
            return
        numbers = ", ".join(str(unit.shard.index) for unit in missing[:10])
        more = ", …" if len(missing) > 10 else ""
        raise InputError(
            f"the run in {self._path!r}: {self.label}: {len(missing)} shards are missing ({job.phase}: {numbers}"
            f"{more}); run their parts again, or merge without them: --allow-missing"
        )
