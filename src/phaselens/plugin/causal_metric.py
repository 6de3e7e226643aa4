"""Base class of causal metrics: they declare conditions, and receive the loss of every text under each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

from phaselens.errors import InputError, short_form
from phaselens.plugin.causal_tables import CAUSAL_TABLES, CausalTables
from phaselens.plugin.condition_losses import Losses
from phaselens.plugin.conditions import Condition, TaskPrompt, TextOutcome
from phaselens.plugin.display import Display
from phaselens.plugin.metric import Metric
from phaselens.plugin.params import Params
from phaselens.plugin.tables import Table, TableSpec
from phaselens.plugin.views import LayerView

P = TypeVar("P", bound=Params)


def kind_of(metric: type[Metric[Any]]) -> Literal["observational", "causal", "task"]:
    """Return whether a metric only reads the model, edits it, or tests it on prompts of its own (a task).

    Raises:
        InputError: for what is not a metric.

    >>> from phaselens.plugin import plugins
    >>> [kind_of(plugins().metric(name)) for name in ("sinks", "bos-mlp", "passkey")]
    ['observational', 'causal', 'task']
    """
    if not (isinstance(metric, type) and issubclass(metric, Metric)):
        raise InputError(f"expected metric as a Metric class, received {short_form(metric)}")
    if not issubclass(metric, CausalMetric):
        return "observational"
    return "causal" if metric.prompts is CausalMetric.prompts or metric.also_on_texts else "task"


class CausalMetric(Metric[P]):
    """A metric that edits activations and measures the effect on the loss. Only `conditions` must be defined.

    The run first passes it the unedited model's activations, if `hooks` names any (as for `Metric`). Then it runs every
    text once unedited and once under each condition, from the lowest edited layer upwards, and calls `record` with the
    loss of each token.

    Where another metric runs the conditions, as `passkey` and `combined` do, `nested_defaults` has the values of
    parameters that its user does not give.

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
        also=(("delta_nats", "Δ nats"), ("p_holm", "p")),
    )

    #: Whether the conditions run on the run's texts as well as on `prompts`, whose indices count from 0 too: tell the
    #: two apart by their ids. An instance that has seen the texts is merged with one that has seen the prompts.
    also_on_texts: ClassVar[bool] = False

    #: Whether `record` needs the divergence of each prediction from the unedited model's; it costs one more forward of
    #: the unedited model.
    needs_divergence: ClassVar[bool] = False

    #: Values of parameters, as text, where another metric runs this one's conditions and its user gives none: such as
    #: those that leave out conditions which are there for a table of this metric only.
    nested_defaults: ClassVar[Mapping[str, str]] = {}

    #: The run's BOS policy (auto, always or never), for use in `prompts`; the run sets it.
    bos: str = "auto"

    def __init__(self, model: Any, params: P, seed: int = 0) -> None:
        self.losses = Losses()
        super().__init__(model, params, seed)

    def hooks(self) -> Sequence[str]:
        """Return the hook points of the unedited model that `conditions` depends on; none by default."""
        return ()

    def update(self, layer: LayerView) -> None:
        """Process one layer of one batch of the unedited model."""
        raise NotImplementedError(f"{type(self).__name__} hooks {list(layer)} but does not define update")

    def condition_hooks(self) -> Sequence[str]:
        """Return the hook points to read in every forward under a condition; none by default.

        `update_condition` receives them. Layers below a condition's lowest edited one do not run again, since they are
        as in the unedited model, whose values `hooks` and `update` give. Such a forward shares nothing with those of
        other conditions, so reading costs time.
        """
        return ()

    def update_condition(self, condition: Condition, layer: LayerView) -> None:
        """Process one layer of one batch under a condition: the points of `condition_hooks`, after the edits."""
        raise NotImplementedError(
            f"{type(self).__name__} reads {list(layer)} under conditions but does not define update_condition"
        )

    @abstractmethod
    def conditions(self) -> Sequence[Condition]:
        """Return the conditions to run. Called once, after all updates; the run adds the baseline."""

    def prompts(self, tokenizer: Any) -> Sequence[TaskPrompt] | None:
        """Return token sequences to run instead of the run's texts, or None for the run's texts.

        `Encoder(tokenizer, bos=self.bos, bos_token_id=self.model.bos_token_id)` encodes a text as the run does. The
        Hugging Face `tokenizer` alone may add a second BOS token, or an EOS token after which nothing is predicted.
        """
        return None

    def record(self, condition: Condition, outcome: TextOutcome) -> None:
        """Process one text under one condition. The default keeps the mean loss; override it to keep more."""
        self.losses.add(condition, outcome)

    def merge(self, other: Metric[P]) -> None:
        """Add the losses of `other` along with its values and warnings."""
        super().merge(other)
        if isinstance(other, CausalMetric):
            self.losses.merge(other.losses)

    def compute(self) -> Mapping[str, Table]:
        """Return the tables `texts`, `conditions` and `contrasts`. Override it to add tables."""
        tables = CausalTables(self.losses, self.seed, self.warn)
        return {
            "texts": self.table("texts", tables.texts()),
            "conditions": self.table("conditions", tables.conditions()),
            "contrasts": self.table("contrasts", tables.contrasts()),
        }
