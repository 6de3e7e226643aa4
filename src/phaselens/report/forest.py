"""What conditions do, as pictures: a forest of effects with their intervals, and curves by layer for sweeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from phaselens.plugin import BASELINE, Display
from phaselens.report.conditions import (
    Key,
    Record,
    aligned,
    control_of,
    is_share,
    labels,
    occurrences,
    records,
    text,
    without,
)
from phaselens.report.drawing import (
    COLOURS,
    DASHES,
    INK,
    MARKERS,
    bare,
    finite,
    lettering,
    new_figure,
    signed_scale,
    whole_numbers,
)
from phaselens.runs import MetricResult, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: A condition in so many layers of one model is a sweep.
SWEPT = 3
_NATS = ("delta_nats", "delta_low", "delta_high")
_NAME = 60


@dataclass(frozen=True)
class _Effect:
    """Which columns are drawn. `factor` makes shares percent; `zero`: whether 0 means that nothing happens."""

    value: str
    low: str | None
    high: str | None
    null: str | None
    factor: float
    title: str
    zero: bool

    def point(self, record: Record) -> tuple[float, float, float]:
        """Value, and the ends of its interval."""
        names = (self.value, self.low, self.high)
        value, low, high = (self.factor * finite(record[name]) if name else float("nan") for name in names)
        return value, low, high


def _effect(result: MetricResult, display: Display) -> _Effect:
    """The difference in nats where the table has it, else what the display shows."""
    columns = {column.name: column for column in result.tables[display.table].spec.columns}
    if set(_NATS) <= set(columns):
        return _Effect(*_NATS, None, 1.0, "Δ nats per token", zero=True)
    share = is_share(columns[display.value], display)
    title = f"{display.title} (%)" if share else display.title
    ends = display.low, display.high
    return _Effect(display.value, *ends, display.null, 100.0 if share else 1.0, title, zero=False)


def condition_figures(run: Run, result: MetricResult, display: Display) -> Iterator[tuple[str, Figure]]:
    """(ending of the name, figure): the forest, and one of curves where conditions are swept over layers."""
    effect = _effect(result, display)
    models = labels(run)
    found = {model: records(result, display.table, model) for model in models}
    swept = _swept(found.values())
    if effect.zero:
        found = {
            model: [record for record in mine if record["condition"] != BASELINE.name]
            for model, mine in found.items()
        }
    single = {
        model: [record for record in mine if record["condition"] not in swept]
        for model, mine in found.items()
    }
    controls = control_of(result)
    title = lettering(result.metric.title or result.metric.name)
    if any(single.values()):
        yield "", _forest(single, effect, controls, title)
    if swept:
        yield "-by-layer", _curves(found, swept, effect, controls, title)


def _swept(models: Any) -> list[str]:
    """Names of conditions that some model has in many layers, in their order."""
    names: dict[str, None] = {}
    for mine in models:
        layers: dict[str, set[Any]] = {}
        for record in mine:
            if record["layer"] is not None:
                layers.setdefault(text(record, "condition"), set()).add(record["layer"])
        names |= dict.fromkeys(name for name, there in layers.items() if len(there) >= SWEPT)
    return list(names)


def _forest(
    found: Mapping[str, Sequence[Record]], effect: _Effect, controls: Mapping[str, str], title: str
) -> Figure:
    """Conditions down, the effect across; a model a colour and marker; controls hollow, beneath their condition."""
    keys = _beneath(
        aligned([[text(record, "condition") for record in mine] for mine in found.values()]), controls
    )
    step = 0.14 + 0.11 * len(found)
    longest = max(len(_shown(key[0], controls)) for key in keys)
    figure, panels = new_figure(4.6 + 0.075 * longest, 1.3 + step * len(keys))
    axes = panels[0, 0]
    rows = {key: place for place, key in enumerate(keys)}
    seen: list[float] = []
    offsets = _offsets(len(found))
    for (model, mine), offset, colour, marker in zip(
        found.items(), offsets, cycle(COLOURS), cycle(MARKERS), strict=False
    ):
        axes.plot([], [], color=colour, marker=marker, linestyle="none", label=lettering(model, 28))
        for key, record in zip(occurrences(text(each, "condition") for each in mine), mine, strict=True):
            seen += _point(
                axes, record, effect, rows[key] + offset, colour, marker, hollow=key[0] in controls
            )
    if effect.zero:
        axes.axvline(0, color=INK, linewidth=0.9)
    if any(name in controls for name, _ in keys):
        axes.plot([], [], color=INK, marker="o", markerfacecolor="white", linestyle="none", label="control")
    if effect.null:
        axes.plot([], [], color=INK, marker="|", markersize=9, linestyle="none", label="null")
    axes.set_yticks(range(len(keys)), [_shown(name, controls) for name, _ in keys])
    axes.set_ylim(len(keys) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    for place, (name, _) in enumerate(keys):
        if place and name not in controls:
            axes.axhline(place - 0.5, color="#cccccc", linewidth=0.6)
    for tick, (name, _) in zip(axes.get_yticklabels(), keys, strict=True):
        tick.set_color("#666666" if name in controls else INK)
    scale = signed_scale(axes, "x", seen) if effect.zero else ""
    axes.set_xlabel(effect.title, fontsize=9)
    axes.tick_params(axis="x", labelsize=8.5)
    bare(axes, "x")
    axes.spines["left"].set_visible(False)
    _frame(figure, axes, title, ["bars: 95 % intervals" if effect.low else "", scale])
    return figure


def _point(
    axes: Axes, record: Record, effect: _Effect, at: float, colour: str, marker: str, *, hollow: bool
) -> list[float]:
    """One condition of one model: interval, value, the null's value, and the layer at the right edge."""
    value, low, high = effect.point(record)
    axes.plot([low, high], [at, at], color=colour, linewidth=1.4, alpha=0.6 if hollow else 1.0)
    axes.plot(
        value, at, color=colour, marker=marker, markersize=5, markerfacecolor="white" if hollow else colour
    )
    if effect.null:
        axes.plot(effect.factor * finite(record[effect.null]), at, color=colour, marker="|", markersize=9)
    if isinstance(record["layer"], int):
        axes.annotate(
            f"L{record['layer']}",
            (1.005, at),
            xycoords=("axes fraction", "data"),
            color=colour,
            fontsize=7,
            va="center",
        )
    return [value, low, high]


