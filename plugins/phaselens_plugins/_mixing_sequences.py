"""Variants of a text in which one token is replaced, with and without BOS, as the model is and with rotation nulled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from phaselens.plugin import ModelInfo, TokenSequence
from phaselens_plugins._common import generator_for

AS_IS, NO_BOS, NO_ROTATION, NEITHER = (
    "as is", "without BOS", "without rotation", "without BOS and rotation",
)  # fmt: skip
#: Whether a setting has BOS, and its rotation mode.
SETTINGS = {
    AS_IS: (True, "auto"),
    NO_BOS: (False, "auto"),
    NO_ROTATION: (True, "nope"),
    NEITHER: (False, "nope"),
}
FIRST, MIDDLE = "given", "middle"
TOKENS = (FIRST, MIDDLE)
"""Which token is replaced: the one at the parameter `token`, and the one in the middle."""


@dataclass(frozen=True)
class Replacement:
    """A token of a text that is replaced: its position in the text as the run reads it, its id, and the new id.

    `frequency_class` is ⌊log₂ n⌋ of the n occurrences of the old token in the text, `new_class` that of the new one.
    """

    token: str
    draw: int
    position: int
    old_id: int
    new_id: int
    frequency_class: int
    new_class: int


@dataclass(frozen=True)
class Role:
    """What a sequence is: a text in a setting, unchanged, or with a replacement at `changed_at` (in this sequence)."""

    text_index: int
    setting: str
    replacement: Replacement | None = None
    changed_at: int | None = None


def frequency_class(count: int) -> int:
    """Return ⌊log₂ count⌋.

    >>> [frequency_class(count) for count in (1, 2, 3, 4)]
    [0, 1, 1, 2]
    """
    return count.bit_length() - 1


def replacements(
    ids: Sequence[int], content: str, *, token: int, draws: int, seed: int
) -> Iterator[Replacement]:
    """Yield the replacements of a text: of the token at position `token` and of the middle one, `draws` of each.

    The new token is drawn from the text's own tokens (position 0 excluded) that occur about as often as the old one,
    so that it depends on the text alone: those of the same class, or of the nearest class that has any. Nothing is
    yielded for a position without a later token, or in a text that has no other token.
    """
    counts = Counter(ids[1:])
    middle = len(ids) // 2
    for name, position in ((FIRST, token), (MIDDLE, middle)):
        if not 1 <= position < len(ids) - 1 or (name == MIDDLE and middle == token):
            continue
        old = ids[position]
        old_class = frequency_class(counts[old])
        gaps = {new: abs(frequency_class(count) - old_class) for new, count in counts.items() if new != old}
        if not gaps:
            continue
        nearest = min(gaps.values())
        candidates = sorted(new for new, gap in gaps.items() if gap == nearest)
        generator = generator_for(content, seed, f"replacement of the {name} token")
        for draw, index in enumerate(generator.permutation(len(candidates))[:draws]):
            new = candidates[int(index)]
            yield Replacement(name, draw, position, old, new, old_class, frequency_class(counts[new]))


def settings_of(model: ModelInfo, *, without_bos: bool, without_rotation: bool) -> list[str]:
    """Return the settings in which the model's texts are read."""
    chosen = [AS_IS]
    if without_bos:
        chosen.append(NO_BOS)
    if without_rotation and can_lose_rotation(model):
        chosen += [NO_ROTATION] if not without_bos else [NO_ROTATION, NEITHER]
    return chosen


def can_lose_rotation(model: ModelInfo) -> bool:
    """Return whether the model has a rotation that can be nulled, and encodes positions in no other way."""
    is_read = all(rotation is None or rotation.problem is None for rotation in model.rotations)
    return set(model.positions) <= {"rope", "nope"} and "rope" in model.positions and is_read


def sequences_of_text(
    text_index: int, ids: Sequence[int], changes: Sequence[Replacement], setting: str
) -> Iterator[tuple[TokenSequence, Role]]:
    """Yield the text in a setting, unchanged and with each replacement, and what each sequence is."""
    has_bos, rotation_mode = SETTINGS[setting]
    offset = 0 if has_bos else 1
    group = f"{text_index}/{setting}"

    def sequence(name: str, new_ids: Sequence[int]) -> TokenSequence:
        return TokenSequence(f"{group}/{name}", list(new_ids[offset:]), group, rotation_mode)

    yield sequence("unchanged", ids), Role(text_index, setting)
    for change in changes:
        changed_ids = [*ids[: change.position], change.new_id, *ids[change.position + 1 :]]
        role = Role(text_index, setting, change, change.position - offset)
        yield sequence(f"{change.token} {change.draw}", changed_ids), role
