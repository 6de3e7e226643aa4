"""Models, options and metrics are parsed and checked before any model is loaded."""

from pathlib import Path

import pytest

from phaselens.errors import InputError
from phaselens.plugin import Metric
from phaselens.runs import ModelSpec, RunOptions, select_metrics
from phaselens.runs.run_options import distinct_labels
from phaselens_plugins.sinks import Sinks


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rope", ("rope", None, None)),
        ("org/model", ("org/model", None, None)),
        ("org/model@v1.0", ("org/model", None, "v1.0")),
        ("org/model@refs/pr/1", ("org/model", None, "refs/pr/1")),
        ("base=org/model@main", ("org/model", "base", "main")),
        ("my-label.2=rope", ("rope", "my-label.2", None)),
        ("/some/where", ("/some/where", None, None)),
        ("/no=label/here", ("/no=label/here", None, None)),
    ],
)
def test_a_model_is_parsed_into_label_source_and_revision(
    text: str, expected: tuple[str, str | None, str | None]
) -> None:
    spec = ModelSpec.parse(text)
    assert (spec.source, spec.label, spec.revision) == expected


def test_an_existing_path_is_read_as_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b@c").mkdir()
    assert ModelSpec.parse("a=b@c") == ModelSpec("a=b@c")
    assert ModelSpec.parse("x=a=b@c") == ModelSpec("a=b@c", "x")
    (tmp_path / "plain").mkdir()
    with pytest.raises(InputError, match="a folder has no revisions; leave '@v1' out"):
        ModelSpec.parse("plain@v1")


@pytest.mark.parametrize("text", ["", "a=", "model@", "a=model@"])
def test_an_incomplete_model_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"write \[?(LABEL|SOURCE)"):
        ModelSpec.parse(text)


def test_labels_are_short_where_that_is_unique_and_full_otherwise() -> None:
    parse = ModelSpec.parse
    assert distinct_labels([parse("/a/one"), parse("org/two")]) == ["one", "two"]
    assert distinct_labels([parse("/a/one"), parse("/b/one")]) == ["a/one", "b/one"]
    assert distinct_labels([parse("/a/x/one"), parse("/b/x/one"), parse("two")]) == [
        "a/x/one",
        "b/x/one",
        "two",
    ]
    assert distinct_labels([parse("org/one@v1"), parse("org/one@v2")]) == ["org/one@v1", "org/one@v2"]
    assert distinct_labels([parse("org/one"), parse("org/one@v2")]) == ["org/one", "org/one@v2"]
    assert distinct_labels([parse("one=/b/two"), parse("/a/one")]) == ["one", "a/one"]
    assert distinct_labels([parse("/a/one"), parse("x=/a/one")]) == ["one", "x"]
    with pytest.raises(
        InputError, match="two models are labelled 'rope'; give each its own label: LABEL=SOURCE"
    ):
        distinct_labels([parse("rope"), parse("rope")])
    with pytest.raises(InputError, match="two models are labelled 'x'"):
        distinct_labels([parse("x=rope"), parse("x=drope")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; give a whole number of at least 1"),
        ({"n_texts": -1}, "n_texts is -1"),
        ({"batch_tokens": 1.5}, "batch_tokens is 1.5"),
        ({"batch_tokens": True}, "batch_tokens is True"),
        ({"seed": -1}, "seed is -1"),
        ({"bos": "allways"}, r"bos is 'allways'; did you mean always\?"),
        ({"positions": {"rope": "nop"}}, r"positions of 'rope': 'nop'; did you mean nope\?"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RunOptions(**options)  # type: ignore[arg-type]


def test_metrics_are_chosen_by_name_by_class_or_with_parameters() -> None:
    for request in ("sinks", Sinks, ["sinks"], ("sinks", {}), [(Sinks, {"threshold": 0.3})]):
        (selected,) = select_metrics(request)  # type: ignore[arg-type]
        assert (selected.metric, selected.params) == (Sinks, Sinks.Params())
    assert select_metrics("sinks")[0].distribution.startswith("phaselens ")
    assert select_metrics(Sinks)[0].distribution == "module phaselens_plugins.sinks"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ([], "no metric was requested; known: .*sinks"),
        ("sink", r"no plugin 'sink'; did you mean sinks\?"),
        (("sinks", {"treshold": 1}), r"sinks: no parameter 'treshold'; did you mean threshold\?"),
        (("sinks", {"threshold": 7}), "sinks: threshold is 7; give a number, 0 to 1"),
        (["sinks", Sinks], "metric 'sinks' is requested twice"),
        ([Metric], "metrics: Metric sets no `name`"),
        ([int], "metrics: <class 'int'> is not a subclass"),
    ],
)
def test_metrics_that_cannot_be_used_are_refused(request_: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        select_metrics(request_)  # type: ignore[arg-type]


def test_options_are_checked_when_they_are_constructed() -> None:
    with pytest.raises(InputError, match="seed is None"):
        RunOptions(seed=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="positions is None"):
        RunOptions(positions=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "spec"), [
    ("gpt2", ModelSpec("gpt2")),
    ("gpt2@main", ModelSpec("gpt2", None, "main")),
    ("label=gpt2", ModelSpec("gpt2", "label")),
])  # fmt: skip
def test_a_hub_id_needs_no_owner(text: str, spec: ModelSpec) -> None:
    assert ModelSpec.parse(text) == spec
