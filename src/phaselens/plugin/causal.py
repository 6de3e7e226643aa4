"""The class that a causal metric is: it declares conditions, and gets the loss of every text under each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from phaselens.plugin.causal_tables import CAUSAL_TABLES, CausalTables
from phaselens.plugin.conditions import Condition, Outcome, Prompt
from phaselens.plugin.losses import Losses
from phaselens.plugin.metric import Display, Metric
from phaselens.plugin.params import Params
from phaselens.plugin.tables import Table, TableSpec
from phaselens.plugin.views import LayerView

P = TypeVar("P", bound=Params)


class CausalMetric(Metric[P]):
    """A metric that changes the model and measures what that does to the loss. `conditions` is all that is needed.

    The run hands it the unedited model's activations first, if `hooks` asks for any (as for `Metric`). Then it
    runs every text once as it is and once under each condition, from the lowest edited layer upwards, and calls
    `record` with the loss of each token.

    >>> from phaselens.plugin import CausalMetric, Condition, Edit
    >>> class NoFirstValue(CausalMetric):
    ...     name, version = "no-first-value", "1"
    ...     def conditions(self):
    ...         return [Condition("value at BOS off", [Edit("blocks.0.attn.hook_v", 0.0, positions=[0])], layer=0)]
    """

    tables: ClassVar[tuple[TableSpec, ...]] = CAUSAL_TABLES
    display: ClassVar[Display | None] = Display(
        table="conditions",
        rows="condition",
        before=(("ppl", "ppl"),),
        value="ratio",
        title="ratio",
        low="ci_low",
        high="ci_high",
        also=(("delta_nats", "Δ nats"), ("p_value", "p")),
    )

    #: The run's BOS policy (auto, always or never), for `prompts`; set by the run.
    bos: str = "auto"

    def __init__(self, model: Any, params: P, seed: int = 0) -> None:
        self.losses = Losses()
        super().__init__(model, params, seed)

    def hooks(self) -> Sequence[str]:
        """Hook points of the unedited model that `conditions` depends on; none by default."""
        return ()

    def update(self, layer: LayerView) -> None:
        """Take in one layer of one batch of the unedited model."""
        raise NotImplementedError(f"{type(self).__name__} hooks {list(layer)} and defines no update")

    @abstractmethod
    def conditions(self) -> Sequence[Condition]:
        """What to do to the model; asked for once, after all updates. The baseline is added by the run."""

    def prompts(self, tokenizer: Any) -> Sequence[Prompt] | None:
        """Sequences of its own to run; None: the run's texts.

        `Encoder(tokenizer, bos=self.bos, bos_token_id=self.model.bos_token_id)` makes the same ids of a text as the run
        does; the Hugging Face `tokenizer` alone may add a second BOS token, or an EOS token after which nothing is left
        to predict.
        """
        return None

    def record(self, condition: Condition, outcome: Outcome) -> None:
        """Take in one text under one condition. Keeps its mean loss; override it to keep more."""
        self.losses.add(condition, outcome)

    def merge(self, other: Metric[P]) -> None:
        """Also the losses."""
        super().merge(other)
        if isinstance(other, CausalMetric):
            self.losses.merge(other.losses)

    def compute(self) -> Mapping[str, Table]:
        """The tables `texts`, `conditions` and `contrasts`; add to them for tables of your own."""
        found = CausalTables(self.losses, self.seed, self.warn)
        return {
            "texts": self.table("texts", found.texts()),
            "conditions": self.table("conditions", found.conditions()),
            "contrasts": self.table("contrasts", found.contrasts()),
        }
