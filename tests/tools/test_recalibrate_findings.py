"""The tables of docs/real-model.md, from stored runs of tiny models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tools.recalibrate import figures, findings

import phaselens
from phaselens.testing import tiny_lens

TEXTS = ["it was a dark night and the wolves", "to be or not to be that is", "call me what you like"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    models = [tiny_lens("llama", label=label) for label in ("a", "b")]
    metrics = (["sinks", "bos-norm", "compression"], ["bos-v", "massive-values"])
    for name, chosen in zip("xy", metrics, strict=True):
        phaselens.run(models, metrics=chosen, texts=TEXTS, out=folder / name)
    return folder / "x", folder / "y"


@pytest.mark.slow
def test_the_tables_join_the_metrics_of_all_runs(folders: tuple[Path, Path]) -> None:
    runs = findings.StoredRuns(folders)
    observed = findings.observations(runs)
    rows = runs.by_model("sinks", "texts")["a"]
    rates = [
        np.mean([row["score"] >= 0.3 for row in rows if row["text"] == text])
        for text in {row["text"] for row in rows}
    ]
    assert observed["heads that are sinks, all layers"]["a"].startswith(f"{100 * np.mean(rates):.0f} % (")
    (summary,) = runs.by_model("bos-norm", "summary")["b"]
    assert observed["largest norm of BOS"]["b"].startswith(f"{summary['peak']:,.0f} (")
    causes = findings.causes(runs)
    ratio = next(row["ratio"] for row in runs.rows("bos-v", "conditions") if row["condition"] == "all layers")
    assert causes["values of BOS removed, all layers"]["a"].startswith(f"{ratio:.3f}"[:4])
    assert set(causes["perplexity"]) == {"a", "b"}


def test_a_model_without_a_value_has_a_dash() -> None:
    table = findings.markdown({"x": {"a": "1"}, "y": {"b": "2"}}, "what")
    assert table.splitlines() == [
        "| what | `a` | `b` |", "|---|---|---|", "| x | 1 | – |", "| y | – | 2 |",
    ]  # fmt: skip
    assert findings.with_interval({"v": 1.0, "l": None, "h": 2.0}, "v", "l", "h", 1) == "–"


@pytest.mark.slow
def test_the_program_prints_both_tables(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["findings", *map(str, folders)])
    findings.main()
    printed = capsys.readouterr().out
    assert printed.count("|---|---|---|") == 2
    assert "massive values in Q, K, V" in printed


def test_the_figure_by_layer_has_each_models_values(folders: tuple[Path, Path]) -> None:
    runs = findings.StoredRuns(folders)
    drawn = figures.by_layer(runs)
    norms = [row["bos_norm"] for row in runs.by_model("bos-norm", "layers")["b"]]
    line = next(line for line in drawn.axes[1].lines if line.get_label() == "b")
    assert list(line.get_ydata()) == norms
