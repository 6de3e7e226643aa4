"""`Experiment`: two prompts, a metric and a stack of edits. Everything the REPL does, as one object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from phaselens.errors import InputError, is_whole, short_form
from phaselens.lens.points import Hook
from phaselens.patching.attribution import attribute
from phaselens.patching.edits import Ablate, Intervention, Patch, SetRotation, Stack, parse_ablation_value
from phaselens.patching.metrics import LogitFunction, LogitMetric, as_metric, loss
from phaselens.patching.old_names import OldNames
from phaselens.patching.passes import capture_activations, require_rows
from phaselens.patching.plans import SweepPlan, axes_of
from phaselens.patching.plugin_metrics import (
    ApplyCondition,
    LayerRow,
    LayerValues,
    MetricByLayer,
    displayed_column,
    find_condition,
    measure_by_layer,
)
from phaselens.patching.prompts import Alignment, Prompt, align, bos_of, require_prompt
from phaselens.patching.results import PromptResult, Sweep, likeliest_tokens
from phaselens.patching.sweeps import sweep
from phaselens.patching.targets import (
    IndexChoice,
    Target,
    resolve_indices,
    resolve_position,
    resolve_target,
    without_iterator,
)
from phaselens.patching.wording import call_source, non_default, number_phrase
from phaselens.plugin import plugins
from phaselens.runs import Observer

if TYPE_CHECKING:
    from torch import Tensor


class Experiment(OldNames):
    """Activation patching on one model.

    Edits are made to the run of `corrupt`; patches take their activations from the run of `clean`. Without `corrupt`,
    edits are made to the clean run, and nothing can be patched. The stack of edits holds no activations, so the prompts
    can be replaced under it.

    Args:
        clean: the prompt, whose run supplies the patches; see `prompt`.
        corrupt: another prompt of the same model and of the same length, whose run is edited.
        metric: the number that `run`, `sweep` and `attribution` report: `logit_diff(…)`, `loss`, or a function of
            logits [batch, pos, d_vocab] that returns [batch]. By default the loss of the prompt's tokens.

    >>> from phaselens.testing import tiny_lens
    >>> from phaselens.patching import logit_diff, prompt
    >>> lens = tiny_lens()
    >>> experiment = Experiment(prompt(lens, "to be"), prompt(lens, "to do"), logit_diff(lens, "e", "o"))
    >>> experiment.patch("blocks.1.hook_resid_post", pos=4)
    patch blocks.1.hook_resid_post at position 4 from the clean run
    >>> experiment.sweep("resid").values.shape
    (2, 6)
    """

    def __init__(
        self, clean: Prompt, corrupt: Prompt | None = None, metric: LogitMetric | LogitFunction = loss
    ) -> None:
        self.lens = require_prompt(clean, "clean").lens
        self._nulled_at_start = self.lens.nulled_layers
        self._edits: list[Intervention] = []
        self._metric = as_metric(metric)
        self.prompts(clean, corrupt)

    @property
    def metric(self) -> LogitMetric:
        """The number that runs and sweeps report; set to `logit_diff(…)`, `loss` or a function of logits.

        Raises:
            InputError: when set to anything else.
        """
        return self._metric

    @metric.setter
    def metric(self, metric: LogitMetric | LogitFunction) -> None:
        self._metric = as_metric(metric)

    def prompts(self, clean: Prompt, corrupt: Prompt | None = None) -> Alignment | None:
        """Replace the prompts and keep the edits.

        An edit that does not fit the new prompts, because they lack a position or a corrupt prompt, is set aside: it
        stays in the stack, is not applied, and is applied again once prompts fit. Positions that count from the end
        (−1) count from the end of the new prompts.

        Raises:
            InputError: for prompts of another model or of two lengths.
        """
        require_prompt(clean, "clean")
        alignment = None if corrupt is None else align(clean, corrupt)
        if clean.lens is not self.lens:
            raise InputError(
                f"this experiment edits {self.lens.info.label}; make another Experiment for {clean.lens.info.label}"
            )
        self.clean, self.corrupt = clean, corrupt
        self._edits = [edit.fit_to(clean, corrupt) for edit in self._edits]
        self._clean_activations: dict[tuple[object, ...], Mapping[str, Tensor]] = {}
        return alignment

    @property
    def edited(self) -> Prompt:
        """The prompt whose run is edited."""
        return self.clean if self.corrupt is None else self.corrupt

    # Edits

    def patch(
        self, point: str | None = None, *, layer: IndexChoice = None, pos: IndexChoice = "all",
        head: IndexChoice = None, key: IndexChoice = None, what: str | None = None,
    ) -> Intervention:  # fmt: skip
        """Put activations of the clean run into the corrupt run.

        Args:
            point: a whole hook name, `"blocks.3.hook_resid_post"`; or instead
            what: a kind of activation (`resid`, `attn`, `mlp`, `head`, `q`, `k`, `v`, `pattern`, `sink`), in
            layer: one layer or several; by default all.
            pos: one position or several, or `"all"`; negative from the end. For `pattern` and `sink`, positions of
                queries.
            head: one head or several; by default all.
            key: one key position or several, for `pattern` (by default all) and `sink` (by default key 0).

        Raises:
            InputError: for a point, layer, position, head or key that does not exist, or without a corrupt run.
        """
        self._require_corrupt("patch")
        target, arguments = self._target(self.clean, point, layer, pos, head, key, what)
        return self._push(Patch(call_source("patch", *_positional(point), **arguments), target))

    def ablate(
        self, point: str | None = None, *, layer: IndexChoice = None, pos: IndexChoice = "all",
        head: IndexChoice = None, key: IndexChoice = None, what: str | None = None, value: float | str = "zero",
    ) -> Intervention:  # fmt: skip
        """Replace activations by `"zero"`, by a number, or by their `"mean"` over the positions of the same run.

        The other arguments are those of `patch`. `ablate(what="sink", layer=3)` takes all attention of later queries
        from key 0 (or `key`) and renormalises their rows; a number is written as the key's score instead. Attention
        scores and weights have no mean, since each query sees different keys.

        Raises:
            InputError: as `patch` does, and for a value that cannot be written.
        """
        target, arguments = self._target(self.edited, point, layer, pos, head, key, what)
        number_or_mean = parse_ablation_value(value, target.names)
        arguments |= non_default(value=value)
        return self._push(
            Ablate(call_source("ablate", *_positional(point), **arguments), target, number_or_mean)
        )

    def _target(
        self, source: Prompt, point: str | None, layer: IndexChoice, pos: IndexChoice, head: IndexChoice,
        key: IndexChoice, what: str | None,
    ) -> tuple[Target, dict[str, object]]:  # fmt: skip
        """Return the target that the arguments describe, and the arguments that differ from their defaults."""
        layer, pos, head, key = map(without_iterator, (layer, pos, head, key))
        target = resolve_target(self.lens, len(self.edited), point, what, layer, pos, head, key)
        # A point that cannot be edited is refused now, not on the next run.
        require_rows(self.lens, source.tokens, target.names)
        return target, non_default(layer=layer, pos=pos, head=head, key=key, what=what)

    def condition(
        self, name: str, which: str | None = None, *, layer: int | None = None, head: int | None = None,
        **params: object,
    ) -> Intervention:  # fmt: skip
        """Apply a condition of a causal metric to the run: `condition("bos-mlp", layer=1)`.

        Args:
            name: a causal metric, installed or built in.
            which: the name of one of its conditions; by default the first that is not a control.
            layer: the layer of the condition.
            head: its head.
            params: parameters of the metric.

        Raises:
            InputError: for a metric or condition that does not exist; the message lists those that do.
        """
        condition = find_condition(self.lens, name, which, layer, params, head)
        code = call_source("condition", name, **non_default(which=which, layer=layer, head=head), **params)
        return self._push(ApplyCondition(code, name, condition, self.edited))

    def null_rope(self, layer: IndexChoice = None) -> Intervention:
        """Null the rotation of one layer, several, or all: queries and keys lose their positions (cos = 1, sin = 0).

        The rotation is a switch of the model: every run on it is affected until `restore_rope` or `undo`.

        Raises:
            RefusedModel: for a model that does not encode positions by a rotation.
            InputError: where the rotation is nulled already.
        """
        return self._switch_rotation("null_rope", layer, nulled=True)

    def restore_rope(self, layer: IndexChoice = None) -> Intervention:
        """Restore the rotation of one layer, several, or all.

        Raises:
            InputError: where the rotation is not nulled, or the model has none.
        """
        return self._switch_rotation("restore_rope", layer, nulled=False)

    def _switch_rotation(self, verb: str, layer: IndexChoice, *, nulled: bool) -> Intervention:
        layer = without_iterator(layer)
        layers = self._layers(layer)
        if not (changed := self.lens.set_rotation(layers, nulled=nulled)):
            reason = "there is no rotation to null" if nulled else "no rotation was nulled"
            layers_phrase = number_phrase("layer", layers)
            raise InputError(f"{verb}: {reason} in {layers_phrase} of {self.lens.info.label}")
        code = call_source(verb, **non_default(layer=layer))
        return self._push(SetRotation(code, layers if nulled else changed, nulled, changed))

    def _layers(self, layer: IndexChoice) -> tuple[int, ...]:
        return resolve_indices(layer, self.lens.info.n_layers, "layer", self.lens.info.label)

    def _push(self, edit: Intervention) -> Intervention:
        edit = replace(edit, made_on=(self.clean, self.corrupt))
        self._edits.append(edit)
        return edit

    def undo(self) -> Intervention:
        """Undo the last edit, applied or set aside, and return it.

        Raises:
            InputError: if the stack is empty.
        """
        if not self._edits:
            raise InputError("undo: there is no edit to undo")
        edit = self._edits.pop()
        if isinstance(edit, SetRotation):
            self.lens.set_rotation(edit.changed, nulled=not edit.nulled)
        return edit

    def patched(self) -> Stack:
        """Return the edits in the order in which they were made, including those that are set aside."""
        return Stack(self._edits)

    # Runs

    def run(self, top: int = 5, pos: int = -1) -> PromptResult:
        """Run the model without and with the edits.

        "Without" is the model as it was loaded, rotation included.

        Args:
            top: the number of most probable next tokens to list.
            pos: the position whose next token is predicted.

        Raises:
            InputError: for a position or number out of range.
        """
        if not is_whole(top) or not 1 <= top <= self.lens.info.d_vocab:
            raise InputError(f"top={short_form(top)}: give a number, 1 to {self.lens.info.d_vocab}")
        prompt = self.edited
        position = resolve_position(pos, len(prompt))
        reason = self.metric.misfit(len(prompt)) if self.metric is not loss else None
        has_metric = self.metric is not loss and reason is None
        clean = None
        with self.lens.nulled_rotation(self._nulled_at_start):
            before = self._logits(prompt)
            if has_metric and self.corrupt is not None:
                clean = self._value(self._logits(self.clean), self.clean)
        after = self._logits(prompt, self.hooks())
        top_before, top_after = likeliest_tokens(self.lens, (before[0, position], after[0, position]), top)
        losses = None
        if len(prompt) > 1:
            losses = float(loss(before, prompt.tokens)[0]), float(loss(after, prompt.tokens)[0])
        edits = self.patched()
        return PromptResult(
            "clean" if self.corrupt is None else "corrupt",
            position,
            prompt.words[position],
            top_before,
            top_after,
            losses,
            self.metric.name if has_metric else None,
            (self._value(before, prompt), self._value(after, prompt)) if has_metric else None,
            clean,
            tuple(map(str, edits.applied)),
            edits.set_aside,
            reason or "",
            bos=bos_of(self.clean, self.corrupt),
        )

    def measure(self, name: str, **params: object) -> MetricByLayer:
        """Measure a metric, by name, on the prompts' runs: by layer, without and with the edits.

        Raises:
            InputError: for a metric or parameter that does not exist, or a metric that shows no number by layer.
        """
        if not isinstance(name, str):
            raise InputError(f"measure: name is {short_form(name)}; give the name of a metric")
        _, column, unit = displayed_column(plugins().metric(name))
        prompt = self.edited
        clean: LayerValues | None = None
        with self.lens.nulled_rotation(self._nulled_at_start):
            before = measure_by_layer(prompt, name, params)
            if self.corrupt is not None:
                clean = measure_by_layer(self.clean, name, params)
        with self.lens.hooks(fwd_hooks=self.hooks()):
            after = measure_by_layer(prompt, name, params)

        def rows(select: Callable[[LayerValues], Mapping[int, float | None]]) -> tuple[LayerRow, ...]:
            values_before, values_after = select(before), select(after)
            values_clean = {} if clean is None else select(clean)
            return tuple(
                (layer, values_before[layer], values_after.get(layer), values_clean.get(layer))
                for layer in sorted(values_before)
            )

        return MetricByLayer(
            name,
            column,
            unit,
            rows(lambda run: run.values),
            tuple(dict.fromkeys([*before.warnings, *after.warnings])),
            rows(lambda run: run.nulls),
            self.patched().set_aside,
            bos=bos_of(self.clean, self.corrupt),
        )

    def hooks(self) -> list[Hook]:
        """Return the edits that fit the prompts as pairs of a hook name and a function, for `lens.stream(…, hooks)`."""
        return [
            hook for edit in self.patched().applied for hook in edit.hooks(self._clean_values, self.lens.rows)
        ]

    def _clean_values(self, names: Sequence[str], keys: tuple[int, ...] | None) -> Mapping[str, Tensor]:
        """Return activations of the clean run, for the current rotation of the model."""
        memo_key = (tuple(names), keys, self.lens.nulled_layers)
        if memo_key not in self._clean_activations:
            self._clean_activations[memo_key] = capture_activations(self.lens, self.clean.tokens, names, keys)
        return self._clean_activations[memo_key]

    def _logits(self, prompt: Prompt, hooks: Sequence[Hook] = ()) -> Tensor:
        return self.lens.stream(prompt.tokens, hooks, unembed=True)

    def _value(self, logits: Tensor, prompt: Prompt) -> float:
        return float(self.metric(logits, prompt.tokens)[0])

    def values(self) -> tuple[float, float]:
        """Return the metric of the edited run and of the clean run, for the current rotation."""
        edited = self._value(self._logits(self.edited, self.hooks()), self.edited)
        return edited, self._value(self._logits(self.clean), self.clean)

    def sweep(
        self, what: str = "resid", *, by: str | None = None, layer: IndexChoice = None,
        observer: Observer | None = None,
    ) -> Sweep:  # fmt: skip
        """Put one cell of the clean run at a time into the corrupt run, edits included, and measure the metric.

        Layers are swept upwards: the run of a cell starts at its layer, from the residual that the corrupt run has
        there. Ctrl-C ends the sweep; the cells that are done are kept, the others masked.

        Args:
            what: `resid` (entering each layer), `attn`, `mlp` (their outputs), `head` (z), `q`, `k`, `v`, `pattern`,
                `sink` (the scores on key 0).
            by: `"pos"`: layer × position; `"head"`: layer × head, all positions at once; `"pos-head"`: both. The
                default is `"head"` where there are heads, else `"pos"`. `pos` of a pattern is the query's.
            layer: the layers to sweep; by default all.
            observer: receives the progress.

        Raises:
            InputError: for an activation that cannot be swept, or without a corrupt run.
        """
        return sweep(self._plan("sweep", what, by, layer), observer or Observer())

    def attribution(self, what: str = "resid", *, by: str | None = None, layer: IndexChoice = None) -> Sweep:
        """Estimate the results of `sweep` for all cells at once, from the metric's gradient: fast, and to first order.

        `agreement(sweep, attribution)` measures how far the estimate can be trusted.
        """
        return attribute(self._plan("attribution", what, by, layer))

    def _plan(self, verb: str, what: str, by: str | None, layer: IndexChoice) -> SweepPlan:
        corrupt = self._require_corrupt(verb)
        axes, layers = axes_of(self.lens, what, by), tuple(sorted(self._layers(layer)))
        base, clean_value = self.values()
        return SweepPlan(
            self.clean, corrupt, self.metric, what, axes, layers, self.hooks(), self.patched().set_aside, base,
            clean_value,
        )  # fmt: skip

    def _require_corrupt(self, verb: str) -> Prompt:
        if self.corrupt is None:
            raise InputError(f"{verb}: there is no corrupt prompt to put the clean run's activations into")
        return self.corrupt


def _positional(point: str | None) -> tuple[str, ...]:
    return () if point is None else (point,)
