"""The vocabulary of `phaselens repl`: each verb reads its words, calls `phaselens.patching`, and prints."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from phaselens.errors import InputError, close_matches
from phaselens.patching import KINDS, Experiment, Sweep, agreement, logit_diff, loss
from phaselens.patching.edits import call, kept, unusual
from phaselens.patching.metrics import as_metric
from phaselens.patching.points import brief
from phaselens.patching.sweeps import axes_of
from phaselens.repl.calls import VERB_NAMES, VERBS, in_words, is_another_verb
from phaselens.repl.models import SessionModel
from phaselens.repl.workspace import Workspace
from phaselens.report import heatmap
from phaselens.report.progress import ProgressBar


class Session(Workspace):
    """The verbs, on the models and prompts of a workspace."""

    def __init__(self, models: Mapping[str, Any], figures: str | None = None, *, quiet: bool = False) -> None:
        super().__init__(models)
        self.figures = figures
        self.quiet = quiet
        self.watched: tuple[str, dict[str, Any]] | None = None
        self._sweeps: dict[tuple[Any, ...], Sweep] = {}
        self._n_figures = 0
        self.name_models({verb: getattr(self, verb) for verb in VERB_NAMES})

    # Judge

    @in_words
    def logit_diff(self, a: str | int, b: str | int, pos: int = -1) -> None:
        """Judge runs by the logit of token `a` minus that of `b`, at the last position (or `pos`).

            logit_diff(" he", " she")

        Both are texts of one token; mind the space before them.
        """
        metric = logit_diff(self.lens, a, b, pos)
        experiment = self.experiment
        if self.mismatch is None and (reason := metric.misfit(len(experiment.edited))):
            raise InputError(reason)
        experiment.metric = metric
        self._difference = (a, b, pos)
        self.say(f"metric: {metric.name}")

    @in_words
    def metric(self, name: Any = None, **params: Any) -> None:
        """Measure a metric by name, on the prompts, before and after the edits; `run()` then shows it too.

        metric("sinks")             by layer; parameters as in metric("sinks", threshold=0.2)
        metric("loss")              judge runs and sweeps by the loss of the prompt's own tokens
        metric(my_function)         … by a function of logits [batch, pos, d_vocab] that gives [batch]
        metric()                    says which metric is in use
        """
        if isinstance(name, str) and name in VERB_NAMES:
            raise InputError(is_another_verb(name))
        if getattr(name, "__self__", None) is self:
            raise InputError(is_another_verb(name.__name__))
        is_loss = isinstance(name, str) and name == "loss"
        if is_loss or not isinstance(name, str):
            judge = loss if is_loss else None if name is None else as_metric(name)
            if params and judge is None:
                raise InputError(f"metric: name the metric whose parameter {next(iter(params))} is")
            if params:
                raise InputError(f"metric: {'loss' if is_loss else 'a function'} takes no parameters")
            if judge is not None:
                self.experiment.metric = judge
                self._difference = None
            self.say(f"metric: {self.experiment.metric.name}")
            if name is None and self.watched:
                self.say(f"shown by run(): {self.watched[0]}")
            return
        measured = self.ready.measure(name, **params)
        self.watched = (name, params)
        self.names["result"] = measured
        self.say(str(measured))

    # Edit

    @in_words
    def patch(
        self,
        point: str | None = None,
        *,
        layer: Any = None,
        pos: Any = "all",
        head: Any = None,
        what: str | None = None,
    ) -> None:
        """Put activations of the clean run into the corrupt run.

            patch("blocks.3.hook_resid_post", pos=5)        a hook point by its whole name
            patch(what="resid", layer=range(3), pos="all")  a kind of activation in some layers
            patch(what="head", layer=2, head=[0, 1])

        Kinds: resid (entering a layer), attn, mlp (what they add), head (z), q, k, v, pattern. Without layer, pos or
        head all of them are meant.
        """
        self._made(self.ready.patch(point, layer=layer, pos=pos, head=head, what=what))

    @in_words
    def ablate(
        self, point: str | None = None, *, layer: Any = None, pos: Any = "all", head: Any = None,
        what: str | None = None, value: float | str = "zero",
    ) -> None:  # fmt: skip
        """Replace activations by zero, by a number, or by their mean over the run's positions.

            ablate(what="mlp", layer=1, pos=0)
            ablate(what="head", layer=3, head=1, value="mean")

        Places are named as in `patch`.
        """
        self._made(self.ready.ablate(point, layer=layer, pos=pos, head=head, what=what, value=value))

    @in_words
    def condition(
        self, name: str, which: str | None = None, *, layer: int | None = None, **params: Any
    ) -> None:
        """Put a condition of a causal metric on the run.

            condition("bos-mlp", layer=1)
            condition("qk-disruption", "massive")

        `phaselens plugins` lists causal metrics; other arguments are the metric's own parameters.
        """
        self._made(self.ready.condition(name, which, layer=layer, **params))

    @in_words
    def nope(self, layer: Any = None) -> None:
        """Null the rotation of one layer, several, or all, live: nope(2), nope(range(3)), nope() for all."""
        self._made(self.experiment.nope(layer))

    @in_words
    def rope(self, layer: Any = None) -> None:
        """Restore the rotation that nope() nulled, of one layer, several, or all: rope(2), rope() for all."""
        self._made(self.experiment.rope(layer))

    def _made(self, edit: Any) -> None:
        self.say(f"{len(self.experiment.patched())}. {edit}")

    @in_words
    def undo(self) -> None:
        """Take back the last edit, applied or set aside."""
        edit = self.experiment.undo()
        self.say(f"undone: {edit}" + ("" if edit.set_aside is None else " (it was set aside)"))

    @in_words
    def patched(self) -> None:
        """List the edits, first one first. One that does not fit the prompts is set aside until they fit again."""
        edits = self.experiment.patched()
        self.say(str(edits))
        if edits and self.mismatch is not None and self.bench.has_prompts:
            self.say("note: on the last prompts that went together", style="dim")

    # Look

    @in_words
    def run(self, top: int = 5, pos: int = -1) -> None:
        """Run without and with the edits: the likeliest next tokens, loss and metric before and after.

        run()               after the last position
        run(top=10, pos=5)
        """
        outcome = self.ready.run(top, pos)
        self.bench.run = (top, pos)
        self.names["result"] = outcome
        self.say(str(outcome))
        if self.watched:
            self.say(str(self.ready.measure(self.watched[0], **self.watched[1])))

    @in_words
    def sweep(
        self, what: str | Sequence[str] = "resid", *more: str, by: str | None = None, layer: Any = None,
        file: str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        """Patch one cell at a time, everywhere, and show what each does to the metric: a heatmap and a figure.

            sweep("resid")              layer × position; also attn, mlp
            sweep("head")               layer × head; also q, k, v, pattern
            sweep("v", by="pos-head")   both
            sweep("q", "k", "v", file="qkv.png")

        Ctrl-C stops it and keeps what is done. `result` holds the last one.
        """
        self._sweep("sweep", what, more, by, layer, file)

    @in_words
    def attribution(
        self, what: str | Sequence[str] = "resid", *more: str, by: str | None = None, layer: Any = None,
        file: str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        """What `sweep` would find, estimated at once from a gradient: a fast first look, right to first order.

            attribution("resid")

        Arguments are those of `sweep`. Where both are known, how far they agree is said.
        """
        self._sweep("attribution", what, more, by, layer, file)

    def _sweep(self, verb: str, what: Any, more: Sequence[Any], by: Any, layer: Any, file: Any) -> None:
        if file is not None and not isinstance(file, str | os.PathLike):
            raise InputError(f"file={brief(file)}: give the name of a file, such as 'heads.png'")
        kinds = [*([what] if isinstance(what, str) or not isinstance(what, Iterable) else what), *more]
        if not kinds:
            raise InputError(f"{verb}: no kind of activation is named; give {', '.join(KINDS)}")
        layer = kept(layer)
        experiment = self.ready
        for kind in kinds:  # before the first of them takes its time
            axes_of(kind, by, experiment.lens)
        sweeps: list[Sweep] = []
        for kind in kinds:
            if verb == "sweep":
                with ProgressBar(quiet=self.quiet) as observer:
                    sweeps.append(experiment.sweep(kind, by=by, layer=layer, observer=observer))
            else:
                sweeps.append(experiment.attribution(kind, by=by, layer=layer))
            heatmap.print_sweep(sweeps[-1], self.out)
            self._compare(experiment, sweeps[-1])
            if sweeps[-1].interrupted:
                break
        for edit in sweeps[-1].set_aside:
            self.say(f"set aside: {edit}")
        self.names["result"] = sweeps[-1]
        self.bench.swept = tuple(
            call(verb, kind, **unusual(by=by, layer=layer)) for kind in kinds[: len(sweeps)]
        )
        self.say(f"figure: {heatmap.save(sweeps, file or self._figure_file(verb, kinds))}", style="dim")

    def _compare(self, experiment: Experiment, sweep: Sweep) -> None:
        """Say how far attribution and patching of the same state agree, where both are known."""
        metric = experiment.metric
        state = (
            experiment.clean,
            experiment.corrupt,
            tuple(edit.code for edit in experiment.patched().applied),
            metric.code or metric.function or metric,
        )
        cells = (sweep.what, sweep.by, sweep.layers)
        self._sweeps[state, cells, sweep.kind] = sweep
        other_kind = "attribution" if sweep.kind == "patching" else "patching"
        other = self._sweeps.get((state, cells, other_kind))
        if other is not None:
            self.say(str(agreement(sweep, other)))

    def _figure_file(self, verb: str, kinds: Sequence[str]) -> Path:
        if self.figures is None:
            self.figures = tempfile.mkdtemp(prefix="phaselens-")
        self._n_figures += 1
        return Path(self.figures) / f"{self._n_figures}-{verb}-{'-'.join(kinds)}.png"

    # Help

    @in_words
    def guide(self, name: str | Callable[..., Any] | None = None) -> None:
        """List the verbs, or explain one: guide("sweep")."""
        if name is None:
            self.say(self._overview())
            return
        model = name if isinstance(name, SessionModel) else None
        if isinstance(name, str) and name not in VERB_NAMES:
            model = self.models.get(name)
        if model is not None:
            self.say(f"{model!r}\n{inspect.getdoc(SessionModel)}")
            return
        topic = name if isinstance(name, str) else getattr(name, "__name__", brief(name))
        if topic not in VERB_NAMES:
            raise InputError(f"guide: no verb {topic!r}; {close_matches(topic, [*VERB_NAMES, *self.models])}")
        verb = getattr(self, topic)
        signature = inspect.signature(verb)
        bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
        shown = signature.replace(parameters=bare, return_annotation=signature.empty)
        self.say(f"{topic}{shown}\n{inspect.getdoc(verb)}")

    def _overview(self) -> str:
        labels = ", ".join(self.models)
        lines = [
            f"models: {labels}; m is {self.first.info.label}, models['…'] any",
            'prompts: clean = m.prompt("…"), corrupt = m.prompt("…"), of as many tokens',
            f"kinds: {', '.join(KINDS)}",
        ]
        for group, verbs in VERBS.items():
            lines.append(f"{group}:")
            for verb in verbs:
                first = (inspect.getdoc(getattr(self, verb)) or "").partition("\n")[0]
                lines.append(f"  {verb:12} {first}")
        lines.append("  %save_session FILE.py   write a script that makes this state again")
        lines.append(
            "result holds what was found last; guide('sweep') or sweep? explains a verb; %tb shows a traceback"
        )
        return "\n".join(lines)
