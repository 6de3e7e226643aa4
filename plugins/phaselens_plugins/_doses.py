"""Shifts of a key's scores: how they are written, the edits that make them, and the tables and the figure of doses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.plugin import Batch, Column, Site, Table, TableSpec, interval_help
from phaselens_plugins._causal import content_keys, draw_other_position, paired_interval_columns
from phaselens_plugins._drawing import DASHES, INK, Record, bare, escaped, numbers, records_by_model, styles
from phaselens_plugins._number_lists import parse_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

ALL_LAYERS, EACH_LAYER, EACH_HEAD, GIVEN = "all layers", "each layer", "each head", "given layer"
SHARE = "share of attention"
_NATS = "nats/token"
_DOSE_COLUMNS = (
    Column("condition", str, None, "the condition's name, in `conditions`"),
    Column(
        "layers", str, None, f"the layers that are edited: {ALL_LAYERS}, {EACH_LAYER}, {EACH_HEAD} or {GIVEN}"
    ),
    Column("layer", int, "index", "the edited layer, 0-based; missing where all are"),
    Column("head", int, "index", "the edited head, 0-based; missing where all are"),
    Column("b", str, "nats", "what is added to the scores; -inf removes the key, 0 is the unedited model"),
    Column("delta_nats", float, _NATS, "what the shift adds to the loss, mean over all predicted tokens"),
    *paired_interval_columns(_NATS, "delta"),
    Column("ratio", float, "ratio", "perplexity divided by the unedited model's"),
    Column(
        "kl",
        float,
        _NATS,
        "divergence of the predictions, KL(unedited ‖ edited), mean over all predicted tokens",
    ),
    Column("kl_low", float, _NATS, interval_help()),
    Column("kl_high", float, _NATS, interval_help()),
    Column("control_nats", float, _NATS, "delta_nats of the same shift of another key of each text"),
    *paired_interval_columns(_NATS, "control"),
    Column("control_kl", float, _NATS, "kl of the same shift of another key of each text"),
    Column("control_kl_low", float, _NATS, interval_help()),
    Column("control_kl_high", float, _NATS, interval_help()),
    Column(
        "mass",
        float,
        SHARE,
        "attention on the key before the edit, mean over texts, edited heads and the queries after it that see it",
    ),
    Column("n_texts", int, "texts", "texts with a predicted token"),
)
DOSES = TableSpec(
    "doses", _DOSE_COLUMNS, "one row per shift: of all layers, of single layers, of single heads"
)
QUESTIONS = TableSpec(
    "questions",
    (
        Column("question", str, None, "what the condition asks"),
        Column("metric", str, None, "the metric that the condition is from"),
        Column("condition", str, None, "the condition's name, in `conditions`"),
        Column("layer", int, "index", "the edited layer, 0-based; missing where all are"),
        Column(
            "delta_nats", float, _NATS, "what the condition adds to the loss, mean over all predicted tokens"
        ),
        *paired_interval_columns(_NATS, "delta"),
        Column("ratio", float, "ratio", "perplexity divided by the unedited model's"),
        Column("kl", float, _NATS, "KL(unedited ‖ edited), mean over all predicted tokens"),
        Column("kl_low", float, _NATS, interval_help()),
        Column("kl_high", float, _NATS, interval_help()),
        Column("n_texts", int, "texts", "texts with a predicted token"),
    ),
    "three ways to take the sink away, side by side",
)
#: What each metric's conditions ask.
QUESTION_OF = {
    "sink-removal": "what if no later query could attend to the sink at all?",
    "bos-v": "what if the sink kept its attention and had no value?",
    "bos-mlp": "what if the norm at position 0 were never written?",
}


def parse_shifts(text: str) -> list[float]:
    """Return the shifts that a text names, separated by commas, each once.

    Raises:
        InputError: for a part that is neither a finite number nor -inf.

    >>> parse_shifts("-inf, −4, 0, 2")
    [-inf, -4.0, 0.0, 2.0]
    """
    return parse_numbers(
        text.split(","),
        lambda shift: shift < math.inf,
        "shifts: {entry!r} is neither a finite number nor -inf; write numbers separated by commas, such as -inf,-4,2",
        read=lambda entry: float(entry.replace("−", "-").replace("∞", "inf")),
    )


def shift_text(shift: float) -> str:
    """Return a shift as text.

    >>> shift_text(-4.0), shift_text(float("-inf")), shift_text(-0.0)
    ('-4', '-inf', '0')
    """
    return f"{shift + 0.0:g}"


@dataclass(frozen=True)
class ShiftScores:
    """Edit function that adds a number to the scores of the named keys."""

    shift: float

    def __call__(self, scores: Tensor, site: Site) -> Tensor:
        """Return the scores plus the shift."""
        return scores + self.shift


@dataclass(frozen=True)
class OtherKeys:
    """Keys of the control: one other position per text, drawn at random from its content."""

    position: int
    seed: int

    def __call__(self, batch: Batch) -> list[int | None]:
        """Return one position for each text; None for a text without another position."""
        return [
            draw_other_key(length, content, self.seed, self.position)
            for length, content in zip(batch.lengths, content_keys(batch), strict=True)
        ]


def draw_other_key(length: int, content: str, seed: int, position: int) -> int | None:
    """Return a random position other than 0 and `position` that a later query sees; None in a text without one.

    The last query predicts nothing, so the key is drawn among those that an earlier one sees, if there are any.

    >>> draw_other_key(4, "a", 0, 0), draw_other_key(4, "a", 0, 1), draw_other_key(2, "a", 0, 0)
    (1, 2, None)
    """
    for last in (length - 3, length - 2):
        is_among = 1 <= position <= last
        n_keys = last - is_among
        if n_keys > 0:
            drawn = draw_other_position(n_keys + 2, content, seed)
            assert drawn is not None
            return drawn + (is_among and drawn >= position)
    return None


def draw_doses(tables: Mapping[str, Table], figure: Figure) -> None:
    """Draw the doses of all layers; if layers or heads were edited alone, the smallest dose of each, too."""
    by_model = records_by_model(tables["doses"])
    swept = {
        scope: {
            label: _of_smallest_dose([record for record in records if record["layers"] == scope])
            for label, records in by_model.items()
        }
        for scope in (EACH_LAYER, EACH_HEAD)
    }
    scopes = [scope for scope, records in swept.items() if any(records.values())]
    figure.set_size_inches((7.2, 9.6, 13.2)[len(scopes)], 4.4)
    panels = figure.subplots(1, 1 + len(scopes), squeeze=False)[0]
    figure.set_layout_engine("constrained")
    for label, style in styles(list(by_model)).items():
        of_all_layers = [record for record in by_model[label] if record["layers"] == ALL_LAYERS]
        _draw_curve(panels[0], of_all_layers, label, style)
    _label_doses(panels[0], [record for records in by_model.values() for record in records])
    for axes, scope in zip(panels[1:], scopes, strict=True):
        draw = _draw_layers if scope == EACH_LAYER else _draw_heads
        for label, style in styles(list(by_model)).items():
            draw(axes, swept[scope][label], label, style)
        axes.axhline(0.0, color=INK, linewidth=0.6)
        axes.set_ylabel("Δ nats per token")
        bare(axes)


def _of_smallest_dose(records: Sequence[Record]) -> list[Record]:
    smallest = min((_dose_of(record) for record in records), default=math.nan)
    return [record for record in records if _dose_of(record) == smallest]


def _dose_of(record: Record) -> float:
    return float(str(record["b"]))


def _places(records: Sequence[Record]) -> dict[str, float]:
    """Return the place of each dose on the axis: its number, and −∞ one step to the left of the smallest."""
    doses = {str(record["b"]): _dose_of(record) for record in records}
    finite = [dose for dose in doses.values() if math.isfinite(dose)] or [0.0]
    step = max(1.0, (max(finite) - min(finite)) / 5)
    return {text: dose if math.isfinite(dose) else min(finite) - step for text, dose in doses.items()}


def _draw_curve(axes: Axes, records: Sequence[Record], label: str, style: Mapping[str, Any]) -> None:
    places = _places(records)
    ordered = sorted(records, key=_dose_of)
    x = [places[str(record["b"])] for record in ordered]
    y, low, high = (numbers(ordered, name) for name in ("delta_nats", "delta_low", "delta_high"))
    bars = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
    axes.errorbar(x, y, yerr=bars, label=escaped(label), capsize=2, **style)
    axes.plot(x, numbers(ordered, "control_nats"), color=style["color"], linestyle=DASHES, linewidth=1.0)


def _label_doses(axes: Axes, records: Sequence[Record]) -> None:
    places = _places(records)
    axes.set_xticks(list(places.values()), ["−∞" if text == "-inf" else text for text in places])
    axes.axhline(0.0, color=INK, linewidth=0.6)
    axes.plot([], [], color=INK, linestyle=DASHES, linewidth=1.0, label="another key")
    axes.set_xlabel("shift b of the key's scores (nats)")
    axes.set_ylabel("Δ nats per token")
    bare(axes)
    axes.legend(frameon=False, fontsize=8)


def _draw_layers(axes: Axes, records: Sequence[Record], label: str, style: Mapping[str, Any]) -> None:
    """Draw the dose of each layer, that of another key dashed."""
    layers = numbers(records, "layer")
    axes.plot(layers, numbers(records, "delta_nats"), label=escaped(label), **style)
    low, high = numbers(records, "delta_low"), numbers(records, "delta_high")
    axes.fill_between(layers, low, high, color=style["color"], alpha=0.18, linewidth=0)
    axes.plot(layers, numbers(records, "control_nats"), color=style["color"], linestyle=DASHES, linewidth=1.0)
    if records:
        axes.set_xlabel(f"layer, edited alone, b = {_dose_label(records[0])}")
        axes.set_xticks(layers[:: max(1, len(layers) // 8)])


def _draw_heads(axes: Axes, records: Sequence[Record], label: str, style: Mapping[str, Any]) -> None:
    """Draw the dose of each head against its attention on the key, a mark for each head."""
    marks = {**style, "linewidth": 0, "alpha": 0.7}
    axes.plot(numbers(records, "mass"), numbers(records, "delta_nats"), label=escaped(label), **marks)
    if records:
        axes.set_xlabel(f"attention on the key; heads alone, b = {_dose_label(records[0])}")


def _dose_label(record: Record) -> str:
    return "−∞" if _dose_of(record) == -math.inf else str(record["b"])