def _beneath(keys: Sequence[Key], controls: Mapping[str, str]) -> list[Key]:
    """Every control moved to below what it controls."""
    ordered: list[Key] = []
    for key in keys:
        if (controls.get(key[0]), key[1]) in keys:
            continue
        ordered.append(key)
        ordered += [other for other in keys if (controls.get(other[0]), other[1]) == key]
    return ordered


def _shown(name: str, controls: Mapping[str, str]) -> str:
    of = controls.get(name)
    return lettering(name, _NAME) if of is None else "└ " + lettering(without(name, of), _NAME)


def _offsets(n: int) -> list[float]:
    """Where in a row each model stands."""
    room = 0.44
    return [0.0] if n == 1 else [room * (place / (n - 1) - 0.5) for place in range(n)]


def _curves(
    found: Mapping[str, Sequence[Record]],
    swept: Sequence[str],
    effect: _Effect,
    controls: Mapping[str, str],
    title: str,
) -> Figure:
    """A panel for each condition that is swept: the effect by layer, a line a model, its control's dashed."""
    panels = [name for name in swept if controls.get(name) not in swept]
    columns = min(2, len(panels))
    n_rows = -(-len(panels) // columns)
    figure, axes = new_figure(
        6.4 if columns == 1 else 9.6, 0.9 + 3.1 * n_rows, rows=n_rows, columns=columns, sharey=True
    )
    seen: list[float] = []
    for panel, name in zip(axes.flat, panels, strict=False):
        for curve in [name, *(other for other in swept if controls.get(other) == name)]:
            for (model, mine), colour, marker in zip(
                found.items(), cycle(COLOURS), cycle(MARKERS), strict=False
            ):
                here = [record for record in mine if record["condition"] == curve]
                seen += _curve(panel, here, effect, colour, marker, model if curve == name else None)
        if effect.zero:
            panel.axhline(0, color=INK, linewidth=0.9)
        panel.set_title(lettering(name, _NAME), loc="left", fontsize=9, color=INK)
        panel.set_xlabel("layer")
        bare(panel)
        whole_numbers(panel.xaxis)
    for panel in axes.flat[len(panels) :]:
        panel.set_visible(False)
    if any(controls.get(name) in swept for name in swept):
        axes[0, 0].plot([], [], color=INK, linestyle=DASHES, linewidth=1.1, label="control")
    scale = ""
    for panel in axes.flat[: len(panels)] if effect.zero else []:
        scale = signed_scale(panel, "y", seen)
    for row in axes:
        row[0].set_ylabel(effect.title)
    _frame(figure, axes[0, 0], title, ["bands: 95 % intervals" if effect.low else "", scale])
    return figure


def _curve(
    panel: Axes, mine: Sequence[Record], effect: _Effect, colour: str, marker: str, label: str | None
) -> list[float]:
    """One model's line and band; a control's (`label` None) is dashed."""
    layers = [finite(record["layer"]) for record in mine]
    points = [effect.point(record) for record in mine]
    value, low, high = ([point[part] for point in points] for part in range(3))
    style: dict[str, Any] = {"linestyle": DASHES, "linewidth": 1.1, "alpha": 0.8}
    if label is not None:
        style = {"marker": marker, "markersize": 4, "linewidth": 1.6, "label": lettering(label, 28)}
    panel.plot(layers, value, color=colour, **style)
    panel.fill_between(
        layers, low, high, color=colour, alpha=0.18 if label is not None else 0.08, linewidth=0
    )
    return [*value, *low, *high]


def _frame(figure: Figure, axes: Axes, title: str, notes: Sequence[str]) -> None:
    """The title above, and below what colours, markers and scales mean: nothing that could hide a point."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower left", ncols=4, frameon=False, fontsize=8, alignment="left",
        title="; ".join(note for note in notes if note), title_fontsize=8,
    )  # fmt: skip
