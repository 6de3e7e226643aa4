"""`phaselens new-plugin`: a package that works, to be changed into one's own."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template

import click

from phaselens.errors import InputError
from phaselens.plugin import plugins

# Template file: where it goes in the new package.
_FILES = {
    "pyproject.toml.tmpl": "pyproject.toml",
    "metric.py.tmpl": "{module}.py",
    "test_metric.py.tmpl": "tests/test_{module}.py",
    "README.md.tmpl": "README.md",
}


@click.command("new-plugin")
@click.argument("name")
@click.argument("folder", metavar="[DIR]", required=False)
def new_plugin(name: str, folder: str | None) -> None:
    """Write a package with a working metric NAME into DIR (default: ./phaselens-NAME): pyproject, metric, test, README.

    NAME is small letters, digits and dashes. Nothing is downloaded, and no file is overwritten.
    """
    from importlib.metadata import version
    from importlib.resources import files

    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise InputError(
            f"new-plugin {name!r}: write small letters, digits and dashes, such as delimiter-sinks"
        )
    for one in plugins().registered:
        if one.name == name:
            raise InputError(
                f"new-plugin {name!r}: {one.distribution} {one.version} has the name; choose another"
            )
    target = Path(folder or f"phaselens-{name}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"new-plugin: {str(target)!r} exists and is not an empty folder; name another")
    words = {
        "name": name,
        "module": f"phaselens_{name}".replace("-", "_"),
        "metric": "".join(part.capitalize() for part in name.split("-")),
        "params": "".join(part.capitalize() for part in name.split("-")) + "Params",
        "version": version("phaselens"),
    }
    for source, place in _FILES.items():
        template = Template((files("phaselens.cli") / "template" / source).read_text(encoding="utf-8"))
        path = target / place.format(**words)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(template.substitute(words), encoding="utf-8")
        click.echo(path)
    click.echo(f"next: pip install -e {target} && phaselens run -p {name}")
