"""Over-mixing: how far and how strongly a change of one token spreads to later ones, and rank collapse by layer.

Attention mixes tokens. With every layer a token's residual depends on more earlier ones, and in the end all of them
would be alike (Dong et al. 2021, arXiv:2103.03404). Barbero et al. 2025 (arXiv:2504.02732) hold that a sink at position
0 is what slows the mixing down: a head that attends to it mixes nothing. So each text is read with one token replaced,
with and without BOS, and with and without rotation, and compared with itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.plugin import (
    Batch,
    Display,
    FigurePanel,
    FigureSet,
    LayerView,
    Metric,
    Params,
    Table,
    TokenSequence,
    hookimpl,
    in_layer,
    param,
)
from phaselens_plugins._causal import content_keys
from phaselens_plugins._common import LayerText, generator_for, layer_texts, quoted_ids
from phaselens_plugins._mixing_sequences import (
    AS_IS,
    FIRST,
    SETTINGS,
    Role,
    can_lose_rotation,
    replacements,
    sequences_of_text,
    settings_of,
)
from phaselens_plugins._mixing_tables import MIXING_TABLES
from phaselens_plugins._mixing_values import MixingRows, MixingValues, bin_name, bin_starts, summary_row
from phaselens_plugins._residual import RESIDUAL

if TYPE_CHECKING:
    from torch import Tensor

FIGURES = FigureSet("mixing", ("change", "no-bos", "no-rotation", "collapse"))
CAUSALITY = 1e-3
"""Change of a token before the replaced one above which a warning is given: a causal model has none but rounding."""


@dataclass(frozen=True)
class MixingParams(Params):
    """Parameters of the metric."""

    token: int = param(
        1, help="position of the replaced token; the middle one is replaced too", unit="position", minimum=1
    )
    draws: int = param(1, help="new tokens drawn for each replaced one", minimum=1, maximum=100)
    threshold: float = param(
        0.01,
        help="a later token is reached if its residual changes by at least this share of its norm",
        minimum=0,
    )
    without_bos: bool = param(True, help="also read the texts without BOS")
    without_rotation: bool = param(True, help="also read the texts with the rotation nulled in all layers")
    massive_factor: float = param(
        10.0, help="a row is massive if its norm is this many times the median row's", minimum=1
    )


class OverMixing(Metric[MixingParams]):
    """Metric of the change of later residuals by one token, and of rank collapse, by setting and layer."""

    name = "over-mixing"
    version = "1"
    title = "over-mixing"
    description = "how far a change of one token spreads, with and without BOS and rotation; rank collapse"
    citation = "Barbero et al. 2025, arXiv:2504.02732; Dong et al. 2021, arXiv:2103.03404"
    Params = MixingParams
    tables = MIXING_TABLES
    display = Display(
        value="change",
        title="change",
        low="ci_low",
        high="ci_high",
        null="null",
        also=(
            ("reached", "reached"),
            ("no_bos", "no BOS"),
            ("no_rotation", "no rotation"),
            ("collapse", "collapse"),
        ),
        summary=(("change", "after the last layer"), ("no_bos", "without BOS"), ("collapse", "smallest collapse"),
                 ("collapse_layer", "at")),
    )  # fmt: skip
    figure_panels = (
        FigurePanel(
            FIGURES, "change", Display("change", "change", low="ci_low", high="ci_high", null="null")
        ),
        FigurePanel(
            FIGURES,
            "no-bos",
            Display("no_bos", "change, without BOS", low="no_bos_low", high="no_bos_high", null="null"),
        ),
        FigurePanel(
            FIGURES,
            "no-rotation",
            Display(
                "no_rotation",
                "change, without rotation",
                low="no_rotation_low",
                high="no_rotation_high",
                null="null",
            ),
        ),
        FigurePanel(
            FIGURES,
            "collapse",
            Display(
                "collapse", "rank collapse", low="collapse_low", high="collapse_high", null="collapse_null"
            ),
        ),
    )

    @classmethod
    def define(cls, params: MixingParams) -> str:
        """State the replaced token, the change and the settings."""
        without = [
            name
            for name, chosen in (("BOS", params.without_bos), ("rotation", params.without_rotation))
            if chosen
        ]
        settings = f"; also without {' and without '.join(without)}" if without else ""
        return (
            f"token {params.token} := another of the text's tokens that is about as frequent; ‖x′ − x‖ / ‖x‖ of later "
            f"tokens; reached: at least {params.threshold:g}{settings}; collapse: ‖X − 1 x̄ᵀ‖ / ‖X‖ without position 0"
        )

    def setup(self) -> None:
        """Start with no texts and no values."""
        settings = settings_of(
            self.model, without_bos=self.params.without_bos, without_rotation=self.params.without_rotation
        )
        self.values = MixingValues(self.model.n_layers, settings)
        self.roles: dict[str, Role] = {}

    def hooks(self) -> Sequence[str]:
        """Return the residual stream after each layer."""
        return [in_layer("{layer}", RESIDUAL)]

    def sequences(self, texts: Batch, tokenizer: Any) -> Sequence[TokenSequence]:
        """Return each text in each setting, unchanged and with each replacement."""
        self.per_text.add(LayerView(0, texts, {}))
        values, sequences = self.values, []
        for index, content, length, padded_ids in zip(
            texts.indices, content_keys(texts), texts.lengths, texts.tokens.tolist(), strict=True
        ):
            ids = padded_ids[:length]
            changes = list(
                replacements(ids, content, token=self.params.token, draws=self.params.draws, seed=self.seed)
            )
            values.contents[index], values.changes[index] = content, changes
            for token_id in {token_id for change in changes for token_id in (change.old_id, change.new_id)}:
                values.spellings[token_id] = texts.token_name(token_id)
            if ids and ids[0] == self.model.bos_token_id:
                values.bos_texts.add(index)
            for setting in values.settings:
                # Without BOS, a text that has none is as it is, and one of a single token is empty.
                if not SETTINGS[setting][0] and (index not in values.bos_texts or length < 2):
                    continue
                for sequence, role in sequences_of_text(index, ids, changes, setting):
                    self.roles[sequence.id] = role
                    sequences.append(sequence)
        return sequences

    def update(self, layer: LayerView) -> None:
        """Compare each changed sequence with the unchanged one of its text and setting."""
        unchanged: dict[tuple[int, str], LayerText] = {}
        for name, text in zip(layer.batch.texts, layer_texts(layer), strict=True):
            role = self.roles[name]
            if role.replacement is None:
                unchanged[role.text_index, role.setting] = text
                numbers = self._collapse(text[RESIDUAL], role)
            else:
                x = unchanged[role.text_index, role.setting][RESIDUAL]
                numbers = self._change(x, text[RESIDUAL], role)
            self.values.keep(role, layer.index or 0, numbers)

    def _change(self, x: Tensor, changed: Tensor, role: Role) -> dict[str, float]:
        """Return the change of the replaced token and of those after it, by bin of distances too."""
        from phaselens.spectrum import relative_change

        assert role.changed_at is not None
        change = relative_change(x, changed)
        before, replaced, later = change.tensor_split([role.changed_at, role.changed_at + 1])
        if len(before) and float(before.max()) > CAUSALITY:
            self.warn(
                f"{role.setting}: tokens before the replaced one changed by up to {float(before.max()):.2g} of their "
                "norm, so the model is not causal, or its arithmetic depends on the batch"
            )
        reached = (later >= self.params.threshold).double().masked_fill(later.isnan(), float("nan"))
        numbers = {"change": later, "reached": reached, "own": replaced}
        numbers |= {bin_name(start): later[start - 1 : 2 * start - 1] for start in bin_starts(len(later))}
        return {name: float(values.mean()) for name, values in numbers.items()}

    def _collapse(self, x: Tensor, role: Role) -> dict[str, float]:
        """Return the rank collapse of the rows without position 0, and the change of unrelated rows."""
        import torch

        from phaselens.spectrum import massive_rows, random_spread, rank_collapse, relative_change, row_norms

        n = len(x) - 1
        if n < 2:
            return {}
        is_massive = massive_rows(row_norms(x), self.params.massive_factor)[1:]
        ordinary_rows = x[1:][~is_massive]
        numbers = {
            "collapse": rank_collapse(x[1:]),
            "collapse_null": random_spread(n),
            "n_massive": float(is_massive.sum()),
        }
        if len(ordinary_rows) > 1:
            numbers |= {
                "collapse_rest": rank_collapse(ordinary_rows),
                "collapse_rest_null": random_spread(len(ordinary_rows)),
            }
        # Each token is paired with the next one of a random order, which is another one.
        generator = generator_for(self.values.contents[role.text_index], self.seed, "unrelated tokens")
        order = torch.from_numpy(generator.permutation(n)).to(x.device) + 1
        numbers["unrelated"] = float(relative_change(x[order], x[order.roll(1)]).mean())
        return numbers

    def merge(self, other: Metric[MixingParams]) -> None:
        """Merge another instance, with its texts and values."""
        super().merge(other)
        if isinstance(other, OverMixing):
            self.values.merge(other.values)
            self.roles |= other.roles

    def compute(self) -> Mapping[str, Table]:
        """Return all tables of this model."""
        self._explain()
        rows = MixingRows(self, self.values)
        layers = self.table("layers", rows.layer_rows())
        return {
            "texts": self.table("texts", rows.text_rows()),
            "settings": self.table("settings", rows.setting_rows()),
            "distances": self.table("distances", rows.distance_rows()),
            "collapse": self.table("collapse", rows.collapse_rows()),
            "layers": layers,
            "summary": self.table("summary", [summary_row(layers)]),
            "replacements": self.table("replacements", rows.replacement_rows()),
        }

    def _explain(self) -> None:
        """Warn of each reason for which numbers are missing."""
        import numpy as np

        values, ids = self.values, self.per_text.texts
        has_bos = np.array([index in values.bos_texts for index in values.text_indices])
        is_read = np.array([values.is_read(index, AS_IS, FIRST) for index in values.text_indices])
        if not is_read.all():
            self.warn(
                f"change is missing: no token after position {self.params.token}, or no other token to put there, for "
                f"text {quoted_ids(ids, ~is_read)}"
            )
        if self.params.without_bos and not has_bos.all():
            self.warn(
                "change without BOS is missing: the text does not begin with BOS, for text "
                f"{quoted_ids(ids, ~has_bos)}"
            )
        if self.params.without_rotation and not can_lose_rotation(self.model):
            encodings = ", ".join(dict.fromkeys(self.model.positions))
            problems = [
                rotation.problem
                for rotation in self.model.rotations
                if rotation is not None and rotation.problem
            ]
            reason = f"; the rotation could not be read: {problems[0]}" if problems else ""
            self.warn(f"change without rotation is missing: the model's positions are {encodings}{reason}")
        for setting, token in values.cases():
            is_read = np.array([values.is_read(index, setting, token) for index in values.text_indices])
            is_missing = np.isnan(values.stack("change", setting, token)) & is_read[:, None]
            for layer in np.flatnonzero(is_missing.any(0)):
                self.warn(
                    f"change ({setting}) is missing: residuals are zero, NaN or infinite in layer {layer} for text "
                    f"{quoted_ids(ids, is_missing[:, layer])}"
                )


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [OverMixing]
