"""Every usage error is one line: what was asked, what was found and what to do."""

from pathlib import Path

import pytest

from tests.cli.conftest import ErrorLine, Phaselens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "no metric was named; add -p NAME, one of: "),
        (["run", "-p", "sink"], "no plugin 'sink'; did you mean sinks?"),
        (["run", "-p", "sinks,other"], "no plugin 'other'; known: "),
        (["run", "-p"], "Option '-p' requires an argument." ),
        (["run", "-p", "sinks", "--texts", "none.txt"], "texts file 'none.txt' does not exist; name a file"),
        (["run", "-p", "sinks", "--texts", "/"], "texts '/': the folder holds none of a .txt file"),
        (["run", "-p", "sinks", "--max-tokens", "0"], "Invalid value for '--max-tokens': 0 is not in the range x>=1."),
        (["run", "-p", "sinks", "--n-texts", "-3"], "Invalid value for '--n-texts': -3 is not in the range x>=1."),
        (["run", "-p", "sinks", "--batch-tokens", "many"], "Invalid value for '--batch-tokens': 'many'"),
        (["run", "-p", "sinks", "--bos", "perhaps"], "Invalid value for '--bos': 'perhaps' is not one of 'auto',"),
        (["run", "-p", "sinks", "--format", "xml"], "Invalid value for '--format': 'xml' is not one of 'table',"),
        (["run", "-p", "sinks", "--positions", "nope"], "--positions 'nope': write LABEL=auto or LABEL=nope"),
        (["run", "-p", "sinks", "--positions", "rop=nope"], "positions: no model is labelled 'rop'; did you mean rope"),
        (["run", "-p", "sinks", "--positions", "rope=nop"], "positions of 'rope': 'nop'; did you mean nope?"),
        (["run", "-p", "sinks", "--table", "layer"], "no table 'layer'; did you mean layers?"),
        (["run", "-p", "sinks", "--table", "other.layers"], "--table other.layers: 'other' is not in this run;"),
        (["run", "-p", "sinks", "--table", "layer", "--format", "json"], "no table 'layer'; did you mean layers?"),
        (["run", "-p", "sinks", "a=rope", "a=drope"], "two models are labelled 'a'; give each its own label"),
        (["run", "-p", "sinks", "a="], "model 'a=' names no source; write [LABEL=]SOURCE[@REVISION]"),
        (["run", "-p", "sinks", "a@"], "model 'a@': nothing follows the @; write SOURCE@REVISION or SOURCE"),
        (["run", "-p", "sinks", "-P", "sinks.threshold"], "-P 'sinks.threshold': write METRIC.PARAMETER=VALUE,"),
        (["run", "-p", "sinks", "-P", "threshold=1"], "-P 'threshold=1': write METRIC.PARAMETER=VALUE,"),
        (["run", "-p", "sinks", "-P", "sink.threshold=1"], "-P 'sink.threshold=1': 'sink' is not in this run; did"),
        (["run", "-p", "sinks", "-P", "sinks.treshold=1"], "sinks: no parameter 'treshold'; did you mean threshold?"),
        (["run", "-p", "sinks", "-P", "sinks.threshold=2"], "sinks: threshold is '2'; give a number, 0 to 1"),
        (["run", "-p", "sinks", "--threshold", "nan"], "sinks: threshold is 'nan'; give a number, 0 to 1"),
        (["run", "-p", "sinks", "--sink-position", "-1"], "sinks: sink_position is '-1'; give a whole number, 0"),
        (["run", "-p", "sinks", "--order", "x"], "sinks: order is 'x'; give threshold_then_mean or mean_then"),
        (["run", "-p", "sinks", "--treshold", "1"], "No such option '--treshold'."),
        (["run", "--threshold", "1"], "no such option: --threshold; to set an option of a metric, add -p NAME"),
        (
            ["run", "-p", "sinks", "-P", "sinks.threshold=1", "-P", "sinks.threshold=0"],
            "-P 'sinks.threshold=0': sinks.threshold is given twice; keep one",
        ),
        (
            ["run", "-p", "sinks", "-P", "sinks.threshold=1", "--threshold", "0"],
            "sinks.threshold is set by -P and by its flag; keep one",
        ),
        (["frobnicate"], "No such command 'frobnicate'."),
        (["plugins", "--loud"], "No such option '--loud'."),
        (["hooks"], "Missing argument 'MODEL'."),
        (["check", "rope", "--positions", "rotary"], "Invalid value for '--positions': 'rotary' is not one of"),
    ],
)  # fmt: skip
def test_bad_usage_exits_with_code_2(error_line: ErrorLine, arguments: list[str], message: str) -> None:
    assert error_line(2, *arguments).startswith(message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nbad \xff\n", "line 2: not valid UTF-8"),
        ("a.txt", b"\n\n", "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
        ("a.jsonl", b'{"txt": "a"}\n', "line 1 has no 'text'; its keys are 'txt' (--text-field)"),
    ],
)
def test_unusable_texts_exit_with_code_2(
    error_line: ErrorLine, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in error_line(2, "run", "-p", "sinks", "--texts", tmp_path / name)


def test_a_message_with_line_ends_and_escape_codes_is_one_escaped_line(error_line: ErrorLine) -> None:
    message = error_line(2, "run", "-p", "sinks\n\x1b[31m")
    assert "\x1b" not in message
    assert message.startswith("no plugin 'sinks")


def test_bad_usage_is_found_without_importing_torch(
    error_line: ErrorLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import builtins

    real = builtins.__import__

    def without_torch(name: str, *args: object, **kwargs: object) -> object:
        assert name.split(".")[0] not in ("torch", "transformers", "transformer_lens")
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_torch)
    error_line(2, "run", "-p", "sinks", "--texts", "none.txt")


def test_debug_adds_the_traceback_before_the_line(phaselens: Phaselens) -> None:
    outcome = phaselens("run", "-p", "sink", "--debug")
    assert outcome.err.startswith("Traceback (most recent call last)")
    assert outcome.err.splitlines()[-1] == "phaselens: error: no plugin 'sink'; did you mean sinks?"


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, SystemError("a bug\nhere"), OSError(28, "No space left")]
)
def test_an_unforeseen_error_is_one_line(
    phaselens: Phaselens, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("phaselens.runs.run", fail)
    outcome = phaselens("run", "-p", "sinks")
    expected = {
        KeyboardInterrupt: (130, "phaselens: error: interrupted\n"),
        SystemError: (
            1,
            "phaselens: error: unforeseen SystemError: a bug here; please report it with the output of --debug\n",
        ),
        OSError: (
            2,
            "phaselens: error: No space left: standard output; free some space, or name another place\n",
        ),
    }[error if isinstance(error, type) else type(error)]
    assert (outcome.code, outcome.err) == expected
