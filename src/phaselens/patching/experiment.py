"""Two prompts, a metric and a stack of edits: everything the REPL does, as one object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError, is_whole
from phaselens.patching import edits as steps
from phaselens.patching.attribution import attribute
from phaselens.patching.edits import Stack, call, unusual
from phaselens.patching.metrics import LogitMetric, as_metric, loss
from phaselens.patching.named import Apply, ByLayer, Measured, Row, by_layer, find_condition, shown_column
from phaselens.patching.passes import Hook, captured, require_rows, rotation, rotation_as, set_rotation
from phaselens.patching.points import Places, brief, chosen, single, target
from phaselens.patching.prompts import Alignment, Prompt, align, bos_of, require_prompt, token_text
from phaselens.patching.results import Outcome, Sweep, Token
from phaselens.patching.sweeps import axes_of, sweep
from phaselens.plugin import plugins
from phaselens.runs import Observer

if TYPE_CHECKING:
    from torch import Tensor


class Experiment:
    """Activation patching on one model.

    Edits are made to the run of `corrupt`; what is patched in comes from the run of `clean`. Without `corrupt`,
    edits are made to the clean run, and there is nothing to patch in. The stack of edits holds no activations, so
    that prompts can be exchanged under it.

    Args:
        clean, corrupt: prompts of one model and of one length; see `prompt`.
        metric: what `run`, `sweep` and `attribution` report: `logit_diff(…)`, `loss` or a function that takes logits
            [batch, pos, d_vocab] and gives [batch]. By default the loss of the prompt's own tokens.

    >>> from phaselens.testing import tiny_lens
    >>> from phaselens.patching import logit_diff, prompt
    >>> lens = tiny_lens()
    >>> experiment = Experiment(prompt(lens, "to be"), prompt(lens, "to do"), logit_diff(lens, "e", "o"))
    >>> experiment.patch("blocks.1.hook_resid_post", pos=4)
    patch blocks.1.hook_resid_post at position 4 from the clean run
    >>> experiment.sweep("resid").values.shape
    (2, 6)
    """

    def __init__(self, clean: Prompt, corrupt: Prompt | None = None, metric: Any = loss) -> None:
        self.lens = require_prompt(clean, "clean").lens
        self._as_loaded = rotation(self.lens)
        self._edits: list[steps.Edit] = []
        self.metric = metric
        self.prompts(clean, corrupt)

    @property
    def metric(self) -> LogitMetric:
        """What runs and sweeps are judged by; set to `logit_diff(…)`, `loss` or a function of logits.

        Raises:
            InputError: when set to anything else.
        """
        return self._metric

    @metric.setter
    def metric(self, metric: Any) -> None:
        self._metric = as_metric(metric)

    def prompts(self, clean: Prompt, corrupt: Prompt | None = None) -> Alignment | None:
        """Exchange the prompts and keep the edits.

        An edit that does not fit the new prompts, for want of a position or of a corrupt prompt, is set aside: it stays
        in the stack, is not applied, and is applied again once prompts fit. Positions that were given from the end
        (−1) are counted from the end of the new prompts.

        Raises:
            InputError: for prompts of another model or of two lengths.
        """
        require_prompt(clean, "clean")
        aligned = None if corrupt is None else align(clean, corrupt)
        if clean.lens is not self.lens:
            raise InputError(
                f"these edits are {self.lens.info.label}'s; make another Experiment for {clean.lens.info.label}"
            )
        self.clean, self.corrupt = clean, corrupt
        self._edits = [edit.fitted(clean, corrupt) for edit in self._edits]
        self._clean_activations: dict[tuple[Any, ...], Mapping[str, Tensor]] = {}
        return aligned

    @property
    def edited(self) -> Prompt:
        """The prompt whose run is edited."""
        return self.clean if self.corrupt is None else self.corrupt

    # Edits

    def patch(
        self, point: str | None = None, *, layer: Places = None, pos: Places = "all", head: Places = None,
        what: str | None = None,
    ) -> steps.Edit:  # fmt: skip
        """Put activations of the clean run into the corrupt run.

        Args:
            point: a whole hook name, `"blocks.3.hook_resid_post"`; or instead
            what: a kind of activation (`resid`, `attn`, `mlp`, `head`, `q`, `k`, `v`, `pattern`), in
            layer: one layer or several; by default all.
            pos: a position or several, `"all"`; negative from the end. For `pattern`, those of the queries.
            head: a head or several; by default all.

        Raises:
            InputError: for a point, layer, position or head that does not exist, or without a corrupt run.
        """
        if self.corrupt is None:
            raise InputError("patch: there is no corrupt prompt to put the clean run's activations into")
        layer, pos, head = map(steps.kept, (layer, pos, head))
        where = target(self.lens, len(self.edited), point, what, layer, pos, head)
        require_rows(self.lens, self.clean.tokens, where.names)  # what cannot be patched says so now
        code = steps.edit_call("patch", point, layer=layer, pos=pos, head=head, what=what)
        return self._push(steps.Patch(code, where))

    def ablate(
        self, point: str | None = None, *, layer: Places = None, pos: Places = "all", head: Places = None,
        what: str | None = None, value: float | str = "zero",
    ) -> steps.Edit:  # fmt: skip
        """Replace activations by `"zero"`, by a number, or by their `"mean"` over the run's own positions.

        The other arguments are those of `patch`. Attention scores and weights have no such mean, since each query sees
        other keys.

        Raises:
            InputError: as `patch` does, and for a value that cannot be written.
        """
        layer, pos, head = map(steps.kept, (layer, pos, head))
        where = target(self.lens, len(self.edited), point, what, layer, pos, head)
        written = steps.require_value(value, where.names)
        require_rows(self.lens, self.edited.tokens, where.names)
        code = steps.edit_call("ablate", point, layer=layer, pos=pos, head=head, what=what, value=value)
        return self._push(steps.Ablate(code, where, written))

    def condition(
        self, name: str, which: str | None = None, *, layer: int | None = None, **params: Any
    ) -> steps.Edit:
        """Put a condition of a causal metric on the run, `condition("bos-mlp", layer=1)`.

        Args:
            name: a causal metric, installed or built in.
            which: the name of one of its conditions; by default the first that is no control.
            layer: the layer it is to concern.
            params: the metric's own parameters.

        Raises:
            InputError: for a metric or condition that does not exist, with those that do.
        """
        condition = find_condition(self.lens, name, which, layer, params)
        code = call("condition", name, **unusual(which=which, layer=layer), **params)
        return self._push(Apply(code, name, condition, self.edited))

    def nope(self, layer: Places = None) -> steps.Edit:
        """Null the rotation of one layer, several, or all: queries and keys then know no positions (cos = 1, sin = 0).

        It is a switch of the model, thrown for every run on it until `rope` or `undo`.

        Raises:
            RefusedModel: where positions do not come in as a rotation.
            InputError: where it is nulled already.
        """
        from phaselens.lens.positions import detect, null_rotation

        layer = steps.kept(layer)
        layers = self._layers(layer)
        kinds = detect(self.lens)
        if all(kinds[each] == "nope" for each in layers):
            raise InputError(
                f"nope: there is no rotation to null in {steps.numbered('layer', layers)} of {self.lens.info.label}"
            )
        before = rotation(self.lens)
        try:
            null_rotation(self.lens, layers, before=kinds)
        except (
            BaseException
        ):  # Ctrl-C too: without an edit that undo() could take back, nothing may have changed
            set_rotation(self.lens, before)
            raise
        return self._push(steps.Rotation(call("nope", **unusual(layer=layer)), layers, True, before))

    def rope(self, layer: Places = None) -> steps.Edit:
        """Restore the rotation of one layer, several, or all.

        Raises:
            InputError: where it is not nulled, or the model has none.
        """
        from phaselens.lens.positions import restore_rotation

        layer = steps.kept(layer)
        layers = self._layers(layer)
        before = rotation(self.lens)
        if not any(before[each] for each in layers):
            raise InputError(
                f"rope: no rotation was nulled in {steps.numbered('layer', layers)} of {self.lens.info.label}"
            )
        restore_rotation(self.lens, layers)
        restored = tuple(each for each in layers if before[each])
        return self._push(steps.Rotation(call("rope", **unusual(layer=layer)), restored, False, before))

    def _layers(self, layer: Places) -> tuple[int, ...]:
        return chosen(layer, self.lens.info.n_layers, "layer", self.lens.info.label)

    def _push(self, edit: steps.Edit) -> steps.Edit:
        made = replace(edit, made_on=(self.clean, self.corrupt))
        self._edits.append(made)
        return made

    def undo(self) -> steps.Edit:
        """Take back the last edit, applied or set aside, and return it.

        Raises:
            InputError: where there is none.
        """
        if not self._edits:
            raise InputError("undo: there is no edit to take back")
        last = self._edits.pop()
        if isinstance(last, steps.Rotation):
            set_rotation(self.lens, last.before)
        return last

    def patched(self) -> Stack:
        """The edits, first one first, those that are set aside among them."""
        return Stack(self._edits)

    # Runs

    def run(self, top: int = 5, pos: int = -1) -> Outcome:
        """Run the model without and with the edits.

        "Without" is the model as it was loaded, rotation included.

        Args:
            top: how many of the most probable next tokens to list.
            pos: the position after which they stand.

        Raises:
            InputError: for a position or number that cannot be.
        """
        if not is_whole(top) or not 1 <= top <= self.lens.info.d_vocab:
            raise InputError(f"top={brief(top)}: give a number, 1 to {self.lens.info.d_vocab}")
        prompt = self.edited
        position = single(pos, len(prompt))
        reason = self.metric.misfit(len(prompt)) if self.metric is not loss else None
        measured = self.metric is not loss and reason is None
        clean = None
        with rotation_as(self.lens, self._as_loaded):
            before = self._logits(prompt)
            if measured and self.corrupt is not None:
                clean = self._value(self._logits(self.clean), self.clean)
        after = self._logits(prompt, self.hooks())
        probabilities = [logits[0, position].double().softmax(-1) for logits in (before, after)]
        lists = [
            tuple(
                Token(token_text(self.lens, token), *(float(one[token]) for one in probabilities))
                for token in each.topk(top).indices.tolist()
            )
            for each in probabilities
        ]
        losses = None
        if len(prompt) > 1:
            losses = float(loss(before, prompt.tokens)[0]), float(loss(after, prompt.tokens)[0])
        edits = self.patched()
        return Outcome(
            "clean" if self.corrupt is None else "corrupt",
            position,
            prompt.words[position],
            lists[0],
            lists[1],
            losses,
            self.metric.name if measured else None,
            (self._value(before, prompt), self._value(after, prompt)) if measured else None,
            clean,
            tuple(map(str, edits.applied)),
            edits.set_aside,
            reason or "",
            bos=bos_of(self.clean, self.corrupt),
        )

    def measure(self, name: str, **params: Any) -> Measured:
        """A metric, by name, on the prompts' runs: by layer, without and with the edits.

        Raises:
            InputError: for a metric or parameter that does not exist, or that shows no number by layer.
        """
        if not isinstance(name, str):
            raise InputError(f"measure: a metric is named by a text, got {type(name).__name__}")
        _, column, unit = shown_column(plugins().metric(name))
        prompt = self.edited
        clean: ByLayer | None = None
        with rotation_as(self.lens, self._as_loaded):
            before = by_layer(prompt, name, params)
            if self.corrupt is not None:
                clean = by_layer(self.clean, name, params)
        with self.lens.hooks(fwd_hooks=self.hooks()):
            after = by_layer(prompt, name, params)

        def rows(part: Callable[[ByLayer], Mapping[int, float | None]]) -> tuple[Row, ...]:
            without, with_edits = part(before), part(after)
            of_clean = {} if clean is None else part(clean)
            return tuple(
                (layer, without[layer], with_edits.get(layer), of_clean.get(layer))
                for layer in sorted(without)
            )

        return Measured(
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
        """The edits that fit the prompts, as pairs of a hook name and a function: `lens.stream(…, hooks)`."""
        return [
            hook for edit in self.patched().applied for hook in edit.hooks(self._clean_values, self.lens.rows)
        ]

    def _clean_values(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Activations of the clean run, of the model as its rotation stands now."""
        key = (tuple(names), rotation(self.lens))
        if key not in self._clean_activations:
            self._clean_activations[key] = captured(self.lens, self.clean.tokens, names)
        return self._clean_activations[key]

    def _logits(self, prompt: Prompt, hooks: Sequence[Hook] = ()) -> Tensor:
        return self.lens.stream(prompt.tokens, hooks, unembed=True)

    def _value(self, logits: Tensor, prompt: Prompt) -> float:
        return float(self.metric(logits, prompt.tokens)[0])

    def values(self) -> tuple[float, float]:
        """The metric of the run that is edited, edits included, and of the clean run, rotation as it stands."""
        return self._value(self._logits(self.edited, self.hooks()), self.edited), self._value(
            self._logits(self.clean), self.clean
        )

    def sweep(
        self,
        what: str = "resid",
        *,
        by: str | None = None,
        layer: Places = None,
        observer: Observer | None = None,
    ) -> Sweep:
        """Put one cell of the clean run at a time into the corrupt run, and see what the metric does.

        On top of the edits there are. Layers are walked upwards: a cell's run starts at its layer, from the residual
        that the corrupt run has there. Ctrl-C ends it; the cells that were done are kept, the others masked.

        Args:
            what: `resid` (entering each layer), `attn`, `mlp` (their outputs), `head` (z), `q`, `k`, `v`, `pattern`.
            by: `"pos"`: layer × position; `"head"`: layer × head, all positions at once; `"pos-head"`: both. By default
                by head where there are heads. `pos` of a pattern is the query's.
            layer: the layers to sweep; by default all.
            observer: is told how far it is.

        Raises:
            InputError: for what cannot be swept, or without a corrupt run.
        """
        by, layers = self._swept("sweep", what, by, layer)
        base, clean = self.values()
        swept = sweep(
            self.clean, self._corrupt("sweep"), self.metric, what, by, layers, self.hooks(), base, clean,
            observer or Observer(),
        )  # fmt: skip
        return replace(swept, set_aside=self.patched().set_aside)

    def attribution(self, what: str = "resid", *, by: str | None = None, layer: Places = None) -> Sweep:
        """What `sweep` finds, estimated for all cells at once by the metric's gradient: fast, and to first order only.

        How far to trust it is said by `agreement(sweep, attribution)`.
        """
        by, layers = self._swept("attribution", what, by, layer)
        base, clean = self.values()
        estimated = attribute(
            self.clean, self._corrupt("attribution"), self.metric, what, by, layers, self.hooks(), base, clean
        )
        return replace(estimated, set_aside=self.patched().set_aside)

    def _swept(self, verb: str, what: str, by: str | None, layer: Places) -> tuple[str, tuple[int, ...]]:
        self._corrupt(verb)
        return axes_of(what, by, self.lens), tuple(sorted(self._layers(layer)))

    def _corrupt(self, verb: str) -> Prompt:
        if self.corrupt is None:
            raise InputError(f"{verb}: there is no corrupt prompt to put the clean run's activations into")
        return self.corrupt
