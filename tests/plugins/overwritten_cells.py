"""The cells of queries and keys that `qk-disruption` overwrites, for comparison with plain module hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import Tensor

from phaselens_plugins._cells import OverwriteCells

#: Cells [head, dimension] by layer and `q` or `k`, and by the digest of the text.
CellsByText = dict[tuple[int, str], dict[str, np.ndarray]]


def record_cells(monkeypatch: pytest.MonkeyPatch) -> CellsByText:
    """Return a dictionary that every disruption from now on fills with the cells that it overwrites."""
    cells_by_text: CellsByText = {}
    overwrite = OverwriteCells.__call__

    def record(self: OverwriteCells, tensor: Tensor, site: Any) -> Tensor:
        by_text = cells_by_text.setdefault((site.layer, "q" if site.point.endswith("_q") else "k"), {})
        by_text.update({text: self.cells[self.fold_of[text]] for text in site.batch.hashes})
        return overwrite(self, tensor, site)

    monkeypatch.setattr(OverwriteCells, "__call__", record)
    return cells_by_text
