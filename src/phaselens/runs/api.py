"""`phaselens.run`: models × metrics × texts, in one call."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phaselens.data import Text, Tokens, encode, texts_from
from phaselens.errors import InputError, ModelError
from phaselens.plugin import plugins
from phaselens.runs.engine import measure
from phaselens.runs.options import (
    DEFAULT_MODELS,
    Chosen,
    MetricRequest,
    ModelSpec,
    Options,
    choose,
    distinct_labels,
    require_distinct,
)
from phaselens.runs.result import MetricResult, ModelRecord, Run, TextRecord
from phaselens.runs.sources import load_model, named_texts, require_model, used_plugins
from phaselens.runs.work import Observer

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer

Source = str | os.PathLike[str]


def run(
    models: Source | HookedTransformer | Iterable[Source | HookedTransformer] = DEFAULT_MODELS,
    *,
    metrics: MetricRequest | Iterable[MetricRequest],
    texts: Source | Iterable[str | Text] = "bundled",
    max_tokens: int = 512,
    n_texts: int | None = None,
    batch_tokens: int = 8192,
    bos: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    positions: Mapping[str, str] | None = None,
    seed: int = 0,
    observer: Observer | None = None,
) -> Run:
    """Measure all metrics on all models, on the same texts, with one forward pass a model and batch.

    Args:
        models: lenses made by `phaselens.load`, or `[LABEL=]SOURCE[@REVISION]` to load. Models named by text are
            loaded one after the other, so that only one is in memory.
        metrics: names of installed metrics, Metric classes, or pairs `(name or class, {parameter: value})`.
        texts: `"bundled"`, a .txt or .jsonl file, a name that a plugin offers, or strings.
        max_tokens: longer texts are cut to their first `max_tokens` tokens, BOS included.
        n_texts: use the first `n_texts` only.
        batch_tokens: tokens in a batch, pads included. It changes memory and speed, and no result.
        bos: `"auto"` as the model's tokenizer does, `"always"` or `"never"` a BOS token at position 0.
        device, dtype, positions: as in `phaselens.load`, for models named by text; `positions` is by label.
        seed: of the bootstrap intervals.
        observer: is told how far the run is.

    Returns:
        The run. A metric that fails is marked so in it, with the others complete.

    Raises:
        InputError: for texts, metrics, parameters or options that cannot be used.
        ModelError: for a model that cannot be loaded or served.
    """
    observer = observer or Observer()
    options = Options(max_tokens, n_texts, batch_tokens, bos, device, str(dtype), dict(positions or {}), seed)
    chosen = choose(metrics)
    given = _given(models)
    labels = _labels(given)
    options.require_labels(labels)
    plugins().require_sound()
    texts = os.fspath(texts) if isinstance(texts, os.PathLike) else texts
    corpus = texts_from(named_texts(texts) if isinstance(texts, str) else texts, n_texts)
    _require_present(given)

    results = {one.name: MetricResult(one.metric, one.params, one.distribution) for one in chosen}
    records = [TextRecord(text.id, text.sha256) for text in corpus]
    result = Run([], records, results, [], _record(options, texts), _versions())
    for model, label in zip(given, labels, strict=True):
        lens = model if not isinstance(model, str) else _load(model, label, options, observer)
        _measure_one(lens, corpus, chosen, options, observer, result)
        del lens
    used = used_plugins([model for model in given if isinstance(model, str)], texts)
    result.warnings.extend(plugins().run_finished(result, [*_installed(chosen), *used]))
    return result


def _given(models: Any) -> list[str | HookedTransformer]:
    """Sources as text and lenses as they are; InputError for anything else."""
    alone = isinstance(models, str | os.PathLike) or not isinstance(models, Iterable)
    given = [
        os.fspath(each) if isinstance(each, os.PathLike) else each for each in ([models] if alone else models)
    ]
    for each in given:
        if not isinstance(each, str) and not hasattr(each, "info"):
            kind = type(each).__name__
            raise InputError(f"models: {kind} is no lens; make one by phaselens.load(model, tokenizer=…)")
    if not given:
        raise InputError("no model was given; name one, or leave models out for the bundled pair")
    return given


def _labels(models: Sequence[str | HookedTransformer]) -> list[str]:
    named = iter(distinct_labels([ModelSpec.parse(model) for model in models if isinstance(model, str)]))
    labels = [next(named) if isinstance(model, str) else model.info.label for model in models]
    require_distinct(labels)
    return labels


def _require_present(models: Sequence[str | HookedTransformer]) -> None:
    """A model that is not there stops the run before the first one has been measured for minutes."""
    named = [ModelSpec.parse(model).source for model in models if isinstance(model, str)]
    if len(named) > 1:
        for source in named:
            require_model(source)


def _load(model: str, label: str, options: Options, observer: Observer) -> HookedTransformer:
    observer.loading(label)
    return load_model(
        ModelSpec.parse(model),
        label=label,
        positions=options.positions.get(label, "auto"),
        device=options.device,
        dtype=options.dtype,
    )


def _measure_one(
    lens: HookedTransformer,
    corpus: Sequence[Text],
    chosen: Sequence[Chosen],
    options: Options,
    observer: Observer,
    result: Run,
) -> None:
    """Tokenise, measure, and put what was found into `result`."""
    label = lens.info.label
    if lens.text_tokenizer is None:
        reason = lens.tokenizer_note or "none was found"
        raise ModelError(f"model {label!r} has no tokenizer for the texts: {reason}")
    encoded = [
        encode(
            lens.text_tokenizer,
            text,
            bos=options.bos,
            bos_token_id=lens.info.bos_token_id,
            max_tokens=options.max_tokens,
        )
        for text in corpus
    ]
    tables, warnings = measure(
        lens,
        encoded,
        chosen,
        result.metrics,
        batch_tokens=options.batch_tokens,
        seed=options.seed,
        observer=observer,
        bos=options.bos,
    )
    order = {text.id: place for place, text in enumerate(corpus)}
    for name, found in tables.items():
        for table_name, table in found.items():
            result.metrics[name].add(label, table_name, table, order)
    for record, tokens in zip(result.texts, encoded, strict=True):
        record.n_tokens[label] = len(tokens.ids)
        record.cut[label] = tokens.cut
    model = _model_record(lens, encoded, options)
    result.models.append(model)
    result.warnings.extend([*_cautions(model, encoded, options), *warnings])


def _model_record(lens: HookedTransformer, encoded: Sequence[Tokens], options: Options) -> ModelRecord:
    first = {tokens.ids[0] for tokens in encoded}
    token = first.pop() if len(first) == 1 else None
    starts_with_bos = token is not None and token == lens.info.bos_token_id
    n_tokens = sum(len(tokens.ids) for tokens in encoded)
    return ModelRecord(lens.info, options.bos, token, starts_with_bos, n_tokens)


def _cautions(model: ModelRecord, encoded: Sequence[Tokens], options: Options) -> list[str]:
    """What a reader of this model's numbers should know about its texts."""
    label, info = model.info.label, model.info
    cautions = [f"{label}: {info.note}"] if info.note is not None else []
    if not model.starts_with_bos:
        why = "it has no BOS token" if info.bos_token_id is None else "texts got no BOS token"
        cautions.append(f"{label}: {why}: position 0 is a text's own first token (bos: {options.bos})")
    cut = sum(tokens.cut for tokens in encoded)
    if cut:
        cautions.append(f"{label}: {cut} of {len(encoded)} texts were cut to {options.max_tokens} tokens")
    longest = max(len(tokens.ids) for tokens in encoded)
    if info.n_ctx is not None and longest > info.n_ctx:
        cautions.append(f"{label}: texts of up to {longest} tokens, but the model was made for {info.n_ctx}")
    return cautions


def _record(options: Options, texts: str | Iterable[str | Text]) -> dict[str, Any]:
    return {"texts": texts if isinstance(texts, str) else "given", **options.as_dict()}


def _installed(chosen: Sequence[Chosen]) -> list[str]:
    """Metrics that came from an installed plugin, and not as a class."""
    return [one.name for one in chosen if not one.distribution.startswith("module ")]


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    packages = ("phaselens", "torch", "transformers", "transformer-lens", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
