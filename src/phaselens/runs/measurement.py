"""`phaselens.run`: models × metrics × texts, in one call."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phaselens.data import Text, TextFields
from phaselens.errors import InputError, is_list_like, require_flag
from phaselens.plugin import plugins
from phaselens.plugin.author_errors import describe_value
from phaselens.runs.distribution import Distribution
from phaselens.runs.document_windows import cut_documents
from phaselens.runs.engine import measure_loaded
from phaselens.runs.inputs import (
    plugins_of_models,
)
from phaselens.runs.memory_limits import AUTO, DEFAULT_BATCH_TOKENS, fitting_batch_tokens
from phaselens.runs.metric_factory import MetricFactory
from phaselens.runs.model_session import ModelSession
from phaselens.runs.observer import Observer
from phaselens.runs.planning import announce_plan
from phaselens.runs.result import MetricResult, Run, TextRecord
from phaselens.runs.resumable import ResumableRun
from phaselens.runs.run_directory import RunDirectory
from phaselens.runs.run_inputs import RunInputs, Source, checked_observer
from phaselens.runs.run_options import (
    DEFAULT_MODELS,
    MetricRequests,
    ModelSpec,
    RunOptions,
    SelectedMetric,
)
from phaselens.runs.shards import DEFAULT_SHARD_TOKENS, cut_shards
from phaselens.runs.stored_run import open_run
from phaselens.runs.threads import current_threads, fixed_threads

if TYPE_CHECKING:
    import torch

    from phaselens.lens import HookedTransformer


def run(
    models: Source | HookedTransformer | Iterable[Source | HookedTransformer] = DEFAULT_MODELS,
    *,
    metrics: MetricRequests,
    texts: Source | Iterable[str | Text] = "bundled",
    text_fields: TextFields | None = None,
    max_tokens: int = 512,
    n_texts: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_tokens: int | str = DEFAULT_BATCH_TOKENS,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    bos: str | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    positions: Mapping[str, str] | None = None,
    seed: int = 0,
    adapter_scale: float | Mapping[str, float] | None = None,
    softmax_scale: Mapping[str, float] | None = None,
    rope_scaling: Mapping[str, str] | None = None,
    device_map: str | None = None,
    observer: Observer | None = None,
    out: Source | None = None,
    fresh: bool = False,
    command: Sequence[str] | None = None,
    threads: int | None = None,
    workers: int | None = None,
    engine: str = "processes",
    address: str | None = None,
    shards: str | None = None,
    phase: str | None = None,
) -> Run:
    """Measure all metrics on all models, on the same texts, with one forward pass per model and batch.

    Args:
        models: lenses made by `phaselens.load`, or `[LABEL=]SOURCE[@REVISION]` to load. Models named by text are
            loaded one after the other, so that only one is in memory.
        metrics: names of installed metrics, Metric classes, pairs `(name or class, {parameter: value})`, or a mapping
            from names or classes to parameters.
        texts: `"bundled"`, a file or folder as for `phaselens.data.read_corpus`, a name that a plugin offers, or
            strings.
        text_fields: where the texts of a file stand; None for `text` and `id`.
        max_tokens: longer texts are cut to their first `max_tokens` tokens, BOS included.
        n_texts: use the first `n_texts` only.
        window: cut longer texts into windows of `window` tokens of the first model, BOS included, with the ids `ID#0`,
            `ID#1`, …; `max_tokens` is then at least as large. None cuts none.
        stride: windows begin `stride` tokens apart; None: where the one before it ends.
        batch_tokens: tokens in a batch, pads included. It changes memory and speed, and results by rounding only.
            `"auto"` takes a number from the memory that is free after the first model is loaded, and records it. A
            batch that does not fit into memory is read in two halves, as are all later ones, with a warning.
        shard_tokens: tokens in a shard, the unit of work: texts of similar length, measured together. It too changes
            results by rounding only.
        bos: `"auto"` as the model's tokenizer does, `"always"` or `"never"` a BOS token at position 0; None as each
            lens was loaded (`auto` for models named by text).
        device, dtype, positions: as in `phaselens.load`, for models named by text; `positions` is by label. A model
            that is already loaded must agree with them.
        seed: seed of the bootstrap intervals.
        adapter_scale: as in `phaselens.load`, for all models of the form `BASE+ADAPTER`, or by label.
        softmax_scale, rope_scaling: as in `phaselens.load`, by label, for models named by text.
        device_map: `"auto"` or a JSON file, as in `phaselens.load`, for models named by text.
        observer: receives the progress of the run.
        out: a directory for the run: its record, the results of finished shards, and its tables. A run that was
            interrupted continues there, if nothing that determines its numbers has changed. None writes nothing.
        fresh: start over, in a new directory beside `out` if that holds a run.
        command: the command line, for the record.
        threads: CPU threads of each process that computes; None for as many as PyTorch uses. They are part of the
            record, because another number changes results by rounding.
        workers: number of processes that compute shards; None computes them in this one. Models must be named by text.
        engine: `"processes"` of this machine, or `"ray"` for actors of a Ray cluster, which needs `out`.
        address: the address of a Ray cluster.
        shards: `"3/8"` computes the third of eight parts of the shards only, into `out`, and makes no tables;
            `phaselens.merge` does.
        phase: `"observations"` or `"conditions"`: compute only this phase of the part.

    Returns:
        The run. A metric that fails is marked as failed; the others are complete.

    Raises:
        InputError: for texts, metrics, parameters or options that cannot be used, and for a directory with a run of
            something else.
        PhaseLensError: for a directory that cannot be written to.
        ModelError: for a model that cannot be loaded or served. Headers of all checkpoints are read first, so that a
            damaged one is found before anything is measured. If a later model still fails, or Ctrl-C
            (KeyboardInterrupt) ends the run, the exception's `run` holds the models that were finished.
    """
    observer = checked_observer(observer)
    is_automatic = isinstance(batch_tokens, str) and batch_tokens == AUTO
    options = RunOptions(
        max_tokens=max_tokens,
        n_texts=n_texts,
        window=window,
        stride=stride,
        batch_tokens=DEFAULT_BATCH_TOKENS if is_automatic else batch_tokens,  # type: ignore[arg-type]
        shard_tokens=shard_tokens,
        bos=bos,
        device=device,
        dtype=_dtype_name(dtype),
        positions={} if positions is None else positions,
        seed=seed,
        adapter_scale=adapter_scale,
        softmax_scale={} if softmax_scale is None else softmax_scale,
        rope_scaling={} if rope_scaling is None else rope_scaling,
        threads=threads,
        device_map=device_map,
    )
    distribution = Distribution.parse(workers, engine, address, shards, phase, out)
    inputs = RunInputs.read(models, metrics, texts, text_fields, options)
    selected_metrics, labels = inputs.metrics, inputs.labels
    directory = _directory(out, fresh, command)
    options = replace(options, threads=options.threads or _threads_of(directory))

    results = {
        selected.name: MetricResult(selected.metric, selected.params, selected.distribution)
        for selected in selected_metrics
    }
    sessions = inputs.sessions(options, observer)
    corpus = cut_documents(inputs.corpus, sessions, options)
    if is_automatic:
        recorded = None if directory is None else directory.recorded_batch_tokens
        options = replace(options, batch_tokens=recorded or fitting_batch_tokens(sessions[0].lens))
        corpus.notes.append(
            f"batches of {options.batch_tokens:,} tokens, by free memory (--batch-tokens auto)"
        )
    records = [TextRecord(text.id, text.sha256, label=text.label) for text in corpus.texts]
    result = Run([], records, results, [], inputs.options_record(options), _versions())
    result.warnings.extend(corpus.notes)
    try:
        with (
            fixed_threads(options.threads or 1),
            _reserved(inputs.models),
            distribution.directory(directory) as work_directory,
        ):
            if work_directory is None:
                for session in sessions:
                    _measure_model(session, selected_metrics, options, result)
                    session.release()
                resumable = None
            else:
                job = distribution.job(
                    work_directory,
                    models=inputs.models,
                    labels=labels,
                    texts=corpus.texts,
                    options=options,
                    metrics=selected_metrics,
                )
                with distribution.crew(job, selected_metrics, observer) as crew:
                    resumable = ResumableRun(
                        work_directory, sessions, selected_metrics, options, corpus.texts, crew
                    )
                    resumable.begin(result, command)
                    if work_directory.is_complete and not work_directory.lacks_shards:
                        return open_run(work_directory.path)
                    resumable.measure(result, observer)
        result.directory = None if directory is None else directory.path
        if distribution.part is not None and resumable is not None:
            resumable.record_failed_shards(result)
            result.warnings.append(distribution.describe_part(resumable.n_saved, out))
            return result
        used_plugins = [*_plugin_names(selected_metrics), *plugins_of_models(inputs.specs)]
        if inputs.plugin_texts is not None:
            used_plugins.append(inputs.plugin_texts.name)
        result.warnings.extend(plugins().notify_run_finished(result.copy(), used_plugins))
        if directory is not None and resumable is not None:
            resumable.finish(result)
    except BaseException as error:
        result.end_early(error, labels)
        if result.models:
            vars(error)["run"] = result
        raise
    return result


def _directory(out: Source | None, fresh: bool, command: object) -> RunDirectory | None:
    """Return the run's directory, which exists then; None without `out`."""
    require_flag("fresh", fresh)
    if command is not None and (
        not is_list_like(command) or not all(isinstance(word, str) for word in command)
    ):
        raise InputError(f"command is {describe_value(command)}; give a list of words, or None")
    if out is None:
        if fresh:
            raise InputError("fresh starts a run over in a new directory; name one with out (--out)")
        return None
    if not isinstance(out, str | os.PathLike) or not os.fspath(out):
        raise InputError(f"out is {describe_value(out)}; give the name of a directory, or None")
    try:
        is_name = b"\0" not in os.fsencode(out)
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise InputError(f"out is {os.fspath(out)!r}, which no directory can be called; give another name")
    return RunDirectory.to_write(out, fresh=fresh)


