"""Curves by layer as vector graphics: the geometry of lines, bands, nulls and axes, which the template draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from phaselens.report.figure_data import FigurePoint, model_points
from phaselens.report.numbers import MISSING, shortest
from phaselens.report.strings import printable
from phaselens.report.table import DisplayTable

WIDTH, HEIGHT = 640, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 36
# Values are drawn on a logarithmic axis if the largest is more than this many times the smallest.
_MAX_LINEAR_RATIO = 50.0
_MAX_TICKS = 6
_MAX_LAYER_TICKS = 17


@dataclass(frozen=True)
class ChartLine:
    """One model's line: the outline of its interval's band, its null, its points."""

    label: str
    index: int
    path: str
    band: str
    null: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Tick:
    """A tick of an axis: its offset in the drawing, and its text."""

    offset: float
    text: str


@dataclass(frozen=True)
class LayerStrip:
    """The part of the chart above one layer, with the text that is shown when the pointer is over it."""

    layer: int
    x: float
    width: float
    tip: str


@dataclass(frozen=True)
class Chart:
    """A chart of one column by layer, one line per model."""

    title: str
    axis: str
    lines: Sequence[ChartLine]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    strips: Sequence[LayerStrip]
    has_null: bool
    has_interval: bool
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


@dataclass(frozen=True)
class _Scale:
    """Maps values to offsets, linearly or by their logarithm."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (
            (math.log10(self.low), math.log10(self.high), math.log10(value))
            if self.is_log
            else (self.low, self.high, value)
        )
        return round(self.start + (value - low) / (high - low) * (self.stop - self.start), 1)


def layer_chart(table: DisplayTable) -> Chart | None:
    """Return the chart of a table by layer; None without any value."""
    column = table.columns[0]
    points = [model_points(table, index, column) for index in range(len(table.models))]
    numbers = [
        number
        for model in points
        for point in model
        for number in (point.value, point.low, point.high, point.null)
        if math.isfinite(number)
    ]
    layers = [point.layer for model in points for point in model]
    if not numbers or not layers:
        return None
    is_percent = column.number_format.style == "percent"
    x = _Scale(min(layers), max(layers) + (max(layers) == min(layers)), _LEFT + 10, WIDTH - _RIGHT - 10)
    y = _value_scale(numbers, is_percent=is_percent)
    unit = "%" if is_percent else column.unit or ""
    return Chart(
        column.title,
        f"{column.title} ({unit})" if unit and unit not in column.title else column.title,
        [_line(label, index, points[index], x, y) for index, label in enumerate(table.models)],
        [Tick(x(layer), str(layer)) for layer in _layer_ticks(layers)],
        [Tick(y(value), f"{shortest(value)}") for value in _value_ticks(y)],
        _strips(table, x),
        column.null is not None,
        column.low is not None,
    )


def _value_scale(numbers: Sequence[float], *, is_percent: bool) -> _Scale:
    low, high = min(numbers), max(numbers)
    if is_percent and low >= 0 and high <= 100:
        return _Scale(0.0, 100.0, HEIGHT - _BOTTOM, _TOP)
    if low > 0 and high / low > _MAX_LINEAR_RATIO:
        return _Scale(low, high, HEIGHT - _BOTTOM - 4, _TOP + 4, is_log=True)
    if low > 0 and low < high / 2:
        low = 0.0
    margin = 0.06 * (high - low) or abs(high) or 1.0
    return _Scale(low - (margin if low else 0.0), high + margin, HEIGHT - _BOTTOM, _TOP)


def _value_ticks(scale: _Scale) -> list[float]:
    """Return round values on the axis."""
    if scale.is_log:
        exponents = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
        step = max(1, math.ceil(len(exponents) / _MAX_TICKS))
        ticks = [10.0**exponent for exponent in exponents if exponent % step == 0]
        ticks = [tick for tick in ticks if scale.low <= tick <= scale.high]
        return ticks or [scale.low, scale.high]
    width = _round_step((scale.high - scale.low) / _MAX_TICKS)
    first = math.ceil(scale.low / width)
    return [round(n * width, 12) for n in range(first, math.floor(scale.high / width) + 1)]


def _round_step(size: float) -> float:
    """Return 1, 2 or 5 times a power of ten, at least `size`."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(float(factor * power) for factor in (1, 2, 5, 10) if factor * power >= size * (1 - 1e-9))


def _layer_ticks(layers: Sequence[float]) -> list[int]:
    first, last = int(min(layers)), int(max(layers))
    step = max(1, math.ceil((last - first + 1) / _MAX_LAYER_TICKS))
    return list(range(first, last + 1, step))


def _line(label: str, index: int, points: Sequence[FigurePoint], x: _Scale, y: _Scale) -> ChartLine:
    with_interval = [point for point in points if math.isfinite(point.low) and math.isfinite(point.high)]
    upper = [f"{x(point.layer)},{y(point.high)}" for point in with_interval]
    lower = [f"{x(point.layer)},{y(point.low)}" for point in reversed(with_interval)]
    return ChartLine(
        printable(label),
        index,
        _path([(point.layer, point.value) for point in points], x, y),
        " ".join(upper + lower) if len(with_interval) > 1 else "",
        _path([(point.layer, point.null) for point in points], x, y),
        [(x(point.layer), y(point.value)) for point in points if math.isfinite(point.value)],
    )


def _path(points: Sequence[tuple[float, float]], x: _Scale, y: _Scale) -> str:
    """Return the path through the points, with a gap where a value is missing."""
    steps = []
    is_drawing = False
    for layer, value in points:
        if math.isfinite(value):
            steps.append(f"{'L' if is_drawing else 'M'}{x(layer)} {y(value)}")
        is_drawing = math.isfinite(value)
    return "".join(steps)


def _strips(table: DisplayTable, x: _Scale) -> list[LayerStrip]:
    """Return the strips above the layers, each with every model's value, interval and null."""
    column = table.columns[0]
    layers = [row.layer for row in table.rows if row.layer is not None]
    width = (x.stop - x.start) / max(1, len(layers) - 1)
    strips = []
    for row in table.rows:
        if row.layer is None:
            continue
        parts = [f"layer {row.layer}"]
        for label, cells in zip(table.models, row.cells, strict=True):
            texts = [printed.text for printed in column.printed(cells[0] if cells else None)]
            line = f"{printable(label)}: {texts[0]}"
            if column.low and texts[1] != MISSING:
                line += f" ({texts[1]})"
            if column.null:
                line += f", null {texts[-1]}"
            parts.append(line)
        strips.append(
            LayerStrip(row.layer, round(x(row.layer) - width / 2, 1), round(width, 1), "\n".join(parts))
        )
    return strips
