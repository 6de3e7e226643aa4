"""Names that methods of `Experiment` had in earlier versions, for scripts that were saved then."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from phaselens.patching.edits import Intervention
    from phaselens.patching.targets import IndexChoice


class _SwitchesRotation(Protocol):
    def null_rope(self, layer: IndexChoice = None) -> Intervention: ...

    def restore_rope(self, layer: IndexChoice = None) -> Intervention: ...


class OldNames:
    """Aliases that warn and call the method under its present name."""

    def nope(self: _SwitchesRotation, layer: IndexChoice = None) -> Intervention:
        """Alias of `null_rope`, with a FutureWarning: nope is now null_rope."""
        warnings.warn("Experiment.nope is now null_rope", FutureWarning, stacklevel=2)
        return self.null_rope(layer)

    def rope(self: _SwitchesRotation, layer: IndexChoice = None) -> Intervention:
        """Alias of `restore_rope`, with a FutureWarning: rope is now restore_rope."""
        warnings.warn("Experiment.rope is now restore_rope", FutureWarning, stacklevel=2)
        return self.restore_rope(layer)
