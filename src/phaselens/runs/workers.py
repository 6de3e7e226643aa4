"""The interface to worker processes, wherever they run, and what they report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phaselens.errors import InputError, ModelError, PhaseLensError
from phaselens.runs.worker_job import Order

#: Threads of workers wait without working, because there may be more of them than cores.
WAITING_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}

Kind = Literal["ready", "advanced", "done", "failed", "refused", "ended"]


@dataclass(frozen=True)
class Report:
    """What a worker reports.

    Attributes:
        worker: its number; a replacement has a new one.
        kind: `ready` for orders; `advanced` by `amount` tokens; `done` with its order in `amount` seconds; `failed` to
            carry the order out, and ending; `refused` what every other worker would refuse too; `ended`.
        amount: tokens or seconds.
        text: why it failed, refused or ended.
        error: the name of the exception with which it refused.
    """

    worker: int
    kind: Kind
    amount: float = 0.0
    text: str = ""
    error: str = ""

    def exception(self) -> PhaseLensError:
        """Return the exception that ends the run, for a worker that refused."""
        classes: dict[str, type[PhaseLensError]] = {"ModelError": ModelError, "RefusedModel": ModelError}
        return classes.get(self.error, InputError if self.error == "InputError" else PhaseLensError)(
            self.text
        )


class Workers:
    """Base class of groups of workers. Each carries out one order at a time."""

    #: How many workers at most.
    n_workers: int

    def start(self) -> int:
        """Start a worker, and return its number."""
        raise NotImplementedError

    def send(self, worker: int, order: Order) -> None:
        """Give a worker an order."""
        raise NotImplementedError

    def wait(self) -> Report:
        """Return the next report, as soon as there is one."""
        raise NotImplementedError

    def close(self) -> None:
        """End all workers."""
        raise NotImplementedError
