"""The attention window of each layer, measured on the masks that the model's own forward builds.

Neither the configuration nor an attribute is reliable: EXAONE 4 sets `sliding_window` on layers that ignore it, and a
Llama configuration may contain one that nothing reads. The mask that reaches the attention function decides.
transformers describes each mask by a function of (query position, key position). During a probe of a few tokens the
lens records which function belongs to the mask of which layer. It then calls that function on positions far away,
which needs no long forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phaselens.errors import RefusedModel
from phaselens.lens import families
from phaselens.lens.components import attention_layers, probe
from phaselens.lens.masks import MaskFunction, recording
from phaselens.lens.points import HookFunction, in_layer
from phaselens.lens.reference import probe_tokens
from phaselens.lens.refusals import ADVICE

if TYPE_CHECKING:
    from phaselens.lens.bridge import HookedTransformer

_N_PROBE_TOKENS = 4
_FAR = 1 << 30
"""A position beyond every window."""
_LONGEST_TEXT = 64
"""Windows shorter than this are also tested on a text that is longer than they are."""


def measure_windows(lens: HookedTransformer) -> tuple[tuple[int | None, ...], int | None]:
    """Return the number of keys that a query of each layer sees, its own included, and the longest text for which that
    holds.

    The number is None for a layer that sees all keys before a query, and for one without attention. The length is None
    if it holds for every text.

    Raises:
        RefusedModel: for a layer that sees other keys, such as a chunk of the text or keys after the query, and for one
            whose mask does not determine what happens in longer texts.
    """
    rules = _rules(lens)
    window_by_rule: dict[int, int | None] = {}
    limits: list[int | None] = []
    shortest = probe_tokens(lens.original_model).shape[1]
    for layer, rule in rules.items():
        if id(rule) not in window_by_rule:
            window_by_rule[id(rule)], limit = _measured_window(rule, _label(lens, layer), shortest)
            limits.append(limit)
    limits.append(families.n_selected_keys_of(lens.original_model))
    limits.append(families.piece_length_of(lens.original_model))
    windows = tuple(
        window_by_rule[id(rules[layer])] if layer in rules else None for layer in range(len(lens.blocks))
    )
    return windows, min((limit for limit in limits if limit is not None), default=None)


def disagreements(lens: HookedTransformer) -> dict[int, float]:
    """Return, for each layer, the share of (query, key) pairs for which `lens.info.windows` is wrong.

    Two things are compared with the window: the rule behind the layer's mask, on pairs of positions near and far; and,
    in a text a few tokens longer than the short windows, the cells of the layer's own scores, −inf where hidden.
    """
    windows = lens.info.windows
    shares: dict[int, float] = {}
    share_by_rule: dict[tuple[int, int | None], float] = {}
    for layer, rule in _rules(lens).items():
        window = windows[layer]
        if (id(rule), window) not in share_by_rule:
            query, key = _pairs([*windows, _measured_window(rule, _label(lens, layer), 1)[0]])
            query, key = _within(query, key, lens.info.longest)
            disagrees = rule(query, key) != visible(query, key, window)
            share_by_rule[id(rule), window] = float(disagrees.double().mean())
        shares[layer] = share_by_rule[id(rule), window]
    for layer, share in _hidden_cells(lens).items():
        shares[layer] = max(shares[layer], share)
    return shares


def visible(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Return whether a query at one position sees a key at another, elementwise.

    >>> visible(torch.tensor(5), torch.arange(8), 3).tolist()
    [False, False, False, True, True, True, False, False]
    """
    is_causal = key <= query
    return is_causal if window is None else is_causal & (key > query - window)


def _rules(lens: HookedTransformer) -> dict[int, MaskFunction]:
    """Return the rule of each layer with attention, found by one forward of a few tokens."""
    tokens = torch.arange(_N_PROBE_TOKENS, device=lens.device)[None] % families.d_vocab_of(
        lens.original_model
    )
    with recording() as recorder:
        probe(lens, tokens)
    rules = {}
    for layer, attention in attention_layers(lens).items():
        rule = recorder.rule(attention.original_component)
        if rule is None and families.n_selected_keys_of(lens.original_model) is not None:
            # The module hides more keys than the model's mask does, but none in texts of at most that number.
            rule = recorder.common_rule
        if rule is None:
            raise RefusedModel(
                f"{_label(lens, layer)} builds its own mask, so the keys that a query of a long text sees cannot be "
                f"determined; {ADVICE}"
            )
        rules[layer] = rule
    return rules


def _label(lens: HookedTransformer, layer: int) -> str:
    return f"{lens.original_model.config.model_type}: attention of layer {layer}"


