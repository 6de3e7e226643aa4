"""PhaseLens: what a decoder-only transformer does with its first token and with position.

    import phaselens
    lens = phaselens.load("rope")                       # a TransformerLens bridge, with streaming attention statistics
    run = phaselens.run([lens, "drope"], metrics=["sinks"], texts=["Call me Ishmael. Some years ago…"])
    print(run)
    run.table("sinks", "layers")                        # a pyarrow Table

Importing this package imports neither torch nor transformers; each name below is imported at its first
use. It registers DroPE checkpoints (`llama_drope`, `qwen2_drope`) with `AutoModelForCausalLM` and `TransformerBridge`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError, MetricError, ModelError, PhaseLensError, RefusedModel
from phaselens.lens.registration import register_when_imported

if TYPE_CHECKING:
    from phaselens.api import compare, merge, run
    from phaselens.lens.bridge import HookedTransformer
    from phaselens.lens.info import ModelInfo
    from phaselens.lens.loading import load
    from phaselens.runs import Run

__all__ = [
    "HookedTransformer",
    "InputError",
    "MetricError",
    "ModelError",
    "ModelInfo",
    "PhaseLensError",
    "RefusedModel",
    "Run",
    "__version__",
    "compare",
    "load",
    "merge",
    "open_run",
    "run",
]

_MODULES = {
    "HookedTransformer": "phaselens.lens.bridge",
    "ModelInfo": "phaselens.lens.info",
    "Run": "phaselens.runs",
    "compare": "phaselens.api",
    "load": "phaselens.lens.loading",
    "merge": "phaselens.api",
    "open_run": "phaselens.api",
    "run": "phaselens.api",
}

register_when_imported()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("phaselens")
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'phaselens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
