"""Measure a run whose shards are kept in a directory, and continue one that was interrupted."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from phaselens.data import Text
from phaselens.errors import InputError
from phaselens.plugin import Metric, MetricWarning
from phaselens.runs.crew import Crew
from phaselens.runs.directory_store import DirectoryStore, ModelKey
from phaselens.runs.metric_factory import MetricFactory
from phaselens.runs.model_description import ModelDescription, as_json
from phaselens.runs.model_session import ModelSession
from phaselens.runs.model_tables import tables_of_metrics
from phaselens.runs.observer import Observer
from phaselens.runs.planning import announce_plan
from phaselens.runs.report_sections import report_sections
from phaselens.runs.result import Run
from phaselens.runs.run_directory import RECORD, RunDirectory
from phaselens.runs.run_options import RunOptions, SelectedMetric
from phaselens.runs.run_record import differences, now, record_request, record_run
from phaselens.runs.shard_work import ShardWork
from phaselens.runs.shards import digest_of


class ResumableRun:
    """A run in a directory. `begin` records it, or checks that it is the one that was recorded; `measure` measures the
    shards that are missing and merges all; `finish` writes the results.

    Args:
        directory: the run's directory.
        sessions: the models.
        selected_metrics: the metrics.
        options: the run's options.
        texts: the run's texts.
        crew: computes the shards that are missing; by default, this process does.
    """

    def __init__(
        self,
        directory: RunDirectory,
        sessions: Sequence[ModelSession],
        selected_metrics: Sequence[SelectedMetric],
        options: RunOptions,
        texts: Sequence[Text],
        crew: Crew | None = None,
    ) -> None:
        self.directory = directory
        self._sessions = list(sessions)
        self._selected = list(selected_metrics)
        self._options = options
        self._texts = texts
        self._crew = Crew() if crew is None else crew
        self._started = time.monotonic()
        self._request: dict[str, Any] = {}
        self._descriptions: dict[str, ModelDescription] = {}
        self._n_saved = 0
        #: Seconds for merging the shards and making the tables; None where this process has also computed shards.
        self._merge_seconds: float | None = None

    def begin(self, result: Run, command: Sequence[str] | None) -> None:
        """Record the run, or check that it is the recorded one.

        Raises:
            InputError: for a run that was recorded with something else; names what has changed.
        """
        self._request = record_request(self._sessions, self._texts, self._selected, self._options)
        if not self.directory.has_record:
            # The first model last, so that it is loaded when it is measured.
            for session in self._sessions[::-1]:
                self._descriptions[session.label] = ModelDescription.of(
                    session, self._selected, self._options
                )
                if session is not self._sessions[0] or self._crew.makes_plans:
                    session.release()
            record = record_run(
                self._request,
                {session.label: self._descriptions[session.label] for session in self._sessions},
                self._selected,
                options=result.options,
                versions=result.versions,
                notes=result.warnings,
                command=command,
            )
            if self.directory.write_record(record):
                return
        self.require_recorded()

    def require_recorded(self) -> None:
        """Check that the run is the recorded one, and take the models' descriptions from the record.

        Raises:
            InputError: as `begin`.
        """
        self._request = self._request or record_request(
            self._sessions, self._texts, self._selected, self._options
        )
        record = self.directory.read_record()
        self._take_descriptions(record, differences(record["request"], self._request))

    def adopt(self) -> None:
        """Take the run from its record, without looking at the files of its models.

        Raises:
            InputError: for a metric that differs here.
        """
        record = self.directory.read_record()
        self._request = record["request"]
        self._take_descriptions(record, [])

    def _take_descriptions(self, record: Mapping[str, Any], changed: list[str]) -> None:
        """Take the models' descriptions from a record, unless something has `changed`."""
        for model in record["models"] if not changed else []:
            description = ModelDescription.from_dict(model)
            self._descriptions[description.record.info.label] = description
            changed += self._changed_metrics(description)
        if changed:
            raise InputError(
                f"the run in {str(self.directory.path)!r} was made with something else: {'; '.join(changed)}; give the "
                f"command in its {RECORD}, another --out, or --fresh to start over in a new directory"
            )

    def _changed_metrics(self, description: ModelDescription) -> list[str]:
        """Return the metrics that start in another state, because a file that they read has changed."""
        from phaselens.plugin.state_codec import encode_state

        factory = self._factory(description)
        return [
            f"metric {name}: a file that it reads has changed"
            for name, digest in description.empty_states.items()
            if encode_state(factory.empty_state(name)).digest != digest
        ]

    def _factory(self, description: ModelDescription) -> MetricFactory:
        record = description.record
        return MetricFactory(record.info, self._selected, seed=self._options.seed, bos=record.bos)

    def measure(self, result: Run, observer: Observer) -> None:
        """Measure the shards that are missing, and add the tables of all models to `result`."""
        start = time.monotonic()
        for number, session in enumerate(self._sessions):
            description = self.description(number)
            self._crew.begin_model(number, session.label, [text.id for text in self._texts])
            work, store = self.work(number, observer, self._crew)
            if self._crew.computes_here and not any(store.exists(unit) for unit in work.units):
                n_batches = sum(len(shard.batches) for shard in description.shards)
                announce_plan(session, self._selected, self._options, n_batches)
            for name, failure in description.failures.items():
                result.metrics[name].failures.append(failure)
            without_values = description.without_values
            metrics = work.measure(
                description.names,
                result.metrics,
                observes=description.observes,
                without_values=without_values,
            )
            session.release()
            self._n_saved += store.n_saved
            if self._crew.makes_tables:
                self._add_tables(result, description, metrics, store.damaged, work.notes)
        self._n_saved += self._crew.n_computed
        if self._crew.makes_plans:
            self._merge_seconds = round(time.monotonic() - start - self._crew.seconds, 6)
        result.failed_shards.extend(self._crew.failed_shards)

    def _add_tables(
        self,
        result: Run,
        description: ModelDescription,
        metrics: Mapping[str, Metric[Any]],
        damaged: Sequence[str],
        remarks: Sequence[str],
    ) -> None:
        """Add the tables of one model to `result`."""
        without_values = description.without_values
        for name in without_values.keys() & metrics.keys():
            for text, code in without_values[name]:
                metrics[name].warn(text, code or None)
        tables, warnings = tables_of_metrics(metrics, result.metrics, without_values)
        notes = [f"{name} was damaged, and was computed again" for name in damaged]
        result.add_model(
            description.record,
            description.n_tokens,
            description.cut,
            tables,
            [*description.warnings, *warnings, *remarks, *notes],
        )

    @property
    def n_saved(self) -> int:
        """Number of shards that were computed for this run by this call."""
        return self._n_saved

    def description(self, number: int) -> ModelDescription:
        """Return the description of the model of that number."""
        return self._descriptions[self._sessions[number].label]

    def work(self, number: int, observer: Observer, crew: Crew) -> tuple[ShardWork, DirectoryStore]:
        """Return the work on the model of that number, and the store of its results."""
        session, description = self._sessions[number], self.description(number)
        store = DirectoryStore(self.directory, self._key(number, session.label, description))
        sizes = (self._options.shard_tokens, self._options.batch_tokens)
        work = ShardWork(
            session,
            self._factory(description),
            description.shards,
            sizes,
            observer=observer,
            store=store,
            keys=description.keys,
            crew=crew,
            n_passes=description.n_passes,
        )
        return work, store

    def _key(self, number: int, label: str, description: ModelDescription) -> ModelKey:
        digest = digest_of(
            {
                "model": self._request["models"][label],
                "positions": list(description.record.info.positions),
                "dtype": description.record.info.dtype,
                "bos": description.record.bos,
                "label": label,
                "metrics": self._request["metrics"],
                "empty_states": description.empty_states,
                "options": self._request["options"],
                "versions": self._request["versions"],
            }
        )
        return ModelKey(number, label, digest)

    def record_failed_shards(self, result: Run) -> None:
        """Record the shards of a part that could not be computed, for the process that merges the run."""
        for shard in result.failed_shards:
            self.directory.write_failed_shard(shard)

    def finish(self, result: Run) -> None:
        """Write tables, errors, and at last the file that marks the run as complete."""
        if self.directory.is_complete:  # without the shards that have been computed by now
            self.directory.set_aside_results()
        sections = {
            name: [as_json(section) for section in report_sections(metric)]
            for name, metric in result.metrics.items()
        }
        failures = {
            name: [failure.as_dict() for failure in metric.failures]
            for name, metric in result.metrics.items()
            if metric.failures
        }
        for name, metric in result.metrics.items():
            for table_name, table in metric.tables.items():
                self.directory.write_table(name, metric.metric.version, table_name, table)
            for failure in metric.failures:
                file = f"{name}.{failure.model}".replace("/", "_")
                self.directory.write(f"errors/{file}.txt", f"{failure}\n\n{failure.traceback}".encode())
        self.directory.write_result(
            {
                "times": {"finished": now(), "seconds": round(time.monotonic() - self._started, 3)}
                | ({} if self._merge_seconds is None else {"merge_seconds": self._merge_seconds}),
                "n_shards_computed": self._n_saved,
                "failed_shards": [shard.as_dict() for shard in result.failed_shards],
                "warnings": [[str(warning), MetricWarning(warning).code] for warning in result.warnings],
                "failures": failures,
                "sections": sections,
                "tables": {
                    name: {table_name: table.not_finite for table_name, table in metric.tables.items()}
                    for name, metric in result.metrics.items()
                },
            }
        )
