"""The vocabulary of `phaselens repl`: each verb reads its words, calls `phaselens.patching`, and prints."""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from phaselens.errors import InputError, close_matches
from phaselens.patching import (
    KINDS,
    Experiment,
    LogitMetric,
    Prompt,
    Sweep,
    agreement,
    align,
    logit_diff,
    loss,
)
from phaselens.patching.metrics import as_metric
from phaselens.patching.prompts import require_prompt
from phaselens.repl.models import SessionModel, adopt
from phaselens.report import heatmap, words
from phaselens.report.progress import ProgressBar
from phaselens.report.tables import console

#: Verbs by what they are for, as `guide()` lists them.
VERBS: dict[str, tuple[str, ...]] = {
    "judge": ("logit_diff", "metric"),
    "edit": ("patch", "ablate", "condition", "nope", "rope", "undo", "patched"),
    "look": ("run", "sweep", "attribution"),
    "help": ("guide",),
}


class Session:
    """Models by label, and the verbs on them. `names` is what the user's lines see and set."""

    def __init__(self, models: Mapping[str, Any], figures: str | None = None, *, quiet: bool = False) -> None:
        self.models: dict[str, SessionModel] = {label: adopt(lens) for label, lens in models.items()}
        self.first = next(iter(self.models.values()))
        self.figures = figures
        self.quiet = quiet
        self.experiments: dict[str, Experiment] = {}
        self.watched: tuple[str, dict[str, Any]] | None = None
        self.swept: str | None = None
        self._difference: tuple[str | int, str | int, int] | None = None
        self._known: dict[tuple[Any, ...], Sweep] = {}
        self._aligned: tuple[Any, Any] = (None, None)
        self._n_figures = 0
        self.names: dict[str, Any] = {"models": self.models, "m": self.first}
        self.names |= {verb: getattr(self, verb) for verbs in VERBS.values() for verb in verbs}
        for label, lens in self.models.items():
            if label == "rope":
                lens._switch = self.rope
            if label.isidentifier() and (label == "rope" or label not in self.names):
                self.names[label] = lens

    # What the verbs stand on

    @property
    def out(self) -> Console:
        """Where results go; looked up anew, as IPython exchanges `sys.stdout`."""
        return console(sys.stdout)

    def say(self, text: str, style: str = "") -> None:
        """Lines of text, harmless ones."""
        for line in str(text).split("\n"):
            self.out.print(Text(words.plain(line), style=style), soft_wrap=True)

    @property
    def lens(self) -> SessionModel:
        """The model that is worked on: that of `clean`, else the first."""
        clean = self.names.get("clean")
        return adopt(clean.lens) if isinstance(clean, Prompt) else self.first

    @property
    def experiment(self) -> Experiment:
        """The edits of that model, with the prompts as they are now.

        Raises:
            InputError: for prompts that do not go together.
        """
        lens = self.lens
        clean, corrupt = self.names.get("clean"), self.names.get("corrupt")
        label = lens.info.label
        if label not in self.experiments:
            stand_in = Prompt(lens, "", (lens.info.bos_token_id or 0,))
            self.experiments[label] = Experiment(stand_in, metric=self._metric_of(lens))
        known = self.experiments[label]
        if clean is not None and (known.clean is not clean or known.corrupt is not corrupt):
            known.prompts(require_prompt(clean, "clean"), corrupt)
        return known

    @property
    def ready(self) -> Experiment:
        """The same, once there is a prompt.

        Raises:
            InputError: which says how to make one.
        """
        if not isinstance(self.names.get("clean"), Prompt):
            raise InputError(
                'there is no prompt yet; write clean = m.prompt("…") and corrupt = m.prompt("…")'
            )
        return self.experiment

    def _metric_of(self, lens: SessionModel) -> LogitMetric:
        return loss if self._difference is None else logit_diff(lens, *self._difference)

    def after_line(self, *_: Any) -> None:
        """Show new prompts side by side; called after each line."""
        clean, corrupt = self.names.get("clean"), self.names.get("corrupt")
        if clean is self._aligned[0] and corrupt is self._aligned[1]:
            return
        self._aligned = (clean, corrupt)
        if isinstance(clean, Prompt) and isinstance(corrupt, Prompt):
            self.say(str(align(clean, corrupt)))
        elif isinstance(clean, Prompt):
            self.say(str(clean))

    # Judge

    def logit_diff(self, a: str | int, b: str | int, pos: int = -1) -> None:
        """Judge runs by the logit of token `a` minus that of `b`, at the last position (or `pos`).

            logit_diff(" he", " she")

        Both are texts of one token; mind the space before them.
        """
        made = logit_diff(self.lens, a, b, pos)
        self.experiment.metric = made
        self._difference = (a, b, pos)
        self.say(f"metric: {made.name}")

    def metric(self, name: Any = None, **params: Any) -> None:
        """Measure a metric by name, on the prompts, before and after the edits; `run()` then shows it too.

        metric("sinks")             by layer; parameters as in metric("sinks", threshold=0.2)
        metric("loss")              judge runs and sweeps by the loss of the prompt's own tokens
        metric(my_function)         … by a function of logits [batch, pos, d_vocab] that gives [batch]
        metric()                    says which metric is in use
        """
        if name is None:
            self.say(f"metric: {self.experiment.metric.name}")
            if self.watched:
                self.say(f"shown by run(): {self.watched[0]}")
        elif name == "loss" or callable(name):
            self.experiment.metric = loss if name == "loss" else as_metric(name)
            self._difference = None
            self.say(f"metric: {self.experiment.metric.name}")
        else:
            found = self.ready.measure(str(name), **params)
            self.watched = (str(name), params)
            self.names["result"] = found
            self.say(str(found))

    # Edit

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

    def condition(
        self, name: str, which: str | None = None, *, layer: int | None = None, **params: Any
    ) -> None:
        """Put a condition of a causal metric on the run.

            condition("bos-mlp", layer=1)
            condition("qk-disruption", "massive")

        `phaselens plugins` lists causal metrics; other arguments are the metric's own parameters.
        """
        self._made(self.ready.condition(name, which, layer=layer, **params))

    def nope(self, layer: Any = None) -> None:
        """Null the rotation of one layer, several, or all, live: nope(), nope(2), nope(range(3))."""
        self._made(self.experiment.nope(layer))

    def rope(self, layer: Any = None) -> None:
        """Restore the rotation that nope() nulled, of one layer, several, or all: rope(), rope(2)."""
        self._made(self.experiment.rope(layer))

    def _made(self, edit: Any) -> None:
        self.say(f"{len(self.experiment.patched())}. {edit}")

    def undo(self) -> None:
        """Take back the last edit."""
        self.say(f"undone: {self.experiment.undo()}")

    def patched(self) -> None:
        """List the edits, first one first."""
        self.say(str(self.experiment.patched()))

    # Look

    def run(self, top: int = 5, pos: int = -1) -> None:
        """Run without and with the edits: the likeliest next tokens, loss and metric before and after.

        run()               after the last position
        run(top=10, pos=5)
        """
        found = self.ready.run(top, pos)
        self.names["result"] = found
        self.say(str(found))
        if self.watched:
            self.say(str(self.ready.measure(self.watched[0], **self.watched[1])))

    def sweep(self, *what: str, by: str | None = None, layer: Any = None, file: str | None = None) -> None:
        """Patch one cell at a time, everywhere, and show what each does to the metric: a heatmap and a figure.

            sweep("resid")              layer × position; also attn, mlp
            sweep("head")               layer × head; also q, k, v, pattern
            sweep("v", by="pos-head")   both
            sweep("q", "k", "v", file="qkv.png")

        Ctrl-C stops it and keeps what is done. `result` holds the last one.
        """
        self._swept("sweep", what or ("resid",), by, layer, file)

    def attribution(
        self, *what: str, by: str | None = None, layer: Any = None, file: str | None = None
    ) -> None:
        """What `sweep` would find, estimated at once from a gradient: a fast first look, right to first order.

        Arguments are those of `sweep`. Where both are known, how far they agree is said.
        """
        self._swept("attribution", what or ("resid",), by, layer, file)

    def _swept(self, verb: str, kinds: tuple[str, ...], by: str | None, layer: Any, file: str | None) -> None:
        experiment = self.ready
        found = []
        for what in kinds:
            with self._watching() as observer:
                found.append(
                    experiment.sweep(what, by=by, layer=layer, observer=observer)
                    if verb == "sweep"
                    else experiment.attribution(what, by=by, layer=layer)
                )
            heatmap.print_sweep(found[-1], self.out)
            self._compare(experiment, found[-1])
            if found[-1].interrupted:
                break
        self.names["result"] = found[-1]
        said = [
            *map(repr, kinds),
            *(f"{name}={value!r}" for name, value in (("by", by), ("layer", layer)) if value),
        ]
        self.swept = f"{verb}({', '.join(said)})" if len(kinds) == 1 else None
        self.say(f"figure: {heatmap.save(found, file or self._figure_file(verb, kinds))}", style="dim")

    @contextmanager
    def _watching(self) -> Any:
        with ProgressBar(quiet=self.quiet) as bar:
            yield bar

    def _compare(self, experiment: Experiment, found: Sweep) -> None:
        """Say how far attribution and patching of the same state agree, where both are known."""
        state = (
            experiment.lens.info.label,
            experiment.clean,
            experiment.corrupt,
            tuple(edit.code for edit in experiment.patched()),
            experiment.metric.name,
        )
        place = (found.what, found.by, found.layers)
        self._known[state, place, found.kind] = found
        other = self._known.get((state, place, "attribution" if found.kind == "patching" else "patching"))
        if other is not None:
            self.say(str(agreement(found, other)))

    def _figure_file(self, verb: str, kinds: tuple[str, ...]) -> Path:
        if self.figures is None:
            self.figures = tempfile.mkdtemp(prefix="phaselens-")
        self._n_figures += 1
        return Path(self.figures) / f"{self._n_figures}-{verb}-{'-'.join(kinds)}.png"

    # Help

    def guide(self, name: str | Callable[..., Any] | None = None) -> None:
        """List the verbs, or explain one: guide("sweep")."""
        if name is None:
            self.say(self._overview())
            return
        wanted = name if isinstance(name, str) else getattr(name, "__name__", "")
        verbs = [verb for group in VERBS.values() for verb in group]
        if wanted in self.models and wanted not in verbs:
            self.say(f"{self.models[wanted]!r}\n{inspect.getdoc(SessionModel)}")
            return
        if wanted not in verbs:
            raise InputError(f"guide: no verb {wanted!r}; {close_matches(wanted, [*verbs, *self.models])}")
        verb = getattr(self, wanted)
        signature = inspect.signature(verb)
        bare = [one.replace(annotation=one.empty) for one in signature.parameters.values()]
        shown = signature.replace(parameters=bare, return_annotation=signature.empty)
        self.say(f"{wanted}{shown}\n{inspect.getdoc(verb)}")

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
