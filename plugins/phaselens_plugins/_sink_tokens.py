"""The tokens of a text that are sinks: what they carry and receive, and the layers in which they do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

#: Characters of which a delimiter consists.
_DELIMITERS = frozenset(" \t\n\r.,;:!?…。、，；：！？")
#: How tokenizers spell white space.
_WHITE_SPACE = (("Ġ", " "), ("▁", " "), ("Ċ", "\n"), ("ĉ", "\t"), ("<0x0A>", "\n"))


class SinkToken(NamedTuple):
    """A row of the table `tokens`."""

    text: str
    position: int
    token: str
    token_id: int
    kind: str
    first_layer: int
    last_layer: int
    n_layers: int
    ratio: float | None
    ratio_layer: int | None
    mass: float | None
    mass_layer: int | None
    secondary_first: int | None
    secondary_last: int | None
    n_secondary: int
    is_bos: int
    is_delimiter: int


@dataclass
class TextTokens:
    """One text's tokens: ids, the largest ratio and mass so far with their layers, and the layers of each listing."""

    ids: np.ndarray
    ratio: np.ndarray
    mass: np.ndarray
    ratio_layer: np.ndarray
    mass_layer: np.ndarray
    #: Positions by layer.
    carrying: dict[int, list[int]] = field(default_factory=dict)
    receiving: dict[int, list[int]] = field(default_factory=dict)
    secondary: dict[int, list[int]] = field(default_factory=dict)

    @classmethod
    def empty(cls, ids: np.ndarray) -> TextTokens:
        """Return the tokens with these ids, before any layer."""
        import numpy as np

        missing = np.full(len(ids), np.nan)
        unknown = np.full(len(ids), -1)
        return cls(ids, missing, missing.copy(), unknown, unknown.copy())

    def raise_to(self, name: str, values: np.ndarray, layer: int) -> None:
        """Replace the values of `name` (ratio or mass) that are smaller than those of `layer`, or missing."""
        import numpy as np

        current, layers = getattr(self, name), getattr(self, f"{name}_layer")
        is_larger = ~np.isnan(values) & ~(values <= current)
        current[is_larger], layers[is_larger] = values[is_larger], layer

    def positions(self) -> list[int]:
        """Return the listed positions."""
        rows = (positions for by_layer in (self.carrying, self.receiving) for positions in by_layer.values())
        return sorted({position for positions in rows for position in positions})

    def rows(
        self, text_id: str, spellings: Mapping[int, str], bos_token_id: int | None
    ) -> Iterator[SinkToken]:
        """Yield a row for each listed token."""
        for position in self.positions():
            carrying, receiving = layers_of(self.carrying, position), layers_of(self.receiving, position)
            layers, secondary = sorted({*carrying, *receiving}), layers_of(self.secondary, position)
            token_id = int(self.ids[position])
            ratio_layer, mass_layer = int(self.ratio_layer[position]), int(self.mass_layer[position])
            yield SinkToken(
                text_id,
                position,
                spellings[token_id],
                token_id,
                "both" if carrying and receiving else "carries" if carrying else "receives",
                layers[0],
                layers[-1],
                len(layers),
                None if ratio_layer < 0 else float(self.ratio[position]),
                None if ratio_layer < 0 else ratio_layer,
                None if mass_layer < 0 else float(self.mass[position]),
                None if mass_layer < 0 else mass_layer,
                secondary[0] if secondary else None,
                secondary[-1] if secondary else None,
                len(secondary),
                int(token_id == bos_token_id),
                int(is_delimiter(spellings[token_id])),
            )


def layers_of(by_layer: Mapping[int, list[int]], position: int) -> list[int]:
    """Return the layers whose positions include `position`."""
    return sorted(layer for layer, positions in by_layer.items() if position in positions)


def is_delimiter(spelling: str) -> bool:
    r"""Return whether a token consists of white space and marks that end a clause, in a tokenizer's spelling.

    >>> [is_delimiter(spelling) for spelling in (".", "Ċ", "▁,", "Ġa", "<s>", "")]
    [True, True, True, False, False, False]
    """
    for mark, character in _WHITE_SPACE:
        spelling = spelling.replace(mark, character)
    return bool(spelling) and set(spelling) <= _DELIMITERS
