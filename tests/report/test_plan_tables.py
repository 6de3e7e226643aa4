"""Plans as tables, and as a sentence."""

from __future__ import annotations

import io

from phaselens.report.plan_tables import plan_sentence, print_plan
from phaselens.report.terminal_layout import console
from phaselens.runs import ModelPlan, PlannedPass, RunPlan

PASSES = (
    PlannedPass("unedited model", ("sinks",), 1200, 600_000, 10, 74, 1, 3600.0),
    PlannedPass("conditions", ("bos-mlp",), 1200, 600_000, 10, 74, 5, 7200.0),
)
MODEL = ModelPlan(
    "a\x1b[31m", "cpu", 1200, 3, 600_000, 10, 30.0, 8000, 2 * 10**9, 16 * 10**9, PASSES, ("x: no",)
)


def test_the_sentence_has_everything() -> None:
    assert plan_sentence(MODEL) == (
        "a\x1b[31m: 1,200 texts, 600,000 tokens, 10 shards; unedited model (sinks): 1 × 74 forwards; conditions "
        "(bos-mlp): 5 × 74 forwards; about 3 h, 2.0 GB of 16.0 GB on cpu"
    )


def test_the_tables_have_everything_on_lines_without_control_characters() -> None:
    file = io.StringIO()
    print_plan(RunPlan((MODEL,), ("2 empty lines skipped",)), console(file))
    text = file.getvalue()
    assert "\x1b" not in text
    for part in ("1,200", "600,000", "2.0 GB", "16.0 GB", "unedited model", "conditions", "3 h", "bos-mlp"):
        assert part in text
    assert text.splitlines()[-3].startswith("about 3 h in this process, from the largest batch: 8,000 tokens")
    assert text.splitlines()[-2:] == ["note: 2 empty lines skipped", "note: x: no"]
