"""The self-check: what the lens shows of a model is what the model does, or it is refused.

On load a few layers are tried; `phaselens check` tries all. The reference is the model's own forward, run before
anything of it was wrapped.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phaselens import attention
from phaselens.errors import InputError, RefusedModel
from phaselens.lens import frequencies
from phaselens.lens.components import STATISTICS, each_attention
from phaselens.lens.positions import softcap_of
from phaselens.lens.precision import LIMITS
from phaselens.lens.visibility import disagreements
from phaselens.lens.weights import projection

_PROBE = 16


@dataclass(frozen=True)
class CheckResult:
    """One check: `measured` must not exceed `limit`; `detail` names the layer it was worst in, or what was found."""

    name: str
    ok: bool
    measured: float
    limit: float
    detail: str = ""


@dataclass(frozen=True)
class Reference:
    """The model's own answer to the probe: tokens [1, pos], logits [1, pos, d_vocab], residuals entering each layer.

    `far_logits` [1, pos, d_vocab] are those of the same tokens at `far_positions` [1, pos], which reach beyond the
    trained length, as if they ended a long text; None for a model that rotates nothing.
    """

    tokens: Tensor
    logits: Tensor
    residuals: tuple[Tensor, ...]
    far_positions: Tensor | None = None
    far_logits: Tensor | None = None


def probe_tokens(model: Any) -> Tensor:
    """A few ids, the same for every model of a vocabulary."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    length = min(_PROBE, getattr(model.config, "max_position_embeddings", None) or _PROBE)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (1, length), generator=generator).to(model.device)


def reference_of(model: Any, *, nulled: bool = False) -> Reference:
    """Run the unwrapped model: SDPA, or eager where scores are capped or sinks learned, which SDPA leaves out."""
    tokens = probe_tokens(model)
    config = model.config
    before = config._attn_implementation
    needs_eager = any(
        hasattr(module, "sinks") or softcap_of(module) is not None for module in model.modules()
    )
    model.eval()
    model.set_attn_implementation("eager" if needs_eager else "sdpa")
    # The object may have run before, on longer texts.
    for module in frequencies.length_dependent(model):
        frequencies.reset(module)
    far = _far_positions(model, tokens)
    far_logits = None
    try:
        with torch.no_grad(), _identity_rotation(model, nulled):
            out = model(tokens, output_hidden_states=True, use_cache=False)
            if far is not None:
                far_logits = model(tokens, position_ids=far, use_cache=False).logits
    finally:
        model.set_attn_implementation(before)
    return Reference(tokens, out.logits, tuple(out.hidden_states[:-1]), far, far_logits)


