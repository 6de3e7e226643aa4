"""Activation patching over many pairs of prompts: the mean over pairs of each cell, with its interval.

One pair shows what happens in one sentence. The pairs are the independent units: each is patched by itself, and the
effects of a cell are averaged over pairs, with a bootstrap interval over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from phaselens.errors import InputError, is_list_like, short_form
from phaselens.patching.edits import Intervention, Stack
from phaselens.patching.experiment import Experiment
from phaselens.patching.metrics import LogitFunction, LogitMetric, loss
from phaselens.patching.pairs_results import PairsResult, PairsSweep
from phaselens.patching.plans import axes_of
from phaselens.patching.prompts import Prompt, bos_of, require_prompt
from phaselens.patching.results import Sweep
from phaselens.patching.targets import IndexChoice
from phaselens.runs import Observer


class Experiments:
    """Activation patching over many pairs of prompts of one model; edits, runs and sweeps are those of `Experiment`.

    Args:
        clean: the prompts whose runs supply the patches.
        corrupt: as many prompts, whose runs are edited; each has as many tokens as its clean prompt.
        metric: the number that is measured, for all pairs; or one for each pair, such as a `logit_diff` of its own
            tokens.

    Raises:
        InputError: for lists of two lengths, an empty one, or prompts that cannot be paired; names the pair.

    >>> from phaselens.testing import tiny_lens
    >>> from phaselens.patching import logit_diff, prompt
    >>> lens = tiny_lens()
    >>> clean = [prompt(lens, text) for text in ("to be", "to go", "to me")]
    >>> corrupt = [prompt(lens, text) for text in ("to do", "to be", "to do")]
    >>> experiments = Experiments(clean, corrupt, logit_diff(lens, "e", "o"))
    >>> sweep = experiments.sweep("head")
    >>> sweep.effect.shape, sweep.low.shape, sweep.n_pairs
    ((2, 4), (2, 4), 3)
    """

    def __init__(
        self,
        clean: Sequence[Prompt],
        corrupt: Sequence[Prompt],
        metric: LogitMetric | LogitFunction | Sequence[LogitMetric | LogitFunction] = loss,
    ) -> None:
        for name, prompts in (("clean", clean), ("corrupt", corrupt)):
            if not is_list_like(prompts):
                raise InputError(f"expected {name} as a list of prompts, received {short_form(prompts)}")
        clean, corrupt = list(clean), list(corrupt)
        if len(clean) != len(corrupt) or not clean:
            raise InputError(
                f"received {len(clean)} clean and {len(corrupt)} corrupt prompts; give as many of both"
            )
        metrics: list[Any] = list(metric) if is_list_like(metric) else [metric] * len(clean)
        if len(metrics) != len(clean):
            raise InputError(
                f"received {len(metrics)} metrics for {len(clean)} pairs; give one, or one for each pair"
            )
        self._experiments: list[Experiment] = []
        for number, pair in enumerate(zip(clean, corrupt, metrics, strict=True)):
            with _naming_pair(number):
                if require_prompt(pair[0], "clean").lens is not clean[0].lens:
                    raise InputError("the prompts are of another model than those of pair 0")
                self._experiments.append(Experiment(*pair))
        self._edited: list[list[Experiment]] = []

    def __len__(self) -> int:
        return len(self._experiments)

    def __getitem__(self, number: int) -> Experiment:
        """Return the experiment of one pair, with all edits."""
        return self._experiments[number]

    def patch(
        self, point: str | None = None, *, layer: IndexChoice = None, pos: IndexChoice = "all",
        head: IndexChoice = None, key: IndexChoice = None, what: str | None = None,
    ) -> Intervention:  # fmt: skip
        """Put activations of each clean run into its corrupt run; arguments as in `Experiment.patch`.

        Raises:
            InputError: as there; names the pair that lacks a position, and edits none.
        """
        return self._edit(
            lambda experiment: experiment.patch(point, layer=layer, pos=pos, head=head, key=key, what=what)
        )

    def ablate(
        self, point: str | None = None, *, layer: IndexChoice = None, pos: IndexChoice = "all",
        head: IndexChoice = None, key: IndexChoice = None, what: str | None = None, value: float | str = "zero",
    ) -> Intervention:  # fmt: skip
        """Replace activations of each corrupt run; arguments as in `Experiment.ablate`.

        Raises:
            InputError: as there; names the pair that lacks a position, and edits none.
        """
        return self._edit(
            lambda experiment: experiment.ablate(
                point, layer=layer, pos=pos, head=head, key=key, what=what, value=value
            )
        )

    def condition(
        self, name: str, which: str | None = None, *, layer: int | None = None, head: int | None = None,
        **params: object,
    ) -> Intervention:  # fmt: skip
        """Apply a condition of a causal metric to every corrupt run; arguments as in `Experiment.condition`.

        The metric selects the condition once, on the bundled texts.

        Raises:
            InputError: as there; names the pair that the condition does not fit, and edits none.
        """
        first = self._experiments[0]
        made: list[Intervention] = []

        def make(experiment: Experiment) -> Intervention:
            if experiment is first:
                made.append(first.condition(name, which, layer=layer, head=head, **params))
                return made[0]
            edit = made[0].fit_to(experiment.clean, experiment.corrupt)
            if edit.set_aside is not None:
                raise InputError(edit.set_aside)
            return experiment._push(edit)

        return self._edit(make)

    def null_rope(self, layer: IndexChoice = None) -> Intervention:
        """Null the rotation of one layer, several, or all, for every pair, as `Experiment.null_rope` does."""
        return self._edit(lambda experiment: experiment.null_rope(layer), self._experiments[:1])

    def restore_rope(self, layer: IndexChoice = None) -> Intervention:
        """Restore the rotation of one layer, several, or all, as `Experiment.restore_rope` does."""
        return self._edit(lambda experiment: experiment.restore_rope(layer), self._experiments[:1])

    def _edit(
        self, make: Callable[[Experiment], Intervention], experiments: Sequence[Experiment] | None = None
    ) -> Intervention:
        """Make an edit in each experiment, or in none if one refuses it."""
        edited: list[Experiment] = []
        edits: list[Intervention] = []
        try:
            for number, experiment in enumerate(self._experiments if experiments is None else experiments):
                with _naming_pair(number):
                    edits.append(make(experiment))
                edited.append(experiment)
        except BaseException:
            for experiment in edited:
                experiment.undo()
            raise
        self._edited.append(edited)
        return edits[0]

    def undo(self) -> Intervention:
        """Undo the last edit in every pair, and return that of the first.

        Raises:
            InputError: if there is none.
        """
        if not self._edited:
            raise InputError("undo: there is no edit to undo")
        edits = [experiment.undo() for experiment in self._edited.pop()]
        return edits[0]

    def patched(self) -> Stack:
        """Return the edits of the first pair, in the order in which they were made."""
        return self._experiments[0].patched()

    def run(self) -> PairsResult:
        """Measure the metric of every pair without and with the edits, and of the clean runs."""
        import numpy as np

        rows = []
        for number, experiment in enumerate(self._experiments):
            result = experiment.run(top=1)
            values = result.loss if experiment.metric is loss else result.value
            if values is None:
                raise InputError(
                    f"pair {number}: {result.reason or 'the prompts have one token, so none is predicted'}"
                )
            clean = result.clean
            if clean is None:  # a run has the loss of the edited prompt only
                with experiment.lens.nulled_rotation(experiment._nulled_at_start):
                    clean = experiment._value(experiment._logits(experiment.clean), experiment.clean)
            rows.append((*values, clean))
        return PairsResult(
            self._metric_name,
            np.array(rows, dtype=np.float64),
            tuple(map(str, self.patched().applied)),
            bos=self._bos,
        )

    def sweep(
        self, what: str = "resid", *, by: str | None = None, layer: IndexChoice = None,
        observer: Observer | None = None, seed: int = 0,
    ) -> PairsSweep:  # fmt: skip
        """Sweep every pair, and return the mean effect of each cell with its interval over pairs.

        Ctrl-C ends the sweep; the pairs that are complete are kept, or the cells of the first one.

        Args:
            what: as in `Experiment.sweep`, and so are `by`, `layer` and `observer`.
            by: by position only for pairs that all have the same number of tokens.
            layer: the layers to sweep; by default all.
            observer: receives the progress, pair by pair.
            seed: seed of the intervals.

        Raises:
            InputError: as there, and for positions of pairs of different lengths.
        """
        self._require_same_positions("sweep", what, by)
        sweeps: list[Sweep] = []
        for experiment in self._experiments:
            result = experiment.sweep(what, by=by, layer=layer, observer=observer)
            if result.interrupted and sweeps:
                break
            sweeps.append(result)
            if result.interrupted:
                break
        return self._mean(sweeps, seed, interrupted=len(sweeps) < len(self) or sweeps[-1].interrupted)

    def attribution(
        self, what: str = "resid", *, by: str | None = None, layer: IndexChoice = None, seed: int = 0
    ) -> PairsSweep:
        """Estimate the results of `sweep` from gradients, as `Experiment.attribution` does, and average over pairs."""
        self._require_same_positions("attribution", what, by)
        sweeps = [experiment.attribution(what, by=by, layer=layer) for experiment in self._experiments]
        return self._mean(sweeps, seed, interrupted=False)

    def _require_same_positions(self, verb: str, what: str, by: str | None) -> None:
        axes = axes_of(self._experiments[0].lens, what, by)
        lengths = sorted({len(experiment.clean) for experiment in self._experiments})
        if "pos" in axes and len(lengths) > 1:
            raise InputError(
                f"{verb}: the pairs have {' and '.join(map(str, lengths[:5]))} tokens, so their positions do not "
                "correspond; sweep by='head', or use pairs of one length"
            )

    @property
    def _metric_name(self) -> str:
        names = dict.fromkeys(experiment.metric.name for experiment in self._experiments)
        return (
            next(iter(names))
            if len(names) == 1
            else f"{next(iter(names)).partition('(')[0]}, one for each pair"
        )

    @property
    def _bos(self) -> str:
        policies = dict.fromkeys(
            bos_of(experiment.clean, experiment.corrupt) for experiment in self._experiments
        )
        return "; ".join(policies)

    def _mean(self, sweeps: Sequence[Sweep], seed: int, *, interrupted: bool) -> PairsSweep:
        import numpy as np

        from phaselens.uncertainty import mean_interval

        first = sweeps[0]
        values = np.ma.stack([sweep.values for sweep in sweeps])
        effects = np.ma.stack([sweep.effect for sweep in sweeps])
        present = ~np.ma.getmaskarray(effects)
        _, low, high = mean_interval(effects.filled(0.0), present=present, seed=seed)
        clean_words, corrupt_words = (
            _common_words([getattr(sweep, name) for sweep in sweeps])
            for name in ("clean_words", "corrupt_words")
        )
        return PairsSweep(
            first.what,
            first.by,
            values.mean(axis=0),
            float(np.mean([sweep.base for sweep in sweeps])),
            float(np.mean([sweep.clean for sweep in sweeps])),
            self._metric_name,
            first.layers,
            clean_words,
            corrupt_words,
            first.n_heads,
            first.kind,
            interrupted,
            first.set_aside,
            bos=self._bos,
            model=first.model,
            low=low,
            high=high,
            sweeps=tuple(sweeps),
        )


def _common_words(prompts: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the word at each position, `…` where the prompts differ; those of the first prompt for several lengths."""
    if len({len(words) for words in prompts}) > 1:
        return prompts[0]
    return tuple(words[0] if len(set(words)) == 1 else "…" for words in zip(*prompts, strict=True))


@contextmanager
def _naming_pair(number: int) -> Iterator[None]:
    """Add the number of the pair to an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"pair {number}: {error}") from error
