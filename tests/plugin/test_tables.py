"""Tables hold plain, finite, typed values."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phaselens.plugin import Column, TableSpec

SPEC = TableSpec(
    "layers", (Column("text", str), Column("layer", int, "index"), Column("score", float, "share"))
)


def test_scalars_of_libraries_become_plain_ones() -> None:
    table = SPEC.build([("a", np.int64(3), np.float32(0.5)), ("b", torch.tensor(4), torch.tensor(1.5))])
    assert table.rows == [("a", 3, 0.5), ("b", 4, 1.5)]
    assert [type(cell) for cell in table.rows[0]] == [str, int, float]


@given(st.lists(st.floats(), min_size=1))
def test_json_of_a_table_has_no_nan_whatever_goes_in(values: list[float]) -> None:
    table = SPEC.build([("a", 0, value) for value in values])
    assert json.loads(json.dumps(table.as_dict(), allow_nan=False)) == table.as_dict()
    wrong = sum(not math.isfinite(value) for value in values)
    assert table.not_finite == ({"score": wrong} if wrong else {})
    assert table.column("score").count(None) == wrong


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (("a", 0), "a row of 2 cells for 3 columns"),
        ((7, 0, 0.1), "column text: 7 is no str"),
        (("a", 0.5, 0.1), "column layer: 0.5 is no int"),
        (("a", True, 0.1), "column layer: True is no int"),
        (("a", 0, "0.1"), "column score: '0.1' is no float"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(row: tuple[object, ...], complaint: str) -> None:
    with pytest.raises(TypeError, match=complaint):
        SPEC.build([row])


def test_arrow_keeps_types_units_and_nulls() -> None:
    arrow = SPEC.build([("a", 0, None), (None, 1, 2)]).to_arrow()
    assert [str(field.type) for field in arrow.schema] == ["string", "int64", "double"]
    assert arrow.schema.field("score").metadata == {b"unit": b"share"}
    assert arrow.to_pylist() == [
        {"text": "a", "layer": 0, "score": None},
        {"text": None, "layer": 1, "score": 2.0},
    ]


def test_json_says_name_and_unit_of_each_column() -> None:
    assert SPEC.build([]).as_dict() == {
        "columns": [
            {"name": "text", "unit": None},
            {"name": "layer", "unit": "index"},
            {"name": "score", "unit": "share"},
        ],
        "rows": [],
    }