def _threads_of(directory: RunDirectory | None) -> int:
    """Return the number of threads of the run that has begun in the directory, or the one that PyTorch uses."""
    recorded = None if directory is None else directory.recorded_threads
    return recorded or current_threads()


def _dtype_name(dtype: str | torch.dtype) -> str:
    """Return the name of a dtype, `float32` for `torch.float32`; `RunOptions` refuses other types."""
    name: Any = str(dtype) if type(dtype).__module__ == "torch" else dtype
    return name.removeprefix("torch.") if isinstance(name, str) else name


@contextmanager
def _reserved(models: Sequence[ModelSpec | HookedTransformer]) -> Iterator[None]:
    """Refuse the lenses among `models` to other threads."""
    with ExitStack() as stack:
        for model in models:
            if not isinstance(model, ModelSpec):
                stack.enter_context(model.reserved())
        yield


def _measure_model(
    session: ModelSession, selected_metrics: Sequence[SelectedMetric], options: RunOptions, result: Run
) -> None:
    """Measure one model, and add its tables and records to `result`."""
    factory = MetricFactory(session.lens.info, selected_metrics, seed=options.seed, bos=session.bos)
    shards = cut_shards(session.tokenized_texts, options.shard_tokens, options.batch_tokens)
    announce_plan(session, selected_metrics, options, sum(len(shard.batches) for shard in shards))
    tables, warnings = measure_loaded(
        session,
        factory,
        result.metrics,
        sizes=(options.shard_tokens, options.batch_tokens),
        observer=session.observer,
    )
    n_tokens = [len(tokenized.ids) for tokenized in session.tokenized_texts]
    cut = [tokenized.cut for tokenized in session.tokenized_texts]
    result.add_model(session.record(), n_tokens, cut, tables, [*session.warnings(), *warnings])


def _plugin_names(selected_metrics: Sequence[SelectedMetric]) -> list[str]:
    """Return the names of the metrics that were requested by a plugin's name rather than as a class."""
    return [selected.name for selected in selected_metrics if selected.is_plugin]


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    packages = ("phaselens", "torch", "transformers", "transformer-lens", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
