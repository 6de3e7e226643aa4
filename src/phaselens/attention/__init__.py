"""Statistics of softmax attention from q, k, v and the log-sum-exp of its rows, never from the matrix.

Also attention with other scores for a few keys, massive cells of queries, keys and values, norms of what heads write,
and the geometry of queries and keys.

Shapes in all functions: q [batch, head, query, d_head], k and v [batch, kv_head, key, d] (key heads shared by
groups of query heads are not repeated), lse [batch, head, query] in nats. `lengths` are the numbers of real
tokens of right-padded texts. All functions accept the keyword options of `SoftmaxOptions`.

Accuracy: weights and entropies within 1e-5, log-sum-exps within 1e-5 of their size, against float64, for
float32 inputs of any magnitude: heads whose scores are too large for float32 are computed in float64. Inputs
in half precision are summed in float32. A query or key that is NaN or infinite makes every result that it
enters NaN.
"""

from phaselens.attention._accumulators import TIE
from phaselens.attention._arguments import all_finite
from phaselens.attention._attend import attend
from phaselens.attention._cells import (
    gaussian_massive_share,
    massive_cells,
    norm_matrix,
    pair_norms,
)
from phaselens.attention._explicit import explicit, explicit_pattern, explicit_scores
from phaselens.attention._geometry import KeyGeometry, key_geometry
from phaselens.attention._largest_product import LargestProduct, largest_product
from phaselens.attention._named_keys import (
    Remainder,
    attend_without,
    key_scores,
    reweighted,
    rows_changed,
)
from phaselens.attention._nulls import (
    n_seeing,
    uniform_distance,
    uniform_entropy,
    uniform_learned_sink,
    uniform_received,
    uniform_sink,
    uniform_sink_rows,
    uniform_window,
)
from phaselens.attention._problem import SoftmaxOptions
from phaselens.attention._readings import concentration, normalised_entropy, query_mean, sink_score
from phaselens.attention._segments import segment_mass, top_keys
from phaselens.attention._statistics import (
    Summary,
    distance_mass,
    received_mass,
    refine_lse,
    row_entropy,
    sink_mass,
    summarise,
    window_mass,
)
from phaselens.attention._writes import Writes, head_norms, scaled_writes, triangular, writes

__all__ = [
    "TIE",
    "KeyGeometry",
    "LargestProduct",
    "Remainder",
    "SoftmaxOptions",
    "Summary",
    "Writes",
    "all_finite",
    "attend",
    "attend_without",
    "concentration",
    "distance_mass",
    "explicit",
    "explicit_pattern",
    "explicit_scores",
    "gaussian_massive_share",
    "head_norms",
    "key_geometry",
    "key_scores",
    "largest_product",
    "massive_cells",
    "n_seeing",
    "norm_matrix",
    "normalised_entropy",
    "pair_norms",
    "query_mean",
    "received_mass",
    "refine_lse",
    "reweighted",
    "row_entropy",
    "rows_changed",
    "scaled_writes",
    "segment_mass",
    "sink_mass",
    "sink_score",
    "summarise",
    "top_keys",
    "triangular",
    "uniform_distance",
    "uniform_entropy",
    "uniform_learned_sink",
    "uniform_received",
    "uniform_sink",
    "uniform_sink_rows",
    "uniform_window",
    "window_mass",
    "writes",
]
