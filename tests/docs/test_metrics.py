"""The pages of metrics are complete, and each column of attention says which queries it is about."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from tools.metric_reference import COLUMNS, INDEX, page_of
from tools.page_blocks import blocks

from phaselens.plugin import CausalMetric, Column, Metric, plugins
from tests.toys import toy_info

#: The section on common properties of metrics, in one line.
SHARED = " ".join(INDEX.read_text(encoding="utf-8").partition("## Common properties")[2].split())
STATISTIC = re.compile(r"attn\.hook_(sink|itself|entropy|received|distance|lse|pattern|attn_scores)$")
METRICS = ["attention-patterns", "bos-write", "position-curves", "sink-tokens", "sinks", "tokens"]
BUILT_IN = [plugin.name for plugin in plugins().registered if plugin.distribution == "phaselens"]
#: Columns of tables by text that do not contain attention.
WITHOUT_ATTENTION = {
    ("bos-write", "value_norm"),
    ("bos-write", "value_norm_null"),
    ("position-curves", "norm"),
    ("position-curves", "cosine"),
    ("position-curves", "loss"),
    ("sink-tokens", "ratio"),
    ("sink-tokens", "carrying"),
    ("sink-tokens", "secondary"),
    ("tokens", "norm"),
}


def metrics_of_attention() -> Iterator[type[Metric[Any]]]:
    """Yield the built-in metrics that read a statistic of attention."""
    for plugin in plugins().registered:
        metric = plugins().metric(plugin.name)
        if plugin.distribution != "phaselens" or issubclass(metric, CausalMetric):
            continue
        if any(STATISTIC.search(point) for point in metric(toy_info(), metric.Params()).hooks()):
            yield metric


def says_which_queries(column: Column, previous_columns: list[Column]) -> bool:
    """Return whether the help names the queries, or names a previous column (for a null: its value's) that does."""
    if re.search(r"\bquer(y|ies)\b", column.help):
        return True
    if column.name.endswith("null") and column.help.startswith("uniform"):
        sources = [
            source for source in previous_columns if source.name == column.name.removesuffix("_null")
        ] or previous_columns[:1]
    elif re.search(r"\bthe same\b", column.help):
        sources = previous_columns[-1:]
    else:
        sources = [
            source for source in previous_columns if re.search(rf"(?<!\w){source.name}(?!\w)", column.help)
        ]
    return any(
        says_which_queries(source, previous_columns[: previous_columns.index(source)]) for source in sources
    )


def columns_of_texts(metric: type[Metric[Any]]) -> Iterator[tuple[str, Column, list[Column]]]:
    """Yield description, column and previous columns of tables by text and by distance; the others are their means."""
    for table in metric.tables:
        if not {"text", "distance"} & {column.name for column in table.columns}:
            continue
        numbers = [column for column in table.columns if column.type is float]
        numbers = [column for column in numbers if not column.help.startswith("95 % interval")]
        for index, column in enumerate(numbers):
            if (metric.name, column.name) not in WITHOUT_ATTENTION:
                yield f"{table.name}.{column.name}: {column.help}", column, numbers[:index]


def test_the_metrics_of_attention_are_checked() -> None:
    assert [metric.name for metric in metrics_of_attention()] == METRICS


@pytest.mark.parametrize("name", METRICS)
def test_every_column_of_attention_says_which_queries_it_is_about(name: str) -> None:
    columns = list(columns_of_texts(plugins().metric(name)))
    assert len(columns) >= 2
    assert [
        text for text, column, previous_columns in columns if not says_which_queries(column, previous_columns)
    ] == []


@pytest.mark.parametrize("name", BUILT_IN)
def test_each_page_has_all_parts_in_their_order(name: str) -> None:
    page = page_of(name).read_text(encoding="utf-8")
    assert page.startswith(f"# {name}\n\n**Question.** ")
    headings = ["Definition", "Example", "When it misleads", "Neighbours", "Parameters"]
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == headings
    question, *parts = re.split(r"^## .*$", page, flags=re.MULTILINE)
    assert "?" in question
    assert all(len(part.strip()) > 40 for part in parts)
    others = set(re.findall(r"`([\w-]+)[^`]*`", parts[3])) & set(BUILT_IN) - {name}
    assert others, "name the metrics that answer what this one cannot"
    assert f"]({COLUMNS.name}#{name})" in parts[4]


@pytest.mark.parametrize("name", BUILT_IN)
def test_each_page_states_formula_shapes_unit_null_and_source(name: str) -> None:
    facts = dict(
        re.findall(r"^\| (\w+) \| (.+) \|$", page_of(name).read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert list(facts)[:5] == ["formula", "shapes", "unit", "null", "source"]
    assert "[" in facts["shapes"]
    assert facts["source"] == plugins().metric(name).citation


@pytest.mark.parametrize("name", BUILT_IN)
def test_each_example_runs_the_metric_and_shows_its_output(name: str) -> None:
    *_, command, output = blocks(page_of(name).read_text(encoding="utf-8"))
    assert command.kind == "sh"
    assert f"-p {name} " in command.code
    assert output.mark == "output"
    assert len(output.code.splitlines()) > 3


def test_the_page_defines_what_a_query_sees() -> None:
    definition = re.search(r"- A query \*\*sees\*\* (.*?) - ", SHARED)
    assert definition is not None
    for statement in (
        "the keys up to its own; in a layer with a sliding window of w keys, only the last w of them, itself included",
        "what its forward uses, measured on the masks that reach its attention",
        "Every mean of attention is over the queries that see the keys in question",
        "Where no query does, the value is missing. Null values follow the same rule.",
    ):
        assert statement in definition[1]


def test_the_page_says_that_a_nulled_rotation_keeps_the_attention_factor() -> None:
    (statement,) = (phrase for phrase in SHARED.split(" - ") if phrase.startswith("`--positions LABEL=nope`"))
    for phrase in (
        "cos = 1 and sin = 0, both times the **attention factor**",
        "YaRN and longrope",
        "keep that factor",
    ):
        assert phrase in statement
