"""Bridge components for a model whose parts were measured: they call the model's own modules."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import (
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.generalized_components.position_embedding_hooks_mixin import (
    PositionEmbeddingHooksMixin,
)

from phaselens.errors import RefusedModel
from phaselens.lens import families
from phaselens.lens.attention_facts import AttentionFacts
from phaselens.lens.attention_owner import is_hooked
from phaselens.lens.blocks import SkippingBlock
from phaselens.lens.components import StreamingAttention
from phaselens.lens.layer_plans import LayerPlan, LayerPlans
from phaselens.lens.module_calls import first_tensor
from phaselens.lens.null_rotation import null_rotation
from phaselens.lens.original_components import NativeNorm
from phaselens.lens.projection_maps import ProjectionMap
from phaselens.lens.residual_parts import Term


class MeasuredPart(GeneralizedComponent):
    """A module of the model with hook points at its input and its output."""


class MeasuredMLP(MLPBridge):
    """An MLP with hook points at its input and its output, and in its projections if it consists of two or three."""

    def __init__(self, name: str, config: Any, projections: Mapping[str, str]) -> None:
        super().__init__(
            name, config, submodules={role: LinearBridge(name=module) for role, module in projections.items()}
        )
        pre = {"hook_pre": "gate.hook_out", "hook_pre_linear": "in.hook_out"}
        if "gate" not in projections:
            pre = {"hook_pre": "in.hook_out"}
        self.hook_aliases = {**pre, "hook_post": "out.hook_in"} if projections else {}
        self.property_aliases: dict[str, str] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's own module, which may be a mixture of experts."""
        return GeneralizedComponent.forward(self, *args, **kwargs)


class MeasuredNorm(NativeNorm, NormalizationBridge):
    """A norm whose kind was measured, so that the points inside it show what it computes."""


class _HeadView(BaseTensorConversion):
    """Shows [batch, pos, heads · d] as [batch, pos, head, d] to hooks."""

    # Tells TransformerLens where the positions are.
    splits_attention_heads = True

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def handle_conversion(self, input_value: Tensor, *_context: object) -> Tensor:
        return input_value.unflatten(-1, (self.n_heads, -1)) if input_value.dim() == 3 else input_value

    def revert(self, input_value: Tensor, *_context: object) -> Tensor:
        return input_value.flatten(-2) if input_value.dim() == 4 else input_value


class _ResidualView(BaseTensorConversion):
    """Shows a residual that a layer keeps as [batch · pos, d_model] as [batch, pos, d_model] to hooks."""

    def __init__(self, block: MeasuredBlock) -> None:
        super().__init__()
        self._block = weakref.ref(block)

    def handle_conversion(self, input_value: Tensor, *_context: object) -> Tensor:
        block = self._block()
        shape = None if block is None else block.residual_shape
        if shape is None or input_value.dim() != 2 or input_value.numel() != shape.numel():
            return input_value
        return input_value.view(shape)

    def revert(self, input_value: Tensor, *_context: object) -> Tensor:
        return input_value.flatten(0, 1) if input_value.dim() == 3 else input_value


class _StreamsView(BaseTensorConversion):
    """Shows several residual streams, which a layer keeps as [stream, batch, pos, d_model], with the texts first."""

    def handle_conversion(self, input_value: Tensor, *_context: object) -> Tensor:
        return input_value.movedim(0, 2)

    def revert(self, input_value: Tensor, *_context: object) -> Tensor:
        return input_value.movedim(2, 0)


