"""The vocabulary of `phaselens repl`: each verb parses its arguments, calls `phaselens.patching`, and prints."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phaselens.errors import InputError, close_matches, short_form
from phaselens.patching import (
    KINDS,
    Experiment,
    LogitMetric,
    Sweep,
    agreement,
    direct_logit_attribution,
    logit_diff,
    logit_lens,
    loss,
)
from phaselens.patching.edits import Intervention
from phaselens.patching.metrics import LogitFunction, as_metric
from phaselens.patching.plans import axes_of
from phaselens.patching.results import TextResult
from phaselens.patching.targets import IndexChoice, without_iterator
from phaselens.patching.wording import call_source, non_default
from phaselens.repl.calls import VERB_NAMES, VERBS, explain_misuse, verb_as_argument
from phaselens.repl.models import SessionModel
from phaselens.repl.workspace import Workspace
from phaselens.report import heatmap
from phaselens.report.progress import ProgressBar

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer


class Session(Workspace):
    """The verbs of the REPL, which act on the models and prompts of a workspace."""

    def __init__(
        self, models: Mapping[str, HookedTransformer], figures: str | None = None, *, quiet: bool = False
    ) -> None:
        super().__init__(models)
        self.figures = figures
        self.quiet = quiet
        self.run_metric: tuple[str, dict[str, object]] | None = None
        self._sweeps: dict[tuple[object, ...], Sweep] = {}
        self._n_figures = 0
        self.bind_names({verb: getattr(self, verb) for verb in VERB_NAMES})

    # Measure

    @explain_misuse
    def logit_diff(self, a: str | int, b: str | int, pos: int = -1) -> None:
        """Measure runs by the logit of token `a` minus that of `b`, at the last position (or `pos`).

            logit_diff(" he", " she")

        Both are texts of one token; mind the leading space.
        """
        metric = logit_diff(self.lens, a, b, pos)
        experiment = self.experiment
        if self.mismatch is None and (reason := metric.misfit(len(experiment.edited))):
            raise InputError(reason)
        experiment.metric = metric
        self._logit_diff_arguments = (a, b, pos)
        self.print(f"metric: {metric.name}")

    @explain_misuse
    def metric(self, name: str | LogitMetric | LogitFunction | None = None, **params: object) -> None:
        """Measure a metric by name, on the prompts, before and after the edits; `run()` then shows it too.

        metric("sinks")             by layer; with parameters, metric("sinks", threshold=0.2)
        metric("loss")              measure runs and sweeps by the loss of the prompt's tokens
        metric(my_function)         … by a function of logits [batch, pos, d_vocab] that returns [batch]
        metric()                    print which metric is in use
        """
        if isinstance(name, str) and name in VERB_NAMES:
            raise InputError(verb_as_argument(name))
        if getattr(name, "__self__", None) is self:
            raise InputError(verb_as_argument(getattr(name, "__name__", "")))
        if isinstance(name, str) and name != "loss":
            result = self.runnable_experiment.measure(name, **params)
            self.run_metric = (name, params)
            self.names["result"] = result
            self.print(str(result))
        elif name is None:
            if params:
                raise InputError(f"metric: name the metric that has the parameter {next(iter(params))}")
            self.print(f"metric: {self.experiment.metric.name}")
            if self.run_metric:
                self.print(f"shown by run(): {self.run_metric[0]}")
        else:
            metric = loss if isinstance(name, str) else as_metric(name)
            if params:
                raise InputError(f"metric: {'loss' if metric is loss else 'a function'} takes no parameters")
            self.experiment.metric = metric
            self._logit_diff_arguments = None
            self.print(f"metric: {metric.name}")

    # Edit

    @explain_misuse
    def patch(
        self, point: str | None = None, *, layer: IndexChoice = None, pos: IndexChoice = "all",
        head: IndexChoice = None, key: IndexChoice = None, what: str | None = None,
    ) -> None:  # fmt: skip
        """Put activations of the clean run into the corrupt run.

            patch("blocks.3.hook_resid_post", pos=5)        a hook point by its whole name
            patch(what="resid", layer=range(3), pos="all")  a kind of activation in some layers
            patch(what="head", layer=2, head=[0, 1])

        Kinds: resid (entering a layer), attn, mlp (their outputs), head (z), q, k, v, pattern, sink (scores on key 0,
        or on the keys in key=). By default all layers, positions and heads are patched.
        """
        edit = self.runnable_experiment.patch(point, layer=layer, pos=pos, head=head, key=key, what=what)
        self._print_edit(edit)

    @explain_misuse
    def ablate(
        self, point: str | None = None, *, layer: IndexChoice = None, pos: IndexChoice = "all",
        head: IndexChoice = None, key: IndexChoice = None, what: str | None = None, value: float | str = "zero",
    ) -> None:  # fmt: skip
        """Replace activations by zero, by a number, or by their mean over the run's positions.

            ablate(what="mlp", layer=1, pos=0)
            ablate(what="head", layer=3, head=1, value="mean")
            ablate(what="sink", layer=3)                    later queries lose key 0; their rows are renormalised

        The other arguments are those of `patch`.
        """
        edit = self.runnable_experiment.ablate(
            point, layer=layer, pos=pos, head=head, key=key, what=what, value=value
        )
        self._print_edit(edit)

    @explain_misuse
    def condition(
        self, name: str, which: str | None = None, *, layer: int | None = None, head: int | None = None,
        **params: object,
    ) -> None:  # fmt: skip
        """Apply a condition of a causal metric to the run.

            condition("bos-mlp", layer=1)
            condition("qk-disruption", "massive")

        `phaselens plugins` lists causal metrics; other arguments are parameters of the metric.
        """
        self._print_edit(self.runnable_experiment.condition(name, which, layer=layer, head=head, **params))

    @explain_misuse
    def null_rope(self, layer: IndexChoice = None) -> None:
        """Null the rotation of some layers, live: null_rope(2), null_rope(range(3)), null_rope() for all."""
        self._print_edit(self.experiment.null_rope(layer))

    @explain_misuse
    def restore_rope(self, layer: IndexChoice = None) -> None:
        """Restore the rotation that null_rope() nulled: restore_rope(2), restore_rope() for all."""
        self._print_edit(self.experiment.restore_rope(layer))

    @explain_misuse
    def nope(self, layer: IndexChoice = None) -> None:
        """Alias: nope is now null_rope. nope(2) is null_rope(2)."""
        self.print("note: nope is now null_rope")
        self.null_rope(layer)

    def _print_edit(self, edit: Intervention) -> None:
        self.print(f"{len(self.experiment.patched())}. {edit}")

    @explain_misuse
    def undo(self) -> None:
        """Undo the last edit, applied or set aside."""
        edit = self.experiment.undo()
        self.print(f"undone: {edit}" + ("" if edit.set_aside is None else " (it was set aside)"))

    @explain_misuse
    def patched(self) -> None:
        """List the edits, in the order made. One that does not fit the prompts is set aside until they fit again."""
        edits = self.experiment.patched()
        self.print(str(edits))
        if edits and self.mismatch is not None and self.state.has_prompts:
            self.print("note: for the last prompts that matched", style="dim")

    # Look

    @explain_misuse
    def run(self, top: int = 5, pos: int = -1) -> None:
        """Run without and with the edits: the likeliest next tokens, loss and metric before and after.

        run()               after the last position
        run(top=10, pos=5)
        """
        result = self.runnable_experiment.run(top, pos)
        self.state.run_arguments = (top, pos)
        self.names["result"] = result
        self.print(str(result))
        if self.run_metric:
            name, params = self.run_metric
            self.print(str(self.runnable_experiment.measure(name, **params)))

    @explain_misuse
    def sweep(
        self, what: str | Sequence[str] = "resid", *more: str, by: str | None = None, layer: IndexChoice = None,
        file: str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        """Patch one cell at a time, everywhere, and show the effect of each on the metric: a heatmap and a figure.

            sweep("resid")              layer × position; also attn, mlp
            sweep("head")               layer × head; also q, k, v, pattern
            sweep("v", by="pos-head")   both
            sweep("q", "k", "v", file="qkv.png")

        Ctrl-C stops it and keeps the cells that are done. `result` holds the last sweep.
        """
        self._print_sweeps("sweep", what, more, by, layer, file)

    @explain_misuse
    def attribution(
        self, what: str | Sequence[str] = "resid", *more: str, by: str | None = None, layer: IndexChoice = None,
        file: str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        """Estimate `sweep` for all cells at once from a gradient: a fast first look, right to first order.

            attribution("resid")

        Arguments are those of `sweep`. After both, their correlation is printed.
        """
        self._print_sweeps("attribution", what, more, by, layer, file)

    @explain_misuse
    def logit_lens(self, pos: int = -1, top: int = 3) -> None:
        """Show what the residual stream predicts at each depth: the model's final norm and unembedding, layer by layer.

            logit_lens()                after the last position, with the edits
            logit_lens(pos=5, top=5)

        Row i is the residual entering layer i. The last column is the metric of each depth.
        """
        self._print_readout(
            "logit_lens", logit_lens(self.runnable_experiment, pos=pos, top=top), pos=pos, top=top
        )

    @explain_misuse
    def direct_logit_attribution(
        self, a: str | int | None = None, b: str | int | None = None, pos: int = -1
    ) -> None:
        """Split the logit of token `a` minus that of `b` into what each head and MLP writes into it directly.

            direct_logit_attribution(" he", " she")
            direct_logit_attribution()  the tokens of logit_diff

        Without `b`, the logit of `a` is split. The final norm's divisor is held fixed.
        """
        if a is None and self._logit_diff_arguments is not None:
            a, b, pos = self._logit_diff_arguments
        if a is None:
            raise InputError(
                'direct_logit_attribution needs a token; for example direct_logit_attribution(" he", " she")'
            )
        attribution = direct_logit_attribution(self.runnable_experiment, a, b, pos=pos)
        arguments = {"pos": pos} if b is None else {"b": b, "pos": pos}
        self._print_readout("direct_logit_attribution", attribution, a=a, **arguments)

    def _print_readout(self, verb: str, result: TextResult, **arguments: object) -> None:
        self.names["result"] = result
        self.state.readout_calls[verb] = call_source("", **arguments)[1:]
        self.print(str(result))

    def _print_sweeps(
        self,
        verb: str,
        what: str | Sequence[str],
        more: Sequence[str],
        by: str | None,
        layer: IndexChoice,
        file: str | os.PathLike[str] | None,
    ) -> None:
        if file is not None and not isinstance(file, str | os.PathLike):
            raise InputError(f"file={short_form(file)}: give the name of a file, such as 'heads.png'")
        kinds = [*([what] if isinstance(what, str) or not isinstance(what, Iterable) else what), *more]
        if not kinds:
            raise InputError(f"{verb}: no kind of activation is named; give {', '.join(KINDS)}")
        layer = without_iterator(layer)
        experiment = self.runnable_experiment
        for kind in kinds:  # refuse an invalid kind before any is measured
            axes_of(experiment.lens, kind, by)
        sweeps: list[Sweep] = []
        for kind in kinds:
            if verb == "sweep":
                with ProgressBar(quiet=self.quiet) as observer:
                    sweeps.append(experiment.sweep(kind, by=by, layer=layer, observer=observer))
            else:
                sweeps.append(experiment.attribution(kind, by=by, layer=layer))
            heatmap.print_sweep(sweeps[-1], self.out)
            self._print_agreement(experiment, sweeps[-1])
            if sweeps[-1].interrupted:
                break
        for edit in sweeps[-1].set_aside:
            self.print(f"set aside: {edit}")
        self.names["result"] = sweeps[-1]
        self.state.sweep_calls = tuple(
            call_source(verb, kind, **non_default(by=by, layer=layer)) for kind in kinds[: len(sweeps)]
        )
        self.print(f"figure: {heatmap.save(sweeps, file or self._figure_file(verb, kinds))}", style="dim")

    def _print_agreement(self, experiment: Experiment, sweep: Sweep) -> None:
        """Print the correlation of patching and attribution, if the session has both for the same state and cells."""
        metric = experiment.metric
        state = (
            experiment.clean,
            experiment.corrupt,
            tuple(edit.code for edit in experiment.patched().applied),
            metric.code or metric.function or metric,
        )
        cells = (sweep.what, sweep.by, sweep.layers)
        self._sweeps[state, cells, sweep.kind] = sweep
        counterpart_kind = "attribution" if sweep.kind == "patching" else "patching"
        counterpart = self._sweeps.get((state, cells, counterpart_kind))
        if counterpart is not None:
            self.print(str(agreement(sweep, counterpart)))

    def _figure_file(self, verb: str, kinds: Sequence[str]) -> Path:
        if self.figures is None:
            self.figures = tempfile.mkdtemp(prefix="phaselens-")
        self._n_figures += 1
        return Path(self.figures) / f"{self._n_figures}-{verb}-{'-'.join(kinds)}.png"

    # Help

    @explain_misuse
    def guide(self, name: str | Callable[..., object] | SessionModel | None = None) -> None:
        """List the verbs, or explain one: guide("sweep")."""
        if name is None:
            self.print(self._overview())
            return
        model = name if type(name) is SessionModel else None
        if isinstance(name, str) and name not in VERB_NAMES:
            model = self.models.get(name)
        if model is not None:
            self.print(f"{model!r}\n{inspect.getdoc(SessionModel)}")
            return
        topic = name if isinstance(name, str) else getattr(name, "__name__", short_form(name))
        if topic not in VERB_NAMES:
            raise InputError(f"guide: no verb {topic!r}; {close_matches(topic, [*VERB_NAMES, *self.models])}")
        verb = getattr(self, topic)
        signature = inspect.signature(verb)
        parameters = [
            parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()
        ]
        without_types = signature.replace(parameters=parameters, return_annotation=signature.empty)
        self.print(f"{topic}{without_types}\n{inspect.getdoc(verb)}")

    def _overview(self) -> str:
        labels = ", ".join(self.models)
        lines = [
            f"models: {labels}; m is {self.first_model.info.label}, models['LABEL'] is any of them",
            'prompts: clean = m.prompt("…"), corrupt = m.prompt("…"), with the same number of tokens',
            f"kinds: {', '.join(KINDS)}",
        ]
        for group, verbs in VERBS.items():
            lines.append(f"{group}:")
            for verb in verbs:
                summary = (inspect.getdoc(getattr(self, verb)) or "").partition("\n")[0]
                lines.append(f"  {verb:12} {summary}")
        lines.append("  %save_session FILE.py   write a script that recreates this state")
        lines.append(
            "result holds the last result; guide('sweep') or sweep? explains a verb; %tb shows a traceback"
        )
        return "\n".join(lines)
