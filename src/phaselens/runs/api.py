"""`phaselens.run`: models × metrics × texts, in one call."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phaselens.data import Encoder, Text, Tokens, texts_from
from phaselens.errors import InputError, ModelError
from phaselens.plugin import plugins
from phaselens.plugin.mistakes import kind_of
from phaselens.runs.engine import measure
from phaselens.runs.options import (
    DEFAULT_MODELS,
    Chosen,
    MetricRequests,
    ModelSpec,
    Options,
    choose,
    distinct_labels,
    require_distinct,
)
from phaselens.runs.result import MetricResult, ModelRecord, Run, TextRecord
from phaselens.runs.sources import (
    load_model,
    named_texts,
    require_device_and_dtype,
    require_model,
    used_plugins,
)
from phaselens.runs.work import Observer

if TYPE_CHECKING:
    import torch

    from phaselens.lens import HookedTransformer

Source = str | os.PathLike[str]


def run(
    models: Source | HookedTransformer | Iterable[Source | HookedTransformer] = DEFAULT_MODELS,
    *,
    metrics: MetricRequests,
    texts: Source | Iterable[str | Text] = "bundled",
    max_tokens: int = 512,
    n_texts: int | None = None,
    batch_tokens: int = 8192,
    bos: str | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    positions: Mapping[str, str] | None = None,
    seed: int = 0,
    observer: Observer | None = None,
) -> Run:
    """Measure all metrics on all models, on the same texts, with one forward pass a model and batch.

    Args:
        models: lenses made by `phaselens.load`, or `[LABEL=]SOURCE[@REVISION]` to load. Models named by text are
            loaded one after the other, so that only one is in memory.
        metrics: names of installed metrics, Metric classes, pairs `(name or class, {parameter: value})`, or a mapping
            from names or classes to parameters.
        texts: `"bundled"`, a .txt or .jsonl file, a name that a plugin offers, or strings.
        max_tokens: longer texts are cut to their first `max_tokens` tokens, BOS included.
        n_texts: use the first `n_texts` only.
        batch_tokens: tokens in a batch, pads included. It changes memory and speed, and no result.
        bos: `"auto"` as the model's tokenizer does, `"always"` or `"never"` a BOS token at position 0; None as each
            lens was loaded (`auto` for models named by text).
        device, dtype, positions: as in `phaselens.load`, for models named by text; `positions` is by label. A model
            that is loaded already must be as they say.
        seed: of the bootstrap intervals.
        observer: is told how far the run is.

    Returns:
        The run. A metric that fails is marked so in it, with the others complete.

    Raises:
        InputError: for texts, metrics, parameters or options that cannot be used.
        ModelError: for a model that cannot be loaded or served. Headers of all checkpoints are read first, so that a
            damaged one is found before anything is measured. Where a later model fails all the same, or Ctrl-C
            (KeyboardInterrupt) ends the run, the exception's `run` holds the models that were finished.
    """
    observer = _observer(observer)
    options = Options(
        max_tokens,
        n_texts,
        batch_tokens,
        bos,
        device,
        _dtype_name(dtype),
        {} if positions is None else positions,
        seed,
    )
    chosen = choose(metrics)
    given = _given(models)
    labels = _labels(given)
    options.require_labels(labels)
    for model in given:
        if not isinstance(model, str):
            options.require_agreement(model.info)
    plugins().require_sound()
    texts = os.fspath(texts) if isinstance(texts, os.PathLike) else texts
    corpus = texts_from(named_texts(texts) if isinstance(texts, str) else texts, n_texts)
    _require_present(given, options)

    results = {one.name: MetricResult(one.metric, one.params, one.distribution) for one in chosen}
    records = [TextRecord(text.id, text.sha256) for text in corpus]
    result = Run([], records, results, [], _record(options, texts, given), _versions())
    try:
        for model, label in zip(given, labels, strict=True):
            lens = model if not isinstance(model, str) else _load(model, label, options, observer)
            _measure_one(lens, corpus, chosen, options, observer, result)
            del lens
        used = used_plugins([model for model in given if isinstance(model, str)], texts)
        result.warnings.extend(plugins().run_finished(result.apart(), [*_installed(chosen), *used]))
    except BaseException as error:
        result.end_early(error, labels)
        if result.models:
            vars(error)["run"] = result
        raise
    return result


def _observer(observer: Any) -> Observer:
    if observer is None:
        return Observer()
    for method in ("loading", "measuring", "advance"):
        if not callable(getattr(observer, method, None)):
            raise InputError(
                f"observer: {kind_of(observer)} has no method {method!r}; subclass phaselens.runs.Observer"
            )
    return observer  # type: ignore[no-any-return]


def _dtype_name(dtype: Any) -> str:
    """`float32` for `torch.float32` too; what is neither text nor a dtype is left for `Options` to refuse."""
    name = str(dtype) if type(dtype).__module__ == "torch" else dtype
    return name.removeprefix("torch.") if isinstance(name, str) else name


def _given(models: Any) -> list[str | HookedTransformer]:
    """Sources as text and lenses as they are; InputError for anything else."""
    if isinstance(models, Mapping | bytes):
        raise InputError(
            f"models: {kind_of(models)}; give a list of names and lenses, LABEL=SOURCE for a label"
        )
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


def _require_present(models: Sequence[str | HookedTransformer], options: Options) -> None:
    """Stop the run on a missing or damaged model before the first model has been measured for minutes."""
    specs = [ModelSpec.parse(model) for model in models if isinstance(model, str)]
    if specs:
        require_device_and_dtype(options.device, options.dtype)
    if len(models) == 1:
        return
    from phaselens.lens.sources import require_complete

    # All headers first: what `require_complete` needs takes seconds to import.
    folders = [(spec, require_model(spec)) for spec in specs]
    for spec, folder in folders:
        if folder is not None:
            require_complete(folder, spec.source)


def _load(model: str, label: str, options: Options, observer: Observer) -> HookedTransformer:
    observer.loading(label)
    return load_model(
        ModelSpec.parse(model),
        label=label,
        positions=options.positions.get(label, "auto"),
        bos=options.bos or "auto",
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
    encoder = lens.encoder(options.bos)
    encoded = [encoder.tokens(text, options.max_tokens) for text in corpus]
    tables, warnings = measure(
        lens,
        encoded,
        chosen,
        result.metrics,
        batch_tokens=options.batch_tokens,
        seed=options.seed,
        observer=observer,
        bos=encoder.bos,
    )
    order = {text.id: place for place, text in enumerate(corpus)}
    for name, found in tables.items():
        for table_name, table in found.items():
            result.metrics[name].add(label, table_name, table, order)
    for record, tokens in zip(result.texts, encoded, strict=True):
        record.n_tokens[label] = len(tokens.ids)
        record.cut[label] = tokens.cut
    model = _model_record(lens, encoded, encoder.bos)
    result.models.append(model)
    result.warnings.extend([*_cautions(model, encoded, encoder, options), *warnings])


def _model_record(lens: HookedTransformer, encoded: Sequence[Tokens], bos: str) -> ModelRecord:
    first = {tokens.ids[0] for tokens in encoded}
    token = first.pop() if len(first) == 1 else None
    starts_with_bos = token is not None and token == lens.info.bos_token_id
    n_tokens = sum(len(tokens.ids) for tokens in encoded)
    return ModelRecord(lens.info, bos, token, starts_with_bos, n_tokens)


def _cautions(model: ModelRecord, encoded: Sequence[Tokens], encoder: Encoder, options: Options) -> list[str]:
    """What a reader of this model's numbers should know about its texts."""
    label, info = model.info.label, model.info
    cautions = [f"{label}: {info.note}"] if info.note is not None else []
    cautions += [f"{label}: {note}" for note in encoder.notes(encoded)]
    if not model.starts_with_bos:
        why = "it has no BOS token" if info.bos_token_id is None else "texts got no BOS token"
        cautions.append(f"{label}: {why}: position 0 is a text's own first token (bos: {model.bos})")
    cut = sum(tokens.cut for tokens in encoded)
    if cut:
        cautions.append(f"{label}: {cut} of {len(encoded)} texts were cut to {options.max_tokens} tokens")
    longest = max(len(tokens.ids) for tokens in encoded)
    if info.n_ctx is not None and longest > info.n_ctx:
        cautions.append(f"{label}: texts of up to {longest} tokens, but the model was made for {info.n_ctx}")
    return cautions


def _record(
    options: Options, texts: str | Iterable[str | Text], models: Sequence[str | HookedTransformer]
) -> dict[str, Any]:
    """The options as they are used; `bos` is None where lenses of several policies keep their own."""
    policies = {options.bos or ("auto" if isinstance(model, str) else model.bos) for model in models}
    bos = policies.pop() if len(policies) == 1 else None
    return {"texts": texts if isinstance(texts, str) else "given", **options.as_dict(), "bos": bos}


def _installed(chosen: Sequence[Chosen]) -> list[str]:
    """Metrics that came from an installed plugin, and not as a class."""
    return [one.name for one in chosen if not one.distribution.startswith("module ")]


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    packages = ("phaselens", "torch", "transformers", "transformer-lens", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
