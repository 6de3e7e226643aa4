"""Studies are read from TOML, entry by entry, and the shipped ones hold what their sources state."""

from __future__ import annotations

import pytest

from phaselens.errors import InputError
from phaselens.runs.study_file import parse_study, read_study, require_measurable, shipped_studies
from tests.runs.studies import study_text


def test_a_list_of_published_values_is_one_value_for_each_layer() -> None:
    study = parse_study(study_text(), "small")
    assert [(value.layer, value.published) for value in study.values[:3]] == [(0, 0.5), (1, 0.25), (2, 0.125)]
    assert study.runs[0].texts == ("a b c d e", "f g h i")
    assert study.runs[0].options == {"max_tokens": 4, "bos": "always"}
    require_measurable(study)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('name = "small"', 'name = "small"\ncode = "import os"', "has the key 'code'"),
        ('schema = "phaselens.study/1"', 'schema = "other"', "has the schema 'other'"),
        ('title = "A small study"', "", "has no 'title'"),
        ("[models]", "[models", "is not TOML"),
        ('run = "published"\nmodel = "one"', 'run = "publishd"\nmodel = "one"', "did you mean published"),
        ('model = "two"', 'model = "tow"', "did you mean two"),
        ("published = 3.5", 'published = "3.5"', "give a number"),
        ("published = 3.5", "published = nan", "give a number"),
        ('reduce = "argmax"', 'reduce = "argmaxx"', "did you mean argmax"),
        ("max_tokens = 4", 'max_tokens = "4"', "max_tokens is '4'"),
        ('place = "Table 1"', "", "has no 'place'"),
        ('["a b c d e", "f g h i"]', '"-"', "texts is '-'"),
        ('"other precision: 4 bits"', '"a | b"', "holds a |"),
    ],
)
def test_an_entry_that_does_not_fit_is_named(old: str, new: str, problem: str) -> None:
    assert old in study_text()
    with pytest.raises(InputError, match=problem.replace("|", r"\|")):
        parse_study(study_text().replace(old, new), "small")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("[run.metrics.sinks]", "[run.metrics.sink]", "did you mean sinks"),
        ("include_query0 = true", "include_query1 = true", "did you mean include_query0"),
        ('table = "summary"', 'table = "summery"', "did you mean summary"),
        ('column = "peak"', 'column = "peek"', "did you mean peak"),
        ('reduce = "argmax"', "where = { layr = 1 }", "did you mean layer"),
    ],
)
def test_what_cannot_be_measured_is_refused_without_a_model(old: str, new: str, problem: str) -> None:
    study = parse_study(study_text().replace(old, new, 1), "small")
    with pytest.raises(InputError, match=problem):
        require_measurable(study)


@pytest.mark.parametrize("name", shipped_studies())
def test_a_shipped_study_can_be_measured_and_cites_a_place_for_each_value(name: str) -> None:
    study = read_study(name)
    assert study.name == name
    require_measurable(study)
    assert all(value.place for value in study.values)


def test_the_study_of_rope_and_drope_holds_its_tables_and_marks_them() -> None:
    values = read_study("rope-vs-drope").values
    by_layer = [v for v in values if v.quantity == "sink rate by layer" and v.model == "rope"]
    assert [value.layer for value in by_layer] == list(range(32))
    assert by_layer[0].published == 0.6625
    assert all(any("known trap" in reason for reason in value.differs) for value in by_layer)
    reported = next(v for v in values if v.published == 1249)
    assert any("disagrees with itself (number)" in reason for reason in reported.differs)
    logged = {v.model: v.published for v in values if v.quantity.endswith("as logged")}
    assert logged == pytest.approx({"rope": 873.271, "drope": 1.01535})
    quantities = {value.quantity.partition(",")[0] for value in values}
    assert {"peak norm of position 0", "least entropy", "spike layer", "massive values of Q"} <= quantities


def test_an_unknown_study_is_refused_with_close_matches() -> None:
    with pytest.raises(InputError, match="did you mean rope-vs-drope"):
        read_study("rope-vs-drop")
