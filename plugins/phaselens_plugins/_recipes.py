"""Recipes that select cells of queries and keys by their norms, and their selections in every layer and fold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from phaselens_plugins._cells import CellMoments, Folds, LayerPoint

if TYPE_CHECKING:
    import numpy as np

    #: bool [fold, head, d_head] by layer and tensor; the last entry is for texts that are in no fold.
    Cells = dict[LayerPoint, np.ndarray]

_LEAST_PROGRESS = 1e-6
MATCH_TOLERANCE = 1e-3
"""Largest relative difference between Σ M² of a matched control and of the cells that it controls for."""


@dataclass(frozen=True)
class SelectionRule:
    """Definition of a massive cell: its norm exceeds `multiple` times the mean, `over` all cells or its head's."""

    multiple: float = 5.0
    over: Literal["global", "per_head"] = "global"


@dataclass(frozen=True)
class CellRecipe:
    """A rule to select cells, and what is written into them: zero, or each cell's mean.

    Attributes:
        help: description of the edit.
        select: maps M² [head, d_head], uniform random numbers in [0, 1) of the same shape, and the rule to bool [head,
            d_head].
        control_for: the recipe that this one is a control for.
        writes_mean: whether each cell's mean is written instead of zero.
        is_random: whether the selection depends on the seed.
        is_matched: whether its Σ M² is matched to that of `control_for`.
    """

    help: str
    select: Callable[[np.ndarray, np.ndarray, SelectionRule], np.ndarray]
    control_for: str | None = None
    writes_mean: bool = False
    is_random: bool = False
    is_matched: bool = False


def massive(squares: np.ndarray, _draw: np.ndarray, rule: SelectionRule) -> np.ndarray:
    """Select the cells over the rule's threshold."""
    import torch

    from phaselens.attention import massive_cells

    cells: np.ndarray = massive_cells(torch.from_numpy(squares).sqrt(), rule.multiple, rule.over).numpy()
    return cells


def largest(squares: np.ndarray, _draw: np.ndarray, _rule: SelectionRule) -> np.ndarray:
    """Select the largest cell of each head."""
    return _argmax_per_head(squares)


def smallest(squares: np.ndarray, _draw: np.ndarray, _rule: SelectionRule) -> np.ndarray:
    """Select the smallest cell of each head."""
    return _argmax_per_head(-squares)


def largest_if_massive(squares: np.ndarray, draw: np.ndarray, rule: SelectionRule) -> np.ndarray:
    """Select the largest cell of each head, if it is massive among the cells of its head."""
    per_head_rule = SelectionRule(rule.multiple, "per_head")
    cells: np.ndarray = largest(squares, draw, rule) & massive(squares, draw, per_head_rule)
    return cells


def random_not_massive(squares: np.ndarray, draw: np.ndarray, rule: SelectionRule) -> np.ndarray:
    """Select random cells that are not massive, as many as are massive."""
    treated = massive(squares, draw, rule)
    return _random_cells(draw, int(treated.sum()), treated)


def random_any(squares: np.ndarray, draw: np.ndarray, rule: SelectionRule) -> np.ndarray:
    """Select random cells, as many as are massive; they may include massive ones."""
    import numpy as np

    n_massive = int(massive(squares, draw, rule).sum())
    return _random_cells(draw, n_massive, np.zeros(squares.shape, dtype=bool))


def matched_to_massive(squares: np.ndarray, draw: np.ndarray, rule: SelectionRule) -> np.ndarray:
    """Select other cells whose Σ M² equals that of the massive cells."""
    return matched(squares, massive(squares, draw, rule), draw)


def matched_to_largest(squares: np.ndarray, draw: np.ndarray, rule: SelectionRule) -> np.ndarray:
    """Select other cells whose Σ M² equals that of each head's largest cell."""
    return matched(squares, largest(squares, draw, rule), draw)


def random_not_largest(squares: np.ndarray, draw: np.ndarray, rule: SelectionRule) -> np.ndarray:
    """Select one random cell of each head, not the largest."""
    import numpy as np

    return _argmax_per_head(np.where(largest(squares, draw, rule), -1.0, draw))