class MeasuredAttention(StreamingAttention, PositionEmbeddingHooksMixin):
    """Attention that calls the model's own module; queries, keys and values are read where they were measured to be."""

    supports_split_qkv_fork = False

    def __init__(self, name: str, config: Any, plan: LayerPlan) -> None:
        assert plan.facts is not None
        assert plan.projections is not None
        super().__init__(name, config, maintain_native_attention=True)
        self._init_position_embedding_hooks()
        self.__dict__["measured_facts"] = plan.facts
        parts = plan.projections
        self.__dict__["maps"] = {}
        submodules: dict[str, GeneralizedComponent] = {}
        aliases: dict[str, str] = {}
        for letter, projection in zip("qkv", (parts.query, parts.key, parts.value), strict=True):
            if isinstance(projection, str):
                continue
            self.maps[letter] = projection
            if projection.is_whole:
                submodules[letter] = LinearBridge(name=projection.name.removeprefix(f"{name}."))
                aliases[f"hook_{letter}"] = f"{letter}.hook_out"
            else:
                setattr(self, f"hook_{letter}", HookPoint())
        if parts.output is not None:
            submodules["o"] = LinearBridge(name=parts.output)
            aliases["hook_z"] = "o.hook_in"
        self.submodules = submodules
        self.hook_aliases = {**aliases}
        self.property_aliases: dict[str, str] = {}
        self.add_points()

    def __deepcopy__(self, memo: dict[int, Any]) -> MeasuredAttention:
        raise NotImplementedError("a measured attention belongs to one layer")

    @property
    def facts(self) -> AttentionFacts:
        """The sizes of the layer's attention, and the options of its softmax, as measured."""
        facts: AttentionFacts = self.__dict__["measured_facts"]
        return facts

    def setup_hook_compatibility(self) -> None:
        """Show hooks the heads, by the measured numbers of heads."""
        super().setup_hook_compatibility()
        facts = self.facts
        for letter, projection in self.maps.items():
            if projection.is_whole:
                self.submodules[letter].hook_out.hook_conversion = _HeadView(len(projection.index))
        if "o" in self.submodules:
            self.submodules["o"].hook_in.hook_conversion = _HeadView(facts.n_heads)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's own module, firing the points of projections that a larger one contains."""
        residual = first_tensor(args)
        residual = first_tensor(kwargs) if residual is None else residual
        n_texts = 1 if residual is None else len(residual)
        handles = []
        by_module: dict[str, list[str]] = {}
        for letter, projection in self.maps.items():
            if not projection.is_whole and is_hooked(getattr(self, f"hook_{letter}")):
                by_module.setdefault(projection.name, []).append(letter)
        for name, letters in by_module.items():
            module = self.original_component.get_submodule(name.removeprefix(f"{self.name}."))
            handles.append(module.register_forward_hook(self._fire_parts(letters, n_texts)))
        if self.nulled and kwargs.get("position_embeddings") is None:
            for rotary in families.rotary_modules(self.original_component):
                handles.append(rotary.register_forward_hook(null_rotation))
        try:
            return super().forward(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def _fire_parts(self, letters: list[str], n_texts: int) -> Any:
        def fire(_module: object, _args: object, output: Tensor) -> Tensor:
            for letter in letters:
                projection: ProjectionMap = self.maps[letter]
                entries = projection.split(output, n_texts)
                version = entries._version if not entries.is_inference() else None
                edited = getattr(self, f"hook_{letter}")(entries)
                is_written = version is None or edited._version != version
                if edited is not entries or is_written:
                    output = projection.put(output, edited)
            return output

        return fire

    def _needs_eager_computation(self) -> bool:
        """Refuse TransformerLens' options that need its own attention: there is none for this model."""
        reason = self.eager_reason()
        if reason:
            raise RefusedModel(
                f"{self.name}: {reason} needs TransformerLens' own attention, which it does not have for this model; "
                "switch that off"
            )
        return False


class MeasuredBlock(SkippingBlock):
    """A block that makes its components from the plan of its layer, when it gets the layer."""

    def __init__(self, name: str, config: Any, plans: LayerPlans) -> None:
        super().__init__(name, config, submodules={})
        # Those of the template, to which TransformerLens falls back: only what every layer has.
        self.hook_aliases: dict[str, Any] = {}
        self.__dict__["plans"] = plans
        self.__dict__["plan"] = None
        self.__dict__["residual_shape"] = None

    def set_original_component(self, original_component: nn.Module) -> None:
        """Take a layer of the model, and make the components of its parts."""
        super().set_original_component(original_component)
        layer = self._extract_layer_idx()
        assert layer is not None
        plan: LayerPlan = self.plans[layer]
        self.__dict__["plan"] = plan
        self.submodules = {
            part: _component(part, name, self.config, plan, original_component)
            for part, name in plan.parts.items()
        }
        self.hook_aliases = {**plan.aliases}
        for point in plan.weighted:
            setattr(self, point, HookPoint())
        if plan.streams_first:
            self.hook_in.hook_conversion = self.hook_out.hook_conversion = _StreamsView()
        for part in plan.flat:
            component = self.submodules[part]
            component.hook_in.hook_conversion = component.hook_out.hook_conversion = _ResidualView(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, unless the forward starts above it."""
        if self.plan.flat:
            self.__dict__["residual_shape"] = (args[0] if args else kwargs["hidden_states"]).shape
        return super().forward(*args, **kwargs)

    def _skipped(self, residual: Any) -> Any:
        result = self.plan.result
        return residual if result is None else (residual, *[None] * (result - 1))

    def adds_mid_again(self) -> bool:
        return self.plan.skip is not None

    def adds_mlp_out_exactly(self) -> bool:
        return self.plan.skip == 1.0 and "hook_mlp_out" not in self.plan.weighted

    def returns_attn_out(self) -> bool:
        plan, point = self.plan, "hook_attn_out"
        parts = [term.name for term in plan.weighted.get(point, ())]
        if point in plan.aliases:
            parts.append(plan.aliases[point].split(".")[0])
        inside = f"{plan.parts.get('attn')}."
        return not any(plan.parts[part].startswith(inside) for part in parts)

    def _after_mid_edit(self, output: Tensor, edit: dict[str, Tensor]) -> Tensor:
        if self.adds_mlp_out_exactly() and "mlp_out" in edit:
            return super()._after_mid_edit(output, edit)
        return output + self.plan.skip * (edit["mid"] - edit["before"])

    def _extract_layer_idx(self) -> int | None:
        return int(self.name.rsplit(".", 1)[-1])

    def _maybe_wire_capture_hooks(self) -> None:
        if self._capture_hooks_wired:
            return
        super()._maybe_wire_capture_hooks()
        for point, terms in self.plan.weighted.items():
            outputs: dict[str, Tensor] = {}
            for term in terms[:-1]:
                keep = self.submodules[term.name].register_forward_hook(_keeper(outputs, term.name))
                self._capture_hook_handles.append(keep)
            fire = self.submodules[terms[-1].name].register_forward_hook(
                _weigher(getattr(self, point), terms, outputs)
            )
            self._capture_hook_handles.append(fire)


def _component(part: str, name: str, config: Any, plan: LayerPlan, layer: nn.Module) -> GeneralizedComponent:
    if part == "attn":
        return MeasuredAttention(name, config, plan)
    if part == "mlp":
        return MeasuredMLP(name, config, plan.mlp)
    return norm_component(name, config, layer.get_submodule(name)) or MeasuredPart(name, config)


def norm_component(name: str, config: Any, module: nn.Module) -> MeasuredNorm | None:
    """Return a component for a norm that divides by the root mean square or by the deviation; None for another module.

    The kind is measured on random numbers, as is whether the weight is stored as its difference from 1.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if any(True for _ in module.children()) or (weight is not None and weight.dim() != 1):
        return None
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    if weight is None or eps is None:
        return None
    generator = torch.Generator().manual_seed(0)
    inputs = (2.0 * torch.randn(4, len(weight), generator=generator) + 1.0).to(weight)
    with torch.no_grad():
        output = module(inputs)
    if not isinstance(output, Tensor):
        return None
    wide = inputs.double()
    for is_rms in (True, False):
        centred = wide if is_rms else wide - wide.mean(-1, keepdim=True)
        normalized = centred / (centred.pow(2).mean(-1, keepdim=True) + float(eps)).sqrt()
        for offset in (0.0, 1.0):
            expected = normalized * (weight.double() + offset)
            if bias is not None and not is_rms:
                expected = expected + bias.double()
            limit = 16 * torch.finfo(weight.dtype).eps * float(expected.abs().max())
            if float((output.double() - expected).abs().max()) <= limit:
                return MeasuredNorm(
                    name, config, submodules={}, uses_rms_norm=is_rms, uses_weight_offset=offset == 1.0
                )
    return None


def _first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple | list) else output
    return tensor


def _keeper(outputs: dict[str, Tensor], name: str) -> Any:
    def keep(_module: object, _args: object, output: Any) -> None:
        outputs[name] = _first(output)

    return keep


def _weigher(point: HookPoint, terms: tuple[Term, ...], outputs: dict[str, Tensor]) -> Any:
    """Return a forward hook of the last of a contribution's parts, which fires the point of their weighted sum."""

    def fire(_module: object, _args: object, output: Any) -> Any:
        last, factor = _first(output), terms[-1].factor
        if not point.has_hooks(dir="both"):
            outputs.clear()
            return None
        others = [outputs[term.name].reshape(last.shape) * term.factor for term in terms[:-1]]
        outputs.clear()
        total = sum(others[1:], start=others[0]) + last * factor if others else last * factor
        edited = point(total.clone())
        if torch.equal(edited, total) and not edited.requires_grad:
            return None
        remaining = edited
        for other in others:
            remaining = remaining - other
        replaced = remaining / factor
        return (replaced, *output[1:]) if isinstance(output, tuple | list) else replaced

    return fire
