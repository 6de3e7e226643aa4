"""Which effects of conditions stand out: those beyond their controls, named with layer, model and interval."""

from __future__ import annotations

from phaselens.report.html.charts import _value_scale, _value_ticks
from phaselens.report.html.findings import find
from tests.report.causal_runs import baseline, causal_run, condition, contrast, two_models


def test_an_effect_beyond_its_control_stands_out_and_one_that_its_control_has_does_not() -> None:
    (finding,) = find(two_models(), [])
    assert (finding.metric, finding.kind) == ("effects", "effect")
    assert finding.text.startswith("write layer at layer 1: ")
    for part in ("in rope", "1.149", "1.112", "beyond its controls"):
        assert part in finding.text
    assert "drope" not in finding.text, "in drope the control has the same effect"
    assert 0 < finding.size < 1


def test_an_effect_whose_interval_has_no_effect_in_it_does_not_stand_out() -> None:
    rows = [baseline(), condition("a", None, 1.01, 0.99, 1.03), condition("b", None, 1.0, 1.0, 1.0)]
    differences = [contrast("a", "b", None, 0.01, -0.01, 0.03, 0.4)]
    assert find(causal_run({"rope": {"conditions": rows, "contrasts": differences}}), []) == []


def test_values_of_many_orders_are_on_a_logarithmic_axis_with_powers_of_ten() -> None:
    for numbers, ticks in (
        ([3.0, 4e6], [10.0, 100.0, 1000.0, 1e4, 1e5, 1e6]), ([2e-9, 5e9], None), ([1.5, 1.5e5], None),
    ):  # fmt: skip
        scale = _value_scale(numbers, is_percent=False)
        assert scale.is_log
        drawn = _value_ticks(scale)
        assert drawn
        assert all(min(numbers) <= tick <= max(numbers) for tick in drawn)
        assert ticks is None or set(drawn) <= set(ticks)
    for numbers in ([0.0, 4e6], [-3.0, 4e6], [1.0, 2.0]):
        assert not _value_scale(numbers, is_percent=False).is_log
