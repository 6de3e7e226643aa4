"""How far the queries of each layer see, measured on the masks that the model's own forward builds.

Neither a configuration nor an attribute says it reliably: EXAONE 4 sets `sliding_window` on layers that ignore it, and
a Llama configuration may carry one that nothing reads. What decides is the mask that reaches the attention function.
transformers describes each mask by a function of (query position, key position); during a probe of a few tokens the
lens notes which function belongs to the mask of which layer, and then asks that function about positions far away,
where no forward has to go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from phaselens.errors import RefusedModel
from phaselens.lens.components import each_attention, probe
from phaselens.lens.masks import Rule, recording

_PROBE = 4
_FAR = 1 << 30
"""A position beyond every window."""
_LONGEST_TEXT = 64
"""Windows that are shorter than this are also tried on a text that is longer than they are."""


def measure_windows(lens: Any) -> tuple[int | None, ...]:
    """How many keys a query of each layer sees, itself included, or None where it sees all before it.

    Raises:
        RefusedModel: for a layer that sees something else, such as a chunk of the text or keys after the query, and
            for one whose mask says nothing about longer texts.
    """
    rules = _rules(lens)
    measured: dict[int, int | None] = {}
    windows = []
    for layer, rule in enumerate(rules):
        if id(rule) not in measured:
            measured[id(rule)] = _window_of(rule, _named(lens, layer))
        windows.append(measured[id(rule)])
    return tuple(windows)


def disagreements(lens: Any) -> dict[int, float]:
    """For each layer, the share of (query, key) pairs that `lens.info.windows` gets wrong.

    Pairs at positions near and far of the rule behind the layer's mask; and, in texts of a few tokens more than the
    windows that are short enough, cells of the layer's own matrix of scores, which are −inf where hidden.
    """
    windows = lens.info.windows
    shares: dict[int, float] = {}
    tried: dict[tuple[int, int | None], float] = {}
    for layer, rule in enumerate(_rules(lens)):
        window = windows[layer]
        if (id(rule), window) not in tried:
            query, key = _pairs([*windows, _window_of(rule, _named(lens, layer))])
            tried[id(rule), window] = float((rule(query, key) != visible(query, key, window)).double().mean())
        shares[layer] = tried[id(rule), window]
    for layer, share in _hidden_cells(lens).items():
        shares[layer] = max(shares[layer], share)
    return shares


def visible(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Whether a query at one position sees a key at another, elementwise.

    >>> visible(torch.tensor(5), torch.arange(8), 3).tolist()
    [False, False, False, True, True, True, False, False]
    """
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def _rules(lens: Any) -> list[Rule]:
    """The rule of each layer, found by one forward of a few tokens."""
    vocabulary = lens.original_model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(_PROBE, device=lens.device)[None] % vocabulary
    with recording() as recorder:
        probe(lens, tokens)
    rules = []
    for layer, attention in enumerate(each_attention(lens)):
        rule = recorder.rule(attention.original_component)
        if rule is None:
            raise RefusedModel(
                f"{_named(lens, layer)} makes its mask in a way of its own, so which keys a query of a long text sees "
                "cannot be told; use a family listed in docs/families.md"
            )
        rules.append(rule)
    return rules


def _named(lens: Any, layer: int) -> str:
    return f"{lens.original_model.config.model_type}: attention of layer {layer}"


def _window_of(rule: Rule, name: str) -> int | None:
    """The window that explains everything a rule says, at positions near and far."""

    def sees(query: int, key: int) -> bool:
        return bool(rule(torch.tensor([query]), torch.tensor([key])))

    try:
        if sees(_FAR, 0):
            window = None
        else:
            hidden, seen = 0, _FAR
            while seen - hidden > 1:
                middle = (hidden + seen) // 2
                hidden, seen = (hidden, middle) if sees(_FAR, middle) else (middle, seen)
            window = _FAR - hidden
        query, key = _pairs([window])
        says = rule(query, key)
    except (IndexError, RuntimeError) as error:
        raise RefusedModel(
            f"{name} has a mask that cannot be asked about long texts ({error}); use a family listed in "
            "docs/families.md"
        ) from error
    wrong = (says != visible(query, key, window)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        how = "sees" if bool(says[row, column]) else "does not see"
        raise RefusedModel(
            f"{name} sees neither all keys before a query nor a window of them: query {int(query[row, 0])} {how} key "
            f"{int(key[row, column])}, as in chunks of a text, or in both directions. PhaseLens measures causal "
            "attention and sliding windows only; use a family listed in docs/families.md"
        )
    return window


def _pairs(windows: list[int | None]) -> tuple[Tensor, Tensor]:
    """query [pair, 1] and key [pair, choice] at positions where rules can differ, near and far; keys are ≥ 0."""
    sizes = sorted({size for size in windows if size is not None} | {1})
    generator = torch.Generator().manual_seed(0)
    random = [torch.randint(1 << bits, (8,), generator=generator) for bits in (5, 8, 11, 14, 17, 20, 24, 30)]
    edges = torch.tensor(
        [max(0, factor * size + step) for size in sizes for factor in (1, 2, 3) for step in range(-2, 3)]
    )
    query = torch.cat([torch.arange(32), edges, *random, torch.tensor([_FAR, _FAR + 1])])[:, None]
    near = torch.tensor([-2, -1, 0, 1, 2])
    steps = torch.cat([near, *(near - size for size in sizes)])
    share = torch.rand(len(query), 16, generator=generator, dtype=torch.float64)
    key = torch.cat([query + steps, torch.arange(4).expand(len(query), 4), (share * query).long()], dim=1)
    return query, key.clamp(min=0)


def _hidden_cells(lens: Any) -> dict[int, float]:
    """For each layer, the share of cells of its scores that are hidden though its window shows them, or not though it
    hides them; of a text that is longer than the windows that are short enough for that."""
    small = [window for window in lens.info.windows if window is not None and window < _LONGEST_TEXT]
    length = max(small, default=_PROBE) + 2
    limit = lens.info.n_ctx if "learned" in lens.info.positions else None
    length = min(length, limit or length)
    vocabulary = lens.info.d_vocab
    tokens = torch.arange(length)[None] % vocabulary
    shares: dict[int, float] = {}
    position = torch.arange(length)

    def compare(layer: int) -> Callable[..., None]:
        def hook(scores: Tensor, hook: Any) -> None:
            # Scores that are not finite where a key is seen are the model's own (NaN weights), and say nothing.
            if not bool((scores.isnan() | (scores == torch.inf)).any()):
                expected = visible(position[:, None], position, lens.info.windows[layer])
                seen = (scores != -torch.inf).cpu()
                shares[layer] = float((seen != expected).double().mean())

        return hook

    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", compare(layer)) for layer in range(lens.info.n_layers)]
    lens.stream(tokens, hooks)
    return shares
