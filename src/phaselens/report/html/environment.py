"""The template, the styles and the script of the report, and Jinja2, which fills the template."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from phaselens.errors import InputError

_SCRIPTS = ("core.js", "tables.js", "heads.js", "texts.js")


def require_jinja() -> Any:
    """Return the module `jinja2`.

    Raises:
        InputError: where it is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise InputError(
            "the HTML report needs Jinja2, which is not installed; install it: pip install 'phaselens[report]'"
        ) from error
    return jinja2


def environment() -> Any:
    """Return Jinja2's environment, which escapes every value."""
    jinja2 = require_jinja()
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def asset(name: str) -> str:
    """Return the content of a file that the package holds for the report."""
    return (files("phaselens.report.html") / "assets" / name).read_text(encoding="utf-8")


def script() -> str:
    """Return the report's script."""
    return "\n".join(map(asset, _SCRIPTS))
