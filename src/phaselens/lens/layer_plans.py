"""The plan of each layer: its parts, and where each of its hook points fires, read off the measured sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from phaselens.lens.attention_facts import AttentionFacts
from phaselens.lens.interface_calls import InterfaceCall
from phaselens.lens.layer_stack import same
from phaselens.lens.projection_maps import AttentionParts, is_linear
from phaselens.lens.residual_parts import RESIDUAL, LayerSums, Sum, Term

_ATTENTION, _MIXER, _MLP = "attention", "mixer", "mlp"
# Names of a layer's part that do not say what it is; its class does.
_GENERAL_NAMES = ("mixer", "temporal_block", "attention", "self_attn", "attn")
CONTRIBUTIONS = {_ATTENTION: "hook_attn_out", _MIXER: "hook_mixer_out", _MLP: "hook_mlp_out"}
"""The hook point of what each kind of part adds to the residual stream."""


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """The parts of one layer by the names that the lens gives them, and its hook points.

    * ``kind``: ``attention``, or what the layer has instead of it.
    * ``parts``: the name in the layer of each part's module (``attn``, ``ln1``, ``mlp``).
    * ``aliases``: hook points, and those of parts that they are.
    * ``weighted``: the hook points of contributions that are not one part's output, and the parts whose outputs, times
      factors, each sums.
    * ``skip``: the factor of the mid residual in what leaves the layer; None where all of it passes through a part.
    * ``absent``: the reason for each hook point that the layer does not have.
    * ``mlp``: the names, in the MLP, of its projections (``in``, ``gate``, ``out``).
    * ``flat``: parts that receive the residual as [batch · pos, d_model].
    * ``streams_first``: the residual is [stream, batch, pos, d_model].
    * ``result``: the length of the tuple or list that the layer returns; None where it returns a tensor.
    """

    kind: str
    parts: Mapping[str, str]
    aliases: Mapping[str, str]
    weighted: Mapping[str, tuple[Term, ...]] = field(default_factory=dict)
    skip: float | None = None
    absent: Mapping[str, str] = field(default_factory=dict)
    facts: AttentionFacts | None = None
    projections: AttentionParts | None = None
    mlp: Mapping[str, str] = field(default_factory=dict)
    flat: tuple[str, ...] = ()
    result: int | None = None
    streams_first: bool = False


class LayerPlans(tuple[LayerPlan, ...]):
    """The plans of all layers. A copy of the block that holds them shares them, since they refer to the model."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerPlans:
        return self


