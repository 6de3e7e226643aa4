"""The self-check: the lens shows what the model computes, or the model is refused.

Loading checks a few layers, `phaselens check` all of them. The reference (`reference`) is the model's own forward
before it was wrapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from phaselens import attention
from phaselens.errors import InputError, RefusedModel
from phaselens.lens import edit_checks
from phaselens.lens.captures import capture, keeper, per_layer
from phaselens.lens.check_results import CheckResult, difference, worst
from phaselens.lens.choices import Choices, recorded_choices, repeated_choices
from phaselens.lens.components import attention_layers, attention_of
from phaselens.lens.ownership import owned_call
from phaselens.lens.points import ROTATED_POINTS, STATISTICS, HookFunction, in_layer, is_attention
from phaselens.lens.precision import STATISTICS_LIMITS
from phaselens.lens.reference import OwnForward, Reference, probe_tokens
from phaselens.lens.refusals import ADVICE, refusing
from phaselens.lens.visibility import disagreements
from phaselens.lens.weights import projection

if TYPE_CHECKING:
    from phaselens.lens.bridge import HookedTransformer


def require(lens: HookedTransformer, results: list[CheckResult]) -> None:
    """Raise RefusedModel for the first check that failed."""
    for result in results:
        if not result.ok:
            advice = f"{ADVICE}, and please report this one"
            if lens.dtype != torch.float32:
                advice = "try --dtype float32; if it fails there too, please report it"
            raise RefusedModel(
                f"{lens.info.label} ({lens.info.family}) failed its check {result.name!r}: difference "
                f"{result.measured:.3g}, at most {result.limit:.3g} is allowed; {result.detail}. It cannot be measured "
                f"exactly: {advice}"
            )


def run_checks(lens: HookedTransformer, *, full: bool = True) -> list[CheckResult]:
    """Run all checks, in every layer (`full`) or in the first, middle and last.

    Returns:
        One result per check, in the order they ran; a failed check is a result too, not an exception.

    Raises:
        RefusedModel: for a model that cannot be run as a check needs it.
    """
    with refusing(lens.original_model, "check it"):
        return _results(lens, full)


@owned_call
def _results(lens: HookedTransformer, full: bool) -> list[CheckResult]:
    n_layers = lens.info.n_layers
    layers = list(range(n_layers)) if full else sorted({0, n_layers // 2, n_layers - 1})
    tokens = lens.reference.tokens if lens.reference is not None else probe_tokens(lens.original_model)
    results = []
    if lens.reference is not None:
        with lens.nulled_rotation(None if lens.reference.nulled else []):
            results += _same_as_reference(lens, lens.reference)
            results += _long_neighbours_change_nothing(lens, lens.reference)
    results.append(_rows_sum_to_one(lens, tokens))
    results.append(_windows_match_the_masks(lens))
    results.append(_statistics_match_scores(lens, tokens))
    results += _heads_write_the_output(lens, tokens, layers)
    clean = edit_checks.clean_forward(lens, tokens, layers)
    results.append(_key_edits_match_the_matrix(lens, clean, layers))
    results.append(edit_checks.edit_changes_layers_above(lens, clean, layers))
    results += edit_checks.mid_edit_reaches_skip_path(lens, clean, layers)
    if lens.resume_problem is None:
        results.append(edit_checks.resuming_gives_the_same(lens, clean, layers))
    results.append(_padding_changes_nothing(lens, tokens))
    return results


def _same_as_reference(lens: HookedTransformer, reference: Reference) -> list[CheckResult]:
    """Compare what each layer returns, and the logits, with the model's own."""
    limit = lens.arithmetic.limit
    results = []
    for name, points in (
        ("logits, nothing hooked inside", {}),
        ("logits, all statistics hooked", _statistics(lens)),
    ):
        with _as_in(lens, reference.forward.residuals, reference.forward.choices) as entering:
            logits, _ = capture(lens, reference.tokens, points, unembed=True)
        gaps = list(map(difference, entering, reference.forward.residuals))
        gap = max(*gaps, difference(logits, reference.forward.logits))
        detail = "no difference" if gap == 0 else "within rounding"
        if gap > limit:
            first_layer = next((layer for layer, value in enumerate(gaps) if value > limit), None)
            detail = "first seen after the last layer"
            if first_layer is not None:
                detail = f"first seen entering layer {first_layer}, by {gaps[first_layer]:.3g}"
        results.append(CheckResult(name, gap <= limit, gap, limit, detail))
    return results


