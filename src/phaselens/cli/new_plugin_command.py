"""The command `phaselens new-plugin`, which writes a working package to start from."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template

import click

from phaselens.errors import InputError
from phaselens.plugin import plugins

# Destination in the new package of each template, without `.tmpl`.
_FILES = {
    "pyproject.toml": "pyproject.toml",
    "metric.py": "{module}.py",
    "test_metric.py": "tests/test_{module}.py",
    "README.md": "README.md",
    "ci.yml": ".github/workflows/ci.yml",
    "gitignore": ".gitignore",
}
# Templates that a causal metric has in another form.
_CAUSAL = {"metric.py": "causal_metric.py", "test_metric.py": "test_causal_metric.py"}
# What the metric of a template measures, for the README.
_ABOUT = {
    False: "the mean norm of the residual stream, layer by layer",
    True: "the loss without the value vectors of the first token, layer by layer",
}


@click.command("new-plugin")
@click.argument("name")
@click.argument("folder", metavar="[DIR]", required=False)
@click.option("--causal", is_flag=True, help="A metric that edits the model and compares the loss.")
def new_plugin(name: str, folder: str | None, causal: bool) -> None:
    """Write a package with a working metric NAME into DIR (default: ./phaselens-NAME): metric, test, README, CI.

    NAME consists of lowercase letters, digits and dashes. Nothing is downloaded, and no file is overwritten.
    """
    from importlib.metadata import version
    from importlib.resources import files

    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise InputError(
            f"new-plugin {name!r}: use lowercase letters, digits and dashes, such as delimiter-sinks"
        )
    for plugin in plugins().registered:
        if plugin.name == name:
            raise InputError(
                f"new-plugin {name!r}: {plugin.distribution} {plugin.version} has this name; choose another"
            )
    target = Path(folder or f"phaselens-{name}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"new-plugin: {str(target)!r} exists and is not an empty folder; choose another")
    words = {
        "name": name,
        "module": f"phaselens_{name}".replace("-", "_"),
        "metric": "".join(word.capitalize() for word in name.split("-")),
        "params": "".join(word.capitalize() for word in name.split("-")) + "Params",
        "version": version("phaselens"),
        "about": _ABOUT[causal],
    }
    for source, destination in _FILES.items():
        template_name = _CAUSAL.get(source, source) if causal else source
        template_file = files("phaselens.cli") / "template" / f"{template_name}.tmpl"
        template = Template(template_file.read_text(encoding="utf-8"))
        path = target / destination.format(**words)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(template.substitute(words), encoding="utf-8")
        click.echo(path)
    click.echo(f"next: pip install -e {target} && phaselens run -p {name}")