class LayerPlanner:
    """Plans one layer from its sums."""

    def __init__(
        self,
        sums: LayerSums,
        layer: nn.Module,
        attention: str | None,
        projections: AttentionParts | None,
    ) -> None:
        self._sums = sums
        self._layer = layer
        self._attention = attention
        self._projections = projections
        self._parts: dict[str, str] = {}
        self._aliases = {"hook_resid_pre": "hook_in", "hook_resid_post": "hook_out"}
        self._weighted: dict[str, tuple[Term, ...]] = {}
        self._absent: dict[str, str] = {}
        self._skip: float | None = None

    def plan(self, calls: Sequence[InterfaceCall]) -> LayerPlan:
        """Return the plan of the layer, with its calls of the attention interface."""
        if self._attention is not None:
            self._parts["attn"] = self._attention
        kind = _ATTENTION
        final = self._final_sum()
        if self._sums.problem is not None:
            self._leave_out(self._sums.problem)
        elif final is None:
            self._leave_out("what leaves the layer is not a sum of the outputs of its modules")
        else:
            self._plan_sums(final)
        if self._attention is None:
            kind = self._mixer_name(final)
        projections = self._projections
        if projections is not None:
            projections = AttentionParts(
                projections.query, projections.key, projections.value, self._output_projection(calls[0])
            )
            self._projections = projections
        self._leave_out_attention(kind)
        return LayerPlan(
            kind,
            self._parts,
            self._aliases,
            self._weighted,
            self._skip,
            self._absent,
            AttentionFacts.of_call(calls[0]) if self._attention is not None else None,
            projections,
            self._mlp_projections(),
            tuple(part for part, name in self._parts.items() if self._is_flat(name)),
            len(result) if isinstance(result := self._sums.result, tuple | list) else None,
        )

    def _leave_out_attention(self, kind: str) -> None:
        """Note the points inside attention that the layer does not have."""
        projections = self._projections
        if projections is None:
            return
        for point, projection in (
            ("attn.hook_q", projections.query),
            ("attn.hook_k", projections.key),
            ("attn.hook_v", projections.value),
        ):
            if isinstance(projection, str):
                self._absent[point] = projection
        if projections.output is None:
            self._absent["attn.hook_z"] = (
                "the heads' outputs do not enter a linear module of the attention module"
            )

    def _leave_out(self, reason: str) -> None:
        for point in ("hook_resid_mid", *CONTRIBUTIONS.values()):
            self._absent[point] = reason
        if self._sums.problem is not None:
            for point in ("hook_resid_pre", "hook_resid_post"):
                del self._aliases[point]
                self._absent[point] = reason

    def _final_sum(self) -> Sum | None:
        """Return the last sum of the layer: what leaves it, or what enters the norm at its end."""
        current = self._sums.output
        while current is not None and len(current.terms) == 1 and current.terms[0].factor == 1.0:
            name = current.terms[0].name
            entering = next((entry for entry in self._sums.sums if entry.enters == name), None)
            returned = self._sums.outputs.get(name)
            if returned is not None and (len(returned.terms) > 1 or returned.terms[0].name != RESIDUAL):
                current = returned
            elif entering is not None:
                return entering
            else:
                break
        return None if current is None else self._expanded(current)

    def _expanded(self, total: Sum) -> Sum:
        """Replace modules that add the residual themselves by the terms that they add."""
        terms: dict[str, float] = {}
        for term in total.terms:
            returned = self._sums.outputs.get(term.name)
            is_sum = returned is not None and len(returned.terms) > 1
            if returned is not None and is_sum and RESIDUAL in self._expanded(returned).names:
                for inner in self._expanded(returned).terms:
                    terms[inner.name] = terms.get(inner.name, 0.0) + term.factor * inner.factor
            else:
                terms[term.name] = terms.get(term.name, 0.0) + term.factor
        return Sum(total.enters, tuple(Term(name, factor) for name, factor in terms.items()))

    def _plan_sums(self, final: Sum) -> None:
        entries = self._entries()
        sums = [self._expanded(entry) for entry in entries if entry.enters != final.enters]
        mid = next((entry for entry in sums if self._mixers_in(entry) and entry.names != final.names), None)
        mixers = self._mixers_in(mid) if mid is not None else self._mixers_in(final)
        if mid is None:
            mlps = [term for term in final.terms if term.name != RESIDUAL and self._kind(term.name) == _MLP]
        else:
            after = [entry for entry in (*sums[sums.index(mid) + 1 :], final) if not entry.names <= mid.names]
            is_pre_norm = mid.names <= final.names
            first = next(entry for entry in after if not is_pre_norm or mid.names < entry.names)
            mlps = [
                Term(term.name, final.factor_of(term.name) if term.name in final.names else term.factor)
                for term in first.terms
                if term.name not in mid.names and term.name != RESIDUAL and self._follows_no_norm(term.name)
            ]
            self._plan_mid(mid, final, is_pre_norm)
            later = sorted(final.names - first.names) if is_pre_norm else []
            if later and "hook_resid_mid" in self._aliases:
                del self._aliases["hook_resid_mid"]
                self._absent["hook_resid_mid"] = (
                    f"after the MLP, {' and '.join(later)} reads the residual too, which an edit would not reach"
                )
        if mid is None and "hook_resid_mid" not in self._absent:
            self._absent["hook_resid_mid"] = (
                "attention and MLP add to one residual, in parallel"
                if mixers and mlps
                else "the layer adds to the residual once"
            )
        self._plan_first_norm()
        for kind in CONTRIBUTIONS:
            terms = mlps if kind == _MLP else [term for term in mixers if self._kind(term.name) == kind]
            self._plan_contribution(kind, terms)

    def _entries(self) -> list[Sum]:
        """Return the sums that enter modules, in order, also those that a module returned.

        Bloom's attention module adds the residual to what it computes.
        """
        returned = [
            Sum(name, (Term(source, 1.0),))
            for name, source in self._sums.inputs.items()
            if source in self._sums.outputs and len(self._sums.outputs[source].terms) > 1
        ]
        entries = [*self._sums.sums, *returned]
        return sorted(entries, key=lambda entry: self._sums.call_of(entry.enters or "").began)

    def _follows_no_norm(self, name: str) -> bool:
        """Return whether a term of the last sum is a contribution, and not the mid residual after a norm."""
        entered = {entry.enters for entry in self._sums.sums}
        if name in entered:
            return False
        returned = self._sums.outputs.get(name)
        return returned is None or not any(term.name in entered for term in returned.terms)

    def _mixers_in(self, total: Sum) -> list[Term]:
        return [
            term
            for term in total.terms
            if term.name != RESIDUAL and self._kind(term.name) in (_ATTENTION, _MIXER)
        ]

    def _plan_mid(self, mid: Sum, final: Sum, is_pre_norm: bool) -> None:
        assert mid.enters is not None
        entries = map(self._expanded, self._entries())
        same_sum = [entry.enters for entry in entries if entry.names == mid.names and entry.enters]
        outermost = [name for name in same_sum if not any(name.startswith(f"{other}.") for other in same_sum)]
        if len(outermost) > 1:
            self._absent["hook_resid_mid"] = (
                f"the residual between attention and MLP enters several modules: {', '.join(outermost)}"
            )
            return
        part = "mlp" if self._is_core(mid.enters) else "ln2"
        self._parts[part] = mid.enters
        self._aliases["hook_resid_mid"] = f"{part}.hook_in"
        if is_pre_norm and final.names >= mid.names:
            shared = [final.factor_of(name) / mid.factor_of(name) for name in mid.names]
            self._skip = shared[0]

    def _plan_first_norm(self) -> None:
        for name, source in self._sums.inputs.items():
            if source == RESIDUAL and not self._is_core(name) and name not in self._parts.values():
                self._parts["ln1"] = name
                return

    def _plan_contribution(self, kind: str, terms: list[Term]) -> None:
        point = CONTRIBUTIONS[kind]
        if not terms:
            part = {_MLP: "MLP", _MIXER: "mixer beside attention"}.get(kind, kind)
            self._absent[point] = f"the layer has no {part} that adds to the residual"
            return
        role = {_ATTENTION: "attn", _MIXER: "mixer", _MLP: "mlp"}[kind]
        parts = [self._part_of(term.name, role, number) for number, term in enumerate(terms)]
        if len(terms) == 1 and terms[0].factor == 1.0:
            self._aliases[point] = f"{parts[0]}.hook_out"
        else:
            self._weighted[point] = tuple(
                Term(part, term.factor) for part, term in zip(parts, terms, strict=True)
            )

    def _part_of(self, name: str, role: str, number: int) -> str:
        """Return the part that a contributing module is, adding the module, and what it norms, to the parts."""
        known = {module: part for part, module in self._parts.items()}
        if name in known:
            return known[name]
        core = self._core(name)
        suffix = f"_{number + 1}" if number else ""
        if core == name:
            part = f"{role}_out{suffix}" if is_linear(self._layer.get_submodule(name)) else f"{role}{suffix}"
        else:
            if core not in known and role not in self._parts:
                self._parts[role] = core
            part = {"attn": "ln1_post", "mlp": "ln2_post", "mixer": "ln1_post"}[role] + suffix
        if part in self._parts:
            part = f"{role}_out{suffix}"
        self._parts[part] = name
        return part

    def _core(self, name: str) -> str:
        """Return the module that computes what a norm (or another module without matrices) passes on."""
        while not self._is_core(name):
            source = self._sums.inputs.get(name)
            if not source or source == name:
                break
            name = source
        return name

    def _is_core(self, name: str) -> bool:
        module = self._layer.get_submodule(name)
        return any(parameter.dim() >= 2 for parameter in (*module.parameters(), *module.buffers()))

    def _kind(self, name: str) -> str:
        core = self._core(name)
        if self._attention is not None:
            inside = f"{self._attention}.".startswith(f"{core}.")
            beside = "." in core and f"{self._attention}.".startswith(f"{core.split('.')[0]}.")
            if inside or beside:
                return _ATTENTION
        return _MIXER if self._sums.mixes_positions(core) else _MLP

    def _mixer_name(self, final: Sum | None) -> str:
        """Return the kind of a layer without attention: the name of what it has instead."""
        terms = [] if final is None else [term for term in final.terms if term.name != RESIDUAL]
        mixers = [term.name for term in terms if self._kind(term.name) == _MIXER]
        if final is None:
            mixing = [call.path for call in self._sums.calls if call.path in self._sums.mixed_outputs]
            mixers = [name for name in mixing if self._is_core(name)][:1]
        if not mixers:
            return "MLP"
        name = self._core(mixers[0])
        last = name.rsplit(".", 1)[-1]
        return type(self._layer.get_submodule(name)).__name__ if last in _GENERAL_NAMES else last

    def _is_flat(self, name: str) -> bool:
        call = next((call for call in self._sums.calls if call.path == name), None)
        return call is not None and any(
            tensor is not None and tensor.dim() == 2 for tensor in (call.input, call.output)
        )

    def _mlp_projections(self) -> dict[str, str]:
        """Return the names, within the MLP, of its projections; empty where it is not one of two or three of them."""
        mlp = self._parts.get("mlp")
        if mlp is None:
            return {}
        calls = [call for call in self._sums.calls if call.path.startswith(f"{mlp}.")]
        linear = [call for call in calls if is_linear(call.module)]
        returned = self._sums.outputs.get(mlp)
        out = returned.terms[0].name if returned is not None and len(returned.terms) == 1 else None
        entering = self._sums.call_of(mlp).input
        inputs = [call for call in linear if same(call.input, entering) and call.path != out]
        if out is None or len(linear) != len(inputs) + 1 or not 1 <= len(inputs) <= 2:
            return {}
        names = {"out": out}
        if len(inputs) == 1:
            names["in"] = inputs[0].path
        else:
            activated = [
                call.path
                for call in inputs
                if any(same(other.input, call.output) for other in calls if not is_linear(other.module))
            ]
            if len(activated) != 1:
                return {}
            names["gate"] = activated[0]
            names["in"] = next(call.path for call in inputs if call.path != activated[0])
        return {role: name.removeprefix(f"{mlp}.") for role, name in names.items()}

    def _output_projection(self, call: InterfaceCall) -> str | None:
        """Return the name of the projection of the heads' outputs: the first linear module that they enter."""
        width = call.output.shape[-1] * call.output.shape[-2]
        query = self._projections.query if self._projections is not None else ""
        for recorded in self._sums.calls:
            name = recorded.path
            is_inside = name.startswith(f"{self._attention}.")
            if not is_inside or not is_linear(recorded.module) or recorded.n_arguments != 1:
                continue
            if (
                recorded.input is None
                or recorded.input.shape[-1] != width
                or name not in self._sums.mixed_inputs
            ):
                continue
            if not isinstance(query, str) and query.name == name:
                continue
            return name.removeprefix(f"{self._attention}.")
        return None