def _far_positions(model: Any, tokens: Tensor) -> Tensor | None:
    """Positions [1, pos] of the end of a text that is longer than the model was made for; None without a rotation."""
    far = frequencies.far_position(model)
    if far is None:
        return None
    n_tokens = tokens.shape[1]
    return torch.arange(n_tokens, device=tokens.device)[None] + max(0, far - n_tokens // 2)


@contextmanager
def _identity_rotation(model: Any, nulled: bool) -> Any:
    """While inside, let every rotary module of an unwrapped model return cos=1 and sin=0.

    Both times the attention factor that YaRN and longrope put into them: the length of the vector (cos, sin).
    """

    def replace(_module: Any, _args: Any, out: Any) -> Any:
        cos, sin = out
        return torch.hypot(cos.double(), sin.double()).to(cos), torch.zeros_like(sin)

    rotary = (
        [module for name, module in model.named_modules() if name.endswith("rotary_emb")] if nulled else []
    )
    handles = [module.register_forward_hook(replace) for module in rotary]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def require(lens: Any, results: list[CheckResult]) -> None:
    """Raise RefusedModel for the first check that failed."""
    for result in results:
        if not result.ok:
            raise RefusedModel(
                f"{lens.info.label} ({lens.info.family}) failed its check {result.name!r}: difference "
                f"{result.measured:.3g}, at most {result.limit:.3g} is allowed; {result.detail}. It cannot be measured "
                "exactly: try --dtype float32; if it fails there too, please report the family"
            )


def run_checks(lens: Any, *, full: bool = True) -> list[CheckResult]:
    """All checks, in every layer (`full`) or in the first, middle and last.

    Returns:
        A result a check, in the order they ran; failed ones are results too, not exceptions.
    """
    n_layers = lens.info.n_layers
    layers = list(range(n_layers)) if full else sorted({0, n_layers // 2, n_layers - 1})
    tokens = lens.reference.tokens if lens.reference is not None else probe_tokens(lens.original_model)
    results = []
    if lens.reference is not None:
        results += _same_as_reference(lens, lens.reference)
        results += _long_neighbours_change_nothing(lens, lens.reference)
    results.append(_rows_sum_to_one(lens, tokens))
    results.append(_windows_are_what_is_seen(lens))
    results.append(_statistics_match_scores(lens, tokens))
    results += _heads_write_the_output(lens, tokens, layers)
    results.append(_edit_reaches(lens, tokens, layers))
    results += _mid_edit(lens, tokens, layers)
    results.append(_resumes(lens, tokens, layers))
    results.append(_padding_changes_nothing(lens, tokens))
    return results


def _difference(found: Tensor, expected: Tensor, *, relative: bool = True) -> float:
    """Largest difference, relative to the largest expected magnitude; what is not finite must be so in both."""
    found, expected = found.detach().double(), expected.detach().double().to(found.device)
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return float("inf")
    if not finite.any():
        return 0.0
    gap = float((found[finite] - expected[finite]).abs().max())
    scale = float(expected[finite].abs().max()) if relative else 1.0
    return gap / scale if scale > 0 else gap


def _worst(name: str, limit: float, by_layer: dict[int, float], what: str = "worst in layer") -> CheckResult:
    layer = max(by_layer, key=lambda index: by_layer[index])
    worst = by_layer[layer]
    detail = f"{what} {layer}" if worst > 0 else "no difference"
    return CheckResult(name, worst <= limit, worst, limit, detail)


def capture(
    lens: Any, tokens: Tensor, names: dict[Any, str], **options: Any
) -> tuple[Tensor, dict[Any, Tensor]]:
    """One forward: what it returned, and a copy of each named activation under its key."""
    kept: dict[Any, Tensor] = {}
    out = lens.stream(tokens, [(name, _keeper(kept, key)) for key, name in names.items()], **options)
    return out, kept


def _per_layer(lens: Any, point: str) -> dict[Any, str]:
    return {layer: f"blocks.{layer}.{point}" for layer in range(lens.info.n_layers)}


def _same_as_reference(lens: Any, reference: Reference) -> list[CheckResult]:
    limit = LIMITS[lens.dtype]
    results = []
    hooked = _statistics(lens)
    for name, extra in (("logits, nothing hooked inside", {}), ("logits, all statistics hooked", hooked)):
        entering = _per_layer(lens, "hook_in")
        logits, kept = capture(lens, reference.tokens, {**entering, **extra}, unembed=True)
        by_layer = {layer: _difference(kept[layer], own) for layer, own in enumerate(reference.residuals)}
        gap = _difference(logits, reference.logits)
        first = next((layer for layer, value in by_layer.items() if value > limit), None)
        detail = "no difference" if gap == 0 else "within rounding"
        if first is not None:
            detail = f"first seen entering layer {first}, by {by_layer[first]:.3g}"
        elif gap > limit:
            detail = "first seen after the last layer"
        results.append(CheckResult(name, gap <= limit and first is None, gap, limit, detail))
    return results


def _rows_sum_to_one(lens: Any, tokens: Tensor) -> CheckResult:
    _, kept = capture(lens, tokens, _per_layer(lens, "attn.hook_pattern"))
    _, lse = capture(lens, tokens, _per_layer(lens, "attn.hook_lse"))
    by_layer = {}
    for layer, pattern in kept.items():
        whole = pattern.double().sum(-1)
        sinks = getattr(each_attention(lens)[layer].original_component, "sinks", None)
        if sinks is not None:
            whole = whole + (sinks.double()[None, :, None] - lse[layer].double()).exp()
        # Rows that are not finite are the model's own (NaN weights); that its logits are too was compared above.
        by_layer[layer] = _difference(whole, torch.ones_like(whole).where(whole.isfinite(), whole))
    return _worst("rows of attention sum to one", 1e-5, by_layer)


def _windows_are_what_is_seen(lens: Any) -> CheckResult:
    """The window of each layer against the masks of the forward, at positions far beyond the probe's."""
    return _worst("each layer sees the keys that its window says", 0.0, disagreements(lens))


def _statistics_match_scores(lens: Any, tokens: Tensor) -> CheckResult:
    """Streamed statistics against those of the same queries and keys in float64."""
    rotated = {
        (layer, p): f"blocks.{layer}.attn.{p}" for layer in range(lens.info.n_layers) for p in _ROTATED
    }
    _, kept = capture(lens, tokens, {**_statistics(lens), **rotated})
    by_layer = dict.fromkeys(range(lens.info.n_layers), 0.0)
    for layer in by_layer:
        query, key = (kept[layer, point].transpose(1, 2).cpu().double() for point in _ROTATED)
        scores = attention.explicit_scores(
            query,
            key,
            scale=lens.info.scales[layer],
            window=lens.info.windows[layer],
            softcap=lens.info.softcap,
        )
        lse = scores.logsumexp(-1)
        learned = getattr(each_attention(lens)[layer].original_component, "sinks", None)
        if learned is not None:
            lse = torch.logaddexp(lse, learned.detach().cpu().double()[None, :, None])
        pattern = (scores - lse[..., None]).exp()
        expected = {
            "hook_lse": lse,
            "hook_sink": pattern[..., 0],
            "hook_entropy": torch.special.entr(pattern).sum(-1),
            "hook_received": pattern.sum(-2),
            "hook_distance": _distances(pattern, kept[layer, "hook_distance"].shape[-1]),
        }
        for name, value in expected.items():
            gap = _difference(kept[layer, name].cpu(), value, relative=name == "hook_lse")
            by_layer[layer] = max(by_layer[layer], gap)
    # The kernels that half precision runs take their exponentials less exactly.
    limit = 2e-5 if lens.dtype in (torch.float32, torch.float64) else 2e-4
    return _worst("streamed statistics equal those of the scores in float64", limit, by_layer)


_ROTATED = ("hook_rot_q", "hook_rot_k")


def _distances(pattern: Tensor, n: int) -> Tensor:
    """[batch, head, distance] of a square pattern: a diagonal each; zeros where the text is too short for one."""
    return torch.stack([pattern.diagonal(-back, dim1=-2, dim2=-1).sum(-1) for back in range(n)], -1)


def _statistics(lens: Any) -> dict[Any, str]:
    return {(layer, s): f"blocks.{layer}.attn.{s}" for layer in range(lens.info.n_layers) for s in STATISTICS}


def _edit_reaches(lens: Any, tokens: Tensor, layers: list[int]) -> CheckResult:
    """Zero the first value of a layer: what enters layers up to it stays bit-equal, and its own output changes."""
    entering = _per_layer(lens, "hook_in")
    _, clean = capture(lens, tokens, {**entering, "out": _last_out(lens)})
    moved: dict[int, float] = {}
    for layer in layers:

        def zero_first(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            value[:, 0] = 0
            return value

        kept: dict[Any, Tensor] = {}
        hooks = [(name, _keeper(kept, key)) for key, name in {**entering, "out": _last_out(lens)}.items()]
        lens.stream(tokens, [*hooks, (f"blocks.{layer}.attn.hook_v", zero_first)])
        below = max(_difference(kept[index], clean[index]) for index in range(layer + 1))
        after = layer + 1 if layer + 1 in clean else "out"
        # Where NaN weights left nothing finite, no edit can show.
        changed = _difference(kept[after], clean[after]) > 0 or not clean[after].isfinite().any()
        moved[layer] = below if changed else float("inf")
    return _worst("an edit changes what is above it and nothing below", 0.0, moved, "edit of hook_v in layer")


def _heads_write_the_output(lens: Any, tokens: Tensor, layers: list[int]) -> list[CheckResult]:
    """What the heads write, added up, is what attention gives; without layers where that is refused by name."""
    points = {
        (layer, name): f"blocks.{layer}.attn.{name}" for layer in layers for name in ("hook_z", "hook_out")
    }
    if any(lens.find_hook(name) is None for name in points.values()):
        return []
    _, kept = capture(lens, tokens, points)
    gaps: dict[int, float] = {}
    for layer in layers:
        try:
            output = projection(lens, layer, "attn.W_O")
        except InputError:
            continue
        z = output.multiplied(kept[layer, "hook_z"]).flatten(-2).float()
        written = z @ output.weight.flatten(0, 1).float() + output.bias.float()
        gaps[layer] = _difference(written, kept[layer, "hook_out"])
    name = "what the heads write adds up to the output of attention"
    return [_worst(name, LIMITS[lens.dtype], gaps)] if gaps else []


def _keeper(kept: dict[Any, Tensor], key: Any) -> Callable[..., None]:
    def hook(value: Tensor, hook: Any) -> None:
        kept[key] = value.detach().clone()

    return hook


def _last_out(lens: Any) -> str:
    return f"blocks.{lens.info.n_layers - 1}.hook_out"


def _mid_edit(lens: Any, tokens: Tensor, layers: list[int]) -> list[CheckResult]:
    """Set the mid residual to zero: the block's output must be the MLP's alone; a copy must change no bit."""
    block = lens.blocks[0]
    if block._point("hook_resid_mid") is None or block._point("hook_mlp_out") is None:
        return []
    gaps: dict[int, float] = {}
    for layer in layers:
        out = f"blocks.{layer}.hook_out"
        mid = f"blocks.{layer}.hook_resid_mid"
        _, clean = capture(lens, tokens, {"out": out})
        copied: dict[Any, Tensor] = {}
        lens.stream(tokens, [(mid, lambda value, hook: value.clone()), (out, _keeper(copied, "out"))])
        kept: dict[Any, Tensor] = {}
        hooks = [(out, _keeper(kept, "out")), (f"blocks.{layer}.hook_mlp_out", _keeper(kept, "mlp"))]
        lens.stream(tokens, [(mid, lambda value, hook: torch.zeros_like(value)), *hooks])
        gaps[layer] = max(_difference(copied["out"], clean["out"]), _difference(kept["out"], kept["mlp"]))
    return [_worst("an edit of hook_resid_mid reaches the skip path", 0.0, gaps)]


def _resumes(lens: Any, tokens: Tensor, layers: list[int]) -> CheckResult:
    """Start at a layer from its cached residual: the same result, and nothing below it runs."""
    final, kept = capture(lens, tokens, _per_layer(lens, "hook_in"))
    gaps: dict[int, float] = {}
    for layer in layers:
        ran: list[int] = []
        hooks = [
            (f"blocks.{below}.attn.hook_in", lambda _value, hook, ran=ran, below=below: ran.append(below))
            for below in range(layer)
        ]
        resumed = lens.stream(residual=kept[layer], start_at_layer=layer, hooks=hooks)
        gaps[layer] = float("inf") if ran else _difference(resumed, final)
    return _worst("start_at_layer gives the same and skips what is below", 0.0, gaps)


def _long_neighbours_change_nothing(lens: Any, reference: Reference) -> list[CheckResult]:
    """A short text after a long one and beside it, and the long one beside the short: each as in a fresh model."""
    if reference.far_positions is None or reference.far_logits is None:
        return []
    model, tokens, far = lens.original_model, reference.tokens, reference.far_positions
    near = torch.arange(tokens.shape[1], device=tokens.device)[None]
    with torch.no_grad(), lens.rows.reading(None):
        after_long = [model(tokens, position_ids=ids, use_cache=False).logits for ids in (far, near)][1]
        beside = model(tokens.expand(2, -1), position_ids=torch.cat([near, far]), use_cache=False).logits
    gaps = {
        "a short text after a long one": _difference(after_long, reference.logits),
        "a short text beside a long one": _difference(beside[:1], reference.logits),
        "a long text beside a short one": _difference(beside[1:], reference.far_logits),
    }
    worst = max(gaps, key=lambda name: gaps[name])
    limit = LIMITS[lens.dtype]
    detail = "no difference" if gaps[worst] == 0 else f"worst for {worst}"
    return [
        CheckResult("a text beside or after a longer one", gaps[worst] <= limit, gaps[worst], limit, detail)
    ]


def _padding_changes_nothing(lens: Any, tokens: Tensor) -> CheckResult:
    """One text alone, and beside a longer one, padded on the right."""
    short = tokens[:, : max(2, tokens.shape[1] // 2)]
    length = short.shape[1]
    padded = torch.cat([torch.nn.functional.pad(short, (0, tokens.shape[1] - length)), tokens])
    lengths = torch.tensor([length, tokens.shape[1]])
    _, alone = capture(lens, short, _statistics(lens))
    _, beside = capture(lens, padded, _statistics(lens), lengths=lengths)
    by_layer = dict.fromkeys(range(lens.info.n_layers), 0.0)
    for (layer, statistic), value in alone.items():
        gap = _difference(beside[layer, statistic][:1, :, : value.shape[2]], value)
        by_layer[layer] = max(by_layer[layer], gap)
    return _worst(
        "a text alone equals the same text in a padded batch", max(1e-5, LIMITS[lens.dtype]), by_layer
    )
