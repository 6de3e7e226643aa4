"""Facts of a loaded model. Imports no torch, so that tables and plugins can use it freely."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from phaselens.errors import InputError, short_form
from phaselens.lens.points import layer_and_point

NO_ATTENTION = "none"
"""The entry of `ModelInfo.positions` for a layer without attention."""
ROTATION_MODES = {"auto": "as the checkpoint is", "nope": "rotation nulled"}
"""The rotation modes of `phaselens.load`, and what each does.

The public parameter, the command line and JSON call the mode `positions`; the code calls it `rotation_mode`, and the
result in a layer, an entry of `ModelInfo.positions`, its `encoding`.
"""


@dataclass(frozen=True)
class RotatedPairs:
    """The dimensions of a head that a layer's rotation mixes, measured on the rotation itself.

    ``pairs`` are the dimensions that turn into each other, each pair once; dimensions outside of them pass unrotated.
    ``problem`` is the reason why the rotation could not be read; there are no pairs then. ``angles`` are the radians by
    which one position turns each pair, in a short text; those that it would turn them by where the rotation was nulled
    or dropped, and empty where they are unknown. ``factor`` is the attention factor by which cos and sin are multiplied
    (YaRN, longrope), which they keep at position 0; None where positions are not given as cos and sin. ``entries`` are
    those of cos and sin that turn each pair, in `hook_cos` and `hook_sin`; empty where these do not exist.

    >>> RotatedPairs(((0, 2), (1, 3)), 6)
    RotatedPairs(pairs=((0, 2), (1, 3)), d_head=6, problem=None)
    >>> str(RotatedPairs(((0, 2), (1, 3)), 6)), str(RotatedPairs(((0, 1), (2, 3)), 4))
    ('4 of 6 dimensions, i with i + 2', '4 of 4 dimensions, 2i with 2i + 1')
    """

    pairs: tuple[tuple[int, int], ...]
    d_head: int
    problem: str | None = None
    angles: tuple[float, ...] = field(default=(), compare=False, repr=False)
    factor: float | None = field(default=None, compare=False, repr=False)
    entries: tuple[tuple[int, ...], ...] = field(default=(), compare=False, repr=False)

    @property
    def unrotated(self) -> tuple[int, ...]:
        """The dimensions that the rotation does not change."""
        rotated = {dimension for pair in self.pairs for dimension in pair}
        return tuple(dimension for dimension in range(self.d_head) if dimension not in rotated)

    def __str__(self) -> str:
        if self.problem is not None:
            return f"unknown: {self.problem}"
        n_pairs = len(self.pairs)
        layouts = {
            f"i with i + {n_pairs}": tuple((low, low + n_pairs) for low in range(n_pairs)),
            "2i with 2i + 1": tuple((2 * low, 2 * low + 1) for low in range(n_pairs)),
        }
        layout = next((name for name, pairs in layouts.items() if pairs == self.pairs), None)
        if layout is None:
            layout = ", ".join(f"{low} with {high}" for low, high in self.pairs)
        return f"{2 * n_pairs} of {self.d_head} dimensions, {layout}"


@dataclass(frozen=True)
class ModelInfo:
    """Facts of one loaded model, as a run records them.

    Per layer:

    * ``positions``: how attention encodes positions: ``rope`` (rotated queries and keys), ``nope`` (not at all),
      ``learned`` (added to the embedding), ``learned+rope``, ``none`` in a layer without attention.
    * ``kinds``: ``attention``, or what the layer has instead of it, such as ``mamba``. Empty where all have attention.
    * ``windows``: the number of keys a query can see, itself included; None where it sees all.
    * ``scales``: the factor of q·k; None in a layer without attention.
    * ``heads``: the number of heads of queries, 0 in a layer without attention. Empty where all layers with attention
      have ``n_heads``, which is the largest number.
    * ``rotations``: the dimensions of queries and keys that the rotation mixes, or would mix where it was nulled or
      dropped; None without rotation.
    * ``head_outputs``: the step between a head's output and the output projection: ``same`` none, ``scaled`` every
      entry is multiplied by a factor (a gate, an RMS norm), ``mixed`` anything else.

    ``learned_sinks`` are the layers whose heads have a learned sink logit, ``gates`` those in which a gate multiplies
    the heads' outputs: factors that do not depend on these outputs.

    ``longest`` is the length of the longest text in which each layer sees all keys before a query or a window of them;
    None without a limit. Attention in chunks of a text, or to keys that an indexer selects, has one, and so have layers
    that run on one piece of a text after the other (xLSTM).

    ``has_position_table``: attention reads a table with an entry for each of the ``n_ctx`` positions and no other (the
    rotation of GPT-J). Learned positions always have that limit.

    ``absent`` maps hook points that the model does not have to the reason, each layer's in its own entry.

    ``n_ctx_trained`` is the number of positions that the model was trained for, where a rope type extended them to
    ``n_ctx``; None if the checkpoint states neither.

    ``softmax_scale`` is the factor of q·k that the checkpoint, or the user, set in place of the model's own, and
    ``rope_scaling`` the rope type and factor that the user set, such as ``yarn:4``.

    ``bos`` is the policy by which the lens reads texts, ``bos_policy`` what its tokenizer does by itself. ``files``
    maps the checkpoint's files, and those of its adapter, to their sha256. ``protocol`` says what the model is and with
    which settings it should be measured (the caption of its tables), ``note`` how it was made. ``adapter`` describes an
    adapter and how it was applied. ``part_of`` is the class of the model of several modalities whose text model this
    is. ``device_map`` counts the modules on each device, such as ``cuda:0 12, disk 4``, of a model on several.
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
    scales: tuple[float | None, ...]
    softcap: float | None
    dtype: str
    device: str
    attention_path: str
    bos_token_id: int | None
    bos_policy: str
    bos: str = "auto"
    n_ctx_trained: int | None = None
    revision: str | None = None
    attention_type: str | None = None
    has_position_table: bool = False
    softmax_scale: float | None = None
    rope_scaling: str | None = None
    quantisation: str | None = None
    rotations: tuple[RotatedPairs | None, ...] = ()
    head_outputs: tuple[str, ...] = ()
    heads: tuple[int, ...] = ()
    learned_sinks: tuple[int, ...] = ()
    gates: tuple[int, ...] = ()
    kinds: tuple[str, ...] = ()
    absent: dict[str, str] = field(default_factory=dict)
    longest: int | None = None
    protocol: str | None = None
    note: str | None = None
    adapter: str | None = None
    part_of: str | None = None
    device_map: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values, in the order of the fields."""
        fields = asdict(self)
        for name in (
            "positions",
            "windows",
            "scales",
            "head_outputs",
            "heads",
            "learned_sinks",
            "gates",
            "kinds",
        ):
            fields[name] = list(fields[name])
        fields["rotations"] = [rotation and str(rotation) for rotation in self.rotations]
        return fields

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers that have attention."""
        return tuple(layer for layer, encoding in enumerate(self.positions) if encoding != NO_ATTENTION)

    def kind_of(self, layer: int) -> str:
        """Return `attention`, or what a layer has instead of it."""
        return self.kinds[layer] if self.kinds else "attention"

    def reason_against(self, n_tokens: int) -> str:
        """Return the reason why the model cannot be measured on a text of so many tokens; "" if it can."""
        if self.longest is not None and n_tokens > self.longest:
            limit = f"the model is measured up to {self.longest}"
            return f"{limit}: beyond, it attends in chunks or to selected keys, or runs on pieces of a text"
        is_learned = any("learned" in encoding for encoding in self.positions)
        if self.n_ctx is not None and n_tokens > self.n_ctx and (is_learned or self.has_position_table):
            kind = "learned positions" if is_learned else "a table of positions"
            return f"the model has {kind} for {self.n_ctx} tokens only"
        return ""

    def n_heads_in(self, layer: int) -> int:
        """Return the number of heads of queries in a layer with attention; those of the largest one in another."""
        return (self.heads[layer] if self.heads else 0) or self.n_heads

    def absence(self, name: str) -> str | None:
        """Return the reason why the model lacks a hook point, given its whole name; None if no reason is known."""
        layer, point = layer_and_point(name)
        is_of_attention = point.startswith("attn.") or point == "hook_attn_out"
        if is_of_attention and layer in range(self.n_layers) and layer not in self.attention_layers:
            return f"layer {layer} is {self.kind_of(layer or 0)}"
        return self.absent.get(name)

    @property
    def positions_summary(self) -> str:
        """`rope`, `nope`, or the number of layers of each in a mixed model: `rope 27, nope 9`."""
        encodings = dict.fromkeys(self.positions)
        if len(encodings) == 1:
            return self.positions[0]
        return ", ".join(f"{encoding} {self.positions.count(encoding)}" for encoding in encodings)


def require_lens(name: str, candidate: object) -> None:
    """Raise InputError unless `candidate` is a loaded model, recognised by its `info`: its class would import torch."""
    if not isinstance(getattr(candidate, "info", None), ModelInfo):
        raise InputError(
            f"expected {name} as a lens made by phaselens.load(model), received {short_form(candidate)}"
        )
