"""The page on runs names the files that a run writes, and its Python examples work."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

import phaselens
from phaselens.runs import DIFFERENCES
from tests.toys import letters, toy_lens

PAGE = (Path(__file__).parents[2] / "docs" / "runs.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "study"
    phaselens.run(toy_lens(), metrics="sinks", texts=[letters(5), letters(9)], out=folder)
    return folder


@pytest.mark.slow
def test_every_file_and_folder_of_a_run_is_on_the_page(study: Path) -> None:
    table = PAGE.partition("| path | contents |")[2].partition("\n\n")[0]
    listed = {name.rstrip("/") for name in re.findall(r"^\| `([\w./]+)` \|", table, re.MULTILINE)}
    assert {path.name for path in study.iterdir()} == listed - {"errors"}


def test_the_table_of_the_examples_has_the_schema_and_units_that_the_page_states(study: Path) -> None:
    (path,) = set(re.findall(r"study/(tables/[\w./-]+)", PAGE))
    schema = parquet.read_schema(study / path)
    assert f"`{schema.metadata[b'phaselens.schema'].decode()}`" in PAGE
    assert schema.field("sink_rate").metadata == {b"unit": b"share of heads"}


def test_the_first_example_opens_the_run(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    monkeypatch.chdir(study.parent)
    example = re.search(r"```python\n(import phaselens.*?)```", PAGE, re.DOTALL)
    assert example is not None
    names: dict[str, object] = {}
    exec(example[1] + "\nframe = run.rows('sinks', 'layers').to_pandas()", names)
    frame = names["frame"]
    assert frame.attrs["units"]["sink_rate"] == "share of heads"  # type: ignore[attr-defined]
    assert len(frame) == 2  # type: ignore[arg-type]


def test_the_page_lists_everything_that_makes_runs_incomparable() -> None:
    table = PAGE.partition("| name | what differs |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(DIFFERENCES)
