"""Plugins that misbehave: one that works, with one member replaced."""

from __future__ import annotations

from random import Random

WORKING = """
import asyncio, os, subprocess, sys
from phaselens.plugin import Column, Metric, Table, TableSpec

class Nasty(BaseException):
    def __str__(self):
        raise RuntimeError("no message")
    __repr__ = __str__

class Working(Metric):
    name = "fuzzed"
    version = "1"
    tables = (TableSpec("texts", (Column("text", str), Column("layer", int), Column("value", float))),)
    plots = True

    def hooks(self):
        return ["blocks.{layer}.hook_resid_post"]

    def update(self, layer):
        self.per_text.add(layer, value=layer["hook_resid_post"].float().mean((1, 2)))

    def compute(self):
        values = self.per_text.stack("value")
        cells = [(text, layer, float(values[i, layer])) for i, text in enumerate(self.per_text.texts)
                 for layer in range(values.shape[1])]
        return {"texts": self.table("texts", cells)}
"""
ACTIONS = (
    "raise Nasty()", "raise ValueError('x' * 100_000)", "raise asyncio.CancelledError()", "raise GeneratorExit()",
    "raise SystemExit(7)", "raise StopIteration()", "raise MemoryError()", "raise RecursionError()",
    "raise KeyboardInterrupt()", "print('JUNK')", "sys.__stdout__.write('JUNK\\n')", "os.write(1, b'JUNK\\n')",
    "sys.stdout.close()", "sys.__stdout__.close()", "sys.stderr.close()", "sys.stdout = sys.__stdout__", "os.close(1)",
    "return None", "return 3", "return 'x'", "return object()", "return [object()]", "return {'texts': 3}",
    "os.environ.clear()", "import gc; gc.collect()",
)  # fmt: skip
_METHODS = {
    "setup": ("self", "super().setup()"),
    "hooks": ("self", "super().hooks()"),
    "update": ("self, layer", "super().update(layer)"),
    "compute": ("self", "super().compute()"),
    "state": ("self", "super().state()"),
    "load_state": ("self, tree", "super().load_state(tree)"),
    "reads": ("self, batch", "True"),
    "sequences": ("self, texts, tokenizer", "None"),
}
_CLASS_METHODS = {
    "define": "cls, params",
    "report": "cls, tables, params",
    "plot": "cls, tables, figure",
}
_ATTRIBUTES = (
    "n_distances", "sink_position", "needs_sink_position", "warnings", "partial_layers", "tables", "display", "Params",
    "figure_panels", "plots", "prints", "name", "version", "per_text", "model", "seed", "spec", "warn",
)  # fmt: skip
_ATTRIBUTE_VALUES = (
    "None", "3", "-1", "'x'", "''", "[]", "{}", "object()", "float('nan')", "10**30", "lambda self: 1", "(1, 2)",
    "type",
)  # fmt: skip
_CELLS = ("None", "float('nan')", "10**400", "'\\ud800'", "'\\x1b[31m'", "object()", "1j", "True", "-1", "[]")


def misbehaving(rng: Random) -> str:
    """Return the source of a plugin in which one member does something else."""
    match rng.choice(("method", "method", "class method", "attribute", "property", "cells", "import")):
        case "method":
            name, (arguments, result) = rng.choice(list(_METHODS.items()))
            member = f"def {name}({arguments}):\n        {rng.choice(ACTIONS)}\n        return {result}"
        case "class method":
            name, arguments = rng.choice(list(_CLASS_METHODS.items()))
            member = f"@classmethod\n    def {name}({arguments}):\n        {rng.choice(ACTIONS)}\n        return 'x'"
        case "attribute":
            member = f"{rng.choice(_ATTRIBUTES)} = {rng.choice(_ATTRIBUTE_VALUES)}"
        case "property":
            name = rng.choice(_ATTRIBUTES)
            member = f"@property\n    def {name}(self):\n        {rng.choice(ACTIONS)}\n        return 1"
        case "cells":
            cells = ", ".join(rng.choice(_CELLS) for _ in range(3))
            rows = rng.choice((f"self.table('texts', [({cells})])", "self.table('texts', [])"))
            member = (
                f"def compute(self):\n        table = {rows}\n        table.rows += [({cells})]\n"
                "        return {'texts': table}"
            )
        case _:
            action = rng.choice([action for action in ACTIONS if not action.startswith("return")])
            return f"{WORKING}\n{action}\n"
    return f"{WORKING}\n    {member}\n"
