"""Calls that do not fit a verb: one line that says how to write them."""

from __future__ import annotations

import pytest

MISFITS = [
    ("metric('logit_diff', 'e', 'o')", "logit_diff is a command; write logit_diff('e', 'o')"),
    ("metric('logit_diff')", "logit_diff is a command"),
    ("metric(logit_diff)", "logit_diff is a command"),
    (
        "metric('sinks', 0.3)",
        'metric takes (name), received 2 positional arguments; for example metric("sinks"',
    ),
    ("metric(threshold=0.3)", "metric: name the metric that has the parameter threshold"),
    ("metric('loss', threshold=0.3)", "metric: loss takes no parameters"),
    ("metric(5)", "expected a metric as logit_diff(…), loss or a function of logits, received 5"),
    (
        "metric(__import__('numpy').zeros(3))",
        "expected a metric as logit_diff(…), loss or a function of logits, received ndarray of shape (3,)",
    ),
    (
        "metric(__import__('numpy').zeros(3), threshold=1)",
        "expected a metric as logit_diff(…), loss or a function of",
    ),
    ("metric(print, threshold=1)", "metric: a function takes no parameters"),
    ("ablate(what='mlp', to='mean')", "ablate has no argument 'to'; did you mean value='mean'?"),
    (
        "ablate(what='pattern', value='mean')",
        "blocks.0.attn.hook_pattern: value='mean': the mean of its rows over queries lets a query attend to later",
    ),
    ("patch(layers=3)", "patch has no argument 'layers'; did you mean layer=3? For example patch("),
    ("patch(what='mlp', position=2)", "patch has no argument 'position'; did you mean pos=2?"),
    (
        "patch(what='mlp', colour=2)",
        "patch has no argument 'colour'; known: head, key, layer, point, pos, what.",
    ),
    (
        "patch('blocks.1.hook_mlp_out', 3)",
        "patch takes (point), and by name layer, pos, head, key, what, received 2 positional arguments",
    ),
    ("patch(what='mlp', pos='x')", "pos='x': give a number, several, or 'all'"),
    ("sweep('q', what='k')", "sweep: what is given twice, as 'q' and as 'k'"),
    ("sweep('q', 'nonsense')", "what='nonsense'; known: attn"),
    ("sweep(['q', 3])", "what=3"),
    ("sweep('q', file=3)", "file=3: give the name of a file"),
    ("attribution('q', observer=1)", "attribution has no argument 'observer'"),
    ("logit_diff(' he')", 'logit_diff needs b; for example logit_diff(" he", " she")'),
    ("logit_diff('e', 'o', pos=99)", "logit_diff('e', 'o', pos=99) needs a prompt of 100 tokens or more"),
    ("logit_diff('e', 'o', pos='x')", "logit_diff: pos='x'; give one position"),
    (
        "run(1, 2, 3)",
        "run takes (top, pos), received 3 positional arguments; for example run(top=10, pos=5)",
    ),
    ("run('x')", "top='x': give a number, 1 to 67"),
    ("null_rope(layers=2)", "null_rope has no argument 'layers'; did you mean layer=2?"),
    ("restore_rope(layers=2)", "restore_rope has no argument 'layers'; did you mean layer=2?"),
    ("restore_rope(1, 2)", "restore_rope takes (layer), received 2 positional arguments"),
    ("condition(5)", "condition: name is 5; give the name of a causal metric"),
    ("condition()", "condition needs name; for example condition("),
    ("undo('x')", "undo takes no arguments; write undo()"),
    ("m.prompt('e', prepend_bos=True)", "prompt has no argument 'prepend_bos'; did you mean bos='always'?"),
    ("guide(5)", "guide: no verb '5'; known: "),
    (
        "m.prompt('a', boss='never')",
        "prompt has no argument 'boss'; did you mean bos='never'? For example m.prompt(",
    ),
    ("m.prompt()", "prompt needs text; for example m.prompt("),
]


@pytest.mark.slow
def test_the_error_of_a_call_that_does_not_fit_is_one_line(ready):
    for line, message in MISFITS:
        out, error = ready(line)
        assert error.startswith(f"error: {message}"), line
        assert (out, error.count("\n")) == ("", 1), line
    assert ready("patched()") == ("no edits\n", "")
    assert ready("metric()")[0] == "metric: logit_diff('e', 'o')\n"


def test_a_type_error_inside_a_metric_stays_a_type_error(ready):
    assert ready("metric(lambda logits: logits + 'a')", "run()")[1].startswith(
        "error: TypeError: unsupported operand"
    )