def matched(squares: np.ndarray, treated: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """Select random cells, none of them `treated`, whose Σ M² comes close to that of `treated`.

    Cells are taken in random order up to the target; then one cell is added, dropped or exchanged at a time, whichever
    brings the sum nearest to the target, until it is within `MATCH_TOLERANCE` or no step brings it nearer. Heads that
    are copies of each other have cells that differ by rounding; exchanging those is no progress.
    """
    import numpy as np

    sizes, target = squares.reshape(-1), float(squares[treated].sum())
    order = [cell for cell in _random_order(draw) if not treated.reshape(-1)[cell]]
    n_below_target = int((np.cumsum(sizes[order]) <= target).sum()) if target else 0
    selected, unselected = order[:n_below_target], order[n_below_target:]
    gap = target - float(sizes[selected].sum())
    while abs(gap) > MATCH_TOLERANCE * target:
        drop, add = _best_exchange(sizes[selected], sizes[unselected], gap)
        decrease = float(sizes[selected[drop]]) if drop is not None else 0.0
        increase = float(sizes[unselected[add]]) if add is not None else 0.0
        if not abs(gap + decrease - increase) < abs(gap) * (1 - _LEAST_PROGRESS):
            break
        gap += decrease - increase
        dropped = [] if drop is None else [selected.pop(drop)]
        selected += [] if add is None else [unselected.pop(add)]
        unselected += dropped
    cells = np.zeros(squares.size, dtype=bool)
    cells[selected] = True
    return cells.reshape(squares.shape)


def _best_exchange(selected: np.ndarray, unselected: np.ndarray, gap: float) -> tuple[int | None, int | None]:
    """Return the indices of the cell to drop and the cell to add (None: none) so that the sum grows by nearly `gap`."""
    import numpy as np

    decreases, increases = np.append(selected, 0.0), np.append(unselected, 0.0)
    order = np.argsort(increases, kind="stable")
    ranks = np.searchsorted(increases[order], gap + decreases)
    add = np.concatenate([order[np.minimum(ranks, len(increases) - 1)], order[np.maximum(ranks - 1, 0)]])
    drop = np.tile(np.arange(len(decreases)), 2)
    nearest = int(np.abs(gap + decreases[drop] - increases[add]).argmin())
    dropped, added = int(drop[nearest]), int(add[nearest])
    return (dropped if dropped < len(selected) else None), (added if added < len(unselected) else None)


def _argmax_per_head(scores: np.ndarray) -> np.ndarray:
    """Select the cell with the largest score of each head; of equal scores, the first."""
    import numpy as np

    cells = np.zeros(scores.shape, dtype=bool)
    cells[np.arange(len(scores)), scores.argmax(-1)] = True
    return cells


def _random_order(draw: np.ndarray) -> list[int]:
    import numpy as np

    order: list[int] = np.argsort(draw, axis=None, kind="stable").tolist()
    return order


def _random_cells(draw: np.ndarray, n: int, excluded: np.ndarray) -> np.ndarray:
    """Select `n` random cells that are not `excluded`."""
    import numpy as np

    cells = np.zeros(draw.size, dtype=bool)
    cells[[cell for cell in _random_order(draw) if not excluded.reshape(-1)[cell]][:n]] = True
    return cells.reshape(draw.shape)


RECIPES = {
    "massive": CellRecipe("massive cells := 0", massive),
    "random-count": CellRecipe(
        "other cells, as many as are massive, := 0", random_not_massive, "massive", is_random=True
    ),
    "random-norm": CellRecipe(
        "other cells of the same Σ M² := 0", matched_to_massive, "massive", is_random=True, is_matched=True
    ),
    "random-any": CellRecipe(
        "random cells, as many as are massive and possibly massive, := 0",
        random_any,
        "massive",
        is_random=True,
    ),
    "top-1": CellRecipe("each head's largest cell := 0", largest),
    "smallest": CellRecipe("each head's smallest cell := 0", smallest, "top-1"),
    "top-1-random": CellRecipe("another cell of each head := 0", random_not_largest, "top-1", is_random=True),
    "top-1-norm": CellRecipe(
        "other cells of the same Σ M² as top-1 := 0",
        matched_to_largest,
        "top-1",
        is_random=True,
        is_matched=True,
    ),
    "top-1-mean": CellRecipe("each head's largest cell := its mean", largest, writes_mean=True),
    "smallest-mean": CellRecipe(
        "each head's smallest cell := its mean", smallest, "top-1-mean", writes_mean=True
    ),
    "study-top-1": CellRecipe(
        "each head's largest cell := its mean, where massive in its head",
        largest_if_massive,
        writes_mean=True,
    ),
}


@dataclass
class CellPlan:
    """Plan of the cells that each recipe selects in each layer, tensor and fold, whatever the order of the texts."""

    moments: CellMoments
    folds: Folds
    rule: SelectionRule
    n_seeds: int
    seed: int
    _squares: dict[LayerPoint, list[np.ndarray]] = field(default_factory=dict)
    _cells: dict[tuple[str, int | None], Cells] = field(default_factory=dict)

    def seeds(self, name: str) -> list[int | None]:
        """Return the seeds of a recipe's repeats; a single None for one that is not random."""
        return [*range(self.n_seeds)] if RECIPES[name].is_random else [None]

    def squares(self, layer_point: LayerPoint) -> list[np.ndarray]:
        """Return M² [head, d_head] of the selection texts, by fold."""
        if layer_point not in self._squares:
            self._squares[layer_point] = [
                self.moments.sum_of_squares(texts, layer_point) for texts in self.folds.selection_texts
            ]
        return self._squares[layer_point]

    def cells(self, name: str, seed: int | None) -> Cells:
        """Return the cells that a recipe selects, bool [fold, head, d_head] by layer and tensor."""
        import numpy as np

        if (name, seed) not in self._cells:
            cells: Cells = {}
            for layer_point in self.moments.layer_points:
                squares_by_fold = self.squares(layer_point)
                # All folds and recipes of a seed share one draw: their selections differ only where their norms do.
                key = (self.seed, seed or 0, layer_point[0], "qk".index(layer_point[1]))
                draw = np.random.default_rng(key).random(squares_by_fold[0].shape)
                select = RECIPES[name].select
                cells[layer_point] = np.stack(
                    [select(squares, draw, self.rule) for squares in squares_by_fold]
                )
            self._cells[name, seed] = cells
        return self._cells[name, seed]

    def means(self, layer_point: LayerPoint) -> np.ndarray:
        """Return the mean of each cell over all tokens of the selection texts, [fold, head, d_head]."""
        import numpy as np

        return np.stack([self.moments.mean(texts, layer_point) for texts in self.folds.selection_texts])

    def norm_shares(self, cells: Cells, layer_point: LayerPoint, fold: int) -> tuple[float, float]:
        """Return the cells' share of Σ M² in the texts of a fold, and in the texts that they were selected on."""
        selected = cells[layer_point][fold]
        fold_squares = self.moments.sum_of_squares(self.folds.members(fold), layer_point)
        return _share(fold_squares, selected), _share(self.squares(layer_point)[fold], selected)

    def nonzero_points(self, cells: Cells) -> list[LayerPoint]:
        """Return the layers and tensors with a cell that is not zero in all texts in which it is overwritten."""
        folds = range(self.folds.n)
        return [
            point for point in cells if any(self.norm_shares(cells, point, fold)[0] > 0 for fold in folds)
        ]

    def reason_to_skip(self, name: str) -> str | None:
        """Return the reason why a recipe overwrites nothing, or too few cells; None for one that can run."""
        for seed in self.seeds(name):
            cells = self.cells(name, seed)
            treated_name = RECIPES[name].control_for
            if not any(by_fold[:-1].any() for by_fold in cells.values()):
                if treated_name is None:
                    return self._not_massive(RECIPES[name].select is largest_if_massive)
                return f"no cells besides those of {treated_name} have so small a Σ M²"
            if not self.nonzero_points(cells):
                return "all cells that it would overwrite are zero in every text"
            if treated_name is not None and not RECIPES[name].is_matched:
                treated = self.cells(treated_name, None)
                too_few = [
                    point for point in cells if (cells[point].sum((1, 2)) < treated[point].sum((1, 2))).any()
                ]
                if too_few:
                    layer, tensor = too_few[0]
                    return f"layer {layer} has too few cells of {tensor} besides those of {treated_name}"
        return None

    def _not_massive(self, per_head: bool) -> str:
        """Return the message that no cell is massive, with the ratio of the largest."""
        import numpy as np

        per_head = per_head or self.rule.over == "per_head"
        max_ratio, (layer, tensor) = 0.0, self.moments.layer_points[0]
        for layer_point in self.moments.layer_points:
            for squares in self.squares(layer_point)[:-1]:
                norms = np.sqrt(squares)
                means = norms.mean(-1, keepdims=True) if per_head else norms.mean()
                ratio = float(np.divide(norms, means, out=np.zeros_like(norms), where=means > 0).max())
                max_ratio, (layer, tensor) = max((max_ratio, (layer, tensor)), (ratio, layer_point))
        mean = "its head's mean" if per_head else "the mean"
        return (
            f"no cell is massive, over {self.rule.multiple:g} × {mean}: the largest is {max_ratio:.2f} ×, in {tensor} "
            f"of layer {layer}; `multiple` sets the threshold"
        )

    def match_range(self, name: str) -> tuple[float, float] | None:
        """Return the range over layers, tensors, folds and seeds of the ratio of a control's Σ M² to its target's."""
        import numpy as np

        treated = self.cells(RECIPES[name].control_for or name, None)
        ratios = []
        for seed in self.seeds(name):
            cells = self.cells(name, seed)
            for point in cells:
                for squares, control_cells, treated_cells in zip(
                    self.squares(point), cells[point], treated[point], strict=True
                ):
                    if squares[treated_cells].sum():
                        ratios.append(float(squares[control_cells].sum() / squares[treated_cells].sum()))
        return (float(np.min(ratios)), float(np.max(ratios))) if ratios else None


def _share(squares: np.ndarray, cells: np.ndarray) -> float:
    total = float(squares.sum())
    return float(squares[cells].sum()) / total if total else float("nan")
