"""The models, metrics and texts of a run, checked before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from phaselens.data import Corpus, Text, TextFields, corpus_from
from phaselens.data.reading import BUNDLED
from phaselens.errors import InputError, require_kind
from phaselens.plugin import NamedTexts, plugins
from phaselens.plugin.author_errors import describe_value
from phaselens.runs.inputs import find_texts, read_texts_of_plugin, require_device_and_dtype, require_models
from phaselens.runs.model_session import ModelSession
from phaselens.runs.observer import Observer
from phaselens.runs.run_options import (
    MetricRequests,
    ModelSpec,
    RunOptions,
    SelectedMetric,
    distinct_labels,
    require_distinct,
    select_metrics,
)

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class RunInputs:
    """What a run measures.

    Attributes:
        models: lenses, and the names of models to load.
        labels: the models' labels.
        metrics: the metrics with their parameters.
        corpus: the texts.
        source: what the texts were named by, for the record.
        text_fields: where the texts of a file stand.
        plugin_texts: the texts, if a plugin offers them.
    """

    models: list[ModelSpec | HookedTransformer]
    labels: list[str]
    metrics: list[SelectedMetric]
    corpus: Corpus
    source: str
    text_fields: TextFields | None
    plugin_texts: NamedTexts | None

    @classmethod
    def read(
        cls,
        models: object,
        metrics: MetricRequests,
        texts: Source | Iterable[str | Text],
        text_fields: TextFields | None,
        options: RunOptions,
    ) -> RunInputs:
        """Check the arguments of a run, and read the texts.

        Raises:
            InputError: for arguments that cannot be used.
        """
        selected_metrics = select_metrics(metrics)
        parsed = parsed_models(models)
        labels = labels_of(parsed)
        options.require_labels(labels)
        for model in parsed:
            if not isinstance(model, ModelSpec):
                options.require_agreement(model.info, model.nulled_layers)
        options.require_adapters(specs_of(parsed))
        plugins().require_working()
        texts = os.fspath(texts) if isinstance(texts, os.PathLike) else texts
        plugin_texts = find_texts(texts)
        source = texts if plugin_texts is None else read_texts_of_plugin(plugin_texts)
        if text_fields is not None:
            require_kind("text_fields", text_fields, TextFields, "such as TextFields(text='body')")
            if not isinstance(source, str) or source == BUNDLED:
                kind = "a list of texts" if not isinstance(texts, str) else f"{texts!r}, which is not a file"
                raise InputError(
                    f"text_fields has no effect on {kind}; leave it out (--text-field and the like)"
                )
        corpus = corpus_from(source, options.n_texts, text_fields)
        name = texts if isinstance(texts, str) else "given"
        return cls(parsed, labels, selected_metrics, corpus, name, text_fields, plugin_texts)

    @property
    def specs(self) -> list[ModelSpec]:
        """The models that are named by text."""
        return specs_of(self.models)

    def sessions(self, options: RunOptions, observer: Observer) -> list[ModelSession]:
        """Return a session for each model, after a check that it can be loaded.

        Raises:
            ModelError: for a missing or damaged model.
        """
        if self.specs:
            require_device_and_dtype(options.device, options.dtype)
        if len(self.models) > 1:
            require_models(self.specs)
        return [
            ModelSession(model, label, self.corpus.texts, options, observer)
            for model, label in zip(self.models, self.labels, strict=True)
        ]

    def options_record(self, options: RunOptions) -> dict[str, Any]:
        """Return the options that the run used; `bos` is None where the lenses' own policies differ."""
        policies = {
            options.bos or ("auto" if isinstance(model, ModelSpec) else model.bos) for model in self.models
        }
        bos = policies.pop() if len(policies) == 1 else None
        fields = {} if self.text_fields is None else {"text_fields": asdict(self.text_fields)}
        return {"texts": self.source, **fields, **options.as_dict(), "bos": bos}


def parsed_models(models: object) -> list[ModelSpec | HookedTransformer]:
    """Return the sources among `models` as specs, and the lenses; raise InputError for anything else."""
    if isinstance(models, Mapping | bytes):
        raise InputError(
            f"models: {describe_value(models)}; give a list of names and lenses, LABEL=SOURCE for a label"
        )
    is_single = isinstance(models, str | os.PathLike) or not isinstance(models, Iterable)
    entries: list[Any] = [models] if is_single else list(models)  # type: ignore[call-overload]
    entries = [os.fspath(entry) if isinstance(entry, os.PathLike) else entry for entry in entries]
    for entry in entries:
        if not isinstance(entry, str) and not hasattr(entry, "info"):
            type_name = type(entry).__name__
            raise InputError(
                f"models: {type_name} is not a lens; make one with phaselens.load(model, tokenizer=…)"
            )
    if not entries:
        raise InputError("no model was given; name one, or leave models out for the bundled pair")
    return [ModelSpec.parse(entry) if isinstance(entry, str) else entry for entry in entries]


def specs_of(models: Sequence[ModelSpec | HookedTransformer]) -> list[ModelSpec]:
    """Return the models that are named by text."""
    return [model for model in models if isinstance(model, ModelSpec)]


def labels_of(models: Sequence[ModelSpec | HookedTransformer]) -> list[str]:
    """Return the models' labels; raise InputError if two are equal."""
    spec_labels = iter(distinct_labels(specs_of(models)))
    labels = [next(spec_labels) if isinstance(model, ModelSpec) else model.info.label for model in models]
    require_distinct(labels)
    return labels


def checked_observer(observer: Observer | None) -> Observer:
    """Return the observer, by default one that ignores all reports; raise InputError for anything else."""
    if observer is None:
        return Observer()
    for method in ("loading", "measuring", "advance"):
        if not callable(getattr(observer, method, None)):
            raise InputError(
                f"observer: {describe_value(observer)} has no method {method!r}; subclass phaselens.runs.Observer"
            )
    return observer
