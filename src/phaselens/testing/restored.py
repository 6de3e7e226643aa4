"""A metric whose state went through a file, as between the processes of a run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from phaselens.plugin import Metric, read_state, write_state


def through_file(metric: Metric[Any]) -> Metric[Any]:
    """Return a new instance with the state of `metric`, which was written to a file and read again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state.safetensors")
        write_state(path, metric.state())
        restored = type(metric)(metric.model, metric.params, metric.seed)
        restored.load_state(read_state(path))
    return restored
