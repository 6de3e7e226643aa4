"""The numbers of `over-mixing` by text, setting and layer, and the rows of its tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phaselens.plugin import Metric, Table
from phaselens_plugins._causal import merge_nested
from phaselens_plugins._common import TableRow, index_of_largest, mean_intervals, none_if_nan
from phaselens_plugins._mixing_sequences import (
    AS_IS,
    FIRST,
    MIDDLE,
    NO_BOS,
    NO_ROTATION,
    SETTINGS,
    TOKENS,
    Replacement,
    Role,
)

if TYPE_CHECKING:
    import numpy as np

#: Name of a number, setting, and replaced token ("" for the unchanged text).
Key = tuple[str, str, str]


@dataclass
class MixingValues:
    """Texts by index, with their replacements, and numbers by key and by text index, layer and draw.

    `bos_texts` are the texts that begin with BOS. Values can be pickled, and merged in any order.
    """

    n_layers: int
    settings: Sequence[str]
    contents: dict[int, str] = field(default_factory=dict)
    changes: dict[int, list[Replacement]] = field(default_factory=dict)
    bos_texts: set[int] = field(default_factory=set)
    spellings: dict[int, str] = field(default_factory=dict)
    numbers: dict[Key, dict[tuple[int, int, int], float]] = field(default_factory=dict)

    def merge(self, other: MixingValues) -> None:
        """Add the texts and numbers of `other`."""
        self.contents |= other.contents
        self.changes |= other.changes
        self.bos_texts |= other.bos_texts
        self.spellings |= other.spellings
        merge_nested(self.numbers, other.numbers)

    def keep(self, role: Role, layer: int, numbers: Mapping[str, float]) -> None:
        """Keep the numbers of one sequence in one layer."""
        replaced, draw = (role.replacement.token, role.replacement.draw) if role.replacement else ("", 0)
        for name, number in numbers.items():
            by_text = self.numbers.setdefault((name, role.setting, replaced), {})
            by_text[role.text_index, layer, draw] = number

    @property
    def text_indices(self) -> list[int]:
        """The indices of the texts, in order."""
        return sorted(self.contents)

    def is_read(self, text_index: int, setting: str, token: str) -> bool:
        """Return whether the text is read in the setting with this token replaced."""
        has_token = any(change.token == token for change in self.changes[text_index])
        return has_token and (SETTINGS[setting][0] or text_index in self.bos_texts)

    def stack(self, name: str, setting: str, token: str = "") -> np.ndarray:
        """Return a number [text, layer], mean over draws; NaN where missing."""
        import numpy as np

        by_cell: dict[tuple[int, int], list[float]] = {}
        for (text_index, layer, _), number in sorted(self.numbers.get((name, setting, token), {}).items()):
            by_cell.setdefault((text_index, layer), []).append(number)
        order = {text_index: row for row, text_index in enumerate(self.text_indices)}
        stacked = np.full((len(order), self.n_layers), np.nan)
        for (text_index, layer), by_draw in by_cell.items():
            stacked[order[text_index], layer] = np.mean(by_draw)
        return stacked

    def cases(self) -> Iterator[tuple[str, str]]:
        """Yield each setting and token that was run."""
        for setting in self.settings:
            for token in TOKENS:
                if ("change", setting, token) in self.numbers:
                    yield setting, token


@dataclass(frozen=True)
class MixingRows:
    """Rows of the tables of a metric, from its values."""

    metric: Metric[Any]
    values: MixingValues

    def text_rows(self) -> Iterator[TableRow]:
        """Yield the rows of the table `texts`."""
        cases = [
            (
                setting,
                token,
                [self.values.stack(name, setting, token) for name in ("change", "reached", "own")],
            )
            for setting, token in self.values.cases()
        ]
        for row, text_index in enumerate(self.values.text_indices):
            position_of = {change.token: change.position for change in self.values.changes[text_index]}
            for setting, token, columns in cases:
                if not self.values.is_read(text_index, setting, token):
                    continue
                n_later = self.metric.per_text.lengths[row] - 1 - position_of[token]
                for layer in range(self.values.n_layers):
                    change, reached, own_change = (none_if_nan(column[row, layer]) for column in columns)
                    yield (
                        self.metric.per_text.texts[row],
                        setting,
                        token,
                        layer,
                        change,
                        0.0,
                        reached,
                        own_change,
                        n_later,
                    )

    def _means(self, name: str, setting: str, token: str = "") -> list[Any]:
        """Return mean over texts, low and high, each [layer]."""
        return mean_intervals(self.metric, self.values.stack(name, setting, token))

    def setting_rows(self) -> Iterator[TableRow]:
        """Yield the rows of the table `settings`."""
        import numpy as np

        for setting, token in self.values.cases():
            change = self.values.stack("change", setting, token)
            differences = change - self.values.stack("change", AS_IS, token)
            columns = [
                *mean_intervals(self.metric, change),
                [0.0] * self.values.n_layers,
                *(
                    [[None] * self.values.n_layers] * 3
                    if setting == AS_IS
                    else mean_intervals(self.metric, differences)
                ),
                *self._means("reached", setting, token),
                self._means("own", setting, token)[0],
                self._means("unrelated", setting)[0],
                (~np.isnan(change)).sum(0).tolist(),
            ]
            for layer in range(self.values.n_layers):
                yield setting, token, layer, *(column[layer] for column in columns)

    def distance_rows(self) -> Iterator[TableRow]:
        """Yield the rows of the table `distances`."""
        import numpy as np

        longest = max(self.metric.per_text.lengths, default=0)
        for setting, token in self.values.cases():
            for start in bin_starts(longest):
                change = self.values.stack(bin_name(start), setting, token)
                if np.isnan(change).all():
                    continue
                means, n_texts = mean_intervals(self.metric, change), (~np.isnan(change)).sum(0)
                for layer in range(self.values.n_layers):
                    interval = (bound[layer] for bound in means)
                    yield setting, token, layer, start, 2 * start - 1, *interval, 0.0, n_texts[layer]

    def collapse_rows(self) -> Iterator[TableRow]:
        """Yield the rows of the table `collapse`."""
        import numpy as np

        for setting in self.values.settings:
            collapse = self.values.stack("collapse", setting)
            columns = [
                *mean_intervals(self.metric, collapse),
                self._means("collapse_null", setting)[0],
                *self._means("collapse_rest", setting),
                self._means("collapse_rest_null", setting)[0],
                self._means("n_massive", setting)[0],
                (~np.isnan(collapse)).sum(0).tolist(),
            ]
            for layer in range(self.values.n_layers):
                yield setting, layer, *(column[layer] for column in columns)

    def layer_rows(self) -> Iterator[TableRow]:
        """Yield the rows of the table `layers`."""
        import numpy as np

        change = self.values.stack("change", AS_IS, FIRST)
        columns = [
            *mean_intervals(self.metric, change),
            [0.0] * self.values.n_layers,
            self._means("reached", AS_IS, FIRST)[0],
            *self._means("change", NO_BOS, FIRST),
            *self._means("change", NO_ROTATION, FIRST),
            self._means("change", AS_IS, MIDDLE)[0],
            self._means("change", NO_BOS, MIDDLE)[0],
            *self._means("collapse", AS_IS),
            self._means("collapse_null", AS_IS)[0],
            (~np.isnan(change)).sum(0).tolist(),
        ]
        for layer in range(self.values.n_layers):
            yield layer, *(column[layer] for column in columns)

    def replacement_rows(self) -> Iterator[TableRow]:
        """Yield the rows of the table `replacements`."""
        texts, lengths = self.metric.per_text.texts, self.metric.per_text.lengths
        spellings = self.values.spellings
        for row, text_index in enumerate(self.values.text_indices):
            for change in self.values.changes[text_index]:
                old, new = spellings[change.old_id], spellings[change.new_id]
                classes = change.frequency_class, change.new_class
                yield texts[row], change.token, change.draw, change.position, old, new, *classes, lengths[row]


def bin_starts(n: int) -> list[int]:
    """Return the first distances of the bins 1, 2–3, 4–7, … up to `n`.

    >>> bin_starts(5)
    [1, 2, 4]
    """
    return [2**exponent for exponent in range(n.bit_length())]


def bin_name(start: int) -> str:
    """Return the name under which the change in a bin of distances is kept."""
    return f"distance {start}"


def summary_row(layers: Table) -> TableRow:
    """Return the row of the table `summary`."""
    import numpy as np

    records = layers.records()
    last = records[-1]
    collapse = np.array([record["collapse"] for record in records], dtype=np.float64)
    smallest = index_of_largest(-collapse)
    return (
        last["change"], last["no_bos"], last["no_rotation"], None if smallest is None else collapse[smallest], smallest,
        last["n_texts"],
    )  # fmt: skip
