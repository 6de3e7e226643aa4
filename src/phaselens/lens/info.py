"""What is known of a loaded model. Imports no torch, so that tables and plugins can use it freely."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from phaselens.errors import InputError, short_form


@dataclass(frozen=True)
class Rotation:
    """Which dimensions of a head a layer's rotation mixes, measured on the rotation itself.

    ``pairs`` are the dimensions that turn into each other, each pair once; dimensions in no pair pass unrotated.
    ``problem`` says why there are none, where the rotation could not be read.

    >>> Rotation(((0, 2), (1, 3)), 6)
    Rotation(pairs=((0, 2), (1, 3)), d_head=6, problem=None)
    >>> str(Rotation(((0, 2), (1, 3)), 6)), str(Rotation(((0, 1), (2, 3)), 4))
    ('4 of 6 dimensions, i with i + 2', '4 of 4 dimensions, 2i with 2i + 1')
    """

    pairs: tuple[tuple[int, int], ...]
    d_head: int
    problem: str | None = None

    @property
    def unrotated(self) -> tuple[int, ...]:
        """The dimensions that the rotation leaves alone."""
        rotated = {dimension for pair in self.pairs for dimension in pair}
        return tuple(dimension for dimension in range(self.d_head) if dimension not in rotated)

    def __str__(self) -> str:
        if self.problem is not None:
            return f"unknown: {self.problem}"
        n_pairs = len(self.pairs)
        layouts = {
            f"i with i + {n_pairs}": tuple((first, first + n_pairs) for first in range(n_pairs)),
            "2i with 2i + 1": tuple((2 * first, 2 * first + 1) for first in range(n_pairs)),
        }
        layout = next((name for name, pairs in layouts.items() if pairs == self.pairs), None)
        if layout is None:
            layout = ", ".join(f"{first} with {second}" for first, second in self.pairs)
        return f"{2 * n_pairs} of {self.d_head} dimensions, {layout}"


@dataclass(frozen=True)
class ModelInfo:
    """Facts of one loaded model, as a run records them.

    ``positions`` says per layer how attention knows where a token stands: ``rope`` (rotated queries and
    keys), ``nope`` (no position at all), ``learned`` (added to the embedding). ``windows`` holds per layer the
    number of keys a query can see, itself included, or None where it sees all. ``scales`` is what q·k is multiplied
    by. ``rotations`` says per layer which dimensions of queries and keys the rotation mixes, None where there is no
    rotation; where a rotation was nulled or dropped, what it would mix. ``head_outputs`` says per layer what happens to
    a head's output before the output projection: ``same`` nothing, ``scaled`` every entry is multiplied by a factor
    (a gate, an RMS norm), ``mixed`` anything else. ``bos`` is the policy by which the lens reads texts, and
    ``bos_policy`` says what its tokenizer does by itself. ``files`` maps the checkpoint's files to their sha256.
    ``note`` is what a reader of the model's numbers should know of it, where there is such a thing: how it was made, or
    the setting it is to be measured with.
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
    bos: str = "auto"
    revision: str | None = None
    attention_type: str | None = None
    softmax_scale: float | None = None
    quantisation: str | None = None
    rotations: tuple[Rotation | None, ...] = ()
    head_outputs: tuple[str, ...] = ()
    note: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain JSON values, in the order of the fields."""
        plain = asdict(self)
        for name in ("positions", "windows", "scales", "head_outputs"):
            plain[name] = list(plain[name])
        plain["rotations"] = [rotation and str(rotation) for rotation in self.rotations]
        return plain

    @property
    def positions_summary(self) -> str:
        """`rope`, `nope`, or for a mixed model how many layers are which: `rope 27, nope 9`."""
        kinds = dict.fromkeys(self.positions)
        if len(kinds) == 1:
            return self.positions[0]
        return ", ".join(f"{kind} {self.positions.count(kind)}" for kind in kinds)


def require_lens(name: str, candidate: Any) -> None:
    """InputError unless it is a loaded model. It is known by its `info`: to import its class would import torch."""
    if not isinstance(getattr(candidate, "info", None), ModelInfo):
        raise InputError(
            f"expected {name} as a lens made by phaselens.load(model), received {short_form(candidate)}"
        )