@contextmanager
def _as_in(lens: HookedTransformer, residuals: Sequence[Tensor], choices: Choices) -> Iterator[list[Tensor]]:
    """Let the layers of a forward inside the context start from the residuals, and choose the experts, of another one.

    Rounding then neither accumulates over the layers nor tips a choice. Yields the list of what entered each layer
    before it was replaced.
    """
    entering: list[Tensor] = []

    def start_from(residual: Tensor) -> HookFunction:
        def replace(value: Tensor, hook: object) -> Tensor:
            entering.append(value.detach().clone())
            return residual.to(value.device, copy=True)

        return replace

    hooks = [(in_layer(layer, "hook_in"), start_from(residual)) for layer, residual in enumerate(residuals)]
    with lens.hooks(fwd_hooks=hooks), repeated_choices(choices, lens.arithmetic.limit):
        yield entering


def _rows_sum_to_one(lens: HookedTransformer, tokens: Tensor) -> CheckResult:
    """Sum the rows of the matrix and, where there are sink logits, add their share by the streamed log-sum-exp."""
    points = _in_attention(attention_layers(lens), ("hook_pattern", "hook_lse"))
    # With reads_only, the log-sum-exp is streamed although the matrix is hooked.
    _, activations = capture(lens, tokens, points, reads_only=True)
    by_layer = {}
    for layer, attention_component in attention_layers(lens).items():
        row_sums = activations[layer, "hook_pattern"].double().sum(-1)
        sink_logits = attention_component.facts.sink_logits
        if sink_logits is not None:
            lse = activations[layer, "hook_lse"].double()
            row_sums = row_sums + (sink_logits.double()[None, :, None] - lse).exp()
        # Rows that are not finite come from the model (NaN weights); its logits were compared above.
        by_layer[layer] = difference(row_sums, torch.ones_like(row_sums).where(row_sums.isfinite(), row_sums))
    return worst("rows of attention sum to one", STATISTICS_LIMITS[lens.dtype] / 2, by_layer)


def _windows_match_the_masks(lens: HookedTransformer) -> CheckResult:
    """Compare the window of each layer with the masks of the forward, at positions far beyond the probe's."""
    return worst("each layer sees exactly the keys in its window", 0.0, disagreements(lens))


def _statistics_match_scores(lens: HookedTransformer, tokens: Tensor) -> CheckResult:
    """Compare streamed statistics with those of the same queries and keys in float64."""
    layers = attention_layers(lens)
    points = _in_attention(layers, (*STATISTICS, *ROTATED_POINTS, "hook_key_scores"))
    _, activations = capture(lens, tokens, points)
    by_layer = dict.fromkeys(layers, 0.0)
    for layer in by_layer:
        query, key = (activations[layer, point].transpose(1, 2).cpu().double() for point in ROTATED_POINTS)
        facts = layers[layer].facts
        scores = attention.explicit_scores(
            query,
            key,
            scale=facts.scale,
            window=lens.info.windows[layer],
            softcap=facts.softcap,
            bias=None if (bias := layers[layer].score_bias) is None else bias.cpu().double(),
        )
        lse = scores.logsumexp(-1)
        sink_logits = facts.sink_logits
        if sink_logits is not None:
            lse = torch.logaddexp(lse, sink_logits.detach().cpu().double()[None, :, None])
        pattern = (scores - lse[..., None]).exp()
        expected = {
            "hook_lse": lse,
            "hook_key_scores": scores[..., :1],
            "hook_learned_sink": 1 - pattern.sum(-1),
            "hook_sink": pattern[..., 0],
            "hook_itself": pattern.diagonal(dim1=-2, dim2=-1),
            "hook_entropy": torch.special.entr(pattern).sum(-1),
            "hook_received": pattern.sum(-2),
            "hook_distance": _distances(pattern, activations[layer, "hook_distance"].shape[-1]),
            "hook_segments": pattern.sum(-1, keepdim=True),
            "hook_top_key": _consistent_top(pattern, activations[layer, "hook_top_key"].cpu()),
            "hook_largest_product": _largest_products(query, key, scores != -torch.inf),
        }
        for name in (
            *STATISTICS,
            "hook_key_scores",
        ):  # one without a reference in float64 fails here, rather than pass unchecked
            gap = difference(activations[layer, name].cpu(), expected[name], relative=not _can_be_zero(name))
            by_layer[layer] = max(by_layer[layer], gap)
    name = "streamed statistics equal those of the scores in float64"
    return worst(name, STATISTICS_LIMITS[lens.dtype], by_layer)


