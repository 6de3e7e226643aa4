"""Recipes that choose cells of queries and keys from their norms, and what they chose in every layer and fold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from phaselens_plugins._cells import Folds, Moments, Place

if TYPE_CHECKING:
    import numpy as np

    #: bool [fold, head, d_head] by layer and tensor; the last fold stands for texts that are in none.
    Cells = dict[Place, np.ndarray]

NEAR = 1e-3
"""A control's Σ M² is near enough to that of what it controls within this share of it."""


@dataclass(frozen=True)
class Rule:
    """What makes a cell massive: its norm over `multiple` times the mean, `over` all cells or its head's."""

    multiple: float = 5.0
    over: Literal["global", "per_head"] = "global"


@dataclass(frozen=True)
class Recipe:
    """One way to choose cells, and what is written into them: zero, or each cell's mean.

    `choose` takes M² [head, d_head], a random number in [0, 1) a cell, and the rule, and gives bool [head, d_head].
    """

    help: str
    choose: Callable[[np.ndarray, np.ndarray, Rule], np.ndarray]
    control_for: str | None = None
    mean: bool = False
    drawn: bool = False
    matched: bool = False


def massive(squares: np.ndarray, _draw: np.ndarray, rule: Rule) -> np.ndarray:
    """Cells over the rule's threshold."""
    import torch

    from phaselens.attention import massive_cells

    found: np.ndarray = massive_cells(torch.from_numpy(squares).sqrt(), rule.multiple, rule.over).numpy()
    return found


def top(squares: np.ndarray, _draw: np.ndarray, _rule: Rule) -> np.ndarray:
    """The largest cell of each head."""
    return _one_per_head(squares)


def smallest(squares: np.ndarray, _draw: np.ndarray, _rule: Rule) -> np.ndarray:
    """The smallest cell of each head."""
    return _one_per_head(-squares)


def thresholded(squares: np.ndarray, draw: np.ndarray, rule: Rule) -> np.ndarray:
    """The largest cell of each head, if it is massive among the cells of its head."""
    found: np.ndarray = top(squares, draw, rule) & massive(squares, draw, Rule(rule.multiple, "per_head"))
    return found


def as_many_others(squares: np.ndarray, draw: np.ndarray, rule: Rule) -> np.ndarray:
    """As many cells as are massive, none of which is."""
    treated = massive(squares, draw, rule)
    return _first(draw, int(treated.sum()), treated)


def as_many(squares: np.ndarray, draw: np.ndarray, rule: Rule) -> np.ndarray:
    """As many cells as are massive, which may be among them."""
    import numpy as np

    return _first(draw, int(massive(squares, draw, rule).sum()), np.zeros(squares.shape, dtype=bool))


def as_large_as_massive(squares: np.ndarray, draw: np.ndarray, rule: Rule) -> np.ndarray:
    """Others whose M² come to the same sum as those of the massive ones."""
    return matched(squares, massive(squares, draw, rule), draw)


def as_large_as_top(squares: np.ndarray, draw: np.ndarray, rule: Rule) -> np.ndarray:
    """Others whose M² come to the same sum as those of the largest cells."""
    return matched(squares, top(squares, draw, rule), draw)


def another_per_head(squares: np.ndarray, draw: np.ndarray, rule: Rule) -> np.ndarray:
    """One cell of each head, not the largest."""
    import numpy as np

    return _one_per_head(np.where(top(squares, draw, rule), -1.0, draw))


