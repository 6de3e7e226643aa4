"""The state of a session: its models, the prompts that its user assigned, and an experiment per model."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from phaselens.errors import InputError
from phaselens.patching import Experiment, LogitMetric, Prompt, align, logit_diff, loss
from phaselens.patching.prompts import require_prompt
from phaselens.patching.wording import number_phrase
from phaselens.repl.models import SessionModel
from phaselens.report import strings
from phaselens.report.terminal_layout import console

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer

# Names with another meaning at the prompt: a model of such a name is available as models['…'] only.
_RESERVED = {"clean", "corrupt", "result", "get_ipython", "exit", "quit", "In", "Out", *dir(builtins)}


@dataclass
class ModelState:
    """The experiment of one model, and the arguments and calls of its last results.

    `placeholder` is the prompt of the experiment until the user assigns one.
    """

    experiment: Experiment
    placeholder: Prompt
    run_arguments: tuple[int, int] | None = None
    sweep_calls: tuple[str, ...] = ()
    readout_calls: dict[str, str] = field(default_factory=dict)

    @property
    def has_prompts(self) -> bool:
        """Whether the user has assigned prompts of this model."""
        return self.experiment.clean is not self.placeholder


class Workspace:
    """Models by label, and an experiment for each. `names` are the variables at the prompt.

    The prompts are the values of `clean` and `corrupt` in `names`. While these two do not match, as between two
    assignments, the experiment keeps the last prompts that matched.
    """

    def __init__(self, models: Mapping[str, HookedTransformer]) -> None:
        self.models = {label: SessionModel(lens) for label, lens in models.items()}
        self.first_model = next(iter(self.models.values()))
        self.names: dict[str, Any] = {"models": self.models, "m": self.first_model}
        self._lens = next(iter(models.values()))
        self._states: dict[int, ModelState] = {}
        self._logit_diff_arguments: tuple[str | int, str | int, int] | None = None
        # (clean, corrupt) after the last line, when they last matched, and when a match or mismatch was last printed.
        self._previous_prompts: tuple[Any, Any] = (None, None)
        self._matched_prompts: tuple[Any, Any] = (None, None)
        self._reported_prompts: tuple[Any, Any] = (None, None)

    def bind_names(self, verbs: Mapping[str, Callable[..., None]]) -> None:
        """Bind the verbs and the models to their names at the prompt; a verb precedes a model of the same name."""
        self.names |= verbs
        for label, model in self.models.items():
            if label.isidentifier() and label not in {*self.names, *_RESERVED}:
                self.names[label] = model

    @property
    def out(self) -> Console:
        """A new console for results on each access, because IPython replaces `sys.stdout`."""
        return console(sys.stdout)

    def print(self, text: str, style: str = "") -> None:
        """Print text with control characters escaped."""
        for line in text.split("\n"):
            self.out.print(Text(strings.printable(line), style=style), soft_wrap=True)

    @property
    def lens(self) -> HookedTransformer:
        """The current model: the model of `clean`; without one, the last current model, initially the first."""
        clean = self.names.get("clean")
        if isinstance(clean, Prompt):
            self._lens = clean.lens
        return self._lens

    @property
    def state(self) -> ModelState:
        """The state of the current model, with the current prompts if they match; it exists even without prompts."""
        self._update_prompts()
        return self._state

    @property
    def _state(self) -> ModelState:
        """The state of the current model, with the last prompts that matched."""
        lens = self.lens
        if id(lens) not in self._states:
            placeholder = Prompt(lens, "", (lens.info.bos_token_id or 0,))
            experiment = Experiment(placeholder, metric=self._metric_for(lens))
            self._states[id(lens)] = ModelState(experiment, placeholder)
        return self._states[id(lens)]

    @property
    def experiment(self) -> Experiment:
        """The experiment of the current model."""
        return self.state.experiment

    @property
    def runnable_experiment(self) -> Experiment:
        """The experiment of the current model, on the current prompts.

        Raises:
            InputError: without prompts, or for prompts that do not match.
        """
        experiment = self.experiment
        if reason := self.mismatch:
            raise InputError(reason)
        return experiment

    @property
    def mismatch(self) -> str | None:
        """The reason why the current prompts cannot be run, or None."""
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

    def _update_prompts(self) -> None:
        """Give the experiment the current prompts if they match, and print which edits stop or start to fit."""
        if self.mismatch is not None:
            return
        clean, corrupt = self.names.get("clean"), self.names.get("corrupt")
        experiment = self._state.experiment
        if experiment.clean is clean and experiment.corrupt is corrupt:
            return
        assert isinstance(clean, Prompt)
        edits_before = experiment.patched()
        experiment.prompts(clean, corrupt)
        edit_pairs = zip(edits_before, experiment.patched(), strict=True)
        changed = [
            (number, after.set_aside)
            for number, (before, after) in enumerate(edit_pairs, start=1)
            if (before.set_aside is None) != (after.set_aside is None)
        ]
        lost = [number for number, reason in changed if reason is not None]
        regained = [number for number, reason in changed if reason is None]
        if lost:
            reasons = dict.fromkeys(reason for _, reason in changed if reason is not None)
            self.print(
                f"note: set aside, {'; '.join(reasons)}: {number_phrase('edit', lost)} "
                "(applied again once prompts fit; patched() lists all)"
            )
        if regained:
            self.print(f"note: applied again: {number_phrase('edit', regained)}")

    def _metric_for(self, lens: HookedTransformer) -> LogitMetric:
        """Return the last logit difference of the session, for the tokens of this model; else the loss."""
        if self._logit_diff_arguments is None:
            return loss
        try:
            return logit_diff(lens, *self._logit_diff_arguments)
        except InputError as error:
            self.print(f"note: runs of {lens.info.label} are measured by the loss: {error}")
            return loss

    def show_new_prompts(self) -> None:
        """Print new prompts, two side by side; called after each line.

        Raises:
            InputError: for two new prompts that do not match, or a value that is not a prompt.
        """
        clean, corrupt = self.names.get("clean"), self.names.get("corrupt")
        previous, self._previous_prompts = self._previous_prompts, (clean, corrupt)
        if clean is previous[0] and corrupt is previous[1]:
            return
        for name, prompt, previous_prompt in (
            ("clean", clean, previous[0]),
            ("corrupt", corrupt, previous[1]),
        ):
            if prompt is not None and prompt is not previous_prompt:
                require_prompt(prompt, name)
        if any(prompt is not None and not isinstance(prompt, Prompt) for prompt in (clean, corrupt)):
            return
        if clean is None or corrupt is None:
            if (prompt := corrupt if clean is None else clean) is not None:
                self.print(str(prompt))
        elif (mismatch := self.mismatch) is None:
            self.print(str(align(clean, corrupt)))
            self._matched_prompts = self._reported_prompts = (clean, corrupt)
        elif corrupt is self._reported_prompts[1]:
            self._print_new_prompt(clean, "corrupt", corrupt)
        elif clean is self._matched_prompts[0]:
            self._print_new_prompt(corrupt, "clean", clean)
        else:
            self._reported_prompts = (clean, corrupt)
            raise InputError(mismatch)
        self._update_prompts()

    def _print_new_prompt(self, new: Prompt, earlier_name: str, earlier: Prompt) -> None:
        """Print the first of two assignments, and the name of the prompt that is still the earlier one."""
        property_of_earlier = (
            f"of {earlier.lens.info.label!r}" if earlier.lens is not new.lens else f"of {len(earlier)} tokens"
        )
        self.print(
            f"{new}\n{earlier_name} is still the earlier prompt, {property_of_earlier}; assign {earlier_name} too"
        )