def _key_edits_match_the_matrix(
    lens: HookedTransformer, clean: edit_checks.CleanForward, layers: list[int]
) -> CheckResult:
    """Remove key 0 from the later queries of a layer, once without the matrix and once in it."""

    def removed(scores: Tensor, hook: object) -> Tensor:
        scores = scores.clone()
        scores[:, :, 1:, 0] = -torch.inf
        return scores

    by_layer = {}
    for layer in (layer for layer in layers if attention_of(lens.blocks[layer]) is not None):
        outputs: dict[str, Tensor] = {}
        for point in ("hook_key_scores", "hook_attn_scores"):
            hooks = [
                (in_layer(layer, f"attn.{point}"), removed),
                (in_layer(layer, "attn.hook_attended"), keeper(outputs, point)),
            ]
            edit_checks.run_layer(lens, clean, layer, hooks)
        # NaN weights leave nothing to compare; the other checks have compared where NaN is.
        is_nan = bool(outputs["hook_attn_scores"].isnan().any())
        by_layer[layer] = 0.0 if is_nan else difference(*outputs.values())
    return worst("an edit of named keys equals the same edit of the matrix", lens.arithmetic.limit, by_layer)


def _consistent_top(pattern: Tensor, top: Tensor) -> Tensor:
    """Return `top` [batch, head, query, 2] where the key named has the row's largest weight, up to rounding; NaN
    elsewhere. Which of several nearly equal weights is the largest, rounding may decide."""
    key = top[..., :1].double()
    weight = pattern.gather(-1, torch.where(key.isnan(), 0.0, key).long())
    is_consistent = weight >= pattern.amax(-1, keepdim=True) * (1 - 2 * attention.TIE)
    return torch.where(is_consistent & (top[..., 1:] >= 1), top, torch.nan)


def _largest_products(query: Tensor, key: Tensor, is_visible: Tensor) -> Tensor:
    """Return the largest |q·k| [batch, head, query] of q [batch, head, query, d_head] and the visible keys."""
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return (query @ keys.transpose(-1, -2)).abs().masked_fill(~is_visible, 0.0).amax(-1)


def _can_be_zero(statistic: str) -> bool:
    """Return whether the statistic is computed from attention and so may be 0 throughout, with no scale to compare
    by."""
    return is_attention(f"attn.{statistic}")


def _distances(pattern: Tensor, n_distances: int) -> Tensor:
    """Return sums over the diagonals of a square pattern, [batch, head, distance]; 0 where the text is too short."""
    return torch.stack(
        [pattern.diagonal(-distance, dim1=-2, dim2=-1).sum(-1) for distance in range(n_distances)], -1
    )


def _statistics(lens: HookedTransformer) -> dict[Any, str]:
    return _in_attention(attention_layers(lens), STATISTICS)


def _in_attention(layers: Iterable[int], points: Sequence[str]) -> dict[Any, str]:
    """Return the names of these points in the attention of each layer, by layer and point."""
    return {(layer, point): in_layer(layer, f"attn.{point}") for layer in layers for point in points}


def _heads_write_the_output(lens: HookedTransformer, tokens: Tensor, layers: list[int]) -> list[CheckResult]:
    """Compare the sum over heads of their outputs with attention's output, where W_O can be read."""
    points = _in_attention(layers, ("hook_z", "hook_out"))
    # A module that adds the residual itself returns more than the heads write. Its projection is then a part.
    projections = {(layer, "hook_out"): in_layer(layer, "attn_out.hook_out") for layer in layers}
    points |= {key: name for key, name in projections.items() if lens.find_hook(name) is not None}
    points = {key: name for key, name in points.items() if lens.find_hook(name) is not None}
    complete = [layer for layer in layers if (layer, "hook_z") in points and (layer, "hook_out") in points]
    _, activations = capture(lens, tokens, points)
    gaps: dict[int, float] = {}
    for layer in complete:
        try:
            output = projection(lens, layer, "attn.W_O")
        except InputError:
            continue
        z = output.multiplied(activations[layer, "hook_z"]).flatten(-2).double()
        head_sum = z @ output.weight.flatten(0, 1).double() + output.bias.double()
        gaps[layer] = difference(head_sum, activations[layer, "hook_out"])
    name = "the heads' outputs add up to the output of attention"
    return [worst(name, lens.arithmetic.limit, gaps)] if gaps else []


