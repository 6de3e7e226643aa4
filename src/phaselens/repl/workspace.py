"""What a session works on: models, the prompts that its user assigned, and an experiment for each model."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from phaselens.errors import InputError
from phaselens.patching import Experiment, LogitMetric, Prompt, align, logit_diff, loss
from phaselens.patching.edits import numbered
from phaselens.patching.prompts import require_prompt
from phaselens.repl.models import SessionModel, adopt
from phaselens.report import words
from phaselens.report.tables import console

# Names that mean something else at the prompt, so that a model of that name is reached by models['…'].
_RESERVED = {"clean", "corrupt", "result", "get_ipython", "exit", "quit", "In", "Out", *dir(builtins)}


@dataclass
class Bench:
    """One model's experiment, and what was last done with it, as calls."""

    experiment: Experiment
    stand_in: Prompt
    run: tuple[int, int] | None = None
    swept: tuple[str, ...] = ()

    @property
    def has_prompts(self) -> bool:
        """Whether a prompt was ever read for it."""
        return self.experiment.clean is not self.stand_in


class Workspace:
    """Models by label, and the experiment on each. `names` is what the user's lines see and set.

    The prompts are whatever `names` holds as `clean` and `corrupt`. While those do not go together, as between two
    assignments, the experiment keeps the last ones that did.
    """

    def __init__(self, models: Mapping[str, Any]) -> None:
        self.models: dict[str, SessionModel] = {label: adopt(lens) for label, lens in models.items()}
        self.first = next(iter(self.models.values()))
        self.names: dict[str, Any] = {"models": self.models, "m": self.first}
        self._lens = self.first
        self._benches: dict[int, Bench] = {}
        self._difference: tuple[str | int, str | int, int] | None = None
        # The prompts of the last line, the last two that went together, and the last two of which it was said whether.
        self._last_seen: tuple[Any, Any] = (None, None)
        self._matched: tuple[Any, Any] = (None, None)
        self._judged: tuple[Any, Any] = (None, None)

    def name_models(self, verbs: Mapping[str, Any]) -> None:
        """Give the verbs and the models their names at the prompt; a verb is stronger, but for the model `rope`."""
        self.names |= verbs
        for label, lens in self.models.items():
            if label == "rope":
                lens._switch = verbs["rope"]
            if label == "rope" or (label.isidentifier() and label not in {*self.names, *_RESERVED}):
                self.names[label] = lens

    @property
    def out(self) -> Console:
        """Where results go; looked up anew, as IPython exchanges `sys.stdout`."""
        return console(sys.stdout)

    def say(self, text: str, style: str = "") -> None:
        """Print text with control characters escaped."""
        for line in str(text).split("\n"):
            self.out.print(Text(words.plain(line), style=style), soft_wrap=True)

    @property
    def lens(self) -> SessionModel:
        """The model that is worked on: that of `clean`, else the last one, at the start the first."""
        clean = self.names.get("clean")
        if isinstance(clean, Prompt):
            self._lens = adopt(clean.lens)
        return self._lens

    @property
    def bench(self) -> Bench:
        """That model's experiment, with the present prompts if they go together; it exists in every state."""
        self._take_prompts()
        return self._bench

    @property
    def _bench(self) -> Bench:
        """The same with the last prompts that went together."""
        lens = self.lens
        if id(lens) not in self._benches:
            stand_in = Prompt(lens, "", (lens.info.bos_token_id or 0,))
            self._benches[id(lens)] = Bench(Experiment(stand_in, metric=self._metric_of(lens)), stand_in)
        return self._benches[id(lens)]

    @property
    def experiment(self) -> Experiment:
        """The experiment of `bench`."""
        return self.bench.experiment

    @property
    def ready(self) -> Experiment:
        """The same, where the present prompts can be run.

        Raises:
            InputError: without prompts, or for prompts that do not go together.
        """
        experiment = self.experiment
        if reason := self.mismatch:
            raise InputError(reason)
        return experiment

    @property
    def mismatch(self) -> str | None:
        """Why the present prompts cannot be run, or None."""
        clean, corrupt = self.names.get("clean"), self.names.get("corrupt")
        if clean is None:
            return 'there is no prompt yet; write clean = m.prompt("…") and corrupt = m.prompt("…")'
        try:
            require_prompt(clean, "clean")
            if corrupt is not None:
                align(clean, require_prompt(corrupt, "corrupt"))
        except InputError as error:
            return str(error)
        return None

    def _take_prompts(self) -> None:
        """Give the experiment the present prompts, if they go together, and say which edits no longer or again fit."""
        if self.mismatch is not None:
            return
        clean, corrupt = self.names.get("clean"), self.names.get("corrupt")
        experiment = self._bench.experiment
        if experiment.clean is clean and experiment.corrupt is corrupt:
            return
        assert isinstance(clean, Prompt)
        before = experiment.patched()
        experiment.prompts(clean, corrupt)
        changed = [
            (number, edit.set_aside)
            for number, (old, edit) in enumerate(zip(before, experiment.patched(), strict=True), start=1)
            if (old.set_aside is None) != (edit.set_aside is None)
        ]
        lost = [number for number, reason in changed if reason is not None]
        regained = [number for number, reason in changed if reason is None]
        if lost:
            reasons = dict.fromkeys(reason for _, reason in changed if reason is not None)
            self.say(
                f"note: set aside, {'; '.join(reasons)}: {numbered('edit', lost)} "
                "(back when prompts fit; patched() lists all)"
            )
        if regained:
            self.say(f"note: applied again: {numbered('edit', regained)}")

    def _metric_of(self, lens: SessionModel) -> LogitMetric:
        """The logit difference that was last asked for, of this model's tokens; else the loss."""
        if self._difference is None:
            return loss
        try:
            return logit_diff(lens, *self._difference)
        except InputError as error:
            self.say(f"note: runs of {lens.info.label} are judged by the loss: {error}")
            return loss

    def after_line(self, *_: Any) -> None:
        """Show new prompts, two side by side; called after each line.

        Raises:
            InputError: for two new prompts that do not go together, or for what is no prompt.
        """
        clean, corrupt = self.names.get("clean"), self.names.get("corrupt")
        seen, self._last_seen = self._last_seen, (clean, corrupt)
        if clean is seen[0] and corrupt is seen[1]:
            return
        for name, prompt, before in (("clean", clean, seen[0]), ("corrupt", corrupt, seen[1])):
            if prompt is not None and prompt is not before:
                require_prompt(prompt, name)
        if any(prompt is not None and not isinstance(prompt, Prompt) for prompt in (clean, corrupt)):
            return
        if clean is None or corrupt is None:
            if (prompt := corrupt if clean is None else clean) is not None:
                self.say(str(prompt))
        elif (mismatch := self.mismatch) is None:
            self.say(str(align(clean, corrupt)))
            self._matched = self._judged = (clean, corrupt)
        elif corrupt is self._judged[1]:
            self._say_half(clean, "corrupt", corrupt)
        elif clean is self._matched[0]:
            self._say_half(corrupt, "clean", clean)
        else:
            self._judged = (clean, corrupt)
            raise InputError(mismatch)
        self._take_prompts()

    def _say_half(self, new: Prompt, name: str, old: Prompt) -> None:
        """Between two assignments: one prompt is new, the other is still that of before."""
        what = f"of {old.lens.info.label!r}" if old.lens is not new.lens else f"of {len(old)} tokens"
        self.say(f"{new}\n{name} is still the earlier prompt, {what}; assign {name} too")
