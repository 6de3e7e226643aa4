"""The lens: TransformerLens' bridge around an unmodified Hugging Face model, with streaming attention statistics.

The only package that knows Hugging Face module names and TransformerLens' components.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phaselens.lens.info import ModelInfo

if TYPE_CHECKING:
    from phaselens.lens.bridge import HookedTransformer
    from phaselens.lens.check_results import CheckResult
    from phaselens.lens.checks import run_checks
    from phaselens.lens.loading import load

__all__ = ["CheckResult", "HookedTransformer", "ModelInfo", "load", "run_checks"]

_MODULES = {
    "CheckResult": "phaselens.lens.check_results",
    "HookedTransformer": "phaselens.lens.bridge",
    "load": "phaselens.lens.loading",
    "run_checks": "phaselens.lens.checks",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'phaselens.lens' has no attribute {name!r}")
