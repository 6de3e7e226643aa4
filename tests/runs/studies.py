"""A small study of a tiny model, as TOML."""

from __future__ import annotations

from pathlib import Path

STUDY = """
schema = "phaselens.study/1"
name = "small"
title = "A small study"
source = "A paper"
description = "What it is."

[models]
one = "{source}"
two = "org/another-model"

[[run]]
name = "published"
description = "two texts"
texts = ["a b c d e", "f g h i"]
max_tokens = 4
bos = "always"
[run.metrics.sinks]
include_query0 = true
strongest = false
[run.metrics.bos-norm]

[[value]]
quantity = "sink rate by layer"
run = "published"
model = "one"
metric = "sinks"
table = "layers"
column = "sink_rate"
published = [0.5, 0.25, 0.125]
place = "Table 1"

[[value]]
quantity = "layer of the largest norm"
run = "published"
model = "one"
metric = "bos-norm"
table = "layers"
column = "bos_norm"
reduce = "argmax"
published = 1
place = "Figure 2"
differs = ["other precision: 4 bits"]

[[value]]
quantity = "mean norm"
run = "published"
model = "two"
metric = "bos-norm"
table = "summary"
column = "peak"
published = 3.5
place = "Figure 2"
"""


def study_text(source: str | Path = "rope") -> str:
    """The study's text, with the source of its first model."""
    return STUDY.replace("{source}", str(source))
