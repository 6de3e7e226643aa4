"""What is known of a loaded model. Imports no torch, so that tables and plugins can use it freely."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelInfo:
    """Facts of one loaded model, as a run records them.

    ``positions`` says per layer how attention knows where a token stands: ``rope`` (rotated queries and
    keys), ``nope`` (no position at all), ``learned`` (added to the embedding). ``windows`` holds per layer the
    number of keys a query can see, itself included, or None where it sees all. ``scales`` is what q·k is multiplied
    by. ``files`` maps the checkpoint's files to their sha256. ``note`` is what a reader of the model's numbers should
    know of it, where there is such a thing: how it was made, or the setting it is to be measured with.
    """

    label: str
    source: str
    family: str
    architecture: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_vocab: int
    n_ctx: int | None
    positions: tuple[str, ...]
    windows: tuple[int | None, ...]
    scales: tuple[float, ...]
    softcap: float | None
    dtype: str
    device: str
    attention_path: str
    bos_token_id: int | None
    bos_policy: str
    revision: str | None = None
    attention_type: str | None = None
    softmax_scale: float | None = None
    quantisation: str | None = None
    note: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain JSON values, in the order of the fields."""
        plain = asdict(self)
        for name in ("positions", "windows", "scales"):
            plain[name] = list(plain[name])
        return plain

    @property
    def positions_summary(self) -> str:
        """`rope`, `nope`, or for a mixed model how many layers are which: `rope 27, nope 9`."""
        kinds = dict.fromkeys(self.positions)
        if len(kinds) == 1:
            return self.positions[0]
        return ", ".join(f"{kind} {self.positions.count(kind)}" for kind in kinds)
