"""Statistics of softmax attention from q, k, v and the log-sum-exp of its rows, never from the matrix.

Shapes, everywhere: q [batch, head, query, d_head], k and v [batch, kv_head, key, d] (key heads shared by
groups of query heads are not repeated), lse [batch, head, query] in nats. `lengths` are the numbers of real
tokens of right-padded texts.
"""

from phaselens.attention._attend import attend
from phaselens.attention._explicit import explicit, explicit_pattern, explicit_scores
from phaselens.attention._statistics import (
    Summary,
    received_mass,
    refine_lse,
    row_entropy,
    sink_mass,
    summarise,
)

__all__ = [
    "Summary",
    "attend",
    "explicit",
    "explicit_pattern",
    "explicit_scores",
    "received_mass",
    "refine_lse",
    "row_entropy",
    "sink_mass",
    "summarise",
]
