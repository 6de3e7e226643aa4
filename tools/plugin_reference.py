"""Writes docs/plugins/reference.md from docstrings: `python -m tools.plugin_reference`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path

import phaselens.plugin
from phaselens.plugin import hookspecs

PAGE = Path(__file__).parents[1] / "docs" / "plugins" / "reference.md"
#: Names in the order in which an author needs them; the other public names follow.
LISTED_FIRST = (
    "Metric",
    "LayerView",
    "Batch",
    "PerText",
    "Params",
    "param",
    "TableSpec",
    "Column",
    "Table",
    "Display",
    "CausalMetric",
    "Condition",
    "Edit",
    "Site",
    "TaskPrompt",
    "TextOutcome",
)
HOOK_EXAMPLES = {
    "phaselens_metrics": '    return [MyMetric, "my_package.late:Another"]',
    "phaselens_models": '    return [NamedModel("mine", lambda: "./checkpoint", "what it is")]',
    "phaselens_texts": '    return [NamedTexts("mine", lambda: ["one text", Text("named", "another")])]',
    "phaselens_commands": "    cli.add_command(my_click_command)",
    "phaselens_run_finished": '    print(run.table("my-metric", "layers"), file=sys.stderr)',
}
#: Public names that are neither classes nor functions.
OTHERS = {
    "ADJUSTED_P": "The columns `p_holm` and `p_bh`, which `with_adjusted_p` fills.",
    "BASELINE": "The condition without edits; `record` receives it for the unedited model.",
    "CAUSAL_TABLES": "The specs of a causal metric's tables `texts`, `conditions` and `contrasts`.",
    "CellValue": "What a table's cell may hold: str, int, a finite float, or None for missing.",
    "TOO_FEW_TEXTS": "Code of a warning that intervals are missing because fewer than two texts have a value. "
    "`phaselens.patching`, which measures one prompt and shows no interval, leaves out warnings with this code.",
    "ConditionKey": "Name, layer and seed of a condition: `tuple[str, int | None, int | None]`.",
    "MODEL": "The column `model`, which a run puts before all others.",
    "hookimpl": "Marks a function of a plugin's module as the implementation of the hook of its name.",
}


def page() -> str:
    """Return the whole page."""
    lines = [
        "# Reference of the plugin API",
        "",
        "Generated from the code by `python -m tools.plugin_reference`; change the docstrings, not this page.",
        "",
        "## Hooks",
        "",
        "A plugin's module implements any of these, each marked with `@hookimpl`, and takes the arguments it needs.",
        "",
        *_hooks(),
        "## Classes and functions",
        "",
        "All of them are in `phaselens.plugin`.",
        "",
    ]
    names = [
        *LISTED_FIRST,
        *sorted(set(phaselens.plugin.__all__) - set(LISTED_FIRST), key=lambda name: (name.lower(), name)),
    ]
    for name in names:
        lines += _entry(name)
    return "\n".join(lines).rstrip() + "\n"


def _hooks() -> Iterator[str]:
    for name, function in inspect.getmembers(hookspecs, inspect.isfunction):
        if hasattr(function, "phaselens_spec"):
            yield from (f"### `{name}{_signature(function)}`", "", _text(function), "")
            arguments = ", ".join(inspect.signature(function).parameters)
            yield from ("```python", "@hookimpl", f"def {name}({arguments}):", HOOK_EXAMPLES[name], "```", "")


def _entry(name: str) -> list[str]:
    member = getattr(phaselens.plugin, name)
    if inspect.isclass(member):
        return [f"### `{name}`", "", _text(member), "", *_fields(member), *_methods(member)]
    if callable(member) and inspect.isfunction(inspect.unwrap(member)):
        return [f"### `{name}{_signature(inspect.unwrap(member))}`", "", _text(member), ""]
    return [f"### `{name}`", "", OTHERS[name], ""]


def _fields(member: type) -> list[str]:
    if not dataclasses.is_dataclass(member):
        return []
    fields = [
        f"`{field.name}: {field.type}`"
        for field in dataclasses.fields(member)
        if not field.name.startswith("_")
    ]
    return [f"Fields: {', '.join(fields)}.", ""] if fields else []


def _methods(public_class: type) -> list[str]:
    lines = []
    for name, member in vars(public_class).items():
        plain = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if name.startswith("_") or name in getattr(public_class, "__dataclass_fields__", {}):
            continue
        if isinstance(plain, property) or hasattr(plain, "attrname"):
            lines.append(f"* `{name}`: {_text(plain)}")
        elif inspect.isfunction(inspect.unwrap(plain)):
            lines.append(f"* `{name}{_signature(inspect.unwrap(plain))}`: {_text(plain)}")
    return [*lines, ""] if lines else []


def _signature(function: object) -> str:
    return str(inspect.signature(function)).replace("'", "")  # type: ignore[arg-type]


def _text(documented: object) -> str:
    """Return the docstring, with the lines of a paragraph joined and examples as code."""
    parts = []
    for paragraph in (inspect.getdoc(documented) or "").split("\n\n"):
        is_code = paragraph.startswith(">>>") or all(
            line.startswith("    ") for line in paragraph.splitlines()
        )
        if paragraph.startswith(">>>"):
            parts.append(f"```python\n{paragraph}\n```")
        else:
            parts.append(paragraph if is_code else " ".join(paragraph.split()))
    return "\n\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
