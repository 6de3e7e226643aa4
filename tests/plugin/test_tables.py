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


def test_scalars_of_numpy_and_torch_become_python_numbers() -> None:
    table = SPEC.build([("a", np.int64(3), np.float32(0.5)), ("b", torch.tensor(4), torch.tensor(1.5))])
    assert table.rows == [("a", 3, 0.5), ("b", 4, 1.5)]
    assert [type(cell) for cell in table.rows[0]] == [str, int, float]


@given(st.lists(st.floats(), min_size=1))
def test_json_of_a_table_never_contains_nan(values: list[float]) -> None:
    table = SPEC.build([("a", 0, value) for value in values])
    assert json.loads(json.dumps(table.as_dict(), allow_nan=False)) == table.as_dict()
    n_not_finite = sum(not math.isfinite(value) for value in values)
    assert table.not_finite == ({"score": n_not_finite} if n_not_finite else {})
    assert table.column("score").count(None) == n_not_finite


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("a", 0), "a row has 2 cells for 3 columns"),
        ((7, 0, 0.1), "column text: 7 is not of type str"),
        (("a", 0.5, 0.1), "column layer: 0.5 is not of type int"),
        (("a", True, 0.1), "column layer: True is not of type int"),
        (("a", 0, "0.1"), "column score: '0.1' is not of type float"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(row: tuple[object, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SPEC.build([row])


def test_arrow_keeps_types_units_and_nulls() -> None:
    arrow = SPEC.build([("a", 0, None), (None, 1, 2)]).to_arrow()
    assert [str(field.type) for field in arrow.schema] == ["string", "int64", "double"]
    assert arrow.schema.field("score").metadata == {b"unit": b"share"}
    assert arrow.to_pylist() == [
        {"text": "a", "layer": 0, "score": None},
        {"text": None, "layer": 1, "score": 2.0},
    ]


def test_json_has_the_name_and_unit_of_each_column() -> None:
    assert SPEC.build([]).as_dict() == {
        "columns": [
            {"name": "text", "unit": None},
            {"name": "layer", "unit": "index"},
            {"name": "score", "unit": "share"},
        ],
        "rows": [],
    }
