"""Results of patching as tables, and as the HTML that a notebook shows."""

from __future__ import annotations

import dataclasses

import numpy as np

from phaselens.patching import Experiment, agreement, align
from phaselens.patching.results import unmeasured

MARKUP = "<script>alert(1)</script>"


def test_the_table_of_a_sweep_has_every_cell_with_its_tokens(experiment: Experiment) -> None:
    sweep = experiment.sweep("resid")
    table = sweep.to_table()
    assert [column.name for column in table.spec.columns] == [
        "layer", "pos", "clean_token", "corrupt_token", "value", "effect",
    ]  # fmt: skip
    frame = table.to_arrow().to_pydict()
    assert np.array_equal(np.reshape(frame["value"], sweep.values.shape), sweep.values)
    assert (frame["clean_token"][4], frame["corrupt_token"][4]) == ("'b'", "'d'")
    partial = dataclasses.replace(sweep, values=unmeasured(sweep.values.shape))
    assert set(partial.to_table().column("effect")) == {None}
    by_head = experiment.sweep("v", by="pos-head").to_table()
    assert len(by_head.rows) == 3 * len(experiment.clean) * experiment.lens.info.n_heads_in(0)


def test_every_result_is_shown_as_html_without_scripts(experiment: Experiment) -> None:
    experiment.patch("blocks.1.hook_resid_post", pos=4)
    sweeps = [experiment.sweep("resid"), experiment.sweep("v", by="pos-head")]
    results = [
        experiment.clean,
        align(experiment.clean, experiment.corrupt),
        experiment.run(),
        experiment.measure("sinks"),
        experiment.patched(),
        agreement(sweeps[0], experiment.attribution("resid")),
        *sweeps,
        *(dataclasses.replace(sweep, clean_words=(MARKUP,) * 9, metric=MARKUP) for sweep in sweeps),
    ]
    pages = [result._repr_html_() for result in results]
    assert all(page.startswith("<div>") and "<script" not in page for page in pages)
    assert "&lt;script&gt;" in pages[-1]
    assert "rgba(0,114,178" in pages[-4]
    assert "the strongest cells" in pages[-3]
    assert "loss, nats per token" in pages[2]
    experiment.undo()
    assert "no edits" in experiment.patched()._repr_html_()


def test_a_wide_sweep_says_how_many_columns_it_leaves_out(experiment: Experiment) -> None:
    sweep = experiment.sweep("resid")
    wide = dataclasses.replace(
        sweep, values=np.ma.zeros((3, 70)), clean_words=("a",) * 70, corrupt_words=("a",) * 70
    )
    assert "6 more columns" in wide._repr_html_()