def _long_neighbours_change_nothing(lens: HookedTransformer, reference: Reference) -> list[CheckResult]:
    """Run a short text after and beside a long one, and the long one beside the short: each as in a fresh model."""
    near, far, far_positions = reference.forward, reference.far_forward, reference.far_positions
    if far is None or far_positions is None:
        return []
    model, tokens = lens.original_model, reference.tokens
    near_positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    limit = lens.arithmetic.limit

    def run_as_in(forward: OwnForward, tokens: Tensor, positions: Tensor) -> list[Tensor]:
        with _as_in(lens, forward.residuals, forward.choices) as entering:
            logits = model(tokens, position_ids=positions, use_cache=False).logits
        return [*entering, logits]

    def gap_of(own: OwnForward, measured: list[Tensor], text: int) -> float:
        pairs = zip(measured, (*own.residuals, own.logits), strict=True)
        return max(difference(tensor[text : text + 1], expected) for tensor, expected in pairs)

    both_texts, both_positions = tokens.expand(2, -1), torch.cat([near_positions, far_positions])
    with torch.no_grad(), lens.rows.with_lengths(None):
        model(tokens, position_ids=far_positions, use_cache=False)
        after = run_as_in(near, tokens, near_positions)
        beside = run_as_in(near.beside(far), both_texts, both_positions)
    gaps = {
        "a short text after a long one": gap_of(near, after, 0),
        "a short text beside a long one": gap_of(near, beside, 0),
        "a long text beside a short one": gap_of(far, beside, 1),
    }
    worst_case = max(gaps, key=lambda name: gaps[name])
    detail = "no difference" if gaps[worst_case] == 0 else f"worst for {worst_case}"
    return [
        CheckResult(
            "a text beside or after a longer one", gaps[worst_case] <= limit, gaps[worst_case], limit, detail
        )
    ]


def _subtract_own_bias(lens: HookedTransformer, statistics: dict[Any, Tensor]) -> None:
    """Subtract the bias at each query's own key from its log-sum-exp, after a forward of whole texts.

    MPT counts its biases from the end of the longest text, which adds one number to all scores of a row.
    """
    for layer, attention_layer in attention_layers(lens).items():
        if attention_layer.score_bias is not None:
            lse = statistics[layer, "hook_lse"]
            own_bias = attention_layer.score_bias.expand(-1, -1, lse.shape[-1], -1)
            statistics[layer, "hook_lse"] = lse - own_bias.diagonal(dim1=-2, dim2=-1)[..., : lse.shape[-1]]


def _padding_changes_nothing(lens: HookedTransformer, tokens: Tensor) -> CheckResult:
    """Compare one text alone with the same text, padded on the right, beside a longer one."""
    short_text = tokens[:, : max(2, tokens.shape[1] // 2)]
    length = short_text.shape[1]
    padded = torch.cat([torch.nn.functional.pad(short_text, (0, tokens.shape[1] - length)), tokens])
    lengths = torch.tensor([length, tokens.shape[1]])
    points = {**per_layer(lens, "hook_in"), **_statistics(lens)}
    # To record takes a call of Python for each operation, and most models choose nothing.
    chooses_nothing = lens.reference is not None and not lens.reference.forward.choices.by_line
    with nullcontext(Choices(*padded.shape)) if chooses_nothing else recorded_choices(padded) as choices:
        _, in_batch = capture(lens, padded, points, lengths=lengths)
    _subtract_own_bias(lens, in_batch)
    residuals = [in_batch[layer][:1, :length] for layer in range(lens.info.n_layers)]
    with _as_in(lens, residuals, choices.of_text(0, length)) as entering:
        _, alone = capture(lens, short_text, _statistics(lens))
    _subtract_own_bias(lens, alone)
    by_layer = dict(enumerate(map(difference, entering, residuals)))
    for (layer, statistic), value in alone.items():
        same_text = in_batch[layer, statistic][:1, :, : value.shape[2]]
        gap = difference(same_text, value, relative=not _can_be_zero(statistic))
        by_layer[layer] = max(by_layer[layer], gap)
    return worst(
        "a text alone equals the same text in a padded batch", max(1e-5, lens.arithmetic.limit), by_layer
    )
