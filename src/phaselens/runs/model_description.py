"""What a run directory says about one model before anything is measured, enough to merge its shards without it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phaselens.errors import InputError
from phaselens.plugin import ModelInfo, NestedState
from phaselens.plugin.state_codec import EncodedState, decode_state, encode_state
from phaselens.runs.active_metrics import guarded
from phaselens.runs.layer_pass import activate, group_by_pass
from phaselens.runs.metric_factory import MetricFactory
from phaselens.runs.model_session import ModelSession
from phaselens.runs.result import Failure, ModelRecord
from phaselens.runs.run_options import RunOptions, SelectedMetric
from phaselens.runs.shards import Shard, cut_shards, shard_key


@dataclass(frozen=True)
class ModelDescription:
    """The facts of one model and of its texts, and the shards of the run.

    Attributes:
        record: the model's facts, and how its texts begin.
        n_tokens: tokens of each text.
        cut: whether each text was cut.
        warnings: warnings about the model's texts.
        shards: the shards of the texts.
        keys: a digest of the content of each shard.
        failures: why metrics cannot be made for the model, by metric.
        observes: whether any metric reads the unedited model.
        without_values: the warnings of the metrics whose hook points the model lacks, each with its code, by metric.
        empty_states: a digest of each metric's state before any text, by metric: it tells whether a file that the
            metric reads has changed.
        n_passes: how often the unedited model reads each text.
    """

    record: ModelRecord
    n_tokens: list[int]
    cut: list[bool]
    warnings: list[str]
    shards: list[Shard]
    keys: list[str]
    failures: dict[str, Failure]
    observes: bool
    without_values: dict[str, list[tuple[str, str]]]
    empty_states: dict[str, str]
    n_passes: int = 1

    @classmethod
    def of(
        cls, session: ModelSession, selected_metrics: Sequence[SelectedMetric], options: RunOptions
    ) -> ModelDescription:
        """Load the model, tokenize the texts, and describe both."""
        lens, texts = session.lens, session.tokenized_texts
        factory = MetricFactory(lens.info, selected_metrics, seed=options.seed, bos=session.bos)
        failures: dict[str, Failure] = {}
        empty_states: dict[str, str] = {}
        active_metrics = []
        without_values: dict[str, list[tuple[str, str]]] = {}
        for name in factory.selected:
            result = factory.empty_result(name)
            with guarded(result, session.label, "construct"):
                factory.require_definition(name)
                active = activate(lens, factory.new(name), result)
                active_metrics.append(active)
                if not active.has_values:
                    without_values[name] = [
                        (str(warning), warning.code) for warning in active.metric.warnings
                    ]
            if not result.failures:
                with guarded(result, session.label, "state"):
                    empty_states[name] = encode_state(factory.empty_state(name)).digest
            if result.failures:
                failures[name] = result.failures[0]
        shards = cut_shards(texts, options.shard_tokens, options.batch_tokens)
        return cls(
            session.record(),
            [len(text.ids) for text in texts],
            [text.cut for text in texts],
            session.warnings(),
            shards,
            [shard_key(texts, shard) for shard in shards],
            failures,
            any(active.points for active in active_metrics),
            without_values,
            empty_states,
            len(group_by_pass(active_metrics)),
        )

    @property
    def names(self) -> list[str]:
        """Names of the metrics that can be made for the model."""
        return list(self.empty_states)

    def as_dict(self) -> dict[str, Any]:
        """Return the description as plain JSON values."""
        return self.record.as_dict() | {
            "tokens_by_text": self.n_tokens,
            "cut_texts": [index for index, is_cut in enumerate(self.cut) if is_cut],
            "warnings": self.warnings,
            "shards": [
                shard_as_dict(shard) | {"key": key} for shard, key in zip(self.shards, self.keys, strict=True)
            ],
            "failures": {name: failure.as_dict() for name, failure in self.failures.items()},
            "observes": self.observes,
            "without_values": self.without_values,
            "empty_states": self.empty_states,
            "n_passes": self.n_passes,
            "adapter": [name for name in self.record.info.files if name.startswith("adapter/")] or None,
            # The values above are for people; this is the same information without loss.
            "info": as_json(self.record.info),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelDescription:
        """Return the description that `as_dict` returned."""
        info = from_json(values["info"])
        if not isinstance(info, ModelInfo):
            raise InputError("its model's facts are of another kind")
        record = ModelRecord(
            info, values["bos"], values["first_token_id"], values["starts_with_bos"], values["n_tokens"]
        )
        cut = set(values["cut_texts"])
        return cls(
            record,
            values["tokens_by_text"],
            [index in cut for index in range(len(values["tokens_by_text"]))],
            values["warnings"],
            [shard_from_dict(index, shard) for index, shard in enumerate(values["shards"])],
            [shard["key"] for shard in values["shards"]],
            {name: Failure(**failure) for name, failure in values["failures"].items()},
            values["observes"],
            {
                name: [(text, code) for text, code in warnings]
                for name, warnings in values["without_values"].items()
            },
            values["empty_states"],
            values.get("n_passes", 1),
        )


def shard_as_dict(shard: Shard) -> dict[str, Any]:
    """Return a shard as plain JSON values."""
    return {"n_tokens": shard.n_tokens, "texts": list(shard.members), "batches": [*map(list, shard.batches)]}


def shard_from_dict(index: int, values: Mapping[str, Any]) -> Shard:
    """Return the shard that `shard_as_dict` returned."""
    return Shard(index, tuple(values["texts"]), tuple(map(tuple, values["batches"])), values["n_tokens"])


def as_json(value: object) -> Any:
    """Return a dataclass or another value without arrays as JSON values, from which it can be made again."""
    from phaselens.plugin.states import plain_copy

    return json.loads(encode_state(NestedState(value=plain_copy(value, "the record"))).text)


def from_json(values: object) -> Any:
    """Return the value that `as_json` turned into JSON values."""
    return decode_state(EncodedState(json.dumps(values), {}))["value"]