def matched(squares: np.ndarray, treated: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """Cells in random order, none of them `treated`, whose M² together come close to those of `treated`.

    The first of them up to the aim are taken; then one is added, dropped or exchanged, whatever brings the sum nearest,
    until it is near enough or nothing brings it nearer.
    """
    import numpy as np

    sizes, aim = squares.reshape(-1), float(squares[treated].sum())
    order = [cell for cell in _order(draw) if not treated.reshape(-1)[cell]]
    n_first = int((np.cumsum(sizes[order]) <= aim).sum()) if aim else 0
    taken, left = order[:n_first], order[n_first:]
    gap = aim - float(sizes[taken].sum())
    while abs(gap) > NEAR * aim:
        drop, add = _nearest(sizes[taken], sizes[left], gap)
        less = float(sizes[taken[drop]]) if drop is not None else 0.0
        more = float(sizes[left[add]]) if add is not None else 0.0
        if not abs(gap + less - more) < abs(gap):
            break
        gap += less - more
        dropped = [] if drop is None else [taken.pop(drop)]
        taken += [] if add is None else [left.pop(add)]
        left += dropped
    found = np.zeros(squares.size, dtype=bool)
    found[taken] = True
    return found.reshape(squares.shape)


def _nearest(taken: np.ndarray, left: np.ndarray, gap: float) -> tuple[int | None, int | None]:
    """Which cell to drop and which to add (None: none), so that the sum grows by as near to `gap` as can be."""
    import numpy as np

    less, more = np.append(taken, 0.0), np.append(left, 0.0)
    order = np.argsort(more, kind="stable")
    after = np.searchsorted(more[order], gap + less)
    add = np.concatenate([order[np.minimum(after, len(more) - 1)], order[np.maximum(after - 1, 0)]])
    drop = np.tile(np.arange(len(less)), 2)
    best = int(np.abs(gap + less[drop] - more[add]).argmin())
    dropped, added = int(drop[best]), int(add[best])
    return (dropped if dropped < len(taken) else None), (added if added < len(left) else None)


def _one_per_head(scores: np.ndarray) -> np.ndarray:
    """The cell with the largest score, the first among equals."""
    import numpy as np

    found = np.zeros(scores.shape, dtype=bool)
    found[np.arange(len(scores)), scores.argmax(-1)] = True
    return found


def _order(draw: np.ndarray) -> list[int]:
    import numpy as np

    order: list[int] = np.argsort(draw, axis=None, kind="stable").tolist()
    return order


def _first(draw: np.ndarray, n: int, without: np.ndarray) -> np.ndarray:
    """The first `n` cells in random order, those `without` left out."""
    import numpy as np

    found = np.zeros(draw.size, dtype=bool)
    found[[cell for cell in _order(draw) if not without.reshape(-1)[cell]][:n]] = True
    return found.reshape(draw.shape)


RECIPES = {
    "massive": Recipe("massive cells := 0", massive),
    "random-count": Recipe("as many other cells := 0", as_many_others, "massive", drawn=True),
    "random-norm": Recipe(
        "other cells of the same Σ M² := 0", as_large_as_massive, "massive", drawn=True, matched=True
    ),
    "random-any": Recipe(
        "as many cells := 0, massive ones among them where it falls so", as_many, "massive", drawn=True
    ),
    "top-1": Recipe("each head's largest cell := 0", top),
    "smallest": Recipe("each head's smallest cell := 0", smallest, "top-1"),
    "top-1-random": Recipe("another cell of each head := 0", another_per_head, "top-1", drawn=True),
    "top-1-norm": Recipe(
        "other cells of the same Σ M² as top-1 := 0", as_large_as_top, "top-1", drawn=True, matched=True
    ),
    "top-1-mean": Recipe("each head's largest cell := its mean", top, mean=True),
    "smallest-mean": Recipe("each head's smallest cell := its mean", smallest, "top-1-mean", mean=True),
    "study-top-1": Recipe(
        "each head's largest cell := its mean, where massive in its head", thresholded, mean=True
    ),
}


@dataclass
class Plan:
    """Which cells each recipe takes in each layer, tensor and fold. The same texts give the same plan in any order."""

    moments: Moments
    folds: Folds
    rule: Rule
    n_seeds: int
    seed: int
    _squares: dict[Place, list[np.ndarray]] = field(default_factory=dict)
    _cells: dict[tuple[str, int | None], Cells] = field(default_factory=dict)

    def seeds(self, name: str) -> list[int | None]:
        """What its repeats are called; one, without a name, where chance has no part in it."""
        return [*range(self.n_seeds)] if RECIPES[name].drawn else [None]

    def squares(self, place: Place) -> list[np.ndarray]:
        """M² [head, d_head] of the texts that choose, by fold."""
        if place not in self._squares:
            self._squares[place] = [self.moments.squared(texts, place) for texts in self.folds.others]
        return self._squares[place]

    def cells(self, name: str, seed: int | None) -> Cells:
        """What a recipe takes, bool [fold, head, d_head] by layer and tensor."""
        import numpy as np

        if (name, seed) not in self._cells:
            chosen: Cells = {}
            for place in self.moments.places:
                squares = self.squares(place)
                # One draw for all folds and recipes of a seed: they differ where their norms do.
                key = (self.seed, seed or 0, place[0], "qk".index(place[1]))
                draw = np.random.default_rng(key).random(squares[0].shape)
                chosen[place] = np.stack([RECIPES[name].choose(each, draw, self.rule) for each in squares])
            self._cells[name, seed] = chosen
        return self._cells[name, seed]

    def means(self, place: Place) -> np.ndarray:
        """Mean of each cell over all tokens of the texts that choose, [fold, head, d_head]."""
        import numpy as np

        return np.stack([self.moments.mean(texts, place) for texts in self.folds.others])

    def held(self, cells: Cells, place: Place, fold: int) -> tuple[float, float]:
        """The cells' share of Σ M²: in the texts of a fold, and in those they were chosen on."""
        chosen = cells[place][fold]
        own = self.moments.squared(self.folds.members(fold), place)
        return _share(own, chosen), _share(self.squares(place)[fold], chosen)

    def alive(self, cells: Cells) -> list[Place]:
        """Layers and tensors where a cell was taken that is not zero in all texts it is overwritten in."""
        folds = range(self.folds.n)
        return [place for place in cells if any(self.held(cells, place, fold)[0] > 0 for fold in folds)]

    def lacking(self, name: str) -> str | None:
        """Why a recipe overwrites nothing, or not what it says; None if it does."""
        for seed in self.seeds(name):
            cells = self.cells(name, seed)
            treated = RECIPES[name].control_for
            if not any(each[:-1].any() for each in cells.values()):
                if treated is None:
                    return self._none_massive(RECIPES[name].choose is thresholded)
                return f"there are no cells besides those of {treated} that hold as little"
            if not self.alive(cells):
                return "all that it would overwrite is zero in every text"
            if treated is not None and not RECIPES[name].matched:
                wanted = self.cells(treated, None)
                short = [
                    place for place in cells if (cells[place].sum((1, 2)) < wanted[place].sum((1, 2))).any()
                ]
                if short:
                    return (
                        f"layer {short[0][0]} has too few cells of {short[0][1]} besides those of {treated}"
                    )
        return None

    def _none_massive(self, per_head: bool) -> str:
        """How far the largest cell is from the threshold."""
        import numpy as np

        per_head = per_head or self.rule.over == "per_head"
        largest, (layer, tensor) = 0.0, self.moments.places[0]
        for place in self.moments.places:
            for squares in self.squares(place)[:-1]:
                norms = np.sqrt(squares)
                means = norms.mean(-1, keepdims=True) if per_head else norms.mean()
                ratio = float(np.divide(norms, means, out=np.zeros_like(norms), where=means > 0).max())
                largest, (layer, tensor) = max((largest, (layer, tensor)), (ratio, place))
        mean = "its head's mean" if per_head else "the mean"
        return (
            f"no cell is massive, over {self.rule.multiple:g} × {mean}: the largest is {largest:.2f} ×, in {tensor} of "
            f"layer {layer}; `multiple` sets the threshold"
        )

    def match(self, name: str) -> tuple[float, float] | None:
        """A control's Σ M² over that of what it controls, the least and the most by layer, tensor, fold and seed."""
        import numpy as np

        treated = self.cells(RECIPES[name].control_for or name, None)
        found = []
        for seed in self.seeds(name):
            cells = self.cells(name, seed)
            for place in cells:
                for squares, mine, theirs in zip(
                    self.squares(place), cells[place], treated[place], strict=True
                ):
                    if squares[theirs].sum():
                        found.append(float(squares[mine].sum() / squares[theirs].sum()))
        return (float(np.min(found)), float(np.max(found))) if found else None


def _share(squares: np.ndarray, chosen: np.ndarray) -> float:
    whole = float(squares.sum())
    return float(squares[chosen].sum()) / whole if whole else float("nan")