def _measured_window(rule: MaskFunction, label: str, shortest: int) -> tuple[int | None, int | None]:
    """Return the window that explains a rule completely, at positions near and far; and the length of the longest text
    for which it does, None for every text.

    Args:
        shortest: texts of this length must be explained, since the self-check uses one.
    """

    def sees(query: int, key: int) -> bool:
        return bool(rule(torch.tensor([query]), torch.tensor([key])))

    try:
        if sees(_FAR, 0):
            window = None
        else:
            hidden_key, visible_key = 0, _FAR
            while visible_key - hidden_key > 1:
                middle = (hidden_key + visible_key) // 2
                if sees(_FAR, middle):
                    visible_key = middle
                else:
                    hidden_key = middle
            window = _FAR - hidden_key
        query, key = _pairs([window])
        sees_pair = rule(query, key)
    except (IndexError, RuntimeError) as error:
        raise RefusedModel(
            f"{label} has a mask that cannot be evaluated for long texts ({error}); {ADVICE}"
        ) from error
    mismatches = (sees_pair != visible(query, key, window)).nonzero()
    limit = _first_query(lambda query: not sees(query, 0))
    if len(mismatches) and limit >= max(2, shortest):
        query, key = _within(query, key, limit)
        if bool((rule(query, key) == visible(query, key, None)).all()):
            return None, limit
        query, key = _pairs([window])
    if len(mismatches):
        row, column = mismatches[0].tolist()
        verb = "sees" if bool(sees_pair[row, column]) else "does not see"
        raise RefusedModel(
            f"{label} sees neither all keys before a query nor a window of them: query {int(query[row, 0])} {verb} key "
            f"{int(key[row, column])}, as in chunks of a text, or in both directions. PhaseLens measures causal "
            "attention and sliding windows only; use a family listed in docs/families.md"
        )
    return window, None


def _first_query(is_beyond: Callable[[int], bool]) -> int:
    """Return the first position for which a condition holds that holds from there on; `_FAR` if there is none."""
    low, high = 0, _FAR
    while low < high:
        middle = (low + high) // 2
        if is_beyond(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _within(query: Tensor, key: Tensor, limit: int | None) -> tuple[Tensor, Tensor]:
    """Return the pairs of which both positions are in a text of that length; None for every text."""
    if limit is None:
        return query, key
    is_within = query[:, 0] < limit
    return query[is_within], key[is_within].clamp(max=limit - 1)


def _pairs(windows: list[int | None]) -> tuple[Tensor, Tensor]:
    """Return query [pair, 1] and key [pair, choice] at positions, near and far, where rules can differ."""
    sizes = sorted({size for size in windows if size is not None} | {1})
    generator = torch.Generator().manual_seed(0)
    random = [torch.randint(1 << bits, (8,), generator=generator) for bits in (5, 8, 11, 14, 17, 20, 24, 30)]
    edges = torch.tensor(
        [max(0, factor * size + step) for size in sizes for factor in (1, 2, 3) for step in range(-2, 3)]
    )
    query = torch.cat([torch.arange(32), edges, *random, torch.tensor([_FAR, _FAR + 1])])[:, None]
    near_steps = torch.tensor([-2, -1, 0, 1, 2])
    steps = torch.cat([near_steps, *(near_steps - size for size in sizes)])
    share = torch.rand(len(query), 16, generator=generator, dtype=torch.float64)
    key = torch.cat([query + steps, torch.arange(4).expand(len(query), 4), (share * query).long()], dim=1)
    return query, key.clamp(min=0)


def _hidden_cells(lens: HookedTransformer) -> dict[int, float]:
    """Return, for each layer, the share of cells of its scores whose visibility contradicts its window.

    The text is longer than the short windows.
    """
    short_windows = [window for window in lens.info.windows if window is not None and window < _LONGEST_TEXT]
    length = max(short_windows, default=_N_PROBE_TOKENS) + 2
    while lens.info.reason_against(length):
        length -= 1
    vocabulary = lens.info.d_vocab
    tokens = torch.arange(length)[None] % vocabulary
    shares: dict[int, float] = {}
    position = torch.arange(length)

    def compare(layer: int) -> HookFunction:
        def record(scores: Tensor, hook: object) -> None:
            # NaN or +inf scores come from the model itself (NaN weights) and do not show what the mask hides.
            if not bool((scores.isnan() | (scores == torch.inf)).any()):
                expected = visible(position[:, None], position, lens.info.windows[layer])
                is_visible = (scores != -torch.inf).cpu()
                shares[layer] = float((is_visible != expected).double().mean())

        return record

    hooks = [(in_layer(layer, "attn.hook_attn_scores"), compare(layer)) for layer in attention_layers(lens)]
    lens.stream(tokens, hooks)
    return shares
